"""Where the tests' samplers begin."""

import torch


def start(dtype=torch.float32, scale=1.0):
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=dtype) * scale

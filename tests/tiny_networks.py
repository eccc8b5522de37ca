"""A network that tests build in no time."""

import torch
from diffusers import UNet2DModel


def tiny_unet(output_scale=0.02, **options):
    """8x8 grey images, outputs of about that scale; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            **options,
        )
    with torch.no_grad():
        unet.conv_out.weight.mul_(output_scale)
    return unet.eval()

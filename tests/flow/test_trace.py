"""The trace of the denoiser's Jacobian."""

import pytest
import torch
from flow_models import generators

from diffusers_sde.flow.trace import TraceOptions, jacobian_products


def test_jacobian_products_in_both_directions():
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    probes = [torch.randn(3, 6, dtype=torch.float64, generator=g) for g in generators(2)]
    for direction in ("reverse", "forward"):
        x0, products = jacobian_products(lambda x: torch.sin(x @ matrix), x, probes, direction)
        assert torch.allclose(x0, torch.sin(x @ matrix)) and not x0.requires_grad
        jacobian = torch.cos(x @ matrix)[:, :, None] * matrix.T
        for probe, product in zip(probes, products, strict=True):
            assert torch.allclose(product, torch.einsum("bi,bij,bj->b", probe, jacobian, probe))
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jacobian_products(lambda x: x.detach(), x, probes)


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "slq"},
        {"num_probes": 0},
        {"probe": "normal"},
        {"differentiation": "both"},
    ],
)
def test_bad_trace_options_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        TraceOptions(**arguments)

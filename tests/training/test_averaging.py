"""Averages of the weights against what they are defined by."""

import numpy as np
import pytest
import torch

from diffusers_sde.training.averaging import PowerEMA, power_exponent


def profile(relative_std, steps):
    """The weight of each step's parameters in the average: averages are linear, so feed unit vectors."""
    parameter = torch.nn.Parameter(torch.zeros(steps, dtype=torch.float64))
    ema = PowerEMA([parameter], relative_std, foreach=True)
    for step in range(steps):
        parameter.data.zero_()[step] = 1.0
        ema.step([parameter])
    return ema.shadow_params[0].numpy()


@pytest.mark.parametrize("relative_std", [0.05, 0.1, 0.25])
def test_the_power_function_average_has_its_width(relative_std):
    steps = 800
    weights, times = profile(relative_std, steps), (np.arange(steps) + 0.5) / steps
    assert weights.sum() == pytest.approx(1.0)
    mean = (weights * times).sum()
    assert np.sqrt((weights * (times - mean) ** 2).sum()) == pytest.approx(relative_std, rel=0.01)
    # And its shape: a power of time, with the exponent of the width.
    late = slice(steps // 2, steps)
    slope = np.polyfit(np.log(times[late]), np.log(weights[late]), 1)[0]
    assert slope == pytest.approx(power_exponent(relative_std), rel=0.02)


def test_exponents_of_the_paper():
    """Karras et al. 2024: widths 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert power_exponent(0.05) == pytest.approx(16.97, abs=5e-3)
    assert power_exponent(0.10) == pytest.approx(6.94, abs=5e-3)
    with pytest.raises(ValueError, match="relative_std must lie in .0, 0.288., got 0.3"):
        power_exponent(0.3)

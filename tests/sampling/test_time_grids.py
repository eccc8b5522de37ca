"""Time grids: their formulas, their ends, and diffusers' integer timesteps."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusers_sde.sampling.time_grids import TIME_GRIDS, TIMESTEP_SPACINGS, discrete_timesteps, get_time_grid
from diffusers_sde.sdes import SDES, VESDE, CosineSDE, DiscreteVPSDE, RectifiedFlowSDE, ddpm_betas

every_sde = pytest.mark.parametrize("sde", [cls() for cls in SDES.values()], ids=SDES.keys())


@pytest.mark.parametrize("n", [1, 2, 3, 50, 1000])
@pytest.mark.parametrize("name", TIME_GRIDS)
@every_sde
def test_every_grid_decreases_from_start_to_end(sde, name, n):
    end = 1e-3 * sde.t_max
    times = get_time_grid(name, sde, n, sde.t_max, end)
    assert times.dtype == torch.float64 and times.shape == (n,)
    assert float(times[0]) == sde.t_max
    assert n == 1 or float(times[-1]) == end
    assert (times.diff() < 0).all() and torch.isfinite(sde.log_snr(times[1:])).all()


@every_sde
def test_uniform_is_uniform_in_t(sde):
    times = get_time_grid("uniform", sde, 11, 0.9 * sde.t_max, 0.1 * sde.t_max)
    torch.testing.assert_close(times, torch.linspace(0.9, 0.1, 11, dtype=torch.float64) * sde.t_max)


@every_sde
def test_log_snr_is_uniform_in_log_snr(sde):
    start, end = 0.95 * sde.t_max, 1e-3 * sde.t_max
    gaps = sde.log_snr(get_time_grid("log_snr", sde, 9, start, end)).diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, float(sde.log_snr(end) - sde.log_snr(start)) / 8))


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_karras_is_equation_5(rho):
    sde, n = VESDE(0.02, 80.0), 18
    start, end = 1.0, 0.01
    largest, smallest = float(sde.sigma(start)), float(sde.sigma(end))
    expected = [
        (largest ** (1 / rho) + i / (n - 1) * (smallest ** (1 / rho) - largest ** (1 / rho))) ** rho for i in range(n)
    ]
    ours = sde.sigma(get_time_grid("karras", sde, n, start, end, rho))
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", [name for name in TIME_GRIDS if name != "uniform"])
@pytest.mark.parametrize(
    "sde", [RectifiedFlowSDE(), CosineSDE(), DiscreteVPSDE.from_betas(ddpm_betas(), rescale_betas_zero_snr=True)]
)
def test_a_start_without_signal_is_the_first_point_and_no_other_is_wasted_there(sde, name):
    """log-SNR is -infinity at t_max: the grid spreads its points from sigma/alpha = 1000 on."""
    times = get_time_grid(name, sde, 12, 1.0, 1e-3)
    assert float(times[0]) == 1.0 and float(sde.alpha(times[0])) == 0.0
    noise_to_signal = torch.exp(-0.5 * sde.log_snr(times[1:]))
    assert float(noise_to_signal[0]) < 1000 and (times.diff() < 0).all()
    assert float(sde.time_of(-2 * math.log(1000.0))) > float(times[1])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("cosine", VESDE(), 5, 1.0, 0.1), ["time_grid", "uniform", "log_snr", "karras", "cosine"]),
        (("uniform", VESDE(), 0, 1.0, 0.1), ["number of time points", "0"]),
        (("uniform", VESDE(), 5, 0.1, 0.1), ["0.1"]),
        (("uniform", VESDE(), 5, 0.1, 0.5), ["sampling_eps", "0.5"]),
        (("karras", VESDE(), 5, 1.0, 0.1, 0.0), ["rho"]),
        (("karras", VESDE(), 5, 1.0, 0.1, math.nan), ["rho"]),
    ],
)
def test_bad_grid(arguments, words):
    with pytest.raises(ValueError) as error:
        get_time_grid(*arguments)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("theirs", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 50, 333, 999, 1000])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_integer_timesteps_are_those_of_diffusers(spacing, n, theirs):
    reference = theirs(timestep_spacing=spacing)
    reference.set_timesteps(n)
    ours = discrete_timesteps(spacing, n, 1000)
    # One level on linspace stands at the data for diffusers, where there is nothing to do, and at the noise here.
    expected = [999] if (spacing, n) == ("linspace", 1) else reference.timesteps.tolist()
    assert ours.dtype == np.int64 and ours.tolist() == expected


def test_steps_offset_is_that_of_diffusers():
    reference = DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    for n in (1, 4, 50, 999):
        reference.set_timesteps(n)
        assert discrete_timesteps("leading", n, 1000, 1).tolist() == reference.timesteps.tolist()


@pytest.mark.parametrize("n", [0, -1, 1001])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_more_steps_than_the_table_has(spacing, n):
    with pytest.raises(ValueError, match=r"num_inference_steps must lie in 1\.\.1000"):
        discrete_timesteps(spacing, n, 1000)


def test_unknown_spacing():
    with pytest.raises(ValueError, match="timestep_spacing must be one of leading, linspace, trailing"):
        discrete_timesteps("even", 5, 1000)

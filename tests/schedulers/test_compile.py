"""``torch.compile(scheduler.step, fullgraph=True)``: right, and without a compilation per step."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_sde import SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler

LEVELS = 12
SCHEDULERS = {
    "reverse SDE": lambda: VPSDEScheduler(time_grid="log_snr"),
    "multistep ODE": lambda: VPSDEScheduler(probability_flow=True, solver_order=3, clip_sample=True),
    "heun": lambda: VPSDEScheduler(predictor="heun", probability_flow=True),
    "predictor-corrector": lambda: SubVPSDEScheduler(corrector="langevin", snr=0.1, correct_steps=2),
    "noise in corrector rows only": lambda: VPSDEScheduler(
        corrector="ornstein_uhlenbeck", snr=0.3, probability_flow=True
    ),
    "Heun and a corrector": lambda: VPSDEScheduler(
        corrector="annealed_langevin", snr=0.1, predictor="heun", probability_flow=True
    ),
    "five kinds of rows": lambda: VPSDEScheduler(
        corrector="ornstein_uhlenbeck", snr=0.1, correct_steps=3, predictor="heun", probability_flow=True
    ),
    "stochasticity 0": lambda: VPSDEScheduler(corrector="annealed_langevin", snr=0.1, stochasticity=0.0),
    "from zero SNR": lambda: VPSDEScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", corrector="ornstein_uhlenbeck", snr=0.3
    ),
    "VE, score": lambda: VESDEScheduler(predictor="reverse_diffusion", corrector="annealed_langevin", snr=0.1),
}


def run(scheduler, step, begin=0):
    """A loop with the exact score of N(0, 1/4) data, so that nothing grows and round-off stays round-off."""
    torch.manual_seed(0)
    scheduler.set_timesteps(LEVELS)
    scheduler.set_begin_index(begin)
    x = torch.randn(2, 3, 4, 4) * scheduler.init_noise_sigma
    for t in scheduler.timesteps[begin:]:
        time = scheduler.sde_time(t)
        alpha, sigma = scheduler.sde.alpha(time), scheduler.sde.sigma(time)
        score = (-x / (0.25 * alpha**2 + sigma**2)).float()
        epsilon = -sigma.float() * score
        x0_hat = 0.25 * alpha / (0.25 * alpha**2 + sigma**2) * x
        outputs = {"score": score, "epsilon": epsilon, "v_prediction": alpha * epsilon - sigma * x0_hat}
        output = outputs[scheduler.config.prediction_type].float()
        x = step(output, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_compiled_step_is_the_eager_step_in_few_graphs(name):
    torch._dynamo.reset()
    scheduler = SCHEDULERS[name]()
    expected, state = run(scheduler, scheduler.step), torch.get_rng_state()
    # The graphs are the same for every backend; the second one also rewrites them, which two cases are enough for.
    counter = CompileCounterWithBackend("aot_eager" if name in ("reverse SDE", "predictor-corrector") else "eager")
    compiled = run(scheduler, torch.compile(scheduler.step, fullgraph=True, backend=counter))
    assert torch.equal(torch.get_rng_state(), state), "a compiled step must draw what the eager one draws"
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)
    # The first two calls, then one per kind of row, and one for a last row without noise: never one per step.
    assert counter.frame_count <= 3 + scheduler.order


def test_a_compiled_start_inside_a_level_passes_the_sample_through_until_the_next():
    """SDXL's denoising_start rounds an odd index up where order is 2: the first call then changes nothing."""
    torch._dynamo.reset()
    scheduler = VPSDEScheduler(corrector="langevin", predictor="ancestral", time_grid="log_snr", snr=0.1)
    expected = run(scheduler, scheduler.step, begin=5)
    compiled = run(scheduler, torch.compile(scheduler.step, fullgraph=True, backend="aot_eager"), begin=5)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)

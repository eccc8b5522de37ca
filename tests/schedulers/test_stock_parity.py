"""Special cases of our schedulers are diffusers' own samplers, to round-off.

Every comparison runs a whole loop with a nonlinear stand-in for the network, so that an error in one step meets the
next. Where a stock scheduler keeps its table in float32, the comparison is also made with our float64 table put in its
place: then nothing but the arithmetic is left, and the tolerance can be 1e-9.
"""

import inspect
import math

import diffusers
import numpy as np
import pytest
import torch
from states import start

from diffusers_sde import FlowSDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from diffusers_sde.schedulers.stock_configs import stock_arguments

# Nothing but the first order: what the stock samplers below are.
FIRST_ORDER = {"time_grid": None, "solver_order": 1, "solver_correction": False, "gaussian_std": 0.0}
SPACINGS = ("leading", "linspace", "trailing")
TOLERANCE = {torch.float32: {"rtol": 2e-5, "atol": 2e-5}, torch.float64: {"rtol": 1e-9, "atol": 1e-9}}


def network(x, t):
    """A smooth function that depends on sample and timestep; any prediction type may be made of it."""
    return torch.tanh(0.7 * x) + 0.3 * torch.sin(torch.as_tensor(t, dtype=x.dtype) / 300.0) + 0.1 * x.roll(1, -1)


def run(scheduler, x, seed=None, **step_arguments):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    arguments = {} if generator is None else {"generator": generator}
    for t in scheduler.timesteps:
        scale = getattr(scheduler, "scale_model_input", None)  # flow schedulers have none
        output = network(x if scale is None else scale(x, t), t)
        x = scheduler.step(output, t, x, **arguments, **step_arguments).prev_sample
    return x


def pair(stock, ours, dtype=torch.float32):
    """Give the stock scheduler our float64 table if the run is in float64."""
    if dtype == torch.float64:
        stock.alphas_cumprod = torch.tensor(ours.sde.alphas_cumprod, dtype=torch.float64)
        stock.alphas = torch.cat([stock.alphas_cumprod[:1], stock.alphas_cumprod[1:] / stock.alphas_cumprod[:-1]])
        stock.betas = 1.0 - stock.alphas
        if hasattr(stock, "final_alpha_cumprod"):
            final = torch.ones((), dtype=torch.float64) if stock.config.set_alpha_to_one else stock.alphas_cumprod[0]
            stock.final_alpha_cumprod = final
    return stock, ours


def ddim_levels(spacing, n):
    """(num_train_timesteps, n) for which DDIM's target t - N // n is its own next timestep.

    On ``linspace`` that holds for n = N only, and on ``trailing`` where n divides N: elsewhere DDIM integrates to one
    time and evaluates the network at another. That defect is not copied here, so it is kept out of the comparison.
    """
    return (n, n) if spacing == "linspace" else (1000, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_probability_flow_is_ddim(spacing, prediction_type, dtype):
    train, n = ddim_levels(spacing, 20)
    stock = diffusers.DDIMScheduler(
        num_train_timesteps=train,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        timestep_spacing=spacing,
        prediction_type=prediction_type,
        steps_offset=1 if spacing == "leading" else 0,
    )
    stock, ours = pair(stock, VPSDEScheduler.from_config(stock.config, probability_flow=True, **FIRST_ORDER), dtype)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(n)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    torch.testing.assert_close(run(ours, start(dtype)), run(stock, start(dtype)), **TOLERANCE[dtype])


def test_ddim_with_zero_terminal_snr():
    stock = diffusers.DDIMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    )
    stock, ours = pair(
        stock, VPSDEScheduler.from_config(stock.config, probability_flow=True, **FIRST_ORDER), torch.float64
    )
    for scheduler in (stock, ours):
        scheduler.set_timesteps(10)
    x = start(torch.float64)
    torch.testing.assert_close(run(ours, x), run(stock, x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("n", [5, 13, 50])
def test_probability_flow_is_first_order_dpm_solver(n):
    # On linspace with any n: DPM-Solver++ of order 1 is DDIM, and its target is its next timestep.
    stock = diffusers.DPMSolverMultistepScheduler(solver_order=1, beta_schedule="squaredcos_cap_v2")
    ours = VPSDEScheduler.from_config(stock.config, probability_flow=True, **FIRST_ORDER)
    stock.set_timesteps(n)
    ours.set_timesteps(timesteps=stock.timesteps)
    torch.testing.assert_close(run(ours, start()), run(stock, start()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("predictor", ["exponential", "ancestral"])
def test_reverse_sde_is_first_order_sde_dpm_solver(predictor):
    stock = diffusers.DPMSolverMultistepScheduler(solver_order=1, algorithm_type="sde-dpmsolver++")
    ours = VPSDEScheduler.from_config(stock.config, predictor=predictor, stochasticity=1.0, **FIRST_ORDER)
    stock.set_timesteps(12)
    ours.set_timesteps(timesteps=stock.timesteps)
    torch.testing.assert_close(run(ours, start(), seed=4), run(stock, start(), seed=4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ancestral_is_ddpm(spacing, variance_type, prediction_type, clip, dtype):
    stock = diffusers.DDPMScheduler(
        timestep_spacing=spacing, variance_type=variance_type, prediction_type=prediction_type, clip_sample=clip
    )
    stock, ours = pair(stock, VPSDEScheduler.from_config(stock.config, predictor="ancestral", time_grid=None), dtype)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(13 if spacing == "leading" else 20)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    result = run(stock, start(dtype), seed=5)
    torch.testing.assert_close(run(ours, start(dtype), seed=5), result, **TOLERANCE[dtype])


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])  # on trailing, DDPM ends with noise: its last t is not 0
def test_ancestral_with_large_variance_is_ddpm_fixed_large(spacing, clip):
    stock = diffusers.DDPMScheduler(timestep_spacing=spacing, variance_type="fixed_large", clip_sample=clip)
    stock, ours = pair(
        stock, VPSDEScheduler.from_config(stock.config, predictor="ancestral", time_grid=None), torch.float64
    )
    for scheduler in (stock, ours):
        scheduler.set_timesteps(20)
    x = start(torch.float64)
    expected = run(stock, x, seed=5)
    torch.testing.assert_close(run(ours, x, seed=5), expected, rtol=1e-9, atol=1e-9)
    small = VPSDEScheduler.from_config(stock.config, predictor="ancestral", variance_type="fixed_small", time_grid=None)
    small.set_timesteps(20)
    assert (run(small, x, seed=5) - expected).abs().max() > 1e-2  # the two variances are told apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("eta", "predictor"), [(1.0, "ancestral"), (1.0, "exponential"), (0.4, "ancestral")])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_reverse_sde_is_stochastic_ddim(spacing, eta, predictor, dtype):
    train, n = ddim_levels(spacing, 20)
    stock = diffusers.DDIMScheduler(num_train_timesteps=train, timestep_spacing=spacing, clip_sample=False)
    ours = VPSDEScheduler.from_config(stock.config, predictor=predictor, stochasticity=eta, **FIRST_ORDER)
    stock, ours = pair(stock, ours, dtype)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(n)
    expected = run(stock, start(dtype), seed=6, eta=eta)
    torch.testing.assert_close(run(ours, start(dtype), seed=6), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("clip", ["clip_sample", "thresholding"])
def test_clipping_is_ddims_with_clipped_model_output(clip):
    # x0_hat is clipped and the noise estimate follows it; DDIM does that with use_clipped_model_output=True.
    arguments = {"clip_sample": clip == "clip_sample", "thresholding": clip == "thresholding"}
    stock = diffusers.DDIMScheduler(**arguments, dynamic_thresholding_ratio=0.8, sample_max_value=1.7)
    stock, ours = pair(
        stock, VPSDEScheduler.from_config(stock.config, probability_flow=True, **FIRST_ORDER), torch.float64
    )
    for scheduler in (stock, ours):
        scheduler.set_timesteps(10)
    x = start(torch.float64, scale=2.0)
    expected = run(stock, x, use_clipped_model_output=True)
    torch.testing.assert_close(run(ours, x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ratio", [0.5, 0.995])
def test_dynamic_thresholding_is_ddpms(ratio):
    stock = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=2.5)
    stock, ours = pair(
        stock, VPSDEScheduler.from_config(stock.config, predictor="ancestral", time_grid=None), torch.float64
    )
    for scheduler in (stock, ours):
        scheduler.set_timesteps(10)
    x = start(torch.float64, scale=2.0)
    torch.testing.assert_close(run(ours, x, seed=8), run(stock, x, seed=8), rtol=1e-9, atol=1e-9)
    t = ours.timesteps[0]
    for scheduler in (stock, ours):
        scheduler.set_timesteps(10)
    estimates = [s.step(network(x, t), t, x).pred_original_sample for s in (stock, ours)]
    torch.testing.assert_close(estimates[1], estimates[0], rtol=1e-9, atol=1e-9)


def test_learned_variance_channels_are_dropped():
    stock = diffusers.DDIMScheduler(clip_sample=False)
    ours = VPSDEScheduler.from_config(stock.config, variance_type="learned_range", probability_flow=True, **FIRST_ORDER)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(4)
    x, t = start(), stock.timesteps[0]
    output = network(x, t)
    both = torch.cat([output, torch.randn_like(output)], dim=1)
    expected = stock.step(output, t, x).prev_sample
    torch.testing.assert_close(ours.step(both, t, x).prev_sample, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "mu"),
    [
        ({}, None),
        ({"shift": 3.0}, None),
        ({"use_dynamic_shifting": True}, 0.8),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 1.6),
        ({"shift": 2.0, "shift_terminal": 0.1}, None),
    ],
)
@pytest.mark.parametrize("own_sigmas", [False, True])
def test_flow_is_flow_match_euler(arguments, mu, own_sigmas):
    stock = diffusers.FlowMatchEulerDiscreteScheduler(**arguments)
    ours = FlowSDEScheduler.from_config(stock.config, probability_flow=True, **FIRST_ORDER)
    grid = {"sigmas": torch.linspace(1.0, 1 / 7, 7).tolist()} if own_sigmas else {"num_inference_steps": 7}
    for scheduler in (stock, ours):
        scheduler.set_timesteps(**grid, **({} if mu is None else {"mu": mu}))
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(run(ours, start()), run(stock, start()), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_heun_is_flow_match_heun(shift):
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    stock = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    config = {**stock.config, "_class_name": "FlowMatchHeunDiscreteScheduler"}  # FlowMapEuler has the same keys
    ours = FlowSDEScheduler.from_config(config, predictor="heun", probability_flow=True, time_grid=None)
    for scheduler in (stock, ours, euler):
        scheduler.set_timesteps(6)
    # The stock order: t0, then every later time twice.
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=1e-5, atol=1e-4)
    expected = run(stock, start())
    torch.testing.assert_close(run(ours, start()), expected, rtol=1e-4, atol=2e-5)
    assert (run(euler, start()) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("predictor", ["exponential", "ancestral"])
def test_ve_is_edm_euler(predictor, prediction_type, schedule):
    stock = diffusers.EDMEulerScheduler(sigma_schedule=schedule, prediction_type=prediction_type, sigma_data=0.7)
    ours = VESDEScheduler.from_config(stock.config, predictor=predictor, probability_flow=True, **FIRST_ORDER)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(9)
    x = start(scale=80.0)
    torch.testing.assert_close(run(ours, x), run(stock, x), rtol=1e-4, atol=1e-4)


def test_video_euler_of_stable_video_diffusion():
    stock = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous",
        prediction_type="v_prediction",
        sigma_min=0.002,
        sigma_max=700.0,
        use_karras_sigmas=True,
        timestep_spacing="leading",
    )
    ours = VESDEScheduler.from_config(stock.config, probability_flow=True, **FIRST_ORDER)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(9)
    x = start(scale=700.0)
    torch.testing.assert_close(run(ours, x), run(stock, x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_add_noise_is_ddpms(beta_schedule):
    stock = diffusers.DDPMScheduler(beta_schedule=beta_schedule)
    ours = VPSDEScheduler.from_config(stock.config)
    timesteps = torch.tensor([0, 1, 17, 500, 998, 999])
    x, noise = torch.randn(6, 3, 4, 4), torch.randn(6, 3, 4, 4)
    expected = stock.add_noise(x, noise, timesteps)
    torch.testing.assert_close(ours.add_noise(x, noise, timesteps), expected, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(ours.scale_noise(x, timesteps, noise), expected, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_scale_noise_is_flow_match_eulers(shift):
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    ours = FlowSDEScheduler.from_config(stock.config, time_grid=None)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(8)
    timesteps = ours.timesteps[[0, 3, 7]]
    x, noise = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4)
    expected = stock.scale_noise(x, stock.timesteps[[0, 3, 7]], noise)
    torch.testing.assert_close(ours.scale_noise(x, timesteps, noise), expected, rtol=1e-5, atol=1e-5)


def test_add_noise_is_edms():
    stock = diffusers.EDMEulerScheduler()
    ours = VESDEScheduler.from_config(stock.config)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(8)
    x, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    expected = stock.add_noise(x, noise, stock.timesteps[[1, 5]])
    torch.testing.assert_close(ours.add_noise(x, noise, ours.timesteps[[1, 5]]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stock", ["DDPMScheduler", "DDIMScheduler", "DDIMParallelScheduler"])
def test_get_velocity_is_theirs(stock):
    theirs = getattr(diffusers, stock)(beta_schedule="scaled_linear", prediction_type="v_prediction")
    ours = VPSDEScheduler.from_config(theirs.config)
    x, noise, timesteps = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0, 500, 999])
    expected = theirs.get_velocity(x, noise, timesteps)
    torch.testing.assert_close(ours.get_velocity(x, noise, timesteps), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("cls", [VPSDEScheduler, SubVPSDEScheduler, VESDEScheduler, FlowSDEScheduler])
def test_get_velocity_is_the_target_of_v_prediction(cls, dtype):
    ours = cls(prediction_type="v_prediction")
    x, noise = torch.randn(2, 3, 4, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    timesteps = ours.conditioning.timestep(ours.sde, t)
    velocity = ours.get_velocity(x.to(dtype), noise.to(dtype), timesteps)
    assert velocity.dtype == dtype
    for i in range(3):
        expected = float(ours.sde.alpha(t[i])) * noise[i] - float(ours.sde.sigma(t[i])) * x[i]
        torch.testing.assert_close(
            velocity[i].double(), expected, rtol=2e-3, atol=2e-2 if dtype == torch.float16 else 1e-9
        )
    # x_0 comes back from x_t and the velocity by the parametrisation of the same name.
    noisy = ours.add_noise(x, noise, timesteps)
    alpha, sigma = ours.sde.alpha(t), ours.sde.sigma(t)
    back = ours.parametrization.to_x0(ours.get_velocity(x, noise, timesteps), noisy, alpha, sigma)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("timesteps", [500, 500.0, [500], np.array([500]), np.int64(500), torch.tensor(500)])
def test_add_noise_takes_numbers_lists_and_arrays(timesteps):
    x, noise = torch.randn(1, 2), torch.randn(1, 2)
    ours = VPSDEScheduler()
    assert torch.equal(ours.add_noise(x, noise, timesteps), ours.add_noise(x, noise, torch.tensor([500])))


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (VPSDEScheduler, [-5, -1, 1000, 5000, 999.1, math.nan]),
        (SubVPSDEScheduler, [-1.0, 1000.1, math.nan]),
        (FlowSDEScheduler, [-1.0, 1000.1, math.inf]),
        (VESDEScheduler, [-1.0, 0.0, 1e-3, 50.1, math.nan]),
    ],
)
def test_a_timestep_outside_the_path_is_refused(cls, values):
    ours, x = cls(), torch.zeros(2, 1)
    inside = float(ours.timesteps[3])
    for value in values:
        for method in (ours.add_noise, ours.get_velocity, lambda a, b, t: ours.scale_noise(a, t, b)):
            with pytest.raises(ValueError, match="timesteps must lie between"):
                method(x, x, torch.tensor([inside, value]))
    # The ends belong to it, and so does what a pipeline has rounded to half precision.
    for end in (ours.timesteps.max(), ours.timesteps.min()):
        for dtype in (ours.timesteps.dtype, torch.bfloat16):
            assert bool(torch.isfinite(ours.add_noise(x, x + 1, end.clone().to(dtype))).all())


def test_samples_on_another_device_than_the_timesteps():
    x = torch.zeros(1, 2, device="meta")  # nothing there can be read by the host
    assert VPSDEScheduler().add_noise(x, x, torch.tensor([5])).device.type == "meta"
    with pytest.raises(ValueError, match="timesteps must lie between"):
        VPSDEScheduler().add_noise(x, x, torch.tensor([5000]))


# ---------------------------------------------------------------------- arguments of other schedulers' methods


def test_prev_timestep_of_unclip_is_accepted_and_changes_nothing():
    x = start()
    ours = VPSDEScheduler.from_config(diffusers.UnCLIPScheduler().config, predictor="ancestral", time_grid=None)
    results = []
    for passes in (False, True):
        ours.set_timesteps(5)
        y, generator = x, torch.Generator().manual_seed(0)
        for i, t in enumerate(ours.timesteps):
            following = {"prev_timestep": ours.timesteps[i + 1] if i + 1 < len(ours.timesteps) else None}
            y = ours.step(network(y, t), t, y, generator=generator, **(following if passes else {})).prev_sample
        results.append(y)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"per_token_timesteps": torch.ones(2)}, "gives each token a time of its own"),
        ({"s_churn": 1.0}, "set stochasticity"),
        ({"s_noise": 1.003}, "set stochasticity"),
        ({"s_tmax": 5.0}, "set stochasticity"),
        ({"variance_noise": torch.ones(2)}, "pass a generator"),
        ({"r_timestep": 3}, "flow maps"),
        ({"order": 4}, "solver_order"),
    ],
)
def test_an_argument_of_another_step_is_refused_with_the_reason(arguments, reason):
    ours = FlowSDEScheduler()
    ours.set_timesteps(3)
    with pytest.raises(ValueError, match=f"takes no {next(iter(arguments))}: it .*{reason}"):
        ours.step(torch.zeros(1, 2), ours.timesteps[0], torch.zeros(1, 2), **arguments)
    assert ours.step_index is None


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"original_inference_steps": 50}, "distilled"),
        ({"strength": 0.5}, "distilled"),
        ({"jump_length": 10}, "InpaintSDEPipeline"),
        ({"mu": 1.0}, "FlowSDEScheduler"),
    ],
)
def test_an_argument_of_another_set_timesteps_is_refused_with_the_reason(arguments, reason):
    ours = VPSDEScheduler()
    with pytest.raises(ValueError, match=f"takes no {next(iter(arguments))}: it .*{reason}"):
        ours.set_timesteps(5, **arguments)
    assert ours.num_inference_steps is None


def test_arguments_that_ask_for_nothing_are_accepted_and_typos_are_not():
    ours = FlowSDEScheduler()
    ours.set_timesteps(3, original_inference_steps=None)
    churn = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": float("inf"), "s_noise": 1.0}
    x = torch.zeros(1, 2)
    assert ours.step(x, ours.timesteps[0], x, per_token_timesteps=None, **churn).prev_sample.shape == x.shape
    with pytest.raises(TypeError, match="unexpected keyword argument 'generatr'"):
        ours.step(x, ours.timesteps[1], x, generatr=None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_steps'"):
        ours.set_timesteps(num_steps=3)


@pytest.mark.parametrize("method", ["step", "set_timesteps"])
def test_every_argument_of_the_stock_methods_is_thought_of(method):
    """Of every scheduler whose method a pipeline may call on ours; those of discrete data and molecules are not."""
    others = ("Amused", "BlockRefinement", "DiscreteDDIM", "EntropyBound", "Helios", "KarrasVe", "RFD4", "VQDiffusion")
    ours = FlowSDEScheduler()
    ours.set_timesteps(3)
    for name in stock_arguments():
        cls = getattr(diffusers, name, None) or getattr(diffusers.schedulers, name)
        if name.startswith(others) or not hasattr(cls, method):
            continue
        for key, parameter in inspect.signature(getattr(cls, method)).parameters.items():
            known = key in inspect.signature(getattr(ours, method)).parameters
            if known or key == "self" or parameter.kind is inspect.Parameter.VAR_KEYWORD:
                continue
            with pytest.raises(ValueError, match=f"takes no {key}: it "):
                arguments = {key: object()}
                if method == "step":
                    ours.step(torch.zeros(1, 2), ours.timesteps[0], torch.zeros(1, 2), **arguments)
                else:
                    ours.set_timesteps(3, **arguments)

"""What diffusers asks of any scheduler, and what this package promises about randomness.

diffusers' own scheduler tests, restated for ours where the tests of the arithmetic do not already say it.
"""

import copy
import json

import diffusers
import pytest
import torch

from diffusers_sde import FlowSDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler

CLASSES = {"vp": VPSDEScheduler, "sub_vp": SubVPSDEScheduler, "ve": VESDEScheduler, "flow": FlowSDEScheduler}
SAMPLERS = {
    "reverse SDE": {},
    "probability flow": {"probability_flow": True, "solver_order": 2},
    "heun": {"predictor": "heun", "probability_flow": True},
    "pc": {"predictor": "reverse_diffusion", "corrector": "langevin", "correct_steps": 2},
}
every_class = pytest.mark.parametrize("name", CLASSES)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


def build(name, sampler="reverse SDE", **arguments):
    # A velocity says something about the data at every time, pure noise included.
    return CLASSES[name](
        **{"prediction_type": "v_prediction", "time_grid": "log_snr", **SAMPLERS[sampler], **arguments}
    )


def model(x, t):
    return x * float(t) / (float(t) + 1.0) + 0.1 * torch.cos(3.0 * x)


def loop(scheduler, x, n=5, generator=None, **step_arguments):
    scheduler.set_timesteps(n)
    for t in scheduler.timesteps:
        output = model(scheduler.scale_model_input(x, t), t.double())
        x = scheduler.step(output, t, x, generator=generator, **step_arguments).prev_sample
    return x


def start(scheduler, batch=2):
    x = torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return x * scheduler.init_noise_sigma


# ---------------------------------------------------------------------- configs


@every_sampler
@every_class
def test_save_and_load_give_identical_samples(name, sampler, tmp_path):
    scheduler = build(name, sampler)
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    results = [loop(s, start(s), generator=torch.Generator().manual_seed(1)) for s in (scheduler, loaded)]
    assert torch.equal(*results)


@every_class
def test_from_save_pretrained_of_every_argument(name, tmp_path):
    """diffusers' check_over_configs: one argument at a time, through a file, gives the same step."""
    cases = [
        {"num_train_timesteps": 500},
        {"predictor": "ancestral", "stochasticity": 0.5},
        {"corrector": "annealed_langevin", "snr": 0.2, "correct_steps": 2},
        {"corrector": "langevin", "langevin_norm": "batch"},
        {"time_grid": "karras", "rho": 5.0},
        {"time_grid": "uniform", "sampling_eps": 0.01},
        {"denoise_final": False},
        {"clip_sample": True, "clip_sample_range": 0.5},
        {"time_conditioning": "score_sde", "num_train_timesteps": 700},
        {"prediction_type": "edm", "sigma_data": 0.3},
    ]
    for i, case in enumerate(cases):
        scheduler = build(name, **case)
        scheduler.save_pretrained(tmp_path / str(i))
        loaded = type(scheduler).from_pretrained(tmp_path / str(i))
        results = [loop(s, start(s), generator=torch.Generator().manual_seed(1)) for s in (scheduler, loaded)]
        assert torch.equal(*results), case
        default = build(name)
        same = loop(default, start(default), generator=torch.Generator().manual_seed(1))
        if case != {"num_train_timesteps": 500} or name != "ve":  # fed sigma, whatever N is
            assert not torch.equal(results[0], same), f"{case} changes nothing"


@every_class
def test_the_config_round_trip_is_exact(name, tmp_path):
    scheduler = build(name, "pc")
    stored = json.loads(scheduler.to_json_string())
    assert stored["_class_name"] == type(scheduler).__name__
    again = type(scheduler).from_config(stored)
    assert json.loads(again.to_json_string()) == stored
    # An argument given on loading wins over the file.
    scheduler.save_pretrained(tmp_path)
    assert type(scheduler).from_pretrained(tmp_path, snr=0.4).config.snr == 0.4


@every_class
def test_a_pipeline_reloads_its_scheduler(name, tmp_path):
    network = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=2,
        layers_per_block=1,
    )
    pipe = diffusers.DDPMPipeline(network, build(name, "pc"))
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is CLASSES[name]
    assert loaded.scheduler.config.corrector == "langevin"


# ---------------------------------------------------------------------- attributes


@every_class
def test_order_belongs_to_the_instance(name):
    orders = [build(name, sampler).order for sampler in SAMPLERS]
    assert orders == [1, 1, 2, 3]
    assert CLASSES[name].order == 1


@every_class
def test_attributes_exist_before_set_timesteps(name):
    scheduler = build(name)
    assert len(scheduler) == scheduler.config.num_train_timesteps == len(scheduler.timesteps)
    assert scheduler.num_inference_steps is None
    assert scheduler.step_index is None
    assert scheduler.begin_index is None
    assert scheduler.init_noise_sigma == pytest.approx(50.0 if name == "ve" else 1.0)
    descending = scheduler.timesteps.double().diff()
    assert (descending < 0).all()


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_tables_of_a_vp_scheduler(beta_schedule):
    scheduler, stock = VPSDEScheduler(beta_schedule=beta_schedule), diffusers.DDPMScheduler(beta_schedule=beta_schedule)
    torch.testing.assert_close(scheduler.alphas_cumprod, stock.alphas_cumprod, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(scheduler.betas, stock.betas, rtol=1e-5, atol=1e-8)


@every_sampler
@every_class
def test_sigmas_are_the_noise_levels_of_the_timesteps(name, sampler):
    scheduler = build(name, sampler)
    scheduler.set_timesteps(6)
    assert len(scheduler.sigmas) == len(scheduler.timesteps) + 1
    assert scheduler.sigmas[-1] == 0.0
    t = scheduler.sde_time(scheduler.timesteps.double())
    # On a flow it is t itself, as for diffusers' own flow schedulers.
    expected = t if name == "flow" else torch.exp(-0.5 * scheduler.sde.log_snr(t))
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), expected, rtol=1e-3, atol=1e-5)


@every_class
def test_step_index_counts_model_calls_and_begin_index_sets_its_start(name):
    scheduler = build(name, "pc")
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2 * scheduler.order)
    assert scheduler.begin_index == 6
    x = start(scheduler)
    for i, t in enumerate(scheduler.timesteps[6:]):
        x = scheduler.step(model(x, t), t, x).prev_sample
        assert scheduler.step_index == 6 + i + 1
    scheduler.set_timesteps(5)
    assert scheduler.begin_index is None
    assert scheduler.step_index is None


@every_class
def test_scale_model_input_is_the_identity_unless_preconditioned(name):
    scheduler = build(name)
    scheduler.set_timesteps(4)
    x = start(scheduler)
    assert scheduler.scale_model_input(x, scheduler.timesteps[0]) is x
    scheduler = build(name, prediction_type="edm", sigma_data=0.5)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        time = scheduler.sde_time(t.double())
        alpha, sigma = float(scheduler.sde.alpha(time)), float(scheduler.sde.sigma(time))
        data = 0.5 * torch.randn(20000, generator=torch.Generator().manual_seed(0))
        noise = torch.randn(20000, generator=torch.Generator().manual_seed(1))
        scaled = scheduler.scale_model_input(alpha * data + sigma * noise, t)
        assert float(scaled.std()) == pytest.approx(1.0, abs=0.03)
        scheduler.step(scaled, t, x.flatten()[:1].expand_as(scaled))


# ---------------------------------------------------------------------- steps


@every_sampler
@every_class
def test_step_shape_and_results(name, sampler):
    scheduler = build(name, sampler)
    scheduler.set_timesteps(5)
    x = start(scheduler)
    t = scheduler.timesteps[scheduler.order].clone()
    a = scheduler.step(model(x, 1.0), t, x, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(5)
    b = scheduler.step(model(x, 1.0), t, x, generator=torch.Generator().manual_seed(0), return_dict=False)
    assert a.prev_sample.shape == a.pred_original_sample.shape == x.shape
    assert isinstance(b, tuple)
    assert len(b) == 2
    assert torch.equal(b[0], a.prev_sample)
    torch.testing.assert_close(b[1], a.pred_original_sample)
    torch.testing.assert_close(tuple(b)[1], a.pred_original_sample)


@every_sampler
@every_class
def test_step_changes_neither_sample_nor_model_output(name, sampler):
    scheduler = build(name, sampler)
    scheduler.set_timesteps(4)
    x = start(scheduler)
    for t in scheduler.timesteps:
        output = model(x, t)
        before = x.clone(), output.clone()
        result = scheduler.step(output, t, x).prev_sample
        assert torch.equal(x, before[0])
        assert torch.equal(output, before[1])
        x = result


@every_sampler
@every_class
def test_full_loop_with_and_without_noise(name, sampler):
    scheduler = build(name, sampler)
    results = [loop(scheduler, start(scheduler), generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.isfinite(results[0]).all()
    assert torch.equal(results[0], results[1])
    deterministic = SAMPLERS[sampler].get("probability_flow", False)
    assert torch.equal(results[0], results[2]) == deterministic


@every_class
def test_full_loop_from_a_noised_image(name):
    """diffusers' full_loop_with_noise: add_noise at the start of a slice, then run the slice."""
    scheduler = build(name, "pc")
    scheduler.set_timesteps(8)
    timesteps = scheduler.timesteps[4 * scheduler.order :]
    image = torch.rand(2, 3, 4, 4)
    noise = torch.randn(2, 3, 4, 4)
    x = scheduler.add_noise(image, noise, timesteps[:1])
    t = scheduler.sde_time(timesteps[0].double())
    expected = float(scheduler.sde.alpha(t)) * image + float(scheduler.sde.sigma(t)) * noise
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)
    for t in timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    assert torch.isfinite(x).all()
    with pytest.raises(ValueError, match="steps are done"):
        scheduler.step(x, timesteps[-1], x)


# ---------------------------------------------------------------------- devices


@pytest.mark.parametrize("device", ["cpu", "meta", torch.device("cpu"), None])
@every_class
def test_set_timesteps_on_any_device(name, device):
    scheduler = build(name, "pc")
    scheduler.set_timesteps(5, device=device)
    assert scheduler.timesteps.device.type == ("cpu" if device is None else torch.device(device).type)
    assert len(scheduler.timesteps) == 15 if scheduler.config.denoise_final else True
    # No coefficient lives on that device: a whole run needs nothing read back from it.
    if str(device) == "meta":
        x = torch.empty(2, 3, 4, 4, device="meta")
        scheduler.set_begin_index(0)
        for t in scheduler.timesteps[:2]:
            x = scheduler.step(x, t, x, generator=torch.Generator()).prev_sample
        assert x.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@every_class
def test_add_noise_and_scale_noise_keep_dtype_and_device(name, dtype):
    scheduler = build(name)
    x, noise = torch.ones(3, 2, dtype=dtype), -torch.ones(3, 2, dtype=dtype)
    timesteps = scheduler.timesteps[[1, 500, -1]]
    noisy = scheduler.add_noise(x, noise, timesteps)
    assert noisy.dtype == dtype
    assert noisy.device == x.device
    assert torch.equal(noisy, scheduler.scale_noise(x, timesteps, noise))
    # One level for each sample.
    assert len({float(v) for v in noisy[:, 0]}) == 3


# ---------------------------------------------------------------------- determinism


@every_class
def test_the_global_seed_is_used_without_a_generator_and_not_touched_with_one(name):
    scheduler = build(name, "pc")
    torch.manual_seed(3)
    first = loop(scheduler, start(scheduler))
    torch.manual_seed(3)
    assert torch.equal(loop(scheduler, start(scheduler)), first)
    state = torch.get_rng_state()
    loop(scheduler, start(scheduler), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)


@every_sampler
@every_class
def test_a_generator_list_gives_the_same_sample_in_any_batch(name, sampler):
    scheduler = build(name, sampler)
    x = start(scheduler, batch=3)

    def run(indices):
        generators = [torch.Generator().manual_seed(10 + i) for i in indices]
        return loop(scheduler, x[indices], generator=generators)

    everything = run([0, 1, 2])
    # To the last bits only: a norm over another batch layout is summed in another order.
    torch.testing.assert_close(run([2]), everything[2:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run([2, 0]), everything[[2, 0]], rtol=1e-5, atol=1e-5)


def test_noise_is_drawn_where_the_plan_says_and_nowhere_else():
    """A generator in step with the run: start on, one draw per corrector call and per stochastic predictor call."""
    scheduler = VPSDEScheduler(predictor="ancestral", corrector="langevin")
    generator = torch.Generator().manual_seed(0)
    loop(scheduler, start(scheduler), n=4, generator=generator)
    expected = torch.Generator().manual_seed(0)
    for _ in range(4 + 3):  # the last level predicts the data, without noise
        torch.randn(2, 3, 4, 4, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())
    ode = VPSDEScheduler(probability_flow=True)
    generator = torch.Generator().manual_seed(0)
    loop(ode, start(ode), n=4, generator=generator)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())


@every_sampler
@every_class
def test_set_timesteps_makes_a_used_scheduler_new(name, sampler):
    used, new = build(name, sampler), build(name, sampler)
    loop(used, start(used), n=7)
    used.set_timesteps(6)
    used.set_begin_index(used.order)
    used.step(start(used), used.timesteps[used.order], start(used))
    twin = copy.deepcopy(used)
    for scheduler in (used, twin):
        result = loop(scheduler, start(scheduler), generator=torch.Generator().manual_seed(1))
        assert torch.equal(result, loop(new, start(new), generator=torch.Generator().manual_seed(1)))


SAMPLER_ARGUMENTS = (
    "predictor", "corrector", "probability_flow", "stochasticity", "solver_order", "solver_type", "solver_correction",
    "gaussian_std", "data_std", "correct_steps", "langevin_norm", "time_grid", "rho", "steps_offset", "denoise_final",
)  # fmt: skip


@every_class
def test_all_classes_have_the_same_sampler_by_default(name):
    config, expected = build(name, "reverse SDE").config, build("vp", "reverse SDE").config
    assert {key: config[key] for key in SAMPLER_ARGUMENTS} == {key: expected[key] for key in SAMPLER_ARGUMENTS}
    assert config.solver_order is None

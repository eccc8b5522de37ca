"""``scheduler.transition``: the law of a step without taking it, and the stochasticity of each step."""

import math

import pytest
import torch

from diffusers_sde import FlowSDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from diffusers_sde.sampling.policies import POLICIES

SCHEDULERS = {
    "vp": lambda **k: VPSDEScheduler(policy="exact", **k),
    "ve": lambda **k: VESDEScheduler(predictor="ancestral", **k),
    "sub_vp": lambda **k: SubVPSDEScheduler(predictor="reverse_diffusion", prediction_type="v_prediction", **k),
    "flow": lambda **k: FlowSDEScheduler(policy="flow_grpo", **k),
    "clipped": lambda **k: VPSDEScheduler(policy="ddpo", clip_sample=True, **k),
    "multistep": lambda **k: VPSDEScheduler(**k),
    "corrector": lambda **k: VPSDEScheduler(policy="exact", corrector="ornstein_uhlenbeck", snr=0.3, **k),
}


def network(x, t):
    return torch.tanh(0.5 * x + 0.001 * torch.as_tensor(t).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_step_draws_what_the_transition_draws_bit_for_bit(name, dtype):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(6)
    x = (torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma).to(dtype)
    memory = ()
    for i, t in enumerate(scheduler.timesteps):
        output = network(scheduler.scale_model_input(x, t), t).to(dtype)
        before = scheduler.step_index, list(scheduler._stored)
        if i in scheduler.stochastic_steps:
            law = scheduler.transition(output, t, x, memory, index=i if name == "corrector" else None)
            assert (scheduler.step_index, scheduler._stored) == before or i == 0
            drawn = law.sample(torch.Generator().manual_seed(i), dtype)
            memory = law.memory
        else:
            with pytest.raises(ValueError, match="no density"):
                scheduler.transition(output, t, x, index=i)
            drawn = None
        x = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        assert drawn is None or torch.equal(drawn, x)
    assert scheduler.stochastic_steps == tuple(range(len(scheduler.timesteps) - 1))


def test_every_sample_can_have_its_own_step():
    """Trainers shuffle steps: a batch of steps is what the samples would have been one by one."""
    scheduler = SCHEDULERS["flow"]()
    scheduler.set_timesteps(8)
    x, output = torch.randn(2, 4, 3, 2, 2)
    indices = [5, 0, 6, 2]
    together = scheduler.transition(output, scheduler.timesteps[indices], x)
    assert together.std.shape == (4,)
    drawn = together.sample([torch.Generator().manual_seed(k) for k in range(4)])
    for k, i in enumerate(indices):
        alone = scheduler.transition(output[k : k + 1], scheduler.timesteps[i], x[k : k + 1])
        assert torch.equal(together.mean[k : k + 1], alone.mean) and float(together.std[k]) == alone.std
        assert torch.equal(drawn[k : k + 1], alone.sample(torch.Generator().manual_seed(k)))
        torch.testing.assert_close(together.log_prob(drawn)[k : k + 1], alone.log_prob(drawn[k : k + 1]))
    by_index = scheduler.transition(output, None, x, index=torch.tensor(indices))
    assert torch.equal(by_index.mean, together.mean)


def test_samples_at_different_steps_look_back_on_their_own_memory():
    """Replay of shuffled steps of a multistep sampler, each with what its path had stored."""
    scheduler = SCHEDULERS["multistep"]()
    scheduler.set_timesteps(8)
    x, memory, seen = torch.randn(3, 2, 4, 4), (), []
    for i, t in list(enumerate(scheduler.timesteps))[:-1]:
        output = network(x, t)
        law = scheduler.transition(output, t, x, memory)
        seen.append((x, output, memory, law))
        assert len(law.memory) <= scheduler._plan.memory < len(scheduler.timesteps)
        x, memory = law.sample(torch.Generator().manual_seed(i)), law.memory
    indices = [5, 3, 6]
    together = scheduler.transition(
        torch.stack([seen[i][1][k] for k, i in enumerate(indices)]),
        scheduler.timesteps[indices],
        torch.stack([seen[i][0][k] for k, i in enumerate(indices)]),
        [torch.stack([seen[i][2][m][k] for k, i in enumerate(indices)]) for m in range(scheduler._plan.memory)],
    )
    assert together.mean.shape == (3, 2, 4, 4)
    for k, i in enumerate(indices):
        assert torch.equal(together.mean[k], seen[i][3].mean[k])


def test_the_ratio_on_replay_is_one_also_after_storage_in_half_precision():
    scheduler = SCHEDULERS["flow"]()
    scheduler.set_timesteps(6)
    x = torch.randn(4, 3, 8, 8).bfloat16()
    for i, t in list(enumerate(scheduler.timesteps))[:-1]:
        output = network(x.float(), t)
        law = scheduler.transition(output, t, x)
        stored = law.sample(torch.Generator().manual_seed(i), torch.bfloat16)
        old = law.log_prob(stored)
        replayed = scheduler.transition(network(x.float(), t), t, x).log_prob(stored)
        assert torch.equal((replayed - old).exp(), torch.ones(4))
        x = stored


def test_gradients_reach_the_output_and_the_sample():
    scheduler = SCHEDULERS["clipped"]()
    scheduler.set_timesteps(5)
    x, output = (torch.randn(2, 1, 3, 3, requires_grad=True) for _ in range(2))
    law = scheduler.transition(output, scheduler.timesteps[2], x)
    law.log_prob(law.sample()).sum().backward()
    assert float(x.grad.abs().sum()) > 0 and float(output.grad.abs().sum()) > 0


def test_rows_that_share_a_timestep_need_an_index():
    scheduler = SCHEDULERS["corrector"]()
    scheduler.set_timesteps(4)
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="2 rows have the timestep .*: pass index"):
        scheduler.transition(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="within the 8 rows of the plan"):
        scheduler.transition(x, None, x, index=8)
    with pytest.raises(ValueError, match="set_timesteps"):
        VPSDEScheduler().transition(x, 10, x)


# ---------------------------------------------------------------------- stochasticity of each step


def noises(scheduler):
    return [row.noise for row in scheduler.rows]


def test_a_list_has_one_number_for_each_step_but_the_last(tmp_path):
    etas = [0.0, 0.3, 1.0, 0.5]
    scheduler = VPSDEScheduler(stochasticity=etas, predictor="ancestral")
    scheduler.save_pretrained(tmp_path)
    for one in (scheduler, VPSDEScheduler.from_pretrained(tmp_path), VPSDEScheduler.from_config(scheduler.config)):
        assert one.config.stochasticity == etas
        one.set_timesteps(5)
        whole = VPSDEScheduler(predictor="ancestral", stochasticity=1.0)
        whole.set_timesteps(5)
        assert noises(one) == pytest.approx([e * n for e, n in zip([*etas, 0.0], noises(whole), strict=True)])
        with pytest.raises(ValueError, match="one number for each step but the last, 7 here, got 4"):
            one.set_timesteps(8)
        one.set_timesteps(5)
        one.set_begin_index(2)  # image to image: the numbers stay with their levels
        one.step(torch.zeros(1, 1, 2, 2), one.timesteps[2], torch.zeros(1, 1, 2, 2))
        assert one.rows[2].noise == pytest.approx(noises(whole)[2])


@pytest.mark.parametrize("value", ["much", [0.1, -1.0], [0.1, "a"], math.inf])
def test_bad_stochasticity_is_named(value):
    with pytest.raises(ValueError, match="stochasticity"):
        VPSDEScheduler(stochasticity=value)


def test_windows_leave_the_other_steps_to_the_probability_flow(tmp_path):
    scheduler = FlowSDEScheduler(policy="flow_cps", stochastic_indices=[1, 3])
    scheduler.save_pretrained(tmp_path)
    for one in (scheduler, FlowSDEScheduler.from_pretrained(tmp_path)):
        one.set_timesteps(6)
        assert one.stochastic_steps == (1, 2)
    for shift in (1.0, 3.0):  # by noise the window is the same under every shift
        scheduler = FlowSDEScheduler(policy="exact", stochastic_sigmas=[0.5, 2.0], shift=shift, time_grid="uniform")
        scheduler.set_timesteps(20)
        ratios = [row.t / max(1.0 - row.t, 1e-9) for row in scheduler.rows[:-1]]
        assert scheduler.stochastic_steps == tuple(i for i, r in enumerate(ratios) if 0.5 <= r <= 2.0)
        assert len(scheduler.stochastic_steps) > 2
    ours = VPSDEScheduler(stochastic_indices=[0, 2])  # the default stochasticity, in a window
    ours.set_timesteps(6)
    plain = VPSDEScheduler()
    plain.set_timesteps(6)
    assert noises(ours)[:2] == pytest.approx(noises(plain)[:2]) and not any(noises(ours)[2:])


@pytest.mark.parametrize("name", POLICIES)
def test_policies_run_on_every_path(name):
    for scheduler in (VPSDEScheduler, VESDEScheduler, SubVPSDEScheduler, FlowSDEScheduler):
        one = scheduler(policy=name)
        one.set_timesteps(8)
        assert one.stochastic_steps == tuple(range(7))
    with pytest.raises(ValueError, match="brings its own predictor"):
        VPSDEScheduler(policy=name, predictor="heun", probability_flow=True)
    with pytest.raises(ValueError, match="must be one number"):
        VPSDEScheduler(policy=name, stochasticity=[0.1, 0.2])

"""The density of a step against torch's distributions, the published policies, and the density of a whole path."""

import math

import pytest
import torch
from analytic import PointwiseGaussian

from diffusers_sde.networks.parametrizations import get_parametrization
from diffusers_sde.sampling import Exponential, Transition, make_plan, transition
from diffusers_sde.sampling.policies import POLICIES, windowed
from diffusers_sde.sampling.rows import advance
from diffusers_sde.sdes import VESDE, VPSDE, CosineSDE, RectifiedFlowSDE, SubVPSDE

SDES = {"ve": VESDE(0.01, 30.0), "vp": VPSDE(), "sub_vp": SubVPSDE(), "flow": RectifiedFlowSDE(), "cosine": CosineSDE()}
TIMES = torch.linspace(0.95, 0.05, 9, dtype=torch.float64)


def normal(mean, std):
    return torch.distributions.Normal(mean, torch.as_tensor(std, dtype=mean.dtype).reshape(-1, *[1] * (mean.ndim - 1)))


@pytest.mark.parametrize("std", [0.3, torch.tensor([0.2, 0.5, 1.5], dtype=torch.float64)])
def test_density_entropy_and_kl_are_those_of_torch(std):
    mean, other, x = torch.randn(3, 3, 2, 4, dtype=torch.float64)
    law = Transition(mean, std)
    its = torch.tensor([0.4, 0.5, 0.9], dtype=torch.float64)
    expected = {
        "log_prob": (law.log_prob(x, "none"), normal(mean, std).log_prob(x)),
        "entropy": (law.entropy("none"), normal(mean, std).entropy().expand_as(mean)),
        "kl": (
            law.kl(Transition(other, its), "none"),
            torch.distributions.kl_divergence(normal(mean, std), normal(other, its)),
        ),
    }
    for got, each in expected.values():
        torch.testing.assert_close(got, each)
    torch.testing.assert_close(law.log_prob(x, "sum"), expected["log_prob"][1].flatten(1).sum(1))
    torch.testing.assert_close(law.log_prob(x), expected["log_prob"][1].flatten(1).mean(1))
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none"):
        law.log_prob(x, "max")
    with pytest.raises(ValueError, match=r"shape \(3, 2, 4\)"):
        law.log_prob(x[:1])


def test_a_sample_is_what_the_row_does_and_gradients_go_through_the_mean():
    plan = make_plan(VPSDE(), TIMES, "ancestral").fold(get_parametrization("epsilon"), VPSDE())
    x, output = torch.randn(2, 4, 3, 2)
    output.requires_grad_()
    row = plan.rows[3]
    law = transition(row, x, output)
    z = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(5))
    assert torch.equal(law.sample(torch.Generator().manual_seed(5)), advance(row, x, output, [], lambda: z)[0])
    target = law.sample(torch.Generator().manual_seed(5))
    assert not target.requires_grad and torch.equal(law.rsample(torch.Generator().manual_seed(5)).detach(), target)
    assert law.rsample().requires_grad
    (gradient,) = torch.autograd.grad(law.log_prob(target, "sum").sum(), output)
    torch.testing.assert_close(gradient, row.model * (target - law.mean.detach()) / row.noise**2)


@pytest.mark.parametrize("name", ["ve", "vp", "sub_vp", "flow"])
def test_the_log_density_of_a_path_is_that_of_its_joint_gaussian(name):
    """For a linear denoiser x_T, ..., x_0 are jointly Gaussian: density by the chain equals density by the matrix."""
    sde, n = SDES[name], 6
    times = torch.linspace(0.9, 0.1, n, dtype=torch.float64) * sde.t_max
    model = PointwiseGaussian(mean=0.2, std=0.5)
    plan = make_plan(sde, times, Exponential(1, gaussian_std=0.2), stochasticity=0.8, denoise_final=False)
    std = float(sde.prior_std)
    x = std * torch.randn(5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    path, total = [x], normal(torch.zeros_like(x), std).log_prob(x).flatten(1).sum(1)
    # The same chain as an affine map of independent unit normals.
    loading, offset = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    loading[0, 0] = std
    for i, row in enumerate(plan.rows):
        law = transition(row, x, model.denoise(x, sde.alpha(row.t), sde.sigma(row.t)))
        x = law.sample(torch.Generator().manual_seed(i))
        total = total + law.log_prob(x, "sum")
        path.append(x)
        alpha, sigma = float(sde.alpha(row.t)), float(sde.sigma(row.t))
        gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
        loading[i + 1] = (row.x + row.model * gain) * loading[i]
        loading[i + 1, i + 1] = row.noise
        offset[i + 1] = (row.x + row.model * gain) * offset[i] + row.model * 0.2 * (1.0 - gain * alpha)
    joint = torch.distributions.MultivariateNormal(offset, loading @ loading.T)
    torch.testing.assert_close(total, joint.log_prob(torch.cat(path, 1)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "predictor, corrector, stochasticity, reason",
    [
        ("reverse_diffusion", "langevin", 1.0, "norm of its own noise"),
        ("ancestral", None, 0.0, "draws no noise"),
        ("heun", None, 0.0, "draws no noise"),
    ],
)
def test_rows_without_a_density_say_why(predictor, corrector, stochasticity, reason):
    plan = make_plan(VPSDE(), TIMES, predictor, corrector, stochasticity=stochasticity)
    with pytest.raises(ValueError, match=reason):
        transition(plan.rows[0], torch.zeros(1, 2), torch.zeros(1, 2))


def test_a_row_that_looks_back_needs_the_memory_and_hands_it_on():
    plan = make_plan(VPSDE(), TIMES, Exponential(2), stochasticity=0.7)
    x, stored, memory = torch.randn(3, 2, dtype=torch.float64), [], ()
    bounded = plan.fold(get_parametrization("sample"), VPSDE(), bounds_estimate=True)
    with pytest.raises(ValueError, match="pass it as estimate"):
        transition(bounded.rows[0], x, x)
    with pytest.raises(ValueError, match="looks back on 1 stored quantities, and 0 were given: pass the memory"):
        transition(plan.rows[1], x, x)
    for i, row in enumerate(plan.rows[:-1]):
        law = transition(row, x, torch.tanh(x), memory)
        expected, kept = advance(row, x, torch.tanh(x), stored, lambda: torch.zeros_like(x))  # noqa: B023
        torch.testing.assert_close(law.mean, expected)
        stored, memory = [kept, *stored], law.memory
        assert len(memory) == i + 1
        x = law.sample(torch.Generator().manual_seed(i))


# ---------------------------------------------------------------------- the published policies, on rectified flow


def flow_grpo(x, v, t, s, a):
    """Liu et al. 2025: dx = [v + sigma_t^2/(2 t) (x + (1 - t) v)] dt + sigma_t dw, sigma_t = a sqrt(t/(1 - t))."""
    sigma, dt = a * math.sqrt(t / (1 - t)), s - t
    mean = x + (v + sigma**2 / (2 * t) * (x + (1 - t) * v)) * dt
    return mean, sigma * math.sqrt(-dt)


def dance_grpo(x, v, t, s, eta):
    """Xue et al. 2025: dz = (v - eta^2/2 score) dt + eta dw, score = -(x - (1 - t) x0)/t^2."""
    dt, score = s - t, -(x - (1 - t) * (x - t * v)) / t**2
    return x + (v - 0.5 * eta**2 * score) * dt, eta * math.sqrt(-dt)


def flow_cps(x, v, t, s, a):
    """Wang & Yu 2025: std = s sin(pi a/2), mean = (1 - s) x0 + sqrt(s^2 - std^2) x1."""
    std = s * math.sin(math.pi * a / 2)
    return (1 - s) * (x - t * v) + math.sqrt(s**2 - std**2) * (x + (1 - t) * v), std


def exact(x, v, t, s, eta):
    """x0_hat = x - t v is frozen, and the linear SDE is solved: with L = (s/t)^(eta^2) (decay of the noise part)."""
    h = math.log((1 - s) / s) - math.log((1 - t) / t)
    x0, decay = x - t * v, math.exp(-(eta**2) * h)
    std = s * math.sqrt(1 - decay**2)
    return (1 - s) * x0 + s / t * decay * (x - (1 - t) * x0), std


def ddpo(x, v, t, s, eta):
    """DDIM's eq. 12 with alpha_bar -> alpha^2 / (alpha^2 + sigma^2): std = eta sqrt((1-b_s)/(1-b_t) (1 - b_t/b_s))."""
    x0, eps = x - t * v, x + (1 - t) * v
    scale_t, scale_s = math.hypot(1 - t, t), math.hypot(1 - s, s)
    b_t, b_s = ((1 - t) / scale_t) ** 2, ((1 - s) / scale_s) ** 2
    std = eta * math.sqrt((1 - b_s) / (1 - b_t) * (1 - b_t / b_s))
    mean = math.sqrt(b_s) * x0 + math.sqrt(1 - b_s - std**2) * eps  # of x_s / scale_s
    return mean * scale_s, std * scale_s


FORMULAS = {"flow_grpo": flow_grpo, "dance_grpo": dance_grpo, "flow_cps": flow_cps, "exact": exact, "ddpo": ddpo}


@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_the_papers_formulas(name):
    policy, sde = POLICIES[name], RectifiedFlowSDE()
    for level in (policy.level, 0.45):
        eta = policy.stochasticity(sde, TIMES, level)
        plan = make_plan(sde, TIMES, policy.predictor, stochasticity=eta)
        plan = plan.fold(get_parametrization("flow_prediction"), sde)
        x, v = torch.randn(2, 3, 4, dtype=torch.float64)
        for row, t, s in zip(plan.rows[:-1], TIMES[:-1].tolist(), TIMES[1:].tolist(), strict=True):
            mean, std = FORMULAS[name](x, v, t, s, level)
            law = transition(row, x, v)
            torch.testing.assert_close(law.mean, mean, rtol=1e-9, atol=1e-9)
            assert law.std == pytest.approx(std, rel=1e-9)


@pytest.mark.parametrize("name", ["exact", "ddpo", "flow_cps"])
def test_policies_without_excess_noise_keep_point_data_at_the_marginal(name):
    """Pure noise of the right amount at every level, however long the steps; Flow-GRPO's has 1.1 to 1.5 times it."""
    sde, policy = RectifiedFlowSDE(), POLICIES[name]
    times = torch.linspace(0.98, 0.02, 10, dtype=torch.float64)

    def excess(policy):
        plan = make_plan(sde, times, policy.predictor, stochasticity=policy.stochasticity(sde, times, policy.level))
        variance, worst = float(sde.sigma(times[0])) ** 2, 0.0
        for row in plan.rows[:-1]:
            variance = row.x**2 * variance + row.noise**2
            worst = max(worst, math.sqrt(variance) / float(sde.sigma(row.s)))
        return worst

    assert excess(policy) == pytest.approx(1.0, abs=1e-9)
    assert excess(POLICIES["flow_grpo"]) > 1.2


def test_windows_are_by_index_or_by_noise():
    sde, ones = VPSDE(), torch.ones(8, dtype=torch.float64)
    assert windowed(sde, TIMES, ones, (2, 5)).tolist() == [0, 0, 1, 1, 1, 0, 0, 0]
    ratio = torch.exp(-0.5 * sde.log_snr(TIMES[:-1]))
    inside = windowed(sde, TIMES, ones, sigmas=(float(ratio[5]), float(ratio[2])))
    assert inside.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert windowed(sde, TIMES[3:], ones[3:], (2, 5), first=3).tolist() == [1, 1, 0, 0, 0]


def test_a_policy_gradient_points_to_the_reward():
    """E[r(x_0)] of a two-step chain with a learnt shift: REINFORCE with these densities is the exact gradient."""
    sde, n = RectifiedFlowSDE(), 200_000
    times = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    plan = make_plan(sde, times, "ancestral", denoise_final=False)
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, dtype=torch.float64, generator=generator)
    total = torch.zeros(n, dtype=torch.float64)
    for row in plan.rows:
        law = transition(row, x, 0.3 * x + shift)
        x = law.sample(generator)
        total = total + law.log_prob(x, "sum")
    reward = x @ torch.tensor([1.0, -2.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(((reward - reward.mean()) * total).mean(), shift)
    # x_0 = (x + 0.3 model) of row 2 times row 1's model + row 2's model, for each unit of shift.
    first, second = plan.rows
    slope = (second.x + 0.3 * second.model) * first.model + second.model
    torch.testing.assert_close(gradient, slope * torch.tensor([1.0, -2.0], dtype=torch.float64), rtol=0.05, atol=0.03)

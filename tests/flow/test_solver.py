"""The probability-flow solver against closed forms."""

import math

import pytest
import torch
from analytic import GaussianMixture
from flow_models import ALL_SDES, gaussian, mixture, name

from diffusers_sde.flow.codes import decode, encode, sample_flow, solve_flow
from diffusers_sde.flow.likelihood import log_prob
from diffusers_sde.flow.solver import ODEOptions, integrate
from diffusers_sde.flow.trace import TraceOptions
from diffusers_sde.sampling.solution import SolverError
from diffusers_sde.sdes import SDES, VESDE, VPSDE, SubVPSDE

TIGHT = ODEOptions(rtol=1e-8, atol=1e-8)


def test_every_sde_is_covered():
    assert {type(sde) for sde in ALL_SDES} == set(SDES.values())


@pytest.mark.parametrize("sde", ALL_SDES, ids=name)
def test_gaussian_flow_is_the_linear_map_between_the_marginals(sde):
    """Along each principal axis of Gaussian data the flow multiplies x - alpha m by the ratio of standard
    deviations."""
    model = gaussian()
    x = model.sample_marginal(sde, sde.t_min, 5, torch.Generator().manual_seed(0))
    result = solve_flow(model.denoiser(sde), sde, x, sde.t_min, sde.t_max, TIGHT)

    def along(x, t):
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        std = (alpha**2 * model.eigenvalues[0] + sigma**2).sqrt()
        return (x - alpha * model.means[0]) @ model.axes[0] / std

    assert torch.allclose(along(result.sample, sde.t_max), along(x, sde.t_min), atol=2e-6)


def test_isotropic_gaussian_data_with_known_moments_need_hardly_any_calls():
    """The right-hand side is zero there: the linear part is exact."""
    sde, model = VPSDE(), GaussianMixture.gaussian(torch.full((3,), 0.2), torch.full((3,), 0.09))
    x = model.sample(4, torch.Generator().manual_seed(0))
    options = ODEOptions(rtol=1e-10, atol=1e-10, data_mean=0.2, data_std=0.3)
    result = solve_flow(model.denoiser(sde), sde, x, sde.t_min, sde.t_max, options)
    assert result.calls.max() <= 12  # the steps grow from a twentieth of the way
    assert result.rejected.max() == 0


def test_error_falls_with_the_tolerance_and_calls_grow_slowly():
    sde, model = SubVPSDE(), mixture()
    x = model.sample(8, torch.Generator().manual_seed(3))
    exact = encode(model.denoiser(sde), sde, x, ODEOptions(rtol=1e-11, atol=1e-11)).sample
    errors, calls = [], []
    for tolerance in (1e-3, 1e-5, 1e-7):
        result = encode(model.denoiser(sde), sde, x, ODEOptions(rtol=tolerance, atol=tolerance))
        errors.append(float((result.sample - exact).square().mean().sqrt()))
        calls.append(float(result.calls.double().mean()))
    assert errors[1] < errors[0] / 10 and errors[2] < errors[1] / 10
    assert errors[1] < 1e-3
    # A method of order p needs 100^(1/p) times the calls for a hundredth of the error: 3.2 for p = 4.
    assert calls[2] < 3.0 * calls[1] and calls[1] < 3.0 * calls[0]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_result_does_not_depend_on_its_batch_mates(batch_size):
    sde, model = VESDE(), mixture()
    x = model.sample(7, torch.Generator().manual_seed(2))
    x[3] *= 5.0  # one that needs more steps than the others
    together = encode(model.denoiser(sde), sde, x, ODEOptions(batch_size=batch_size))
    assert len(set(together.calls.tolist())) > 1
    for i in (0, 3, 6):
        alone = encode(model.denoiser(sde), sde, x[i : i + 1])
        assert torch.allclose(alone.sample[0], together.sample[i], rtol=1e-11, atol=1e-12)
        assert alone.calls[0] == together.calls[i]


def test_conditioning_stays_with_its_sample():
    """Each sample has its own label, the mean of its data; batches smaller than the data move samples around."""
    sde, std = VPSDE(), 0.2
    labels = torch.linspace(-1.0, 1.0, 9, dtype=torch.float64)

    def denoiser(x, t, label):
        alpha, variance = sde.alpha(t)[:, None], sde.sigma(t)[:, None] ** 2
        gain = alpha * std**2 / (alpha**2 * std**2 + variance)
        return label[:, None] + gain * (x - alpha * label[:, None])

    latents = torch.zeros(9, 2, dtype=torch.float64)
    result = decode(denoiser, sde, latents, TIGHT, conditioning={"label": labels})
    many = decode(denoiser, sde, latents, ODEOptions(1e-8, 1e-8, batch_size=2), conditioning={"label": labels})
    alpha_end = float(sde.alpha(sde.t_max))
    spread = std / math.hypot(alpha_end * std, float(sde.sigma(sde.t_max)))
    expected = labels - spread * alpha_end * labels
    assert torch.allclose(result.sample, expected[:, None].expand(-1, 2), atol=1e-5)
    assert torch.allclose(many.sample, result.sample, atol=1e-10)


def test_calls_are_those_of_the_denoiser():
    sde, model, seen = VPSDE(), mixture(), []

    def counting(x, t):
        seen.append(len(x))
        assert t.shape == (len(x),)
        return model.denoiser(sde)(x, t)

    x = model.sample(10, torch.Generator().manual_seed(0))
    result = encode(counting, sde, x, ODEOptions(batch_size=4))
    assert max(seen) == 4 and sum(seen) == int(result.calls.sum())
    finished = []
    encode(counting, sde, x, ODEOptions(batch_size=4), progress=finished.append)
    assert sum(finished) == 10
    denoised = sample_flow(counting, sde, x)
    assert (denoised.calls == sample_flow(counting, sde, x, denoise_final=False).calls + 1).all()


def test_nothing_of_the_caller_is_changed_and_gradients_are_not_needed():
    sde, model = VPSDE(), mixture()
    x = model.sample(3, torch.Generator().manual_seed(0))
    before, x = x.clone(), x.requires_grad_()
    with torch.inference_mode():
        result = encode(model.denoiser(sde), sde, x).sample
    assert torch.equal(x.detach(), before) and x.requires_grad and not result.requires_grad
    assert encode(model.denoiser(sde), sde, x.detach().half()).sample.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.uint8)}, "x must be a floating-point tensor"),
        ({"x": torch.zeros(3)}, r"x must have shape \(B, ...\)"),
        ({"x": torch.zeros(0, 3)}, "at least one sample"),
        ({"x": torch.full((2, 3), math.nan)}, "x must be finite"),
        ({"t_start": 0.0}, "t_start must lie in"),
        ({"t_end": 1.5}, "t_end must lie in"),
        ({"t_end": 1e-5}, "must differ"),
        ({"conditioning": {"label": torch.zeros(5)}}, "conditioning 'label'"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    sde, model = VPSDE(), mixture()
    usual = {"x": torch.zeros(2, 3), "t_start": 1e-5, "t_end": 1.0}
    with pytest.raises(ValueError, match=message):
        solve_flow(model.denoiser(sde), sde, **{**usual, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        *({"rtol": v} for v in (-1.0, 0.0, 1.0, math.nan, math.inf, "1e-3", None, True)),
        *({"atol": v} for v in (-1.0, 0.0, 1.0, math.nan, math.inf, "1e-3", None, True)),
        {"rtol": 1e-30, "atol": 1e-30},
        *({"max_calls": v} for v in (0, math.nan, math.inf, "5", None, True)),
        *({"batch_size": v} for v in (0, 2.5, math.nan, "5", None, True)),
        *({"data_std": v} for v in (0.0, math.nan, math.inf, "1")),
        *({"data_mean": v} for v in (math.nan, math.inf, None)),
    ],
)
def test_bad_options_are_refused(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} .*must"):
        ODEOptions(**arguments)


def test_whole_numbers_are_counts():
    assert ODEOptions(batch_size=4.0, max_calls=torch.tensor(7)) == ODEOptions(batch_size=4, max_calls=7)


def test_a_solver_that_cannot_go_on_says_why():
    sde, model, x = VPSDE(), mixture(), torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match="max_calls = 5"):
        encode(model.denoiser(sde), sde, x, ODEOptions(max_calls=5))
    with pytest.raises(RuntimeError, match="not finite at t = 1e-05"):
        encode(lambda x, t: x / 0.0, sde, x)
    with pytest.raises(SolverError, match=r"step size vanished at t = 0\.[0-9]+"):
        encode(lambda x, t: torch.where((t > 0.5)[:, None], 1e9, x), sde, x)
    with pytest.raises(ValueError, match="returned shape"):
        encode(lambda x, t: x[:, :1], sde, x)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("trace", [None, "exact"])
def test_the_first_estimate_that_is_not_finite_ends_the_solve(value, trace):
    """Not after a hundred rejected steps: a NaN says nothing that a shorter step would mend."""
    calls = []

    def denoiser(x, t):
        calls.append(float(t.max()))
        return torch.where((t > 0.5)[:, None], value, x)

    with pytest.raises(SolverError, match="not finite at t = "):
        if trace is None:
            encode(denoiser, VPSDE(), torch.zeros(2, 3))
        else:
            log_prob(denoiser, VPSDE(), torch.zeros(2, 3), TraceOptions(trace))
    assert sum(t > 0.5 for t in calls) == 1


def test_integrate_returns_no_density_without_a_trace():
    sde, model = VPSDE(), mixture()
    result = integrate(model.denoiser(sde), sde, torch.zeros(2, 3), 1e-5, 1.0, ODEOptions())
    assert (result.variance == 0).all()

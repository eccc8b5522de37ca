"""Predictors: one step of the reverse SDE or the probability-flow ODE, as coefficients.

A predictor maps a grid of times t_0 > t_1 > ... > t_n to *stages*, one per model call of an interval: coefficients of
x_t, of x0_hat and of fresh unit noise z (and of earlier x0_hats) for every interval at once, in float64:

    x_s = x * x_t + x0 * x0_hat(x_t, t) + noise * z + sum_k history_k * x0_hat_{k calls ago}.

``stochasticity`` (eta) interpolates between the probability-flow ODE, 0, and Anderson's reverse SDE, 1, through
dx = [f x - (1 + eta^2)/2 g^2 score] dt + eta g dw; every value has the same marginals, and so has one that changes with
t. A new predictor is one function and one line in ``PREDICTORS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..basics.checks import check_choice, check_integer, check_number
from ..sdes import SDE


class Stage(NamedTuple):
    """Coefficients of one model call for each of n intervals, each of shape (n,), float64.

    Attributes:
        x: Coefficient of the sample.
        x0: Coefficient of the denoised estimate at this call.
        noise: Coefficient of fresh unit noise.
        history: Coefficients of the denoised estimates of earlier calls, the most recent first. They are 0 where no
            such estimate exists yet.
        at_target: The network is called at the interval's end s instead of its start t.
        remember: A later stage or interval uses this call's estimate.
        memo: The quantity that is extrapolated, as a combination a x_t + b x0_hat, given as (a, b). ``x0`` and
            ``history`` then multiply this quantity, and it is what is remembered. None means x0_hat itself.
        late: Weights with which the estimate at the start of this interval, and earlier ones, finish the *previous*
            step before this one begins; the most recent first.
    """

    x: Tensor
    x0: Tensor
    noise: Tensor
    history: tuple[Tensor, ...] = ()
    at_target: bool = False
    remember: bool = False
    memo: tuple[Tensor, Tensor] | None = None
    late: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Predictor:
    """A registered predictor.

    Attributes:
        stages: The function (sde, times, stochasticity, options) -> stages. The stochasticity is one number for all
            intervals, or a tensor with one number for each.
        calls: Model calls per interval, which is the number of stages.
        finite_at_zero_snr: Whether it can start where alpha(t) = 0; f and g^2 are infinite there.
        deterministic: Whether it integrates the probability-flow ODE only.
    """

    stages: Callable[[SDE, Tensor, Tensor | float, PredictorOptions], list[Stage]]
    calls: int = 1
    finite_at_zero_snr: bool = True
    deterministic: bool = False


# The constants of ``default_stochasticity`` were measured; see docs/results.md.
RENEWED, LARGEST = 0.6, 2.0

# The constants of ``exponential`` with ``solver_order`` None were measured by benchmarks/swapped.py, and on the
# project's own grids by benchmarks/quality.py.
#
# Order 3 is taken on grids whose median interval is at most this long in lambda: over longer ones a parabola fits the
# estimates worse than a line. Switching from interval to interval instead is worse than either order.
THIRD_ORDER_INTERVAL = 0.6
# An estimate k intervals back is taken to lie at least k h / reach away, where h is the length of the interval to
# integrate. The reach is REACH_OF_NOISE / sqrt(nu) within these limits, where nu is the share of the sample's variance
# that an interval between the estimates has renewed. It is above 1, so that grids whose neighbouring intervals tend to
# the same length keep their order of convergence.
SHORTEST_REACH, LONGEST_REACH, REACH_OF_NOISE = 1.1, 1.75, 0.85

# Up to this lambda (sigma/alpha = 150) E[x_0 | x_t] is nearly constant. The paper's VP SDE starts there.
START = -5.0
SOLVER_TYPES = ("heun", "midpoint")


@dataclass(frozen=True)
class PredictorOptions:
    """Options that some predictors read.

    Attributes:
        solver_order: 1, 2 or 3, for ``exponential``; None chooses by the lengths of the intervals, see there.
        large_variance: Whether the ``ancestral`` predictor takes its noise from beta instead of the posterior variance.
        solver_type: ``heun`` or ``midpoint``, which are DPM-Solver++'s names. The slope of order 2 gets its exact
            weight with ``heun``, and the weight of a point in the middle with ``midpoint``.
        solver_correction: Whether each step of ``exponential`` is done again with the estimate at its end, as soon as
            that estimate is known.
        gaussian_std: Standard deviation of the Gaussian part of the data that ``exponential`` integrates exactly.
    """

    solver_order: int | None = 1
    large_variance: bool = False
    solver_type: str = "heun"
    solver_correction: bool = False
    gaussian_std: float = 0.0

    def __post_init__(self) -> None:
        if self.solver_order is not None:
            check_integer("solver_order", self.solver_order, at_least=1, at_most=3)
        check_choice("solver_type", self.solver_type, SOLVER_TYPES)
        check_number("gaussian_std", self.gaussian_std, at_least=0.0)


def default_stochasticity(sde: SDE, times: Tensor) -> Tensor:
    """Stochasticity of each interval that its length and that of the next one allow, shape (n,).

    eta^2 = min(0.6/h, 2), where h is the length in lambda = log(alpha/sigma) of the interval or of the one after it,
    whichever is longer. The noise of an interval corrects what the network got wrong before it. But the larger eta is,
    the harder is the interval to integrate: the polynomial of ``exponential`` is extrapolated against
    exp((1 + eta^2) l). The noise is also still in the estimates from which the next interval is extrapolated, and the
    longer that interval is, the more this noise is magnified. Long intervals therefore get little noise, which is close
    to the probability flow. Short ones get more than the reverse SDE with eta = 1 (Anderson's).
    """
    lam = 0.5 * sde.log_snr(times)
    h = lam[1:] - lam[:-1]
    return (RENEWED / torch.maximum(h, torch.cat([h[1:], h[-1:]]))).clamp(max=LARGEST).sqrt()


def _with_score(sde: SDE, t: Tensor, x: Tensor, score: Tensor, noise: Tensor) -> Stage:
    """A stage given by its coefficient of the score, (alpha x0_hat - x_t) / sigma^2."""
    per_variance = score * torch.exp(-2.0 * sde.log_sigma(t))
    return Stage(x - per_variance, sde.alpha(t) * per_variance, noise)


def euler_maruyama(sde: SDE, times: Tensor, stochasticity: Tensor | float, options: PredictorOptions) -> list[Stage]:
    """Euler-Maruyama on the reverse SDE; Euler on the probability-flow ODE for stochasticity 0.

    x_s = x_t - [f x_t - (1 + eta^2)/2 g^2 score] (t - s) + eta g sqrt(t - s) z (Song et al. 2021, eq. 6 and 13).
    """
    t, dt = times[:-1], times[:-1] - times[1:]
    g2 = sde.g2(t)
    score = 0.5 * (1.0 + stochasticity**2) * g2 * dt
    return [_with_score(sde, t, 1.0 - sde.f(t) * dt, score, stochasticity * torch.sqrt(g2 * dt))]


def reverse_diffusion(sde: SDE, times: Tensor, stochasticity: Tensor | float, options: PredictorOptions) -> list[Stage]:
    """The forward discretisation, reversed: x_s = (2 - a) x_t + v score + sqrt(v) z (Song et al. 2021, eq. 46).

    a and v come from the exact transition kernel x_t | x_s ~ N(a x_s, v I). For VP they are DDPM's sqrt(1 - beta) and
    beta, for VE they are SMLD's 1 and sigma_t^2 - sigma_s^2. The probability flow takes half the score and no noise.
    """
    t, s = times[:-1], times[1:]
    a, v = sde.transition(s, t)
    return [_with_score(sde, t, 2.0 - a, 0.5 * (1.0 + stochasticity**2) * v, stochasticity * v.sqrt())]


def ancestral(sde: SDE, times: Tensor, stochasticity: Tensor | float, options: PredictorOptions) -> list[Stage]:
    """Ancestral sampling: x_s ~ q(x_s | x_t, x_0 = x0_hat), for every SDE.

    The variance is eta^2 sigma_s^2 v / sigma_t^2 with v of the transition kernel. eta = 1 is DDPM's posterior (Ho et
    al. 2020, eq. 6-7) and SMLD's (Song et al. 2021, eq. 47); eta = 0 is DDIM and values between are DDIM's eta (Song et
    al. 2020, arXiv:2010.02502, eq. 12). With ``large_variance`` the noise has the variance v, as in the official code.
    """
    t, s = times[:-1], times[1:]
    _, v = sde.transition(s, t)
    sigma_t, sigma_s = sde.sigma(t), sde.sigma(s)
    std = stochasticity * sigma_s * v.sqrt() / sigma_t
    x = torch.sqrt(sigma_s.square() - std.square()) / sigma_t
    noise = stochasticity * v.sqrt() if options.large_variance else std
    return [Stage(x, sde.alpha(s) - sde.alpha(t) * x, noise)]


def exponential(sde: SDE, times: Tensor, stochasticity: Tensor | float, options: PredictorOptions) -> list[Stage]:
    """Exponential integrator: the linear part and the noise exact, x0_hat extrapolated in lambda = log(alpha/sigma).

    With h = lambda_s - lambda_t and q = 1 + eta^2 the solution of the SDE is

        x_s = sigma_s/sigma_t exp(-eta^2 h) x_t + alpha_s q int exp(-q (lambda_s - l)) x0_hat(l) dl
              + sigma_s sqrt(1 - exp(-2 eta^2 h)) z

    (Lu et al. 2022, arXiv:2211.01095, appendix A). Order p takes x0_hat(l) as the polynomial through the last p
    estimates, with exact weights and no extra model call; at the start, where fewer estimates exist, it takes those.
    Order 1 is DDIM for eta = 0 and ancestral sampling for eta = 1. Order 2 is DPM-Solver++(2M) and its SDE form. The
    integral needs no special case at lambda = -infinity, where alpha(t) = 0.

    ``solver_order`` None is safe on any grid. It takes order 3 where the intervals of the grid are short and order 2
    where they are long, and it limits how far the estimates are extrapolated. Where an interval is longer than those
    before it, the earlier estimates are taken to lie further back than they do. This bounds what their differences
    contribute (``_reach``). Where neighbouring intervals have about the same length, the weights are exactly those of
    the classical rule.

    ``solver_correction``: once the estimate at the end of a step is known, the step's integral is redone with the
    polynomial that includes it, before the next step starts. It costs no model call (the estimate is not evaluated
    again), changes nothing but coefficients, and for eta = 0 raises the order by one (Zhao et al. 2023,
    arXiv:2302.04867, UniC; Xue et al. 2023, arXiv:2309.05019, for the SDE). It is not an MCMC corrector, since it draws
    no noise.

    ``gaussian_std`` (call it c) takes the data as e + c z. Then e has the noise S^2 = sigma^2 + alpha^2 c^2 at time t,
    and all of the above holds with S in place of sigma, log(alpha/S) in place of lambda and

        E[e | x_t] = x0_hat + c^2 alpha score = (1 + c^2 alpha^2/sigma^2) x0_hat - (c^2 alpha/sigma^2) x_t

    in place of x0_hat. To sample e down to S = c, where sigma = 0, is to sample the data. The marginals do not depend
    on c. What depends on c is which data are integrated exactly: points for c = 0, and Gaussian data of standard
    deviation c in general, for which a step of any length and any eta is exact. Where sigma is far below c the
    integrand is the noise. So c = 0 is data prediction, a large c is noise prediction, and a c between is data
    prediction at noise above c and noise prediction at noise below c.
    """
    log_snr = sde.log_snr(times)
    ratio = options.gaussian_std**2 * torch.exp(log_snr)
    widening = 0.5 * torch.log1p(ratio)
    log_std, lam = sde.log_sigma(times) + widening, 0.5 * log_snr - widening
    alpha, h = sde.alpha(times), lam[1:] - lam[:-1]
    eta2 = torch.as_tensor(stochasticity, dtype=torch.float64, device=h.device).square().expand_as(h)
    q, decay = 1.0 + eta2, torch.where(eta2 > 0, eta2 * h, torch.zeros_like(h))
    x = torch.exp(log_std[1:] - log_std[:-1] - decay)
    noise = torch.exp(log_std[1:]) * torch.sqrt(-torch.expm1(-2.0 * decay))

    # The first interval may be infinite (alpha = 0). x0_hat is treated as constant up to START, and only the rest of
    # the interval is integrated at higher order.
    whole, h = h, torch.where(torch.isfinite(h), h, (lam[1:] - START).clamp(min=1.0))
    order = options.solver_order or _order_for(whole)
    back = _distances(h, order)
    if options.solver_order is None:
        back = _within_reach(back, h, _reach(decay, order))
    exact = _adams_weights(h, q, back)
    exact[0] = exact[0] + (_moment(whole, q, 0) - _moment(h, q, 0))
    used = exact
    if options.solver_order == 2 and options.solver_type == "midpoint":
        slope = 0.5 * h * _moment(h, q, 0) / back[1]
        slope = torch.where(torch.isfinite(h), slope, torch.zeros_like(h))
        used = [_moment(whole, q, 0) + slope, -slope]
    late = []
    if options.solver_correction:
        # The update is the step before with the estimate at its end included, minus the step as it was taken.
        late = _moulton_update(h, q, back)
        for k in range(order):
            late[k + 1] = late[k + 1] + (exact[k] - used[k])
        late = [torch.cat([torch.zeros_like(h[:1]), (alpha[1:] * update)[:-1]]) for update in late]
    memo = None
    if options.gaussian_std:
        of_x = torch.where(alpha > 0, -ratio / alpha, torch.zeros_like(alpha))
        memo = (of_x[:-1], 1.0 + ratio[:-1])
    history = tuple(alpha[1:] * w for w in used[1:])
    return [Stage(x, alpha[1:] * used[0], noise, history, remember=order + len(late) > 1, memo=memo, late=tuple(late))]


def _distances(h: Tensor, order: int) -> list[Tensor]:
    """Distances from the start of each interval back to the estimates 0, 1, ..., ``order`` calls before.

    They are infinite where there is no such estimate.
    """
    distances = [torch.zeros_like(h)]
    for k in range(1, order + 1):
        before = torch.cat([torch.full_like(h[:k], math.inf), h[:-k]])[: len(h)]
        distances.append(distances[-1] + before)
    return distances


def _order_for(h: Tensor) -> int:
    """The order for a grid: 3 where its intervals are short, 2 otherwise."""
    finite = h[torch.isfinite(h)]
    return 3 if len(finite) and float(finite.median()) <= THIRD_ORDER_INTERVAL else 2


def _reach(decay: Tensor, order: int) -> Tensor:
    """For each interval, how far the last slope may be extrapolated, in lengths of the interval before.

    The estimate at the start of an interval and the one before it differ by the slope of E[x_0 | x_t] along the path
    and by the noise that was drawn between them, which renewed the share nu = 1 - exp(-2 eta^2 h) of the variance.
    An extrapolation over an interval r times as long magnifies that noise r times. The product r sqrt(nu) is therefore
    bounded, with the largest nu of the intervals between the estimates used.

    Args:
        decay: eta^2 h of each interval.
        order: How many estimates are used.
    """
    decay = torch.where(torch.isfinite(decay), decay, torch.zeros_like(decay))
    before = [torch.cat([torch.zeros_like(decay[:k]), decay[:-k]])[: len(decay)] for k in range(1, order)]
    renewed = -torch.expm1(-2.0 * torch.stack([torch.zeros_like(decay), *before]).amax(0))
    return (REACH_OF_NOISE / renewed.sqrt()).clamp(SHORTEST_REACH, LONGEST_REACH)


def _within_reach(back: list[Tensor], h: Tensor, reach: Tensor) -> list[Tensor]:
    """Distances such that no interval is longer than ``reach`` times the mean distance between the estimates used."""
    finite = torch.where(torch.isfinite(h), h, torch.zeros_like(h))
    return [torch.maximum(distance, k * finite / reach) for k, distance in enumerate(back)]


def _divided_difference(nodes: list[Tensor]) -> list[Tensor]:
    """Coefficients of f(node_0), f(node_1), ... in the divided difference f[node_0, node_1, ...].

    Where too few nodes exist, or an interval is infinite, a distance is infinite and the coefficients are 0, which is
    their limit.
    """
    exists = torch.stack([torch.isfinite(node) for node in nodes]).all(0)
    coefficients = []
    for i, node in enumerate(nodes):
        product = torch.ones_like(node)
        for j, other in enumerate(nodes):
            if i != j:
                product = product * (node - other)
        coefficients.append(torch.where(exists, 1.0 / product, torch.zeros_like(node)))
    return coefficients


def _newton_moments(h: Tensor, q: Tensor, back: list[Tensor], degrees: int) -> list[Tensor]:
    """Integrals q int_0^h exp(q (w - h)) N(w) dw of N = 1, w, w (w + b_1), w (w + b_1) (w + b_2), ...

    b_k is the distance back to the k-th estimate before, ``back[k]``. Entries that do not exist are meaningless.
    """
    moments = [_moment(h, q, j) for j in range(degrees)]
    polynomial, result = [torch.ones_like(h)], [moments[0]]  # of w, lowest power first
    for j in range(1, degrees):
        shifted = [torch.zeros_like(h), *polynomial]
        polynomial = [a + back[j - 1] * b for a, b in zip(shifted, [*polynomial, torch.zeros_like(h)], strict=True)]
        result.append(sum((c * m for c, m in zip(polynomial, moments, strict=False)), torch.zeros_like(h)))
    return result


def _adams_weights(h: Tensor, q: Tensor, back: list[Tensor]) -> list[Tensor]:
    """Weights of the last estimates in q int_0^h exp(q (w - h)) x0_hat(lambda_t + w) dw (Adams-Bashforth).

    They come from the Newton form of the polynomial that interpolates at lambda_t, at the time before it, and so on.
    The number of estimates is one less than the number of distances.
    """
    order = len(back) - 1
    weights = [torch.zeros_like(h) for _ in range(order)]
    for j, moment in enumerate(_newton_moments(h, q, back, order)):
        for k, c in enumerate(_divided_difference([-distance for distance in back[: j + 1]])):
            weights[k] = weights[k] + torch.where(c == 0, c, c * moment)
    return weights


def _moulton_update(h: Tensor, q: Tensor, back: list[Tensor]) -> list[Tensor]:
    """What the estimate at the end of each interval adds to the integral of ``_adams_weights`` (Adams-Moulton).

    The result holds the coefficients of that estimate and of the ``order`` estimates before it. They are the one Newton
    term by which the polynomial through all of these differs from the polynomial without the estimate at the end.
    """
    order = len(back) - 1
    update = [torch.zeros_like(h) for _ in range(order + 1)]
    moments = _newton_moments(h, q, back, order + 1)
    for p in range(1, order + 1):
        # Exactly p estimates before the end exist (order, or fewer at the start).
        deepest = torch.isfinite(back[p - 1]) & torch.isfinite(h)
        if p < order:
            deepest = deepest & ~torch.isfinite(back[p])
        for k, c in enumerate(_divided_difference([h, *(-distance for distance in back[:p])])):
            update[k] = torch.where(deepest, c * moments[p], update[k])
    return update


def _moment(h: Tensor, q: Tensor, j: int) -> Tensor:
    """q int_0^h exp(q (w - h)) w^j dw, accurate for every h (h may be infinite for j = 0)."""
    if j == 0:
        return -torch.expm1(-q * h)
    nodes, quadrature = np.polynomial.legendre.leggauss(20)
    theta = torch.as_tensor(0.5 * (nodes + 1.0), device=h.device)
    half = torch.as_tensor(0.5 * quadrature, device=h.device)
    small = torch.where(torch.isfinite(h), h, torch.zeros_like(h)).minimum(1.0 / q)
    integrand = torch.exp((q * small).unsqueeze(-1) * (theta - 1.0)) * theta**j * half
    by_quadrature = q * small ** (j + 1) * integrand.sum(-1)
    by_recurrence = torch.where(torch.isfinite(h), h, torch.zeros_like(h)) ** j - (j / q) * _moment(h, q, j - 1)
    moment = torch.where(h * q <= 1.0, by_quadrature, by_recurrence)
    return torch.where(torch.isfinite(h), moment, torch.zeros_like(moment))


def heun(sde: SDE, times: Tensor, stochasticity: Tensor | float, options: PredictorOptions) -> list[Stage]:
    """Heun's method on the probability-flow ODE dx = x0_hat d alpha + eps_hat d sigma; second order, two calls.

    Euler's method on this form is DDIM. The second call is made at the Euler point, and each integrand is replaced by
    the mean of its values at the two ends: x_s += (D_s - D_t) (d alpha - d sigma alpha_s/sigma_s) / 2. For VE this is
    Algorithm 1 of Karras et al. 2022 (arXiv:2206.00364), for rectified flow it is Heun's method on the velocity.
    """
    t, s = times[:-1], times[1:]
    (first,) = ancestral(sde, times, 0.0, options)
    alpha_s, sigma_s = sde.alpha(s), sde.sigma(s)
    weight = 0.5 * ((alpha_s - sde.alpha(t)) - (sigma_s - sde.sigma(t)) * alpha_s / sigma_s)
    ones, zeros = torch.ones_like(weight), torch.zeros_like(weight)
    return [first._replace(remember=True), Stage(ones, weight, zeros, (-weight,), at_target=True)]


def no_predictor(sde: SDE, times: Tensor, stochasticity: Tensor | float, options: PredictorOptions) -> list[Stage]:
    """Corrector-only sampling: the sample is carried from level to level unchanged."""
    return []


PREDICTORS: dict[str, Predictor] = {
    "euler_maruyama": Predictor(euler_maruyama, finite_at_zero_snr=False),
    "reverse_diffusion": Predictor(reverse_diffusion),
    "ancestral": Predictor(ancestral),
    "exponential": Predictor(exponential),
    "heun": Predictor(heun, calls=2, deterministic=True),
    "none": Predictor(no_predictor, calls=0),
}


def get_predictor(name: str) -> Predictor:
    """Look a predictor up by name.

    Raises:
        ValueError: Unknown name.
    """
    return PREDICTORS[check_choice("predictor", name, PREDICTORS)]

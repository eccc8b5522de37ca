"""Exponential integrators: the linear part of the SDE and its noise are exact, and x0_hat is extrapolated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..basics.checks import check_choice, check_flag, check_integer, check_number
from ..sdes import SDE
from .stages import ESTIMATE, Predictor, Stage
from .time_grids import USUAL_STD, for_spread

# The constants of ``Exponential.default_stochasticity`` were measured; see docs/results.md.
RENEWED_VARIANCE, LARGEST_VARIANCE = 0.6, 2.0

# The constants of ``Exponential`` with ``solver_order`` None were measured by benchmarks/swapped.py, and on the
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
LEAST_RENEWED = 1e-12  # below it the reach is the longest, and its derivative should be finite

# Up to this lambda (sigma/alpha = 150) E[x_0 | x_t] is nearly constant for data of standard deviation USUAL_STD. The
# paper's VP SDE starts there.
START_OF_CHANGE = -5.0
GAUSSIAN_PART = 0.1  # of the standard deviation of the data: ``gaussian_std`` where it is None
SOLVER_TYPES = ("heun", "midpoint")
NODES, WEIGHTS = np.polynomial.legendre.leggauss(20)  # Gauss-Legendre quadrature on [-1, 1]


@dataclass(frozen=True)
class Exponential(Predictor):
    """Multistep exponential integrator, which extrapolates x0_hat in lambda = log(alpha/sigma).

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

    Args:
        solver_order: 1, 2 or 3; None chooses by the lengths of the intervals.
        solver_type: ``heun`` or ``midpoint``, which are DPM-Solver++'s names. The slope of order 2 gets its exact
            weight with ``heun``, and the weight of a point in the middle with ``midpoint``.
        solver_correction: Whether each step is done again with the estimate at its end, as soon as that is known.
        gaussian_std: Standard deviation of the Gaussian part of the data that is integrated exactly; None is a tenth
            of ``data_std``.
        data_std: Standard deviation of the data, by which the end of an infinite interval moves; None stands for 0.5.
    """

    solver_order: int | None = 1
    solver_type: str = "heun"
    solver_correction: bool = False
    gaussian_std: float | None = 0.0
    data_std: float | None = None

    def __post_init__(self) -> None:
        if self.solver_order is not None:
            check_integer("solver_order", self.solver_order, at_least=1, at_most=3)
        check_choice("solver_type", self.solver_type, SOLVER_TYPES)
        check_flag("solver_correction", self.solver_correction)
        _gaussian_part(self.gaussian_std, self.data_std)

    @property
    def order(self) -> int:
        """``solver_order``, where None is 3 on a fine grid. The correction adds one to the order of the ODE."""
        return self.solver_order or 3

    def default_stochasticity(self, sde: SDE, times: Tensor) -> Tensor:
        """Stochasticity of each interval that its length and that of the next one allow, shape (n,).

        eta^2 = min(0.6/h, 2), where h is the length in lambda = log(alpha/sigma) of the interval or of the one after
        it, whichever is longer. The noise of an interval corrects what the network got wrong before it. But the larger
        eta is, the harder is the interval to integrate: the polynomial of ``exponential`` is extrapolated against
        exp((1 + eta^2) l). The noise is also still in the estimates from which the next interval is extrapolated, and
        the longer that interval is, the more this noise is magnified. Long intervals therefore get little noise, which
        is close to the probability flow. Short ones get more than the reverse SDE with eta = 1 (Anderson's).
        """
        lam = 0.5 * sde.log_snr(times)
        h = lam[1:] - lam[:-1]
        longer = torch.maximum(h, torch.cat([h[1:], h[-1:]]))
        finite = torch.isfinite(longer)  # an infinite interval gets none, and its derivative stays finite
        eta2 = (RENEWED_VARIANCE / torch.where(finite, longer, torch.ones_like(h))).clamp(max=LARGEST_VARIANCE)
        return torch.where(finite, eta2.sqrt(), torch.zeros_like(h))

    def stages(self, sde: SDE, times: Tensor, stochasticity: Tensor | float) -> list[Stage]:
        """See ``Predictor.stages``."""
        t, s = times[:-1], times[1:]
        eta2 = torch.as_tensor(stochasticity, dtype=torch.float64, device=t.device).square().expand_as(t)
        q, alpha = 1.0 + eta2, sde.alpha(s)
        c = _gaussian_part(self.gaussian_std, self.data_std)
        x, noise, h, decay = _exact_part(sde, t, s, eta2, c)

        # The first interval may be infinite (alpha = 0). x0_hat is treated as constant up to START_OF_CHANGE, and only
        # the rest of the interval is integrated at higher order.
        start = for_spread(START_OF_CHANGE, self.data_std)
        rest = (_widened_path(sde, s, c)[1] - start).clamp(min=1.0)
        whole, h = h, torch.where(torch.isfinite(h), h, rest)
        order = self.solver_order or _order_for(whole)
        back = _distances(h, order)
        if self.solver_order is None:
            back = _within_reach(back, h, _reach(decay, order))
        exact = _adams_weights(h, q, back)
        exact[0] = exact[0] + (kernel_moment(whole, q, 0) - kernel_moment(h, q, 0))
        used = exact
        if self.solver_order == 2 and self.solver_type == "midpoint":
            slope = 0.5 * h * kernel_moment(h, q, 0) / back[1]
            slope = torch.where(torch.isfinite(h), slope, torch.zeros_like(h))
            used = [kernel_moment(whole, q, 0) + slope, -slope]
        completion: list[Tensor] = []
        if self.solver_correction:
            # The step before with the estimate at its end included, minus the step as it was taken.
            completion = _moulton_update(h, q, back)
            for k in range(order):
                completion[k + 1] = completion[k + 1] + (exact[k] - used[k])
            completion = [torch.cat([torch.zeros_like(h[:1]), (alpha * update)[:-1]]) for update in completion]
        history = tuple(alpha * w for w in used[1:])
        stage = Stage(x, alpha * used[0], noise, history, completion=tuple(completion))
        if c:
            stage = stage._replace(estimate=_gaussian_part_removed(sde, t, c))
        return [stage._replace(keep=ESTIMATE) if order + len(completion) > 1 else stage]


@dataclass(frozen=True)
class Singlestep(Predictor):
    """Singlestep exponential integrator of second order: two calls per interval, and no memory of earlier ones.

    The first call's estimate leads to the middle of the interval in lambda, as ``Exponential`` of order 1 does. With
    the estimate there, x0_hat(l) is a line through both, by which the first half is completed and the second half is
    integrated. With lambda_m in the middle, q = 1 + eta^2, M_j(h) = q int_0^h exp(q (w - h)) w^j dw and
    d = (x0_hat_m - x0_hat_t) / (lambda_m - lambda_t),

        x_m = sigma_m/sigma_t exp(-eta^2 h_1) x_t + alpha_m M_0(h_1) x0_hat_t + sigma_m sqrt(1 - exp(-2 eta^2 h_1)) z
        x_s = sigma_s/sigma_m exp(-eta^2 h_2) (x_m + alpha_m M_1(h_1) d) + alpha_s (M_0(h_2) x0_hat_m + M_1(h_2) d)
              + sigma_s sqrt(1 - exp(-2 eta^2 h_2)) z'.

    For eta = 0 it is DPM-Solver++(2S) (Lu et al. 2022, arXiv:2211.01095, algorithm 1) with exact weights of the slope;
    eta > 0 follows one path of the SDE through both halves, as k-diffusion's DPM++ SDE does. It serves where history
    is of no use, because a method changes the sample between levels or goes back in noise: restarts, resampling,
    replacement. Elsewhere ``Exponential`` is as accurate with half the calls.

    Args:
        gaussian_std: As in ``Exponential``.
        data_std: As in ``Exponential``.
    """

    gaussian_std: float | None = 0.0
    data_std: float | None = None

    calls: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _gaussian_part(self.gaussian_std, self.data_std)

    @property
    def order(self) -> int:
        """See ``Predictor.order``."""
        return 2

    def stages(self, sde: SDE, times: Tensor, stochasticity: Tensor | float) -> list[Stage]:
        """See ``Predictor.stages``."""
        t, s, c = times[:-1], times[1:], _gaussian_part(self.gaussian_std, self.data_std)
        eta2 = torch.as_tensor(stochasticity, dtype=torch.float64, device=t.device).square().expand_as(t)
        q = 1.0 + eta2
        middle = _middle(sde, t, s, c, for_spread(START_OF_CHANGE, self.data_std))
        x, noise, h, _ = _exact_part(sde, t, middle, eta2, c)
        first = Stage(x, sde.alpha(middle) * kernel_moment(h, q, 0), noise, keep=ESTIMATE, s=middle)
        finite = torch.where(torch.isfinite(h), h, _exact_part(sde, middle, s, eta2, c)[2])
        x, noise, h, _ = _exact_part(sde, middle, s, eta2, c)
        slope = (x * sde.alpha(middle) * kernel_moment(finite, q, 1) + sde.alpha(s) * kernel_moment(h, q, 1)) / finite
        second = Stage(x, sde.alpha(s) * kernel_moment(h, q, 0) + slope, noise, (-slope,), t=middle)
        if c:
            first = first._replace(estimate=_gaussian_part_removed(sde, t, c))
            second = second._replace(estimate=_gaussian_part_removed(sde, middle, c))
        return [first, second]


def _gaussian_part(gaussian_std: float | None, data_std: float | None) -> float:
    """The number that ``gaussian_std`` stands for.

    Raises:
        ValueError: It is negative, or ``data_std`` is not positive.
    """
    std = USUAL_STD if data_std is None else check_number("data_std", data_std, above=0.0)
    return GAUSSIAN_PART * std if gaussian_std is None else check_number("gaussian_std", gaussian_std, at_least=0.0)


def _exact_part(
    sde: SDE, t: Tensor, s: Tensor, eta2: Tensor, gaussian_std: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What does not depend on the estimate: coefficients of x_t and of the noise, h = lambda_s - lambda_t and eta^2 h.

    With S^2 = sigma^2 + alpha^2 c^2 and lambda = log(alpha/S) they are S_s/S_t exp(-eta^2 h) and
    S_s sqrt(1 - exp(-2 eta^2 h)); each has the shape of ``t``.
    """
    log_std_t, lam_t = _widened_path(sde, t, gaussian_std)
    log_std_s, lam_s = _widened_path(sde, s, gaussian_std)
    h = lam_s - lam_t
    finite = torch.isfinite(h)
    # Derivatives are finite too: nothing infinite is multiplied.
    decay = torch.where(finite & (eta2 > 0), eta2 * torch.where(finite, h, torch.ones_like(h)), torch.zeros_like(h))
    decay = torch.where(finite | (eta2 == 0), decay, torch.full_like(h, math.inf))
    return (
        torch.exp(log_std_s - log_std_t - decay),
        torch.exp(log_std_s) * torch.sqrt(-torch.expm1(-2.0 * decay)),
        h,
        decay,
    )


def _middle(sde: SDE, t: Tensor, s: Tensor, gaussian_std: float, start: float) -> Tensor:
    """The time in the middle of an interval in lambda = log(alpha/S); of an infinite one, of what follows ``start``."""
    lam_t, lam_s = _widened_path(sde, t, gaussian_std)[1], _widened_path(sde, s, gaussian_std)[1]
    h = torch.where(torch.isfinite(lam_t), lam_s - lam_t, (lam_s - start).clamp(min=1.0))
    squared_ratio = torch.exp(h - 2.0 * lam_s) - gaussian_std**2  # sigma^2/alpha^2
    return torch.minimum(torch.maximum(sde.time_of(-torch.log(squared_ratio)).to(t), s), t)


def _widened_path(sde: SDE, times: Tensor, gaussian_std: float) -> tuple[Tensor, Tensor]:
    """log S and log(alpha/S) with S^2 = sigma^2 + alpha^2 c^2, each of the shape of ``times``."""
    log_snr = sde.log_snr(times)
    widening = 0.5 * torch.log1p(gaussian_std**2 * torch.exp(log_snr))
    return sde.log_sigma(times) + widening, 0.5 * log_snr - widening


def _gaussian_part_removed(sde: SDE, t: Tensor, gaussian_std: float) -> tuple[Tensor, Tensor]:
    """E[e | x_t] = (1 + c^2 alpha^2/sigma^2) x0_hat - (c^2 alpha/sigma^2) x_t as coefficients of x_t and x0_hat.

    At pure noise, where alpha = 0, e has the mean of the data.
    """
    alpha, ratio = sde.alpha(t), gaussian_std**2 * torch.exp(sde.log_snr(t))
    return torch.where(alpha > 0, -ratio / alpha, torch.zeros_like(alpha)), 1.0 + ratio


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
    finite = h[torch.isfinite(h)].detach()
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
    renewed = renewed.clamp(min=LEAST_RENEWED)
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
    # Other nodes, as good as any, take the place of those that do not exist, so that derivatives are finite.
    nodes = [torch.where(exists, node, torch.full_like(node, float(i))) for i, node in enumerate(nodes)]
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
    moments = [kernel_moment(h, q, j) for j in range(degrees)]
    back = [torch.where(torch.isfinite(b), b, torch.zeros_like(b)) for b in back]
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


def kernel_moment(h: Tensor, q: Tensor, j: int) -> Tensor:
    """q int_0^h exp(q (w - h)) w^j dw, accurate for every h (h may be infinite for j = 0)."""
    if j == 0:
        finite = torch.isfinite(h)
        moment = -torch.expm1(-q * torch.where(finite, h, torch.ones_like(h)))
        return torch.where(finite, moment, torch.ones_like(moment))
    theta = torch.as_tensor(0.5 * (NODES + 1.0), device=h.device)
    half = torch.as_tensor(0.5 * WEIGHTS, device=h.device)
    small = torch.where(torch.isfinite(h), h, torch.zeros_like(h)).minimum(1.0 / q)
    integrand = torch.exp((q * small).unsqueeze(-1) * (theta - 1.0)) * theta**j * half
    by_quadrature = q * small ** (j + 1) * integrand.sum(-1)
    by_recurrence = torch.where(torch.isfinite(h), h, torch.zeros_like(h)) ** j - (j / q) * kernel_moment(h, q, j - 1)
    moment = torch.where(h * q <= 1.0, by_quadrature, by_recurrence)
    return torch.where(torch.isfinite(h), moment, torch.zeros_like(moment))

"""The fit of a plan's parameters: Adam on gradients through the sampler, or on estimates of them without any.

Three sets of noise and references are kept apart. The first is fitted to. On the second the averaged parameters are
looked at now and then, and the best are chosen; where more than half of the gain is lost again, the fit goes back to
the best so far with shorter steps. On the third these are compared with the unfitted sampler, once, from the same
noise. If they are not nearer by more than ``SIGNIFICANT`` standard errors, in all or in a part of the distance, or if
whole images or their features are further off beyond the noise, the unfitted sampler is the result.

Many short steps of small batches find more, and more surely, than few long ones of large batches that cost the same. A
step of Adam is as long in a direction in which the gradient is nothing but noise as in any other, and many of them
average out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..basics.checks import check_flag, check_integer, check_number
from .targets import SETS, Batch, Gain, Target, stream

SIGNIFICANT = 2.0
AVERAGED_PART = 0.1  # of the steps, over which parameters are averaged at the end
LARGEST_DECAY = 0.999
LARGEST_GRADIENT = 1.0
BACK_OFF = 0.3  # times the learning rate, where a look at the choice found that the steps were too long
KEPT_PART = 0.5  # of the gain so far; where less of it is left, that is not the noise of a look

Simulator = Callable[[Tensor, Batch, torch.Generator], Tensor]
"""(parameters, batch, generator of the noise on the way) -> samples, shape (B, ...)."""


@dataclass(frozen=True)
class FitOptions:
    """How a fit is made.

    Args:
        steps: Steps of Adam, whose rate follows a cosine to 0.
        batch_size: Samples of each.
        learning_rate: Rate of the first step.
        held_out: Samples of the report, and twice as many as of each look at the choice.
        checks: How often the averaged parameters are looked at.
        gradients: Whether gradients pass through the sampler. Otherwise they are estimated by antithetic differences
            in random directions (Salimans et al. 2017, arXiv:1703.03864), with the same noise in all of them.
        directions: Pairs of differences for each estimate.
        spread: Length of the differences, for each parameter.
        seed: Of everything that is drawn.

    Raises:
        ValueError: A value out of range.
    """

    steps: int = 120
    batch_size: int = 128
    learning_rate: float = 0.03
    held_out: int = 2048
    checks: int = 4
    gradients: bool = True
    directions: int = 4
    spread: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 2), ("held_out", 2), ("checks", 1), ("directions", 1)):
            check_integer(name, getattr(self, name), at_least=least)
        check_integer("seed", self.seed, at_least=0)
        check_number("learning_rate", self.learning_rate, above=0.0)
        check_number("spread", self.spread, above=0.0)
        check_flag("gradients", self.gradients)


class Fit(NamedTuple):
    """The result of a fit.

    Attributes:
        parameters: The parameters, shape (size,), float64; zeros where the unfitted sampler came back.
        is_fitted: Whether they beat it beyond the noise.
        fitted: Distance of the chosen parameters on the report's set.
        unfitted: Distance of the unfitted sampler there.
        error: Standard error of the difference.
        parts: What each part of the distance gains, by its name; empty where the distance has no parts.
        chosen_step: The step whose averaged parameters were chosen; 0 is the unfitted sampler.
        samples: Samples that were drawn, all together.
        seconds: What it took.
    """

    parameters: Tensor
    is_fitted: bool
    fitted: float
    unfitted: float
    error: float
    parts: Mapping[str, Gain]
    chosen_step: int
    samples: int
    seconds: float


def fit_parameters(
    size: int,
    simulator: Simulator,
    target: Target,
    options: FitOptions,
    progress: Callable[[int, float], None] | None = None,
) -> Fit:
    """Fit the parameters of a sampler; see the head of this module.

    Args:
        size: Number of parameters; all 0 are the unfitted sampler.
        simulator: Draws samples of parameters.
        target: What samples are to be like.
        options: How it is done.
        progress: Called after each step with its number and loss.

    Raises:
        ValueError: The unfitted sampler itself gives no finite samples.
    """
    began, drawn = time.perf_counter(), 0

    def draw(parameters: Tensor, batch: Batch, *purpose: int) -> Tensor:
        nonlocal drawn
        drawn += len(batch.noise)
        return simulator(parameters, batch, stream(options.seed, *purpose))

    counts = {"choice": max(2, options.held_out // 2), "report": options.held_out}
    held = {part: target.batch(part, n, stream(options.seed, SETS.index(part), 0)) for part, n in counts.items()}
    parameters = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([parameters], options.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    decay = min(1.0 - 1.0 / max(AVERAGED_PART * options.steps, 1.0), LARGEST_DECAY)
    average, averaged = torch.zeros_like(parameters.detach()), 0

    def distance(batch: Batch, purpose: tuple[int, ...], candidate: Tensor) -> float:
        with torch.no_grad():
            return float(target.loss(draw(candidate, batch, *purpose), batch))

    judged = partial(distance, held["choice"], (1, 1))

    best, unfitted_loss, chosen = average.clone(), judged(average), 0
    best_loss = unfitted_loss
    if not math.isfinite(best_loss):
        raise ValueError("the sampler gives samples that are not finite: there is nothing to fit.")
    every = max(1, options.steps // options.checks)
    for step in range(1, options.steps + 1):
        batch = target.batch("fit", options.batch_size, stream(options.seed, 0, step, 0))
        if options.gradients:
            loss = target.loss(draw(parameters, batch, 0, step, 1), batch)
            optimizer.zero_grad()
            loss.backward()
            value = float(loss.detach())
        else:
            value = _estimate_gradient(parameters, options, step, partial(distance, batch, (0, step, 1)))
        assert parameters.grad is not None
        parameters.grad.nan_to_num_(0.0, 0.0, 0.0)  # of a predictor that is not differentiable at pure noise, for one
        torch.nn.utils.clip_grad_norm_([parameters], LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            average, averaged = torch.lerp(parameters, average, decay), averaged + 1
        if step % every == 0 or step == options.steps:
            corrected = average / (1.0 - decay**averaged)
            found = judged(corrected)
            if found < best_loss:
                best, best_loss, chosen = corrected.clone(), found, step
            elif not unfitted_loss - found > KEPT_PART * (unfitted_loss - best_loss):
                # The steps are too long: back to the best, with shorter ones.
                with torch.no_grad():
                    parameters.copy_(best)
                average, averaged = torch.zeros_like(best), 0
                optimizer.state.clear()
                for group in optimizer.param_groups:
                    group["lr"] *= BACK_OFF
        if progress is not None:
            progress(step, value)
    with torch.no_grad():
        batch = held["report"]
        unfitted = draw(torch.zeros_like(best), batch, 2, 1)
        fitted = draw(best, batch, 2, 1) if chosen else unfitted
        result = target.compare(fitted, unfitted, batch)
    is_fitted = chosen > 0 and result.is_nearer(SIGNIFICANT)
    return Fit(
        best if is_fitted else torch.zeros_like(best),
        is_fitted,
        result.fitted,
        result.unfitted,
        result.error,
        result.parts,
        chosen,
        drawn,
        time.perf_counter() - began,
    )


@torch.no_grad()
def _estimate_gradient(parameters: Tensor, options: FitOptions, step: int, loss: Callable[[Tensor], float]) -> float:
    """Put an estimate of the gradient in its place; return the mean loss."""
    generator = stream(options.seed, 0, step, 2)
    gradient, losses = torch.zeros_like(parameters), []
    for _ in range(options.directions):
        direction = torch.randn(len(parameters), generator=generator, dtype=torch.float64)
        pair = [loss(parameters + sign * options.spread * direction) for sign in (1.0, -1.0)]
        losses += pair
        gradient += direction * (pair[0] - pair[1]) / (2.0 * options.spread * options.directions)
    parameters.grad = gradient
    return sum(losses) / len(losses)


@contextmanager
def frozen(network: torch.nn.Module) -> Iterator[None]:
    """A network in evaluation mode whose weights take no gradients; both are put back afterwards."""
    trained, weights = network.training, [p for p in network.parameters() if p.requires_grad]
    network.eval()
    for p in weights:
        p.requires_grad_(False)
    try:
        yield
    finally:
        network.train(trained)
        for p in weights:
            p.requires_grad_(True)

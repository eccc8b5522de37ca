r"""Exact log-density by the probability-flow ODE, and bits per dimension of quantised data.

By the instantaneous change of variables (Song et al. 2021, section 4.3 and appendix D.2)

    log p(x_0) = log prior(x_T) + int div(velocity) dt;

``coordinates`` writes the flow in variables whose linear part leaves the integral in closed form, and what remains is
tr(d x0_hat / dx) along the path, which ``trace`` finds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..basics.checks import check_state
from ..basics.noise import Generators, sample_generators
from ..networks.denoisers import Denoiser
from ..sdes import SDE
from .coordinates import FlowCoordinates
from .solver import ODEOptions, integrate
from .trace import TraceEstimator, TraceOptions


@dataclass(frozen=True)
class LogProb:
    """Log-densities.

    Attributes:
        value: log p(x) in nats, shape (B,), float64.
        standard_error: Standard error of ``value``, shape (B,). It covers the noise of the trace estimate, not the
            solver's error. It is 0 for the exact trace. For fixed probes it comes from the replicates, and is nan if
            there is only one. For resampled probes it comes from the scatter of the trace along the path, which needs
            no second probe.
        latents: The codes, which are unit noise, shape (B, ...).
        calls: Network calls of each sample, shape (B,). Every call is a forward pass with ``num_probes`` derivatives.
        t_min: SDE time of the density, which is that of x_t at this time: of data with noise sigma(t_min).
    """

    value: Tensor
    standard_error: Tensor
    latents: Tensor
    calls: Tensor
    t_min: float

    @property
    def per_dimension(self) -> Tensor:
        """Nats per dimension, shape (B,)."""
        return self.value / self.latents[0].numel()


def log_prob(
    denoiser: Denoiser,
    sde: SDE,
    x: Tensor,
    trace: TraceOptions | None = None,
    options: ODEOptions | None = None,
    t_min: float | None = None,
    conditioning: Mapping[str, Tensor] | None = None,
    generator: Generators = None,
    progress: Callable[[int], object] | None = None,
) -> LogProb:
    """Log-density of continuous data under the probability flow, in nats.

    log p(x) = log prior(x_T) + log-determinant of the flow from t_min to t_max (Song et al. 2021, eq. 39), where the
    prior is N(0, prior_std^2 I) of the SDE. For quantised data see ``bits_per_dim``.

    Args:
        denoiser: (x_t, t, **conditioning) -> x0_hat. It must be differentiable and must not clip.
        sde: The SDE.
        x: Data, shape (B, ...), taken as the state at ``t_min``.
        trace: How the trace is found; see ``TraceOptions``.
        options: Settings of the solver.
        t_min: SDE time of the data; the SDE's own t_min if None.
        conditioning: Arguments of the denoiser with one row per sample, such as ``class_labels``.
        generator: Source of the probes: a list with one generator for each sample, or one generator, or None for
            torch's global state. In the last two cases the probes of a sample follow from the generator and from the
            sample's content, so that they do not depend on its batch mates.
        progress: Called with the number of samples that are done.

    Returns:
        The values with their standard errors, the latent codes and the calls.

    Raises:
        ValueError: Bad arguments.
        SolverError: The solver gives up; see ``integrate``.
    """
    trace = TraceOptions() if trace is None else trace
    options = ODEOptions() if options is None else options
    t_min = sde.t_min if t_min is None else t_min
    x = check_state(x)
    generators = [] if trace.method == "exact" else sample_generators(x, generator, "probes")
    result = integrate(
        denoiser,
        sde,
        x,
        t_start=t_min,
        t_end=sde.t_max,
        options=options,
        trace=TraceEstimator(trace, generators),
        conditioning=conditioning,
        progress=progress,
    )
    coordinates = FlowCoordinates(sde, t_min, sde.t_max, options.data_mean, options.data_std)
    end = result.solution.sample
    scales = x[0].numel() * (coordinates.log_scale(sde.t_max) - coordinates.log_scale(t_min))
    value = sde.prior_log_prob(end).cpu().double() + scales + result.log_density_change.mean(1)
    if trace.method == "exact":
        error = torch.zeros_like(value)
    elif trace.method == "resampled":
        error = result.variance.sqrt()
    elif trace.num_probes > 1:
        error = result.log_density_change.std(1) / math.sqrt(trace.num_probes)
    else:
        error = torch.full_like(value, math.nan)
    return LogProb(value, error, end / sde.prior_std, result.solution.calls, t_min)

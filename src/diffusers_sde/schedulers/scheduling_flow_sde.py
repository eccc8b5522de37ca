"""Rectified flow: stochastic and predictor-corrector sampling for flow-matching models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..basics.checks import check_number, check_numbers
from ..sampling.time_grids import WARPED
from ..sdes import RectifiedFlowSDE
from .arguments import sampler_arguments
from .config_checks import checked_own
from .families import Family
from .scheduling_sde import SDEScheduler
from .stock_configs import left_out_of, stock_class

LARGEST_MU = 100.0  # the shift is e^mu
_Times = TypeVar("_Times", float, Tensor)


def flow_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """What the config of a stock scheduler of flow-matching models says, as arguments of ``FlowSDEScheduler``."""
    for key in ("use_karras_sigmas", "use_exponential_sigmas"):
        if config.get(key):
            raise ValueError(f"{key}=True cannot be honoured for a flow; pass time_grid='karras' or 'log_snr'.")
    # Where the network is fed t itself, N = 1, the stock grid is one point: its pipelines bring their own.
    n = config.get("num_train_timesteps", 1000)
    ours: dict[str, Any] = {"time_grid": "uniform", "sampling_eps": 1.0 / n if n > 1 else 1e-3}
    if "flow_shift" in config and config.get("use_flow_sigmas"):
        ours["shift"] = config["flow_shift"]
    if "beta_start" in config and config.get("prediction_type") not in (None, "flow_prediction"):
        raise ValueError(
            f"use_flow_sigmas=True with prediction_type={config['prediction_type']!r}: a DDPM network on a flow's "
            "grid is not a flow model. Use VPSDEScheduler with use_flow_sigmas removed from the config."
        )
    if config.get("final_sigmas_type", "zero") != "zero":
        raise ValueError(f"final_sigmas_type={config['final_sigmas_type']!r} cannot be honoured for flow models.")
    ours["prediction_type"] = "flow_prediction"
    # UniPC's grid ends at 1/N before the shift, that of the others at 0.
    end = ours["sampling_eps"] if stock_class(config) == "UniPCMultistepScheduler" else 0.0
    return {**ours, **left_out_of(config, end)}


class FlowSDEScheduler(SDEScheduler):
    """Reverse SDE, predictor-corrector and probability-flow sampling on the straight path of a flow-matching model.

    x_t = (1 - t) x_0 + t eps. The probability flow is the model's own ODE; the SDE with the same marginals is
    dx = -x/(1 - t) dt + sqrt(2 t/(1 - t)) dw. Names and defaults of diffusers' FlowMatchEulerDiscreteScheduler are
    kept, and what its pipelines call sigma is t here.

    Args:
        num_train_timesteps: This is N, the scale of the network's timesteps: it is fed t N.
        shift: This factor moves uniform times towards the noise, t -> shift t / (1 + (shift - 1) t) (Esser et al. 2024,
            arXiv:2403.03206, section 5.3.2): the ``uniform`` and ``blended`` grids, ``timestep_spacing``, and sigmas
            that are passed. Grids in log-SNR (``sech``, ``log_snr``, ``karras``) do not move, nor does the path.
        use_dynamic_shifting: True takes the shift from ``mu``, which pipelines compute from the image size and pass to
            ``set_timesteps``, instead of ``shift``.
        base_shift: Pipelines read this number and the next three to compute ``mu``: it is mu for the smallest image.
        max_shift: Pipelines take this ``mu`` for the largest image.
        base_image_seq_len: Pipelines take an image of this many tokens for the smallest.
        max_image_seq_len: Pipelines take an image of this many tokens for the largest.
        time_shift_type: ``exponential`` shifts by t -> e^mu / (e^mu + 1/t - 1), ``linear`` has mu in place of e^mu.
        shift_terminal: The grid is stretched so that it ends at this t, unless it is None.
        prediction_type: The network predicts ``flow_prediction``, ``epsilon``, ``sample``, ``v_prediction``, ``score``
            or ``edm``.
        {common}
    """

    _families = {"flow": Family("a rectified-flow (flow-matching) model", flow_arguments, fixes_noise=True)}
    _compatibles = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]

    @sampler_arguments(snr=0.05, sampling_eps=0.01, timestep_spacing="linspace")
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int | None = 256,
        max_image_seq_len: int | None = 4096,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        prediction_type: str = "flow_prediction",
        **sampler: Any,
    ) -> None:
        self.register_to_config(**checked_own(self.config))
        self._mu: float | None = None
        self.setup(RectifiedFlowSDE())

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
        **foreign: Any,
    ) -> None:
        """Lay out the sampler; resets all state of an earlier run.

        Args:
            num_inference_steps: Noise levels. Each costs ``order`` model calls (the last one may cost fewer).
            device: Where ``timesteps`` live. All coefficients stay on the host.
            timesteps: Decreasing network timesteps t N to use as they are.
            sigmas: Decreasing times t instead; they are shifted like the scheduler's own grid, as flow-matching
                pipelines expect.
            mu: The shift, where ``use_dynamic_shifting`` is on (otherwise it is ignored, as diffusers does).
            **foreign: As in ``SDEScheduler.set_timesteps``.

        Raises:
            ValueError: ``mu`` is missing, or see ``SDEScheduler.set_timesteps``.
        """
        if self.config.use_dynamic_shifting and mu is None and timesteps is None:
            raise ValueError("mu must be passed to set_timesteps when use_dynamic_shifting is on.")
        self._mu = None if mu is None else check_number("mu", mu, at_least=-LARGEST_MU, at_most=LARGEST_MU)
        super().set_timesteps(num_inference_steps, device, timesteps, sigmas, **foreign)

    def level_times(self, num_inference_steps: int) -> Tensor:
        """As in ``SDEScheduler``; uniform times are shifted."""
        times = super().level_times(num_inference_steps)
        own_grid = self.config.time_grid is None and self.config.fitted_plan is None
        return self._shifted(times) if own_grid else times

    def _warp(self, times: Tensor) -> Tensor:
        return self._shifted(times)

    def _unwarped(self, time: float) -> float:
        return _shift(time, 1.0 / self._shift_factor)

    def _check_sampling_sigma(self) -> None:
        super()._check_sampling_sigma()
        config = self.config
        if config.sampling_sigma is not None and config.shift_terminal and config.time_grid in WARPED:
            raise ValueError(
                f"shift_terminal={config.shift_terminal!r} already ends the {config.time_grid!r} grid: pass "
                f"shift_terminal=None with sampling_sigma={config.sampling_sigma!r}."
            )

    def _levels_of_lists(self, timesteps: Any, sigmas: Any) -> tuple[Tensor, Tensor]:
        # CogView4 and GLM-Image feed the network the unshifted timesteps, at states of the shifted sigmas.
        times, fed = self._times_of_sigmas(sigmas), check_numbers("timesteps", timesteps)
        if len(times) != len(fed):
            raise ValueError(f"timesteps and sigmas must be of one length, got {len(fed)} and {len(times)}.")
        return times, fed

    def _sigmas(self, t: Tensor) -> Tensor:
        return t  # what flow-matching pipelines and training scripts call sigma

    def _training_times(self) -> Tensor:
        every = super()._training_times()
        # FlowMatchEulerDiscreteScheduler has them before set_timesteps with the shift that is known by then.
        return every if self.config.use_dynamic_shifting else _shift(every, self.config.shift)

    def _times_of_sigmas(self, sigmas: Sequence[float] | Tensor) -> Tensor:
        # Flow-matching pipelines call sigma what is t here, not the ratio sigma/alpha.
        values = check_numbers("sigmas", sigmas)
        values = values[:-1] if len(values) > 1 and float(values[-1]) == 0.0 else values
        if not bool(((values > 0) & (values <= 1)).all()):
            raise ValueError(f"sigmas of a flow must lie in (0, 1] (a final 0 is allowed), got {values.tolist()}.")
        return self._shifted(values)

    def last_time(self) -> float:
        """SDE time at which sampling ends."""
        # FlowMatchEulerDiscreteScheduler shifts the end of its grid once at construction and once more with the grid.
        end, config = self.stated_last_time(), self.config
        if config.sampling_sigma is not None or config.use_dynamic_shifting or config.time_grid not in WARPED:
            return end
        return _shift(end, config.shift)

    @property
    def _shift_factor(self) -> float:
        config = self.config
        if not config.use_dynamic_shifting or self._mu is None:
            return float(config.shift)
        return math.exp(self._mu) if config.time_shift_type == "exponential" else self._mu

    def _shifted(self, t: Tensor) -> Tensor:
        config = self.config
        t = _shift(t, self._shift_factor)
        if config.shift_terminal and float(t[-1]) < 1.0:  # a single level, of pure noise, has no end to stretch
            t = 1.0 - (1.0 - t) * (1.0 - config.shift_terminal) / (1.0 - t[-1])
        return t


def _shift(t: _Times, factor: float) -> _Times:
    return factor * t / (1.0 + (factor - 1.0) * t)

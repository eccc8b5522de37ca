"""Rectified flow: stochastic and predictor-corrector sampling for flow-matching models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..sdes import RectifiedFlowSDE
from .scheduling_sde import SDEScheduler, document_common_arguments


@document_common_arguments
class FlowSDEScheduler(SDEScheduler):
    """Reverse SDE, predictor-corrector and probability-flow sampling on the straight path of a flow-matching model.

    x_t = (1 - t) x_0 + t eps. The probability flow is the model's own ODE; the SDE with the same marginals is
    dx = -x/(1 - t) dt + sqrt(2 t/(1 - t)) dw.

    Args:
        num_train_timesteps: N, the scale of the network's timesteps: it is fed t N.
        shift: Moves the grid towards the noise, t -> shift t / (1 + (shift - 1) t) (Esser et al. 2024,
            arXiv:2403.03206, section 5.3.2).
        prediction_type: ``flow_prediction``, ``epsilon``, ``sample``, ``v_prediction``, ``score`` or ``edm``.
        {common}
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        prediction_type: str = "flow_prediction",
        predictor: str = "exponential",
        corrector: str | None = None,
        probability_flow: bool = False,
        stochasticity: float = 1.0,
        solver_order: int = 1,
        correct_steps: int = 1,
        snr: float = 0.05,
        langevin_norm: str = "sample",
        time_grid: str | None = "uniform",
        rho: float = 7.0,
        sampling_eps: float = 1e-3,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        denoise_final: bool = True,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        variance_type: str = "fixed_small",
        time_conditioning: str = "continuous",
        sigma_data: float = 0.5,
    ) -> None:
        if not shift > 0:
            raise ValueError(f"shift must be positive, got {shift!r}.")
        self._setup(RectifiedFlowSDE())

    def _times(self, num_inference_steps: int) -> Tensor:
        times = super()._times(num_inference_steps)
        return self.config.shift * times / (1.0 + (self.config.shift - 1.0) * times)

    def _times_of_sigmas(self, sigmas: Sequence[float] | Tensor) -> Tensor:
        # Flow-matching pipelines call sigma what is t here, not the ratio sigma/alpha.
        values = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
        return values[:-1] if len(values) > 1 and float(values[-1]) == 0.0 else values

"""Sub-variance-preserving SDE, the paper's best for likelihood."""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config

from ..parametrizations import TimeConditioning
from ..sdes import SubVPSDE
from .config_checks import checked_config
from .scheduling_sde import SDEScheduler, document_common_arguments


@document_common_arguments
class SubVPSDEScheduler(SDEScheduler):
    """Reverse SDE, predictor-corrector and probability-flow sampling on the sub-VP SDE.

    dx = -beta/2 x dt + sqrt(beta (1 - exp(-2 B(t)))) dw (Song et al. 2021, eq. 12). The official code has neither
    ancestral sampling nor a Langevin corrector for it; here every predictor and corrector applies.

    Args:
        num_train_timesteps: N, the scale of the network's timesteps.
        beta_start: beta(0) / N, in diffusers' convention: 1e-4 is the paper's beta_min = 0.1 for N = 1000.
        beta_end: beta(1) / N: 0.02 is the paper's beta_max = 20 for N = 1000.
        prediction_type: ``epsilon``, ``sample``, ``v_prediction``, ``flow_prediction``, ``score`` or ``edm``.
        {common}
    """

    _families = ("sub_vp",)

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        prediction_type: str = "epsilon",
        predictor: str = "exponential",
        corrector: str | None = None,
        probability_flow: bool = False,
        stochasticity: float | None = None,
        solver_order: int | None = None,
        solver_type: str = "heun",
        solver_correction: bool = True,
        gaussian_std: float = 0.05,
        correct_steps: int = 1,
        snr: float = 0.01,
        langevin_norm: str = "sample",
        time_grid: str | None = "sech",
        rho: float = 7.0,
        sampling_eps: float = 0.027,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        denoise_final: bool = True,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        variance_type: str | None = "fixed_small",
        time_conditioning: str = "continuous",
        sigma_data: float = 0.5,
    ) -> None:
        self.register_to_config(**checked_config(self.config))
        TimeConditioning(time_conditioning, num_train_timesteps)  # refuses N by name
        self._setup(SubVPSDE(num_train_timesteps * beta_start, num_train_timesteps * beta_end))

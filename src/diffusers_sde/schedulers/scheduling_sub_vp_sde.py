"""Sub-variance-preserving SDE, the paper's best for likelihood."""

from __future__ import annotations

from typing import Any

from ..networks.conditioning import TimeConditioning
from ..sdes import SubVPSDE
from .arguments import sampler_arguments
from .config_checks import checked_own
from .families import Family
from .scheduling_sde import SDEScheduler


class SubVPSDEScheduler(SDEScheduler):
    """Reverse SDE, predictor-corrector and probability-flow sampling on the sub-VP SDE.

    dx = -beta/2 x dt + sqrt(beta (1 - exp(-2 B(t)))) dw (Song et al. 2021, eq. 12). The official code has neither
    ancestral sampling nor a Langevin corrector for it; here every predictor and corrector applies.

    Args:
        num_train_timesteps: This is N, the scale of the network's timesteps.
        beta_start: This is beta(0) / N, in diffusers' convention: 1e-4 is the paper's beta_min = 0.1 for N = 1000.
        beta_end: This is beta(t_max) / N: 0.02 is the paper's beta_max = 20 for N = 1000. It may equal ``beta_start``.
        prediction_type: The network predicts ``epsilon``, ``sample``, ``v_prediction``, ``flow_prediction``, ``score``
            or ``edm``.
        t_max: This is the SDE time of the prior; beta is in units of 1/time. Networks that are fed t itself
            see values up to it.
        {common}
    """

    _families = {"sub_vp": Family("a sub-VP model")}

    @sampler_arguments(sampling_eps=0.027)
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        prediction_type: str = "epsilon",
        t_max: float = 1.0,
        **sampler: Any,
    ) -> None:
        self.register_to_config(**checked_own(self.config))
        TimeConditioning(self.config.time_conditioning, num_train_timesteps)  # refuses N by name
        self.setup(SubVPSDE.from_ends(num_train_timesteps * beta_start, num_train_timesteps * beta_end, t_max))

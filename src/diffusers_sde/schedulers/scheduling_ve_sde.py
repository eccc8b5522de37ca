"""Variance-exploding SDE: NCSN, SMLD and NCSN++."""

from __future__ import annotations

from typing import Any

from ..sdes import VESDE
from .arguments import sampler_arguments
from .config_checks import checked_own
from .scheduling_sde import SDEScheduler


class VESDEScheduler(SDEScheduler):
    """Reverse SDE, predictor-corrector and probability-flow sampling on the VE SDE.

    dx = sigma(t) sqrt(2 log(sigma_max/sigma_min)) dw, sigma(t) = sigma_min (sigma_max/sigma_min)^t (Song et al. 2021,
    eq. 9 and 30). The state starts at N(0, sigma_max^2 I): use a pipeline that multiplies by ``init_noise_sigma``, such
    as ``SDEPipeline`` (diffusers' DDPMPipeline and DDIMPipeline do not).

    The defaults describe the networks that diffusers' ScoreSdeVeScheduler serves: fed sigma, returning the score. Its
    sigma_max of 1348 belongs to one of them; 50 is the paper's value for CIFAR-10 on [0, 1].

    Args:
        num_train_timesteps: N, the scale of the network's timesteps under ``continuous`` conditioning.
        sigma_min: Smallest noise, in units of the data.
        sigma_max: Largest noise, in units of the data.
        prediction_type: ``score``, ``epsilon``, ``sample``, ``v_prediction``, ``flow_prediction`` or ``edm``.
        preconditioning: None, or ``edm`` for networks of diffusers' EDM schedulers, which call their preconditioned
            output ``epsilon`` or ``v_prediction``.
        {common}
    """

    _families = ("ve", "edm")

    @sampler_arguments(snr=0.15, sampling_eps=1e-5, timestep_spacing="linspace", time_conditioning="sigma")
    def __init__(
        self,
        num_train_timesteps: int = 2000,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        prediction_type: str = "score",
        preconditioning: str | None = None,
        **sampler: Any,
    ) -> None:
        self.register_to_config(**checked_own(self.config))
        self.setup(VESDE(sigma_min, sigma_max))

"""Variance-exploding SDE: NCSN, SMLD and NCSN++."""

from __future__ import annotations

from typing import Any

from ..sdes import VESDE
from .arguments import sampler_arguments
from .config_checks import checked_own
from .families import Family
from .scheduling_sde import SDEScheduler
from .stock_configs import named_grid


def ve_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """What the config of ScoreSdeVeScheduler says, as arguments of ``VESDEScheduler``."""
    # ScoreSdeVeScheduler runs Algorithm 2 of the paper.
    corrects = config.get("correct_steps", 1) > 0
    return {
        "time_grid": "uniform",
        "predictor": "reverse_diffusion",
        "corrector": "langevin" if corrects else None,
        "correct_steps": max(config.get("correct_steps", 1), 1),
    }


def edm_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """What the config of a stock scheduler of EDM models says, as arguments of ``VESDEScheduler``."""
    if config.get("final_sigmas_type", "zero") != "zero":
        raise ValueError(f"final_sigmas_type={config['final_sigmas_type']!r} cannot be honoured for EDM models.")
    schedule = config.get("sigma_schedule", "karras")
    video = config.get("timestep_type") == "continuous"
    if video and config.get("prediction_type") != "v_prediction":
        raise ValueError(
            "timestep_type='continuous' means EDM's preconditioning with prediction_type='v_prediction' only, got "
            f"prediction_type={config.get('prediction_type')!r}."
        )
    if video and (config.get("sigma_min") is None or config.get("sigma_max") is None):
        raise ValueError("timestep_type='continuous' needs sigma_min and sigma_max in the config.")
    return {
        "preconditioning": "edm",
        "time_conditioning": "edm",
        "time_grid": "karras" if schedule == "karras" else "log_snr",
        **({"sigma_data": 1.0} if video else {}),
        **({"time_grid": named_grid(config)["time_grid"] or "karras"} if video else {}),
    }


class VESDEScheduler(SDEScheduler):
    """Reverse SDE, predictor-corrector and probability-flow sampling on the VE SDE.

    dx = sigma(t) sqrt(2 log(sigma_max/sigma_min)) dw, sigma(t) = sigma_min (sigma_max/sigma_min)^t (Song et al. 2021,
    eq. 9 and 30). The state starts at N(0, sigma_max^2 I): use a pipeline that multiplies by ``init_noise_sigma``, such
    as ``SDEPipeline`` (diffusers' DDPMPipeline and DDIMPipeline do not).

    The defaults describe the networks that diffusers' ScoreSdeVeScheduler serves: fed sigma, returning the score. Its
    sigma_max of 1348 belongs to one of them; 50 is the paper's value for CIFAR-10 on [0, 1].

    Args:
        num_train_timesteps: This is N, the scale of the network's timesteps under ``continuous`` conditioning.
        sigma_min: This is the smallest noise, at t = 0, in units of the data.
        sigma_max: This is the largest noise, at t = 1, in units of the data.
        prediction_type: The network predicts ``score``, ``epsilon``, ``sample``, ``v_prediction``, ``flow_prediction``
            or ``edm``.
        preconditioning: ``edm`` is for networks of diffusers' EDM schedulers, which call their preconditioned output
            ``epsilon`` or ``v_prediction``; None is for all others.
        {common}
    """

    _families = {
        "ve": Family("a variance-exploding model", ve_arguments),
        "edm": Family("an EDM-preconditioned variance-exploding model", edm_arguments),
    }

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

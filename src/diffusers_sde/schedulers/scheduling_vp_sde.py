"""Variance-preserving SDE: DDPM and everything trained like it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from ..networks.conditioning import TimeConditioning
from ..sdes import SDE, VPSDE, DiscreteVPSDE, ddpm_betas
from .arguments import sampler_arguments
from .config_checks import checked_own
from .families import Family
from .scheduling_sde import SDEScheduler
from .stock_configs import FIXED_SPACING, left_out_of, named_grid, stock_arguments, stock_class


def vp_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """What the config of a stock scheduler of DDPM-type models says, as arguments of ``VPSDEScheduler``."""
    if "beta_min" in config:  # ScoreSdeVp: the paper's continuous VP SDE, whose networks are fed 999 t
        n = config.get("num_train_timesteps", 2000)
        return {
            "beta_start": config["beta_min"] / n,
            "beta_end": config["beta_max"] / n,
            "continuous": True,
            "time_grid": "uniform",
            "time_conditioning": "score_sde",
        }
    if not any(config.get(key) for key in ("trained_betas", "beta_schedule", "beta_start")):
        raise ValueError("The config names no betas (IPNDMScheduler's are its own); pass trained_betas.")
    ours = named_grid(config)
    if ours["time_grid"] is not None:
        # diffusers' sigma grids end at the first table entry.
        ours["sampling_eps"] = 1.0 / config.get("num_train_timesteps", 1000)
    # Where a class has no such argument, the key was left by the one before it.
    owner = stock_arguments().get(stock_class(config) or "", config)
    if config.get("set_alpha_to_one") is False and "set_alpha_to_one" in owner:
        ours["final_sigmas_type"] = "sigma_min"
    spacing = FIXED_SPACING.get(stock_class(config) or "")
    if spacing is not None:
        ours["timestep_spacing"] = spacing
    return {**ours, **left_out_of(config)}


class VPSDEScheduler(SDEScheduler):
    """Reverse SDE, predictor-corrector and probability-flow sampling on the VP SDE, for any DDPM-type network.

    dx = -beta/2 x dt + sqrt(beta) dw (Song et al. 2021, eq. 11). Names and defaults of diffusers' DDPM and DDIM
    schedulers are kept, so their configs load; ``clip_sample`` alone is off by default, because the config of a latent
    model that does not mention it must not be clipped.

    A network that was trained with the constant beta(t) = 1 on t in [0, 10], and is fed t itself, is described by

        VPSDEScheduler(
            num_train_timesteps=1, beta_start=1.0, beta_end=1.0, continuous=True, t_max=10.0, time_conditioning="time"
        )

    Args:
        num_train_timesteps: This is N, the length of the table and the scale of the network's timesteps.
        beta_start: This is the first variance of the table, or beta(0) / N where ``continuous`` is True.
        beta_end: This is the last variance of the table, or beta(t_max) / N where ``continuous`` is True. It may equal
            ``beta_start``.
        beta_schedule: The table is ``linear``, ``scaled_linear``, ``squaredcos_cap_v2``, ``sigmoid``, ``exp`` or
            ``laplace``.
        trained_betas: These variances are used instead, unless they are None.
        prediction_type: The network predicts ``epsilon``, ``sample``, ``v_prediction``, ``flow_prediction``, ``score``
            or ``edm``.
        rescale_betas_zero_snr: True rescales the table to zero terminal SNR.
        continuous: False is for the SDE that passes through the DDPM table; True is for the paper's VP SDE with
            beta(t) from N beta_start at t = 0 to N beta_end at t = t_max, which ``linear`` discretises for t_max = 1.
        thresholding: True clips x0_hat at its own ``dynamic_thresholding_ratio`` quantile and rescales it (Saharia et
            al. 2022, arXiv:2205.11487); this is not for latent models.
        dynamic_thresholding_ratio: ``thresholding`` clips at this quantile of the absolute values.
        sample_max_value: The threshold of ``thresholding`` is at most this value.
        final_sigmas_type: ``zero`` ends with x0_hat; ``sigma_min`` with a noise-free step to the first table entry, as
            DDIM does where ``set_alpha_to_one`` is false. Grids with a name end at that entry, and so with x0_hat.
        t_max: This is the SDE time of the prior, where ``continuous`` is True; beta is in units of 1/time. Networks
            that are fed t itself see values up to it, and those that are fed counts see t N / t_max. A table lies on
            [0, 1].
        {common}
    """

    _families = {
        "vp": Family("a variance-preserving (DDPM-type) model", vp_arguments, has_thresholding=True, fixes_noise=True)
    }
    _compatibles = [e.name for e in KarrasDiffusionSchedulers if not e.name.startswith("EDM")]

    @sampler_arguments(time_conditioning=None)
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        continuous: bool = False,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        final_sigmas_type: str = "zero",
        t_max: float = 1.0,
        **sampler: Any,
    ) -> None:
        self.register_to_config(**checked_own(self.config))
        if self.config.time_conditioning is None:
            self.register_to_config(time_conditioning="continuous" if continuous else "discrete")
        if continuous and (beta_schedule != "linear" or trained_betas is not None or rescale_betas_zero_snr):
            raise ValueError(
                "continuous=True is the paper's VP SDE with linear beta(t): it takes beta_schedule='linear', no "
                f"trained_betas and no rescale_betas_zero_snr, got beta_schedule={beta_schedule!r}."
            )
        if t_max != 1.0 and not continuous:
            raise ValueError(f"t_max must be 1 for a table of betas, got {t_max!r}: pass continuous=True.")
        sde: SDE
        if continuous:
            TimeConditioning(self.config.time_conditioning, num_train_timesteps)  # refuses N by name
            sde = VPSDE.from_ends(num_train_timesteps * beta_start, num_train_timesteps * beta_end, t_max)
        else:
            betas = ddpm_betas(beta_schedule, num_train_timesteps, beta_start, beta_end, trained_betas)
            if len(betas) != num_train_timesteps:
                raise ValueError(
                    f"trained_betas has {len(betas)} entries, but num_train_timesteps is {num_train_timesteps!r}."
                )
            sde = DiscreteVPSDE.from_betas(betas, rescale_betas_zero_snr)
            self.betas = betas.float()
            self.alphas_cumprod = torch.tensor(sde.alphas_cumprod, dtype=torch.float32)
        self.setup(sde, final_time=sde.t_max / num_train_timesteps if final_sigmas_type == "sigma_min" else None)
        # A table with zero terminal SNR is what the network was trained on: epsilon determines nothing at its end.
        starts_at_the_end = self.config.time_grid is not None or self.config.timestep_spacing != "leading"
        if starts_at_the_end and float(sde.log_alpha(sde.t_max)) < -80.0:
            self._make_plan(self.level_times(min(self.config.num_train_timesteps, 3) - 1))

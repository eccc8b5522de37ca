"""Forward SDEs. A new one is a file with ``_log_alpha`` and ``_log_sigma``, and a line in ``SDES``."""

from .base import SDE, as_time, expand_like
from .cosine import CosineSDE
from .discrete_vp import BETA_SCHEDULES, DiscreteVPSDE, ddpm_betas, rescale_to_zero_terminal_snr
from .edm import EDMSDE
from .rectified_flow import RectifiedFlowSDE
from .sub_vp import SubVPSDE
from .ve import VESDE, smld_sigmas
from .vp import VPSDE, LinearBetaSDE

SDES: dict[str, type[SDE]] = {
    "ve": VESDE,
    "vp": VPSDE,
    "sub_vp": SubVPSDE,
    "discrete_vp": DiscreteVPSDE,
    "cosine": CosineSDE,
    "edm": EDMSDE,
    "rectified_flow": RectifiedFlowSDE,
}

__all__ = [
    "BETA_SCHEDULES",
    "EDMSDE",
    "SDE",
    "SDES",
    "VESDE",
    "VPSDE",
    "CosineSDE",
    "DiscreteVPSDE",
    "LinearBetaSDE",
    "RectifiedFlowSDE",
    "SubVPSDE",
    "as_time",
    "ddpm_betas",
    "expand_like",
    "rescale_to_zero_terminal_snr",
    "smld_sigmas",
]

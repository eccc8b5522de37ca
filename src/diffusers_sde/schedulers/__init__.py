"""Schedulers on the diffusers interface, one per SDE."""

from .scheduling_flow_sde import FlowSDEScheduler
from .scheduling_sde import SDEScheduler, SDESchedulerOutput
from .scheduling_sub_vp_sde import SubVPSDEScheduler
from .scheduling_ve_sde import VESDEScheduler
from .scheduling_vp_sde import VPSDEScheduler

__all__ = [
    "FlowSDEScheduler",
    "SDEScheduler",
    "SDESchedulerOutput",
    "SubVPSDEScheduler",
    "VESDEScheduler",
    "VPSDEScheduler",
]

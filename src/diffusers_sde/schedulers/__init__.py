"""Schedulers on the diffusers interface, one per SDE."""

from .scheduling_flow_sde import FlowSDEScheduler
from .scheduling_sde import SDEScheduler, SDESchedulerOutput
from .scheduling_sub_vp_sde import SubVPSDEScheduler
from .scheduling_ve_sde import VESDEScheduler
from .scheduling_vp_sde import VPSDEScheduler

SCHEDULERS: dict[str, type[SDEScheduler]] = {
    cls.__name__: cls for cls in (VPSDEScheduler, VESDEScheduler, FlowSDEScheduler, SubVPSDEScheduler)
}

__all__ = [
    "SCHEDULERS",
    "FlowSDEScheduler",
    "SDEScheduler",
    "SDESchedulerOutput",
    "SubVPSDEScheduler",
    "VESDEScheduler",
    "VPSDEScheduler",
]

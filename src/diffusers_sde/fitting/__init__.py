"""Samplers fitted to a network: where it has to be called."""

from .grids import profile_grid

__all__ = ["profile_grid"]

"""What a network is fed for SDE time t, and the way back.

A conditioning is a pair of functions, time to timestep and timestep to time. A new one is such a pair and one line in
``TIME_CONDITIONINGS``, or, outside the package, in the ``time_conditionings`` of a scheduler class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..basics.checks import check_choice, check_integer
from ..sdes import SDE, as_time


@dataclass(frozen=True)
class TimeMaps:
    """The two functions of a conditioning. Both take and return tensors of any one shape.

    Attributes:
        timestep: (SDE, t, N) -> what the network is fed at SDE time t.
        time: (SDE, timestep, N) -> the SDE time; the inverse of ``timestep`` in its second argument.
        meaning: What the network is fed, in words for reports, with ``{n}`` for N and ``{last}`` for N - 1.
        log_sigma: Where the network is fed a function of the noise level alone: timestep -> log(sigma/alpha).
        smallest_n: Smallest N with which ``timestep`` can be inverted.
    """

    timestep: Callable[[SDE, Tensor, int], Tensor]
    time: Callable[[SDE, Tensor, int], Tensor]
    meaning: str = "a function of its own"
    log_sigma: Callable[[Tensor], Tensor] | None = None
    smallest_n: int = 1


def noise_maps(
    of_log_sigma: Callable[[Tensor], Tensor], log_sigma: Callable[[Tensor], Tensor], meaning: str
) -> TimeMaps:
    """The maps of a network that is fed a function of log(sigma/alpha), given that function and its inverse."""
    return TimeMaps(
        lambda sde, t, n: of_log_sigma(-0.5 * sde.log_snr(t)),
        lambda sde, timestep, n: sde.time_of(-2.0 * log_sigma(timestep)),
        meaning,
        log_sigma,
        smallest_n=2,
    )


TIME_CONDITIONINGS: dict[str, TimeMaps] = {
    "discrete": TimeMaps(
        lambda sde, t, n: t / sde.t_max * n - 1.0,
        lambda sde, timestep, n: (timestep + 1.0) / n * sde.t_max,
        "the index of a table of {n} timesteps",
        smallest_n=2,
    ),
    "continuous": TimeMaps(
        lambda sde, t, n: t / sde.t_max * n, lambda sde, timestep, n: timestep / n * sde.t_max, "t / t_max times {n}"
    ),
    "score_sde": TimeMaps(
        lambda sde, t, n: t / sde.t_max * (n - 1),
        lambda sde, timestep, n: timestep / (n - 1) * sde.t_max,
        "t / t_max times {last}",
        smallest_n=2,
    ),
    "time": TimeMaps(lambda sde, t, n: t, lambda sde, timestep, n: timestep, "t itself"),
    "sigma": noise_maps(torch.exp, torch.log, "the noise level sigma"),
    "log_sigma": noise_maps(lambda value: value, lambda value: value, "log sigma"),
    "edm": noise_maps(lambda value: 0.25 * value, lambda value: 4.0 * value, "log(sigma)/4"),
}


@dataclass(frozen=True)
class TimeConditioning:
    """What the network is fed for SDE time t, and the way back.

    Maps that differ by a fraction of a step are in use, and a checkpoint works only with its own. With u = t / t_max:

    * ``discrete``: u N - 1, the index into a DDPM table of N entries (diffusers' timesteps);
    * ``continuous``: u N (networks trained by this package; flow-matching models);
    * ``score_sde``: u (N - 1) (the paper's official VP and sub-VP networks, 999 t);
    * ``time``: t itself, from 0 to t_max;
    * ``sigma``: sigma(t)/alpha(t) (the paper's VE networks and diffusers' ``google/ncsnpp-*``);
    * ``log_sigma``: its logarithm; ``edm``: a quarter of that (c_noise of Karras et al. 2022).

    Args:
        name: One of the above, or any name together with ``maps``.
        num_train_timesteps: N.
        maps: The pair of functions; None for that of the name in ``TIME_CONDITIONINGS``.

    Raises:
        ValueError: An unknown name, or an N with which the maps cannot be inverted.
    """

    name: str
    num_train_timesteps: int = 1000
    maps: TimeMaps | None = None

    def __post_init__(self) -> None:
        if self.maps is None:
            check_choice("time_conditioning", self.name, TIME_CONDITIONINGS)
        # A flow may be fed t itself; a table of one entry is none.
        check_integer("num_train_timesteps", self.num_train_timesteps, at_least=self._maps.smallest_n)

    @property
    def _maps(self) -> TimeMaps:
        return TIME_CONDITIONINGS[self.name] if self.maps is None else self.maps

    @property
    def is_of_noise(self) -> bool:
        """Whether the network is fed a function of the noise level sigma/alpha, whatever the time."""
        return self._maps.log_sigma is not None

    @property
    def meaning(self) -> str:
        """What the network is fed, in words."""
        return self._maps.meaning.format(n=self.num_train_timesteps, last=self.num_train_timesteps - 1)

    def timestep(self, sde: SDE, t: Tensor | float) -> Tensor:
        """The network's input for SDE time ``t``, same shape."""
        return self._maps.timestep(sde, as_time(t), self.num_train_timesteps)

    def time(self, sde: SDE, timestep: Tensor | float) -> Tensor:
        """The SDE time at which the network is fed ``timestep``: the inverse of ``timestep``."""
        return self._maps.time(sde, as_time(timestep), self.num_train_timesteps)

    def lies_on(self, sde: SDE, timestep: Tensor | float) -> Tensor:
        """Whether the path has a time at which the network is fed ``timestep``, up to round-off; same shape.

        Counts may be rounded to the precision of ``timestep``, and sigmas to a thousandth: lists of sigmas that go
        around are rounded to a few digits.
        """
        c = as_time(timestep)
        rounded = isinstance(timestep, Tensor) and timestep.dtype in (torch.float16, torch.bfloat16)
        slack = 2.0 * torch.finfo(timestep.dtype).eps if rounded else 0.0  # type: ignore[union-attr]
        if self._maps.log_sigma is not None:
            log_sigma = self._maps.log_sigma(c)
            low, high = (-0.5 * float(sde.log_snr(t)) for t in (0.0, sde.t_max))
            slack = max(slack, 1e-3)
            return (log_sigma >= low - slack) & (log_sigma <= high + slack)
        u = self.time(sde, c) / sde.t_max
        return (u >= -1e-9) & (u <= 1.0 + max(slack, 1e-6))

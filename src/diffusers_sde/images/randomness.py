"""Everything random about a training sample is a function of the seed and of the sample's number.

Samples are numbered 0, 1, 2, ... through the whole run, epoch after epoch. Which image a number stands for, its crop,
its time and its noise do not depend on the number of processes, on gradient accumulation, on the device or on where a
run was interrupted: a run on another machine layout, or resumed, sees the same samples.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

# Independent streams of one seed.
ORDER, AUGMENTATION, NOISE, LATENT_NOISE = 0, 1, 2, 3


class SampleRandom:
    """Independent random numbers for every sample number, from a counter-based generator (Philox).

    Args:
        seed: Any integer >= 0.
        stream: Numbers of different streams are independent.
    """

    def __init__(self, seed: int, stream: int) -> None:
        self._bits = np.random.Philox(key=(seed << 8) + stream)
        self._state = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def __call__(self, number: int) -> np.random.Generator:
        """The generator of sample ``number``, at its beginning; valid until the next call.

        Moving one generator to another counter costs a microsecond, building one fifty.
        """
        self._state["state"]["counter"][:] = (0, 0, 0, number)
        self._state["buffer_pos"] = 4
        self._state["has_uint32"] = 0
        self._bits.state = self._state
        return self._generator


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of ``n`` images in an epoch, shape (n,)."""
    return SampleRandom(seed, ORDER)(epoch).permutation(n)

"""Averages of the weights over the run, diffusers' exponential one and EDM2's power function, and their use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from .adapters import trained_parameters
from .sharding import copy_whole


class PowerEMA(EMAModel):
    """Average with weights proportional to step^gamma, whose width is a fixed fraction of the run so far.

        decay(n) = (1 - 1/n)^(gamma + 1)    (Karras et al. 2024, arXiv:2312.02696, eq. 127)

    Args:
        parameters: The weights to average.
        relative_std: Standard deviation of the averaging profile, as a fraction of the steps so far, in (0, 0.28];
            the paper's models do best between 0.05 and 0.15.
        foreach: See ``EMAModel``.
    """

    def __init__(self, parameters, relative_std: float, foreach: bool = False) -> None:  # type: ignore[no-untyped-def]
        super().__init__(parameters, foreach=foreach)
        self.exponent = power_exponent(relative_std)

    def get_decay(self, optimization_step: int) -> float:
        """Decay of update ``optimization_step`` = 1, 2, ...; the first one copies."""
        return (1.0 - 1.0 / max(optimization_step, 1)) ** (self.exponent + 1.0)


def power_exponent(relative_std: float) -> float:
    """The gamma for which s^gamma on [0, 1] has this standard deviation.

    The root of sigma^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) with gamma > 0 (ibid., eq. 126).

    Raises:
        ValueError: ``relative_std`` not below 12^-1/2, the width of the plain mean.
    """
    if not 0.0 < relative_std < 12.0**-0.5:
        raise ValueError(f"relative_std must lie in (0, 0.288), got {relative_std!r}.")
    precision = relative_std**-2
    return float(np.roots([1.0, 7.0, 16.0 - precision, 12.0 - precision]).real.max())


@contextmanager
def averaged_weights(
    accelerator: Accelerator,
    model: Any,
    ema: EMAModel | None,
    whole_network: nn.Module | None,
    is_compiled: bool,
) -> Iterator[Any]:
    """The network in evaluation mode with its averaged weights, for a while; to be called on all processes.

    It is not compiled: that would be done again for evaluation, and for every other size of a batch.

    Args:
        accelerator: Has prepared the network.
        model: The network as it was prepared.
        ema: The average; None for the weights as they are.
        whole_network: A network of the same architecture on the host, which is not sharded; None where no network is.
        is_compiled: Whether the network was compiled.
    """
    if whole_network is not None:
        copy_whole(model.parameters() if ema is None else ema.shadow_params, whole_network)
        yield whole_network.to(accelerator.device).eval()
        whole_network.to("cpu")
        return
    network = accelerator.unwrap_model(model)
    parameters = trained_parameters(network)
    if ema is not None:
        ema.store(parameters)
        ema.copy_to(parameters)
    network.eval()
    try:
        with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
            yield network
    finally:
        network.train()
        if ema is not None:
            ema.restore(parameters)

"""What the middle of a denoising network makes of images: features that nobody has to train.

A network that has learnt to take noise from images has learnt what they show. The activations of its middle tell
classes apart (Baranchuk et al. 2022, arXiv:2112.03126) and serve as a perceptual loss (Lin & Yang 2024,
arXiv:2401.00110).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..networks.denoisers import Denoiser
from ..sdes import SDE


def middle_of(network: Any) -> nn.Module | None:
    """The block in the middle of a U-Net, or of a row of transformer blocks; None where no such block is known."""
    middle = getattr(network, "mid_block", None)
    if isinstance(middle, nn.Module):
        return middle
    for name in ("transformer_blocks", "blocks", "layers"):
        blocks = getattr(network, name, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks) > 0:
            return blocks[(len(blocks) - 1) // 2]
    return None


class _Reached(Exception):
    """The middle of the network, behind which nothing has to be computed."""

    def __init__(self, activations: Any) -> None:
        super().__init__()
        self.activations = activations


def _stop(module: nn.Module, arguments: Any, output: Any) -> None:
    raise _Reached(output)


class MiddleFeatures:
    """The mean over all places of the activations of a network's middle, for images without noise: (B, ...) -> (B, C).

    Args:
        middle: The block whose output is taken: (B, C, H, W), or tokens (B, T, C).
        denoiser: (x_t, t) -> x0_hat, which calls the network that ``middle`` belongs to.
        sde: The SDE.
        t: The time that the network is told, shape (). Images are scaled by alpha(t); no noise is added.
    """

    def __init__(self, middle: nn.Module, denoiser: Denoiser, sde: SDE, t: Tensor) -> None:
        self._middle, self._denoiser, self._sde, self._t = middle, denoiser, sde, t

    def __call__(self, images: Tensor) -> Tensor:
        """The features of images, shape (B, ...), in float32.

        Raises:
            ValueError: The middle does not return one tensor of one of these shapes.
        """
        handle = self._middle.register_forward_hook(_stop)
        try:
            self._denoiser(images * float(self._sde.alpha(self._t)), self._t)
            activations: Any = None
        except _Reached as reached:
            activations = reached.activations
        finally:
            handle.remove()
        if not isinstance(activations, Tensor) or activations.ndim not in (3, 4) or len(activations) != len(images):
            got = tuple(activations.shape) if isinstance(activations, Tensor) else type(activations).__name__
            raise ValueError(
                f"middle must return a tensor of shape (B, C, H, W) or (B, T, C) for {len(images)} images, got {got}."
            )
        return activations.float().mean(1 if activations.ndim == 3 else (2, 3))

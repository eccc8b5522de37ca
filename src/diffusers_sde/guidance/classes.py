"""Generation by class: the scores of p(x) and p(y | x) are added, by Bayes' rule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from ..basics.checks import check_pair
from ..networks.denoisers import Denoiser
from ..sdes import SDE, expand_like
from .common import bounded_path, check_scale


def classifier_guidance(
    denoiser: Denoiser, sde: SDE, log_prob: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0
) -> Denoiser:
    """Guide by a classifier of noisy data: x0_hat + scale (sigma^2 / alpha) grad log p_t(y | x_t).

    Args:
        denoiser: The unconditional one.
        sde: Its SDE.
        log_prob: (x_t, t) -> log p_t(y | x_t) in nats, shape (B,), differentiable. It must know the noise level.
        scale: 1 is Bayes' rule. Other values raise p_t(y | x_t) to this power; those above 1 sharpen it.

    Raises:
        ValueError: ``scale`` is negative, not finite or too large.

    Reference:
        Song et al. 2021, eq. 14 and appendix I.1; scale: Dhariwal & Nichol 2021, arXiv:2105.05233, section 4.
    """
    check_scale("scale", scale)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        t, alpha, sigma = bounded_path(sde, t, x)
        x0_hat = denoiser(x, t)
        if scale == 0.0:
            return x0_hat
        # The log-likelihood needs second derivatives, and fused attention kernels have none.
        again = torch.is_grad_enabled() and x.requires_grad
        kernels = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH) if again else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), kernels:
            at = x if again else x.detach().clone().requires_grad_()
            gradient = torch.autograd.grad(log_prob(at, t).sum(), at, create_graph=again)[0]
        return x0_hat + scale * sigma**2 / alpha * gradient

    return denoise


def classifier_free_guidance(
    denoiser: Callable[[Tensor, Tensor, Tensor], Tensor],
    condition: Tensor,
    null_condition: Tensor,
    scale: float = 1.0,
) -> Denoiser:
    """Guide by the difference of a conditional and an unconditional estimate, both from one batched call.

    x0_hat = x0_hat(null) + scale (x0_hat(condition) - x0_hat(null)), which with exact denoisers is classifier guidance
    with the same scale. Scale 1 calls the conditional half only, and scale 0 the unconditional half only.

    Args:
        denoiser: (x_t, t, condition) -> x0_hat.
        condition: The conditions, one row per sample, shape (B, ...).
        null_condition: The value that the network takes for "no condition", broadcastable to ``condition``.
        scale: 0 is unconditional, 1 conditional, larger values push away from the unconditional estimate.

    Raises:
        ValueError: ``scale`` is negative, not finite or too large; or, at a call, the batch does not fit the
            conditions.

    Reference:
        Ho & Salimans 2022, arXiv:2207.12598, eq. 6, with scale = 1 + w.
    """
    check_scale("scale", scale)
    null_condition = torch.as_tensor(null_condition).to(condition).expand_as(condition)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if len(condition) != len(x):
            raise ValueError(f"condition has {len(condition)} rows, but the batch has {len(x)} samples.")
        if scale in (0.0, 1.0):
            return denoiser(x, t, condition if scale == 1.0 else null_condition)
        both = denoiser(torch.cat([x, x]), torch.cat([t, t]) if t.ndim else t, torch.cat([condition, null_condition]))
        conditional, unconditional = both.chunk(2)
        return torch.lerp(unconditional, conditional, scale)

    return denoise


def guide_within(interval: tuple[float, float] | None, inside: Denoiser, outside: Denoiser, sde: SDE) -> Denoiser:
    """Call ``inside`` where sigma/alpha lies in the interval, and ``outside`` elsewhere.

    Args:
        interval: Smallest and largest noise-to-signal ratio sigma/alpha, in units of the data; the same numbers mean
            the same noise for every SDE. None means everywhere.
        inside: The guided denoiser.
        outside: The conditional denoiser without guidance. Of the two, only the one that is needed is called.
        sde: Their SDE.

    Raises:
        ValueError: ``interval`` is not two increasing numbers >= 0.

    Reference:
        Kynkäänniemi et al. 2024, arXiv:2404.07724.
    """
    check_interval(interval)
    if interval is None:
        return inside
    low, high = interval

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        ratio = torch.exp(-0.5 * sde.log_snr(t))
        within = (ratio >= low) & (ratio <= high)
        if bool(within.all()):
            return inside(x, t)
        if not bool(within.any()):
            return outside(x, t)
        return torch.where(expand_like(within, x).to(x.device), inside(x, t), outside(x, t))

    return denoise


def check_interval(interval: tuple[float, float] | None) -> None:
    """Raise a ValueError unless this is an interval of noise-to-signal ratios, or None."""
    if interval is not None:
        check_pair("guidance_interval (sigma/alpha)", interval, at_least=0.0)

"""DiffusionNFT: learning from rewards by denoising what was drawn (Zheng et al. 2025, arXiv:2509.16117).

No density of a step is needed, so that any sampler may draw the images. The paper has velocities; since every
prediction is an affine function of x0_hat, its equations read the same for denoisers, on every SDE. With x0_old, the
estimate of the network that has drawn the images x_0, and x_t = alpha x_0 + sigma eps,

    x0_plus = (1 - beta) x0_old + beta x0_hat,    x0_minus = (1 + beta) x0_old - beta x0_hat,
    minimise  E r |x0_plus - x_0|^2 + (1 - r) |x0_minus - x_0|^2    (equation 5),

where r in [0, 1] is the reward as a probability. Its minimum is

    x0_hat = x0_old + (2/beta) P(good | x_t) (E[x_0 | x_t, good] - x0_old)    (theorem 3.2),

with r the probability that x_0 is good, and x0_old = E[x_0 | x_t]: guidance towards the better images by a network that
needs no guidance afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..evaluation.samplers import generator_of
from ..networks.denoisers import Denoiser
from ..pipelines import ClassConditionalSDEPipeline, SDEPipeline, TextSDEPipeline
from ..pipelines.runs import unet_denoiser
from ..sdes import expand_like
from .reward_methods import RewardMethod, arguments_of_images

# A reward so many standard deviations of its group above the mean is certainly good, one so far below certainly bad.
CERTAIN = 5.0
SMALLEST_ERROR = 1e-5  # of an estimate, as a divisor
_NOISING = 2**42  # numbers of the noise that is added to images, apart from those of the noise of sampling


def optimality(advantages: Tensor, certain: float = CERTAIN) -> Tensor:
    """r = 1/2 + clip(A / certain, -1, 1) / 2, the reward as a probability (ibid., section 3.3), shape (n,).

    Args:
        advantages: A, the reward less its group's mean in standard deviations of the group, shape (n,).
        certain: The advantage from which on r is 1.
    """
    return 0.5 + 0.5 * (advantages / certain).clamp(-1.0, 1.0)


def contrastive_loss(
    estimate: Tensor, old: Tensor, x0: Tensor, r: Tensor, beta: float, normalised: bool = True
) -> Tensor:
    """r |x0_plus - x_0|^2 + (1 - r) |x0_minus - x_0|^2 over beta; see the head of this module.

    Args:
        estimate: x0_hat of the network that learns, shape (n, ...).
        old: x0_old, same shape.
        x0: The images, same shape.
        r: Shape (n,).
        beta: How strongly the implicit estimates differ.
        normalised: Divide each square by the mean absolute error of the same estimate, without its gradient, so that
            all noise levels count alike (ibid., section 3.3).

    Returns:
        The mean over the entries of a row, shape (n,).
    """
    plus, minus = (1.0 - beta) * old + beta * estimate, (1.0 + beta) * old - beta * estimate
    good, bad = (_squared(implicit - x0, normalised) for implicit in (plus, minus))
    return (r * good + (1.0 - r) * bad) / beta


def _squared(error: Tensor, normalised: bool) -> Tensor:
    squares = error.square().flatten(1).mean(1)
    if not normalised:
        return squares
    return squares / error.detach().abs().flatten(1).mean(1).clamp(min=SMALLEST_ERROR)


@dataclass(frozen=True)
class NoisedImages:
    """Images, and what has become of them at K noise levels, which are others for every image.

    Attributes:
        x0: The images in the network's data, shape (B, ...).
        t: SDE times, float64 on the host, shape (K, B).
        x_t: Noised images, shape (K, B, ...).
        old: x0_old, the estimate at ``x_t`` of the network that has drawn the images, same shape.
        labels: The class of each image, or the number of its prompt, int64, shape (B,); None for a model without both.
    """

    x0: Tensor
    t: Tensor
    x_t: Tensor
    old: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        """K."""
        return len(self.t)


class ForwardProcess(RewardMethod):
    """Learning by denoising; see the head of this module.

    The levels are those at which the pipeline's sampler calls the network. A network that amplifies its output, as a
    prediction of the noise does at high noise, has the loss of its output instead of that of x0_hat there.
    """

    learns_from_average = True  # the soft update of the paper, section 3.3, whose decay is ema_max_decay
    statistics = ("loss", "change", "kl")

    def _levels(self) -> list[float]:
        """The times at which the sampler calls the network."""
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(self.config.num_inference_steps)
        return sorted({float(row.t) for row in scheduler.rows}, reverse=True)

    def count_steps(self) -> int:
        """The noise levels of the sampler."""
        return len(self._levels())

    @torch.no_grad()
    def draw(self, numbers: range, first: int, labels: list[int] | None) -> tuple[NoisedImages, Tensor]:
        """Images by the model's own sampler, noised; and the images in [0, 1]."""
        config, pipe = self.config, self.pipe
        arguments = arguments_of_images(config, numbers, first, labels)
        x0: Tensor = pipe(**arguments, output_type="latent", return_dict=False)[0]
        classes = None if labels is None else torch.tensor(labels, device=x0.device)
        levels = torch.tensor(self._levels(), dtype=torch.float64)
        times, noise = [], []
        for number in numbers:
            generator = generator_of(config.seed, _NOISING + first + number)
            chosen = torch.randperm(len(levels), generator=generator)[: config.trained_steps]
            times.append(levels[chosen])
            noise.append(torch.randn((len(chosen), *x0.shape[1:]), generator=generator))
        t, eps = torch.stack(times, 1), torch.stack(noise, 1).to(x0)
        sde = pipe.scheduler.sde
        x_t = expand_like(sde.alpha(t), eps).to(x0) * x0 + expand_like(sde.sigma(t), eps).to(x0) * eps
        denoiser = self._denoiser(pipe)
        old = torch.stack([denoiser(x, at, classes) for x, at in zip(x_t, t, strict=True)])
        return NoisedImages(x0, t, x_t, old, classes), pipe.postprocess(x0, "pt")

    def losses(self, drawn: NoisedImages, steps: Tensor, images: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """The loss at the head of this module, and the KL's stand-in: the squared change of the network's output."""
        config, scheduler = self.config, self.pipe.scheduler
        t = drawn.t[steps, images]
        device = drawn.x_t.device
        steps, images = steps.to(device), images.to(device)
        x_t, old, x0 = drawn.x_t[steps, images], drawn.old[steps, images], drawn.x0[images]
        labels = None if drawn.labels is None else drawn.labels[images]
        estimate = self._denoiser(self.pipe)(x_t, t, labels)
        _, out = scheduler.parametrization.coefficients(scheduler.sde.alpha(t), scheduler.sde.sigma(t))
        amplified = out.abs().to(estimate)
        loss = contrastive_loss(estimate, old, x0, optimality(advantages), config.nft_beta)
        loss = loss / amplified.clamp(min=1.0)

        def change(other: Tensor) -> Tensor:
            return (estimate - other).square().flatten(1).mean(1) / amplified.square()

        kl = torch.zeros_like(loss)
        if config.kl_weight:
            with self.reference.pipeline() as pipe:
                of_reference = self._denoiser(pipe)(x_t, t, labels)
            kl = change(of_reference)
        with torch.no_grad():
            sums = torch.stack([loss.sum(), change(old).sum(), kl.sum()])
        return loss + config.kl_weight * kl, sums

    def _denoiser(self, pipe: SDEPipeline) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """(x_t, t, classes, or numbers of prompts, or None) -> x0_hat of a pipeline, with the guidance of the run."""
        if isinstance(pipe, TextSDEPipeline):
            assert self.config.prompts is not None, "the run has refused such a model without prompts"
            told = pipe.denoiser(self.config.prompts, self.config.guidance_scale)
            return lambda x, t, numbers: told(x, t, image=numbers)
        if isinstance(pipe, ClassConditionalSDEPipeline):
            denoiser: Denoiser = pipe.denoiser(self.config.guidance_scale)
        else:
            denoiser = unet_denoiser(pipe, pipe.scheduler)

        def denoise(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            return denoiser(x, t) if labels is None else denoiser(x, t, class_labels=labels)

        return denoise

"""Group-relative policy optimisation: steps towards images that are better than others of their group become likelier.

The policy is a stochastic sampler, whose steps are Gaussians with known densities:

    maximise  E min(rho A, clip(rho, 1 - c, 1 + c) A) - kl_weight KL(p(x_s | x_t) || p_ref(x_s | x_t)),

with rho the ratio of the densities of a step under the new and the old weights, and A the reward less its group's mean,
in standard deviations of the group (Black et al. 2024, arXiv:2305.13301; Liu et al. 2025, arXiv:2505.05470).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..pipelines import Rollout, RolloutSteps, SDEPipeline, collect_rollout, rollout_model
from ..sampling.transitions import Transition
from .policy_configuration import STORAGE, PolicyTrainingConfig
from .reward_methods import Reference, RewardMethod, arguments_of_images

SMALLEST_STD = 1e-6  # of the rewards of a group: equal ones say nothing, and are not to be amplified


def group_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """(r - mean)/std within each group (Shao et al. 2024, arXiv:2402.03300, section 4.1), shape (n,).

    Args:
        rewards: Shape (n,).
        groups: Number of each reward's group, int64, shape (n,).
    """
    advantages = torch.zeros_like(rewards)
    for group in groups.unique().tolist():
        own = groups == group
        centred = rewards[own] - rewards[own].mean()
        advantages[own] = centred / (centred.square().mean().sqrt() + SMALLEST_STD)
    return advantages


def clipped_objective(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """min(rho A, clip(rho, 1 - c, 1 + c) A), to be maximised (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    Args:
        ratio: rho = p(x_s | x_t) / p_old(x_s | x_t), shape (n,).
        advantages: A, shape (n,).
        clip_range: c.
    """
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return torch.minimum(ratio * advantages, clipped * advantages)


def draw_rollout(
    config: PolicyTrainingConfig, pipe: SDEPipeline, numbers: range, first: int, labels: list[int] | None
) -> tuple[Rollout, Tensor]:
    """A rollout of images by their numbers, and the images in [0, 1]; see ``RewardMethod.draw``."""
    arguments = arguments_of_images(config, numbers, first, labels)
    storage, reduction = STORAGE[config.rollout_storage], config.log_prob_reduction
    rollout = collect_rollout(pipe, storage, reduction, **arguments, output_type="pt")
    return rollout, rollout.output.images


def reference_law(reference: Reference, rollout: Rollout, steps: RolloutSteps) -> Transition:
    """The law of steps under the weights that a run has started from, without gradients."""
    with reference.pipeline() as pipe:
        return rollout.transition(steps, rollout_model(pipe, rollout)(steps))


@torch.no_grad()
def path_kl(
    config: PolicyTrainingConfig,
    policy: SDEPipeline,
    reference: Reference,
    numbers: range,
    first: int,
    labels: list[int] | None,
) -> tuple[float, Tensor]:
    """KL of the paths of a policy to those of the reference in nats, and the images at their ends.

    The KL is the sum over the steps of a rollout of KL(p(x_s | x_t) || p_ref(x_s | x_t)), summed over the entries and
    averaged over the images. That of the images is at most this. Arguments are those of ``RewardMethod.draw``.
    """
    rollout, images = draw_rollout(config, policy, numbers, first, labels)
    total = 0.0
    for k in range(len(rollout)):
        steps = rollout.steps(k)
        law = rollout.transition(steps, rollout_model(policy, rollout)(steps))
        total += float(law.kl(reference_law(reference, rollout, steps), "sum").mean())
    return total, images


class PolicyGradient(RewardMethod):
    """Learning from the densities of the steps that have led to the images; see the head of this module."""

    learns_from_average = False  # the ratio of the densities is to begin at 1
    statistics = ("ratio_deviation", "clipped", "kl")

    def count_steps(self) -> int:
        """The steps with noise of a rollout."""
        self.pipe.scheduler.set_timesteps(self.config.num_inference_steps)
        return len(self.pipe.scheduler.stochastic_steps)

    def draw(self, numbers: range, first: int, labels: list[int] | None) -> tuple[Rollout, Tensor]:
        """A rollout, and its images."""
        return draw_rollout(self.config, self.pipe, numbers, first, labels)

    def losses(self, drawn: Rollout, steps: Tensor, images: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the objective at the head of this module."""
        config, rows = self.config, drawn.steps(steps, images)
        law = drawn.transition(rows, rollout_model(self.pipe, drawn)(rows))
        ratio = torch.exp(law.log_prob(rows.x_s, config.log_prob_reduction) - rows.log_prob)
        objective = clipped_objective(ratio, advantages, config.clip_range)
        kl = torch.zeros_like(ratio)
        if config.kl_weight:
            kl = law.kl(reference_law(self.reference, drawn, rows), config.log_prob_reduction)
        with torch.no_grad():
            off = (ratio - 1.0).abs()
            sums = torch.stack([off.sum(), (off > config.clip_range).float().sum(), kl.sum()])
        return config.kl_weight * kl - objective, sums

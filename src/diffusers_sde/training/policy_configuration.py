"""What reinforcement learning of a trained pipeline is told: a dataclass, from which the command line is generated."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch

from ..basics.options import CheckedOptions, option
from ..images.options import LARGEST_SEED_OF_NUMPY
from ..sampling.policies import POLICIES
from .adapters import AdapterOptions
from .options import AveragingOptions, OptimiserOptions, OutputOptions
from .rewards import REWARD_INPUTS

METHODS = ("grpo", "nft")
STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OF_GRPO = ("clip_range", "log_prob_reduction", "rollout_storage")


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(CheckedOptions):
    """Which pipeline learns from which reward, and how."""

    model: str = option(MISSING, "The trained pipeline, a folder or Hub name; its network is where the policy starts.")
    reward: str = option(
        MISSING,
        "What is rewarded: 'package.module:function', a Python function of a batch of images that returns one number "
        "for each (it gets class_labels, or prompts, too if it takes them); 'classifier:CLASS', the probability of a "
        "class by --reward_classifier; or 'classifier', that of the class asked for.",
    )
    reward_classifier: str | None = option(None, "Folder or Hub name of what scripts/train_classifier.py has trained.")
    reward_input: str = option(
        "pt", "What a reward function gets: a tensor in [0, 1], (B, C, H, W), or PIL images.", choices=REWARD_INPUTS
    )
    method: str = option(
        "grpo",
        "How the network learns: 'grpo' makes the steps of better images likelier, by their densities; 'nft' "
        "(DiffusionNFT) denoises what the model's own sampler has drawn, towards better images and away from worse "
        "ones.",
        choices=METHODS,
    )
    policy: str = option(
        "exact",
        "How images are drawn while the network learns: 'exact' has no excess noise at any number of levels; the "
        "others are the steps of the papers of these names. With nft, this and the next three only say along which "
        "steps the KL of evaluations is measured.",
        choices=POLICIES,
    )
    stochasticity: float | None = option(None, "Noise of the policy. Default: its published number.", above=0.0)
    stochastic_indices: tuple[int, ...] | None = option(
        None,
        "Draw and train on the steps from this one up to and without that one, and follow the probability flow in the "
        "others (MixGRPO, Flow-GRPO-Fast). Default: all.",
        least=0,
    )
    stochastic_sigmas: tuple[float, ...] | None = option(
        None, "The same by the smallest and largest noise sigma/alpha at the beginning of a step.", least=0.0
    )
    num_inference_steps: int = option(10, "Noise levels of a rollout, and of the sample grids.", least=2)
    trained_steps: int | None = option(
        None,
        "Train on so many steps of each image, drawn anew every round; with nft, on so many noise levels. Default: all "
        "with noise; all levels of a rollout.",
        least=1,
    )
    prompts: tuple[str, ...] | None = option(
        None, "Captions that groups are drawn of, for a model that is told captions, such as 'a three' 'a seven'."
    )
    guidance_scale: float = option(1.0, "Classifier-free guidance of models with classes or captions.", least=0.0)
    group_size: int = option(64, "Images whose rewards are compared with each other.", least=2)
    num_groups: int | None = option(
        None,
        "Groups in a round, each of one class where the model knows classes, or of one of the prompts, which take "
        "turns. Default: one for each class or prompt, one without them.",
        least=1,
    )
    sample_batch_size: int = option(256, "Images drawn at a time, per process.", least=1)
    train_batch_size: int = option(128, "Steps of images per process and forward pass.", least=1)
    updates_per_round: int = option(2, "Optimiser steps per round, each on its own part of the steps.", least=1)
    max_train_steps: int = option(100, "Rounds.", least=1)
    clip_range: float = option(0.2, "Clip the ratio of probabilities to 1 plus and minus this.", above=0.0)
    kl_weight: float = option(
        0.0,
        "Weight of KL(p(x_s | x_t) || reference) beside the objective, with nft of the mean squared difference of the "
        "networks' outputs; the reference is --model.",
        least=0.0,
    )
    nft_beta: float = option(
        1.0, "With nft: how strongly the implicit estimates for good and bad images differ from the old one.", above=0.0
    )
    log_prob_reduction: str = option(
        "sum",
        "Log-probabilities of a step are the 'sum' over the entries of an image, which is its density, or their "
        "'mean', as published codes have it, with clip ranges of 1e-5 to 1e-3 and a KL of that scale.",
        choices=("sum", "mean"),
    )
    rollout_storage: str = option("fp32", "Precision in which the states of rollouts are kept.", choices=STORAGE)
    sample_every: int = option(10, "Draw and reward a grid of samples every so many rounds, and at the end.", least=0)
    num_sample_images: int = option(64, "Images in that grid.", least=1)
    seed: int = option(0, "Seed of all noise.", least=0, most=LARGEST_SEED_OF_NUMPY)


@dataclass(frozen=True, kw_only=True)
class PolicyTrainingConfig(OutputOptions, AveragingOptions, AdapterOptions, OptimiserOptions, PolicyOptions):
    """Everything that reinforcement learning is told; each field is the command-line option of the same name.

    A round draws images, rewards them, and takes ``updates_per_round`` optimiser steps.

    Raises:
        ValueError: A value out of range, an unknown name, or options that contradict each other.
    """

    output_dir: str = option("outputs/rl", "Where checkpoints, samples, logs and the final pipeline go.")
    checkpointing_steps: int = option(
        50, "Save a checkpoint for resuming every so many rounds, and at the end; 0: never.", least=0
    )
    logging_steps: int = option(1, "Log reward, ratio and speed every so many rounds.", least=1)
    learning_rate: float = option(1e-4, "Learning rate after warm-up.", above=0.0)
    lr_scheduler: str = option(
        "constant", "Course of the learning rate after warm-up.", choices=("constant", "linear", "cosine")
    )
    lr_warmup_steps: int | None = option(0, "Optimiser steps of linear warm-up.", least=0)
    ema_max_decay: float | None = option(
        0.5,
        "Largest decay of the averaged weights per optimiser step. They are what is saved, and nft draws by them: in "
        "short runs large decays let them lag behind.",
        least=0.0,
        most=1.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        others = _OF_GRPO if self.method == "nft" else ("nft_beta",)
        idle = [f.name for f in fields(self) if f.name in others and getattr(self, f.name) != f.default]
        if idle:
            raise ValueError(f"{idle[0]} has no effect with method {self.method!r}.")

    def public(self) -> dict[str, Any]:
        """All options as a dictionary, for files and logs."""
        return asdict(self)

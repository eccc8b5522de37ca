"""Training of networks by denoising score matching, on accelerate.

    from diffusers_sde.training import TrainingConfig, train
    pipeline = train(TrainingConfig(sde="vp", output_dir="outputs/digits", max_train_steps=2000))

and of saved pipelines on a reward: ``train_policy``.

Needs the extra ``training``: ``pip install diffusers-sde[training]``.
"""

from .cli import main, parse_args
from .configuration import TrainingConfig
from .networks import NETWORKS
from .policy_configuration import PolicyTrainingConfig
from .rl import train_policy
from .trainer import Trainer, train

__all__ = [
    "NETWORKS",
    "PolicyTrainingConfig",
    "Trainer",
    "TrainingConfig",
    "main",
    "parse_args",
    "train",
    "train_policy",
]

"""The command lines of training, generated from the dataclasses of options."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from ..basics.files import FolderInUse, SaveError
from ..basics.options import fail, parser_of
from .autoencoder import AutoencoderTrainer
from .autoencoder_configuration import AutoencoderTrainingConfig
from .classifier import ClassifierTrainer
from .configuration import ClassifierTrainingConfig, CommonTrainingConfig, TrainingConfig
from .policy_configuration import PolicyTrainingConfig
from .recipes import RECIPES
from .rl import PolicyTrainer
from .run import TrainingRun
from .trainable import TRAINABLE
from .trainer import Trainer

DESCRIPTION = f"Train a network by denoising score matching, for one of these SDEs: {', '.join(TRAINABLE)}."
POLICY = "Let a trained pipeline learn to draw what is rewarded, by group-relative policy optimisation."
AUTOENCODER = "Train an autoencoder of images, in whose latents a diffusion model can then be trained."
CLASSIFIER = "Train a classifier of noisy images, p_t(y | x_t), for the classifier guidance of a diffusion model."


def build_parser(
    prog: str = "train.py", description: str = DESCRIPTION, config_class: type[CommonTrainingConfig] = TrainingConfig
) -> argparse.ArgumentParser:
    """One option per field of the configuration class, with its help text and default."""
    parser = parser_of(
        config_class,
        argument_default=argparse.SUPPRESS,  # what is not given comes from the recipe or the configuration's defaults
        prog=prog,
        description=description,
        epilog="A step is an optimiser step: train_batch_size x processes x gradient_accumulation_steps images. "
        f"Launch: 'accelerate launch {_launched(prog)} ...'; several processes without a GPU: 'ACCELERATE_USE_CPU=true "
        f"accelerate launch --multi_gpu --num_processes 2 {_launched(prog)} ...' (accelerate's --cpu starts only one). "
        "On a CPU accelerate gives a process one thread: --num_cpu_threads_per_process changes that.",
    )
    if config_class is TrainingConfig:
        parser.add_argument(
            "--recipe",
            choices=sorted(RECIPES),
            help="Settings of the paper for CIFAR-10, which other options override.",
        )
    return parser


def _launched(prog: str) -> str:
    """What accelerate launches: a script of the clone, or a command of the package."""
    program, _, command = prog.partition(" ")
    return f"-m diffusers_sde.commands {command}" if command else f"scripts/{program}"


def parse_args(argv: Sequence[str] | None = None) -> TrainingConfig:
    """The configuration that a command line describes.

    Args:
        argv: Arguments without the program's name; None for those of this process.

    Raises:
        ValueError: See ``TrainingConfig``.
        SystemExit: An unknown option or a value that is not of its type.
    """
    return TrainingConfig.from_recipe(**vars(build_parser().parse_args(argv)))


def main(argv: Sequence[str] | None = None, prog: str = "train.py") -> None:
    """Train a denoiser as the command line says; see ``run_command_line``."""
    run_command_line(build_parser(prog), TrainingConfig.from_recipe, Trainer, argv)


def classifier_main(argv: Sequence[str] | None = None, prog: str = "train_classifier.py") -> None:
    """Train a classifier as the command line says; see ``run_command_line``."""
    parser = build_parser(prog, CLASSIFIER, ClassifierTrainingConfig)
    run_command_line(parser, ClassifierTrainingConfig, ClassifierTrainer, argv)


def policy_main(argv: Sequence[str] | None = None, prog: str = "train_rl.py") -> None:
    """Let a pipeline learn from rewards as the command line says; see ``run_command_line``."""
    run_command_line(_plain_parser(prog, POLICY, PolicyTrainingConfig), PolicyTrainingConfig, PolicyTrainer, argv)


def autoencoder_main(argv: Sequence[str] | None = None, prog: str = "train_autoencoder.py") -> None:
    """Train an autoencoder as the command line says; see ``run_command_line``."""
    parser = _plain_parser(prog, AUTOENCODER, AutoencoderTrainingConfig)
    run_command_line(parser, AutoencoderTrainingConfig, AutoencoderTrainer, argv)


def _plain_parser(prog: str, description: str, config_class: type[Any]) -> argparse.ArgumentParser:
    """The parser of a configuration that has no SDE and no recipes."""
    return parser_of(
        config_class,
        argument_default=argparse.SUPPRESS,
        prog=prog,
        description=description,
        epilog=f"Launch: 'accelerate launch {_launched(prog)} ...'. On a CPU accelerate gives a process one thread: "
        "--num_cpu_threads_per_process changes that.",
    )


def run_command_line(
    parser: argparse.ArgumentParser,
    make_config: Callable[..., Any],
    make_run: Callable[[Any], TrainingRun | PolicyTrainer | AutoencoderTrainer],
    argv: Sequence[str] | None,
) -> None:
    """Train as the command line says.

    Args:
        parser: The parser of its options.
        make_config: Makes the configuration of the options that are given.
        make_run: Makes the run of a configuration.
        argv: Arguments without the program's name; None for those of this process.

    Mistakes that are found before training end in one line and exit code 2, a disk that is full in one line and 1.
    """
    names = tuple(action.dest for action in parser._actions)
    main_process = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(
        format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO if main_process else logging.ERROR
    )
    for chatty in ("httpx", "httpx2", "accelerate.checkpointing", "accelerate.accelerator"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        trainer = make_run(make_config(**vars(parser.parse_args(argv))))
    except (ValueError, OSError) as error:
        if not main_process:
            raise SystemExit(2) from None
        raise fail(parser.prog, error, names=names) from None
    try:
        trainer.run()
    except (FolderInUse, SaveError) as error:
        code = 2 if isinstance(error, FolderInUse) else 1
        if not main_process:
            raise SystemExit(code) from None
        raise fail(parser.prog, error, code, names) from None

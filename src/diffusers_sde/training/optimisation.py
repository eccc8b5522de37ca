"""The optimiser, the course of its learning rate, and the average of the weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from .averaging import PowerEMA
from .options import AveragingOptions, OptimiserOptions


def _adam_constants(options: OptimiserOptions) -> dict[str, Any]:
    return {
        "betas": (options.adam_beta1, options.adam_beta2),
        "weight_decay": options.adam_weight_decay,
        "eps": options.adam_epsilon,
    }


def check_optimizer(options: OptimiserOptions) -> None:
    """Make sure that the optimiser is installed.

    Raises:
        ValueError: It is not.
    """
    if options.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("use_8bit_adam needs bitsandbytes, which is not installed: 'pip install bitsandbytes'.")


def build_optimizer(
    options: OptimiserOptions, parameters: Sequence[Tensor], max_steps: int, device: torch.device
) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW and the course of its learning rate over ``max_steps``.

    The course counts optimiser steps: accelerate must not prepare it, which would step it once per process.
    """
    constants = {"lr": options.learning_rate, **_adam_constants(options)}
    if options.use_8bit_adam:
        optimizer = importlib.import_module("bitsandbytes").optim.AdamW8bit(parameters, **constants)
    else:
        optimizer = torch.optim.AdamW(parameters, **constants, fused=device.type in ("cpu", "cuda"))
    warmup = options.lr_warmup_steps
    course = get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=min(500, max_steps // 10) if warmup is None else warmup,
        num_training_steps=max_steps,
    )
    return optimizer, course


def apply_options(options: OptimiserOptions, optimizer: Any, course: Any) -> None:
    """Let the run's own options count, where loading a checkpoint has restored those that it was trained with."""
    course.base_lrs = [options.learning_rate] * len(course.base_lrs)
    rates = [options.learning_rate * factor(course.last_epoch) for factor in course.lr_lambdas]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group |= {"lr": rate, "initial_lr": options.learning_rate, **_adam_constants(options)}
    course._last_lr = rates


def build_average(
    options: AveragingOptions, parameters: Sequence[Tensor], default_max_decay: float, foreach: bool
) -> EMAModel | None:
    """The average of the weights, or None where none is kept.

    Args:
        options: Which average.
        parameters: The weights.
        default_max_decay: Largest decay of the exponential average where the options leave it open.
        foreach: See ``EMAModel``.
    """
    if not options.use_ema:
        return None
    if options.ema_relative_std is not None:
        return PowerEMA(parameters, options.ema_relative_std, foreach=foreach)
    return EMAModel(
        parameters,
        decay=default_max_decay if options.ema_max_decay is None else options.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=options.ema_inv_gamma,
        power=options.ema_power,
        foreach=foreach,
    )

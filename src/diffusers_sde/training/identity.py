"""Whether a run may continue a checkpoint: what the two must have in common, and what may change and is logged."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from ..images.samples import TrainingSource
from ..schedulers import SDEScheduler
from ..sdes import SDE
from .configuration import CommonTrainingConfig
from .networks import network_identity
from .trainable import trained_config

logger = logging.getLogger(__name__)

# What checkpoints of the first versions do not say about themselves.
_RECORDED_LATER = frozenset(("architecture", "data", "train_eps", "min_snr_gamma", "log_normal_mean", "log_normal_std"))
# Parts that are compared entry by entry, as far as both runs have them: other versions know more entries or fewer.
_IN_PARTS = {"scheduler": "scheduler's", "architecture": "network's"}


# These options change what comes out, and a run may change them when it is resumed: they count from there on.
_CHANGEABLE = (
    *("learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay"),
    *("adam_epsilon", "max_grad_norm", "train_batch_size", "gradient_accumulation_steps", "random_flip"),
    *("center_crop", "stratified_times", "sampling_eps", "ema_inv_gamma", "ema_power", "ema_max_decay"),
    *("torch_compile", "channels_last"),
)


def identity_of(
    config: CommonTrainingConfig,
    source: TrainingSource,
    scheduler: SDEScheduler,
    sde: SDE,
    weighting: str,
    network: Any,
) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that continues it, whatever is trained.

    Args:
        config: The options of the run.
        source: Its data.
        scheduler: What it trains for.
        sde: The SDE at the times of training.
        weighting: The weighting of its loss over time.
        network: The network.
    """
    is_log_normal, is_logit_normal = (config.time_sampling == name for name in ("log_normal", "logit_normal"))
    shift = config.time_shift_at(source.resolution)
    identity = {
        "sde": repr(scheduler.sde),
        "prediction_type": scheduler.config.prediction_type,
        "sigma_data": scheduler.config.sigma_data,
        "time_conditioning": scheduler.config.time_conditioning,
        "weighting": weighting,
        "min_snr_gamma": None,
        "time_sampling": config.time_sampling,
        "log_normal_mean": config.log_normal_mean if is_log_normal else None,
        "log_normal_std": config.log_normal_std if is_log_normal else None,
        "logit_normal_mean": config.logit_normal_mean if is_logit_normal else None,
        "logit_normal_std": config.logit_normal_std if is_logit_normal else None,
        "time_shift": None if shift == 1.0 else shift,
        "use_8bit_adam": config.use_8bit_adam or None,
        "train_eps": sde.t_min,
        "discrete": config.discrete,
        "data_min": config.data_min,
        "use_ema": config.use_ema,
        "ema_relative_std": config.ema_relative_std,
        "resolution": source.resolution,
        "channels": source.channels,
        **network_identity(network),
        "images": source.num_images,
        "data": source.fingerprint(config.needs_labels),
        "shuffle_buffer": config.shuffle_buffer if source.num_images is None else None,
        "seed": config.seed,
        "class_conditional": config.needs_labels,
        "label_dropout": None,
        "scheduler": trained_config(scheduler),
    }
    return as_recorded(identity)


def changeable_options(config: CommonTrainingConfig, network: Any) -> dict[str, Any]:
    """The options that change the result, and that a run may change when it is resumed."""
    options = {name: getattr(config, name) for name in _CHANGEABLE if hasattr(config, name)}
    return options | {"dropout": network.config.get("dropout") or 0.0}  # which a preset may have decided


def log_other_scheduler(saved: Any, own: SDEScheduler) -> None:
    """Warn where a network was saved with another scheduler than it is trained for: it has to learn the difference.

    Args:
        saved: The scheduler that it was saved with, of whatever class; None if there was none.
        own: The scheduler of the run.
    """
    was, now = dict(getattr(saved, "config", {})), trained_config(own)
    if isinstance(saved, SDEScheduler):
        was = trained_config(saved)
    changes = [f"{name} {was[name]!r} -> {now[name]!r}" for name in now if name in was and was[name] != now[name]]
    if changes:
        logger.warning("init_from: the network was trained for something else: %s.", ", ".join(changes))


def as_recorded(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as it is read from a checkpoint: JSON has no tuples."""
    return dict(json.loads(json.dumps(identity, default=repr)))


def check_same_run(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Make sure that a checkpoint is of the same network, data and loss as a run.

    Args:
        saved: The identity in the checkpoint.
        own: The identity of the run, ``as_recorded``.

    Raises:
        ValueError: Something differs; the message names it.
    """
    saved, own = dict(saved), dict(own)
    unrecorded = _RECORDED_LATER - set(saved)
    unknown = sorted(name for name in unrecorded if own.get(name) is not None)
    if unknown:
        logger.warning(
            "The checkpoint was saved by an earlier version, which did not record %s: make sure yourself that this "
            "run has the same.",
            ", ".join(unknown),
        )
    for part, whose in _IN_PARTS.items():
        entries = [identity.pop(part, {}) for identity in (saved, own)]
        for name in entries[0].keys() & entries[1].keys():
            saved[f"{whose} {name}"], own[f"{whose} {name}"] = (each[name] for each in entries)
    # What has a name of its own comes first: other options may be why the data or the network are others.
    names = [name for name in {**own, **saved} if name not in unrecorded]
    parts = tuple(_IN_PARTS.values())
    for name in sorted(names, key=lambda name: (name == "data", name.startswith(parts))):
        if saved.get(name) == own.get(name):
            continue
        if name == "data":
            raise ValueError(
                "resume_from_checkpoint: the checkpoint was trained on other images or classes than those of this "
                f"run (fingerprints {saved[name]} and {own[name]}), though they are as many."
            )
        raise ValueError(
            f"resume_from_checkpoint: the checkpoint was trained with {name}={saved.get(name)!r}, this run "
            f"has {own.get(name)!r}."
        )


def log_changes(saved: Mapping[str, Any] | None, own: Mapping[str, Any]) -> None:
    """Log the options that change the result and differ from those of a checkpoint; they count from there on.

    Args:
        saved: The options in the checkpoint; None where it does not record them.
        own: The options of the run.
    """
    if saved is None:
        logger.warning("The checkpoint does not say which options it was trained with: those of this run count now.")
        return
    changes = [f"{name} {saved[name]!r} -> {own[name]!r}" for name in own if saved.get(name, own[name]) != own[name]]
    if changes:
        logger.warning("Other options than those of the checkpoint count from now on: %s.", ", ".join(changes))

"""Checkpoints that are whole or absent, and an output folder that never loses another run."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from ..hub.pipelines import PIPELINE_MODULE
from .sharding import copy_sharded, gather, load_state, save_state

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.json"
EMA_FILE = "ema.safetensors"
UNFINISHED = ".unfinished-checkpoint"
DISCARDED = ".discarded-checkpoint"
_NAME = re.compile(r"checkpoint-(\d+)")
_RESULTS = ("model_index.json", "diffusion_pytorch_model.safetensors")  # of a pipeline, of a classifier
_FILES_OF_A_RUN = (
    *_RESULTS,
    "config.json",
    f"{PIPELINE_MODULE}.py",
    "training_config.json",
    "unet",
    "scheduler",
    "samples",
    "classifier.safetensors",
    UNFINISHED,
    DISCARDED,
)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, the earliest first."""
    if not output_dir.is_dir():
        return []
    return sorted((p for p in output_dir.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says about itself; every file is compared with the size and checksum it was saved with.

    Raises:
        ValueError: The folder is not a whole checkpoint.
    """
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text())
        files = state["files"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"resume_from_checkpoint: {str(checkpoint)!r} is not a checkpoint of this program ({STATE_FILE}: {error}); "
            "it must be a folder checkpoint-<step>, or 'latest'."
        ) from error
    damaged = [name for name, expected in files.items() if _fingerprint(checkpoint / name) != expected]
    if damaged:
        raise ValueError(
            f"resume_from_checkpoint: {str(checkpoint)!r} is damaged: {', '.join(damaged)} missing or not as saved."
        )
    return state


def _fingerprint(file: Path) -> list[int] | None:
    """Size and CRC-32, or None where there is no such file."""
    if not file.is_file():
        return None
    size, checksum = 0, 0
    with file.open("rb") as stream:
        while chunk := stream.read(2**22):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return [size, checksum]


def find_checkpoint(output_dir: Path, wanted: str | None, overwrite: bool, logging_dir: str) -> Path | None:
    """The checkpoint to resume from, or None for a new run; nothing is changed on disk.

    With ``latest``, damaged checkpoints are reported and the one before is taken.

    Raises:
        ValueError: ``wanted`` is not a checkpoint, or ``output_dir`` holds a run that is neither to be continued nor
            to be deleted.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir {str(output_dir)!r} is a file.")
    if wanted is not None and overwrite:
        raise ValueError("resume_from_checkpoint and overwrite_output_dir exclude each other.")
    saved = list_checkpoints(output_dir)
    if wanted == "latest":
        for checkpoint in reversed(saved):
            try:
                read_state(checkpoint)
                return checkpoint
            except ValueError as error:
                logger.warning("%s Trying the checkpoint before it.", error)
        if saved:
            raise ValueError(f"resume_from_checkpoint: no checkpoint in {str(output_dir)!r} is whole.")
        if not any((output_dir / name).exists() for name in _RESULTS):
            return None  # a run that was stopped before its first checkpoint has nothing to lose: it starts again
    elif wanted is not None:
        checkpoint = Path(wanted)
        if not checkpoint.exists() and (output_dir / wanted).is_dir():
            checkpoint = output_dir / wanted
        read_state(checkpoint)
        if checkpoint.resolve().parent == output_dir.resolve():
            return checkpoint
    earlier = [name for name in (*_FILES_OF_A_RUN, logging_dir) if (output_dir / name).exists()]
    earlier += [path.name for path in saved]
    if earlier and not overwrite:
        raise ValueError(
            f"output_dir {str(output_dir)!r} already holds a run ({', '.join(earlier[:4])}): continue it with "
            "resume_from_checkpoint='latest', delete it with overwrite_output_dir, or choose another folder."
        )
    return Path(wanted) if wanted not in (None, "latest") else None


def check_output_dir(output_dir: Path, needed: int) -> None:
    """Make sure that ``needed`` bytes can be written to a folder, which need not exist yet; nothing is left there.

    Raises:
        ValueError: They cannot.
    """
    place = output_dir.resolve()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as error:
        raise ValueError(f"output_dir {str(output_dir)!r} cannot be written: {error}.") from error
    if free < needed:
        raise ValueError(
            f"output_dir {str(output_dir)!r} has {free / 2**20:.0f} MiB free, but a checkpoint and the final pipeline "
            f"of this network need {needed / 2**20:.0f} MiB: free space or choose another folder."
        )


def clear_run(output_dir: Path, logging_dir: str) -> None:
    """Delete what an earlier run left, and nothing else."""
    leftovers = [output_dir / name for name in (*_FILES_OF_A_RUN, logging_dir)]
    for path in leftovers + list_checkpoints(output_dir):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    state: Mapping[str, Any],
    ema: EMAModel | None,
    total_limit: int | None,
) -> Path:
    """Save everything that training needs to continue exactly; to be called on all processes.

    The checkpoint is written beside its place, forced to the disk and renamed at the end, so that a kill at any moment
    leaves no half of one. Earlier checkpoints go only when the new one is whole, and are renamed first as well.

    Args:
        accelerator: Saves network, optimiser, gradient scaler and random states.
        output_dir: Where ``checkpoint-<step>`` goes.
        state: What else to save, as JSON; ``step`` names the checkpoint.
        ema: The averaged weights.
        total_limit: Keep only so many of the checkpoints up to this step.

    Raises:
        OSError: The disk is full, or the like; earlier checkpoints are whole.
    """
    unfinished, checkpoint = output_dir / UNFINISHED, output_dir / f"checkpoint-{state['step']}"
    if accelerator.is_main_process:
        _discard(output_dir)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        save_state(accelerator, unfinished)
        if ema is not None:
            average = {str(i): parameter for i, parameter in enumerate(ema.shadow_params)}
            weights = gather(average, accelerator.is_main_process)
            if accelerator.is_main_process:
                save_file(weights, unfinished / EMA_FILE, metadata={"format": "pt"})
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            averaging = {} if ema is None else {"ema_updates": ema.optimization_step}
            names = sorted(str(p.relative_to(unfinished)) for p in unfinished.rglob("*") if p.is_file())
            files = {name: _fingerprint(unfinished / name) for name in names}
            (unfinished / STATE_FILE).write_text(json.dumps({**state, **averaging, "files": files}, indent=2))
            for name in (*names, STATE_FILE, "."):
                _sync(unfinished / name)
            if checkpoint.exists():  # a run resumed from an earlier step comes by here again
                _discard(output_dir, checkpoint)
            unfinished.rename(checkpoint)
            _sync(output_dir)
            if total_limit is not None:
                # Later ones belong to a run that was abandoned by resuming before them, or are damaged.
                so_far = [path for path in list_checkpoints(output_dir) if _step(path) <= state["step"]]
                for old in so_far[:-total_limit]:
                    _discard(output_dir, old)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)  # a full disk gets its space back
        raise
    accelerator.wait_for_everyone()
    return checkpoint


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, ema: EMAModel | None) -> dict[str, Any]:
    """Restore what ``save_checkpoint`` saved, on all processes; returns its ``state``."""
    state = read_state(checkpoint)
    load_state(accelerator, checkpoint)
    if ema is not None:
        weights = load_file(checkpoint / EMA_FILE)
        for i, parameter in enumerate(ema.shadow_params):
            copy_sharded(weights[str(i)], parameter)
        ema.optimization_step = state["ema_updates"]
    return state


def _discard(output_dir: Path, checkpoint: Path | None = None) -> None:
    """Delete a checkpoint, under another name: a kill in between must not leave half of one under its own."""
    discarded = output_dir / DISCARDED
    shutil.rmtree(discarded, ignore_errors=True)
    if checkpoint is not None:
        checkpoint.rename(discarded)
        shutil.rmtree(discarded)


def _sync(path: Path) -> None:
    """Wait until the disk holds a file's contents, or a folder's entries."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints that are whole or absent, and an output folder that never loses another run."""

from __future__ import annotations

import glob
import json
import logging
import re
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from accelerate import Accelerator
from accelerate.utils import SAFE_WEIGHTS_NAME
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..basics.files import check_folder, saving, sync, write_folder_whole
from ..basics.modes import give_mode
from ..pipelines.base import PIPELINE_MODULE
from .adapters import ADAPTER_FILES, ADAPTER_FOLDER, save_adapter, trained_state
from .sharding import copy_sharded, gather, load_state, save_state

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.json"
CONFIG_FILE = "training_config.json"
EMA_FILE = "ema.safetensors"
TRACKER = "diffusers-sde"  # the folder of trackers inside logging_dir
UNFINISHED = ".unfinished-checkpoint"
DISCARDED = ".discarded-checkpoint"
UNFINISHED_PIPELINE = ".unfinished-pipeline"
ABANDONED = "abandoned-"
_NAME = re.compile(r"checkpoint-(\d+)")
_ABANDONED_NAME = re.compile(rf"{ABANDONED}checkpoint-\d+(\.\d+)?")
_RESULTS = ("model_index.json", "diffusion_pytorch_model.safetensors")  # of a pipeline, of a classifier
# What a run writes under names that others use too: it is a run's only beside its CONFIG_FILE.
_FILES_OF_A_RUN = (
    *_RESULTS,
    "config.json",
    f"{PIPELINE_MODULE}.py",
    "diffusers_sde.py",
    "unet/config.json",
    "unet/diffusion_pytorch_model*",
    "unet/diffusers_sde.py",
    "vae/config.json",
    "vae/diffusion_pytorch_model*",
    "text_encoder/config.json",
    "text_encoder/model*.safetensors*",
    *(
        f"tokenizer/{name}"
        for name in ("*.json", "merges.txt", "vocab.txt", "*.model", "*.jinja")  # each kind of tokenizer has others
    ),
    *(f"{ADAPTER_FOLDER}/{name}" for name in ADAPTER_FILES),
    "scheduler/scheduler_config.json",
    "scheduler/diffusers_sde.py",
    "samples/step-*.png",
    "samples/.step-*.png.unfinished",
    "classifier.safetensors",
)
_FOLDERS_OF_A_RUN = frozenset(("unet", "vae", "text_encoder", "tokenizer", "scheduler", "samples", ADAPTER_FOLDER))
_FOR_ITSELF = (UNFINISHED, DISCARDED, UNFINISHED_PIPELINE)


def check_logging_dir(logging_dir: str) -> None:
    """Make sure that the folder for the tracker lies inside the output folder, apart from what else a run writes.

    Raises:
        ValueError: It does not.
    """
    posix, windows = PurePosixPath(logging_dir), PureWindowsPath(logging_dir)
    outside = posix.is_absolute() or bool(windows.anchor) or ".." in (*posix.parts, *windows.parts)
    if outside or not posix.parts:
        raise ValueError(
            f"logging_dir must be the name of a folder inside output_dir, without '..', got {logging_dir!r}."
        )
    first = windows.parts[0]
    if first in (*_FOLDERS_OF_A_RUN, *_FOR_ITSELF) or _NAME.fullmatch(first) or _ABANDONED_NAME.fullmatch(first):
        raise ValueError(f"logging_dir must not be a folder for something else, got {logging_dir!r}.")


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
        _check_state(state)
    except (OSError, ValueError) as error:  # a file that is no text is a ValueError too
        raise ValueError(
            f"resume_from_checkpoint: {str(checkpoint)!r} is not a checkpoint of this program ({STATE_FILE}: {error}); "
            "it must be a folder checkpoint-<step>, or 'latest'."
        ) from error
    files = dict(state["files"])
    own = files.pop(STATE_FILE, None)  # older checkpoints do not have it
    damaged = [name for name, expected in files.items() if _fingerprint(checkpoint / name) != expected]
    if own is not None and own != _state_fingerprint(state):
        damaged.append(STATE_FILE)
    if damaged:
        raise ValueError(
            f"resume_from_checkpoint: {str(checkpoint)!r} is damaged: {', '.join(damaged)} missing or not as saved."
        )
    return state


def _check_state(state: Any) -> None:
    """Raise a ValueError unless this is what ``save_checkpoint`` was given."""
    if not isinstance(state, dict):
        raise ValueError(f"a dictionary is needed, got a {type(state).__name__}")
    for name in ("step", "samples_seen", "processes"):
        value = state.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} must be an integer at least 0, got {value!r}")
    for name in ("lr_scheduler", "identity", "files"):
        if not isinstance(state.get(name), dict):
            raise ValueError(f"{name} must be a dictionary, got {state.get(name)!r}")


def _state_fingerprint(state: Mapping[str, Any]) -> list[int]:
    """Size and CRC-32 of a state, without this entry of its own."""
    files = {name: value for name, value in state["files"].items() if name != STATE_FILE}
    text = json.dumps({**state, "files": files}, sort_keys=True).encode()
    return [len(text), zlib.crc32(text)]


def _fingerprint(file: Path) -> list[int] | None:
    """Size and CRC-32, or None where there is no such file."""
    if not file.is_file():
        return None
    size, checksum = 0, 0
    with file.open("rb") as stream:
        while chunk := stream.read(2**22):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return [size, checksum]


def find_checkpoint(output_dir: Path, wanted: str | None, overwrite: bool) -> Path | None:
    """The checkpoint to resume from, or None for a new run; nothing is changed on disk.

    With ``latest``, damaged checkpoints are reported and the one before is taken.

    Raises:
        ValueError: ``wanted`` is not a checkpoint, or ``output_dir`` holds a run that is neither to be continued nor
            to be deleted.
    """
    check_folder(output_dir)
    if wanted is not None and overwrite:
        raise ValueError("resume_from_checkpoint and overwrite_output_dir exclude each other.")
    saved, leftovers = list_checkpoints(output_dir), _leftovers(output_dir)
    if wanted == "latest":
        for checkpoint in reversed(saved):
            try:
                read_state(checkpoint)
                return checkpoint
            except ValueError as error:
                logger.warning("%s Trying the checkpoint before it.", error)
        if saved:
            raise ValueError(f"resume_from_checkpoint: no checkpoint in {str(output_dir)!r} is whole.")
        if not any((output_dir / name).exists() for name in _RESULTS) and not _strangers(output_dir, leftovers):
            return None  # a run that was stopped before its first checkpoint has nothing to lose: it starts again
    elif wanted is not None:
        checkpoint = Path(wanted)
        if not checkpoint.exists() and (output_dir / wanted).is_dir():
            checkpoint = output_dir / wanted
        read_state(checkpoint)
        if checkpoint.resolve().parent == output_dir.resolve():
            return checkpoint
    if leftovers and not overwrite:
        earlier = ", ".join(str(path.relative_to(output_dir)) for path in leftovers[:4])
        raise ValueError(
            f"output_dir {str(output_dir)!r} already holds a run ({earlier}): continue it with "
            "resume_from_checkpoint='latest', delete it with overwrite_output_dir, or choose another folder."
        )
    if overwrite:
        _check_ours(output_dir, leftovers)
    return Path(wanted) if wanted not in (None, "latest") else None


def _leftovers(output_dir: Path) -> list[Path]:
    """What a run in a folder has left, or what looks like it: files, links, and folders that are a run's as a whole."""
    found = [path for name in (CONFIG_FILE, *_FILES_OF_A_RUN, *_FOR_ITSELF) for path in _find(output_dir, name)]
    if output_dir.is_dir():
        numbered = (path for path in sorted(output_dir.iterdir()) if path.is_dir() or path.is_symlink())
        found += [path for path in numbered if _NAME.fullmatch(path.name) or _ABANDONED_NAME.fullmatch(path.name)]
    return found + _find(output_dir, f"{glob.escape(_logging_dir(output_dir))}/{TRACKER}")


def _find(folder: Path, pattern: str) -> list[Path]:
    """The files that a pattern names, or the link on the way to them: what lies behind one is not in the folder."""
    first, _, rest = pattern.partition("/")
    found = []
    for path in sorted(folder.glob(first)):
        if not rest or path.is_symlink():
            found.append(path)
        elif path.is_dir():
            found += _find(path, rest)
    return found


def _logging_dir(output_dir: Path) -> str:
    """Where the trackers of the run in a folder are, by its own record."""
    try:
        logging_dir = json.loads((output_dir / CONFIG_FILE).read_text())["logging_dir"]
        check_logging_dir(logging_dir)
        return PureWindowsPath(logging_dir).as_posix()
    except (OSError, ValueError, KeyError, TypeError):
        return "logs"


def _check_ours(output_dir: Path, leftovers: list[Path]) -> None:
    """Raise a ValueError where a folder holds things with the names of a run's that no run of ours has written."""
    strange = _strangers(output_dir, leftovers)
    if strange:
        raise ValueError(
            f"overwrite_output_dir: {', '.join(strange[:4])} in output_dir {str(output_dir)!r} was not written by a "
            f"training run of this program ({CONFIG_FILE} or {STATE_FILE} is missing), so nothing is deleted: choose "
            "another folder, or move it away."
        )


def _strangers(output_dir: Path, leftovers: list[Path]) -> list[str]:
    found = [path for path in list_checkpoints(output_dir) if not path.is_symlink()]
    strange = [path for path in found if not (path / STATE_FILE).is_file()]
    # A run begins with its configuration; before that only its tracker may have written.
    if not (output_dir / CONFIG_FILE).is_file():
        strange += [path for path in leftovers if path not in strange and path.name not in (*_FOR_ITSELF, TRACKER)]
    return [str(path.relative_to(output_dir)) for path in strange]


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


def clear_run(output_dir: Path) -> None:
    """Delete what an earlier run left inside a folder, and nothing else: links go, what they lead to stays.

    Raises:
        ValueError: Something there was not written by a run; nothing is deleted.
    """
    leftovers, inside = _leftovers(output_dir), output_dir.resolve()
    _check_ours(output_dir, leftovers)
    # Its configuration last: it says that the rest is a run's.
    for path in sorted(leftovers, key=lambda path: path.name == CONFIG_FILE):
        parent = path.parent.resolve()
        if not parent.is_relative_to(inside):
            raise ValueError(f"{str(path)!r} is not inside output_dir {str(output_dir)!r}: it is not deleted.")
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        while parent != inside and not any(parent.iterdir()):
            parent.rmdir()
            parent = parent.parent


def set_aside_later(output_dir: Path, checkpoint: Path, step: int) -> None:
    """Rename the checkpoints after the one that a run goes on from, so that ``latest`` is always one of this run.

    They are kept as ``abandoned-checkpoint-<step>`` until somebody deletes them.
    """
    for later in reversed(list_checkpoints(output_dir)):
        if _step(later) <= step or later == checkpoint:
            continue
        number, aside = 1, output_dir / f"{ABANDONED}{later.name}"
        while aside.exists():
            number += 1
            aside = output_dir / f"{ABANDONED}{later.name}.{number}"
        later.rename(aside)
        logger.warning(
            "The run goes on from step %d: %s, which is later, is kept as %s and not used.",
            step,
            later.name,
            aside.name,
        )
    sync(output_dir)


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
        total_limit: Keep only so many of the latest checkpoints.

    Raises:
        SaveError: The disk is full, or the like; earlier checkpoints are whole.
    """
    unfinished, checkpoint = output_dir / UNFINISHED, output_dir / f"checkpoint-{state['step']}"
    try:
        with saving(f"The checkpoint of step {state['step']}", output_dir):
            if accelerator.is_main_process:
                remove_leftovers(output_dir)
                unfinished.mkdir(parents=True)
            accelerator.wait_for_everyone()
            save_state(accelerator, unfinished)
            if ema is not None:
                average = {str(i): parameter for i, parameter in enumerate(ema.shadow_params)}
                weights = gather(average, accelerator.is_main_process)
                if accelerator.is_main_process:
                    save_file(weights, unfinished / EMA_FILE, metadata={"format": "pt"})
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                averaging = {} if ema is None else {"ema_updates": ema.optimization_step}
                _write_state(unfinished, {**state, **averaging})
                mode = unfinished.stat().st_mode
                for file in unfinished.glob("*.safetensors"):
                    give_mode(file, mode)
                if checkpoint.exists():  # of the same step, which the run has come to again
                    _discard(output_dir, checkpoint)
                unfinished.rename(checkpoint)
                sync(output_dir)
                remove_surplus(output_dir, total_limit)
    except BaseException:
        _remove(unfinished)  # a full disk gets its space back
        raise
    accelerator.wait_for_everyone()
    return checkpoint


def remove_surplus(output_dir: Path, total_limit: int | None) -> None:
    """Delete all but the latest ``total_limit`` checkpoints; None keeps all."""
    if total_limit is not None:
        for old in list_checkpoints(output_dir)[:-total_limit]:
            _discard(output_dir, old)


def remove_leftovers(output_dir: Path) -> None:
    """Delete what a kill in the middle of ``save_checkpoint`` has left under other names than checkpoints'."""
    _discard(output_dir)
    _remove(output_dir / UNFINISHED)


def _write_state(unfinished: Path, state: Mapping[str, Any]) -> None:
    """Write the state with the checksums of all files, its own included, and force all of them to the disk."""
    names = sorted(str(p.relative_to(unfinished)) for p in unfinished.rglob("*") if p.is_file())
    # As it will be read: JSON has no tuples.
    everything = json.loads(json.dumps({**state, "files": {name: _fingerprint(unfinished / name) for name in names}}))
    everything["files"][STATE_FILE] = _state_fingerprint(everything)
    (unfinished / STATE_FILE).write_text(json.dumps(everything, indent=2))
    for name in (*names, STATE_FILE, "."):
        sync(unfinished / name)


def save_model(model: Any, output_dir: Path, adapted: Any = None) -> None:
    """Save a pipeline or a network over an earlier one: every file is the old or the new one at any moment.

    Args:
        model: The pipeline or network.
        output_dir: Where it goes.
        adapted: A network whose adapter, if it has one, is saved by itself beside it.

    Raises:
        SaveError: The disk is full, or the like; the earlier one is whole.
    """

    def write(folder: Path) -> None:
        model.save_pretrained(str(folder))
        if adapted is not None:
            save_adapter(adapted, folder / ADAPTER_FOLDER)

    with saving("The model", output_dir):
        write_folder_whole(output_dir, output_dir / UNFINISHED_PIPELINE, write)


def check_weights(checkpoint: Path, network: nn.Module) -> None:
    """Make sure that a checkpoint's weights have the names and shapes of a network's.

    Raises:
        ValueError: They have not.
    """
    path = checkpoint / SAFE_WEIGHTS_NAME
    if not path.is_file():  # divided into several files
        return
    with safe_open(path, "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    own = {name: tuple(value.shape) for name, value in trained_state(network).items()}
    for name in sorted(saved.keys() | own.keys()):
        if saved.get(name) != own.get(name):
            raise ValueError(
                f"resume_from_checkpoint: {str(checkpoint)!r} is of another network than this run's: its {name} has "
                f"shape {saved.get(name)}, this run's {own.get(name)}."
            )


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
    _remove(discarded)
    if checkpoint is not None:
        checkpoint.rename(discarded)
        _remove(discarded)


def _remove(path: Path) -> None:
    """Delete a folder, or a link but not what it leads to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)

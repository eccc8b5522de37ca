"""Checkpoints that are whole or absent, and an output folder that never loses another run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

STATE_FILE = "training_state.json"
UNFINISHED = ".unfinished-checkpoint"
_NAME = re.compile(r"checkpoint-(\d+)")
_FILES_OF_A_RUN = ("model_index.json", "training_config.json", "unet", "scheduler", "samples", UNFINISHED)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, the earliest first."""
    if not output_dir.is_dir():
        return []
    found = [(int(m[1]), p) for p in output_dir.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says about itself.

    Raises:
        ValueError: The folder is not a whole checkpoint.
    """
    missing = [n for n in (STATE_FILE, "model.safetensors", "optimizer.bin") if not (checkpoint / n).is_file()]
    if missing:
        raise ValueError(
            f"resume_from_checkpoint: {str(checkpoint)!r} is not a checkpoint of this program ({', '.join(missing)} "
            "missing); it must be a folder checkpoint-<step>, or 'latest'."
        )
    try:
        return json.loads((checkpoint / STATE_FILE).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"resume_from_checkpoint: {str(checkpoint / STATE_FILE)!r} is damaged: {error}.") from error


def find_checkpoint(output_dir: Path, wanted: str | None, overwrite: bool, logging_dir: str) -> Path | None:
    """The checkpoint to resume from, or None for a new run; nothing is changed on disk.

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
        if saved:
            read_state(saved[-1])
            return saved[-1]
        if not (output_dir / "model_index.json").exists():
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


def clear_run(output_dir: Path, logging_dir: str) -> None:
    """Delete what an earlier run left, and nothing else."""
    leftovers = [output_dir / name for name in (*_FILES_OF_A_RUN, logging_dir)]
    for path in leftovers + list_checkpoints(output_dir):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, state: Mapping[str, Any], total_limit: int | None
) -> Path:
    """Save everything that training needs to continue exactly; to be called on all processes.

    The checkpoint is written beside its place and renamed at the end, so that a kill at any moment leaves no half of
    one, and earlier checkpoints go only when the new one is whole.
    """
    unfinished, checkpoint = output_dir / UNFINISHED, output_dir / f"checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / STATE_FILE).write_text(json.dumps({"step": step, **state}, indent=2))
        if checkpoint.exists():  # a run resumed from an earlier step comes by here again
            shutil.rmtree(checkpoint)
        unfinished.rename(checkpoint)
        if total_limit is not None:
            for old in list_checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return checkpoint

"""A run in its output folder, whatever is trained: it claims the folder, saves checkpoints and goes on from one."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NoReturn

from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration

from ..basics.files import FolderInUse, check_unlocked, saving, write_whole
from ..basics.processes import lock_for_all
from .checkpoints import (
    CONFIG_FILE,
    clear_run,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    remove_leftovers,
    remove_surplus,
    save_checkpoint,
    set_aside_later,
)
from .optimisation import apply_options
from .precision import default_precision
from .sharding import check_launch
from .signals import EXIT_CODE

logger = logging.getLogger(__name__)


class SavedRun(ABC):
    """A run. Building it checks and changes nothing on disk; ``run`` works.

    Args:
        config: The options of the run.
        **arguments: Further ones of ``Accelerator``.

    Attributes:
        resume_from: The checkpoint that the run goes on from, or None.
        step: Steps that have been taken.
        samples_seen: Images that have been trained on.
        ema: The averaged weights, or None.

    Raises:
        ValueError: Another run is writing to the output folder, or it holds something that ``config`` does not expect.
    """

    step: int
    samples_seen: int
    ema: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, config: Any, **arguments: Any) -> None:
        self.config = config
        self.output_dir = Path(config.output_dir)
        check_unlocked(self.output_dir)
        self.resume_from = find_checkpoint(self.output_dir, config.resume_from_checkpoint, config.overwrite_output_dir)
        self._found = list_checkpoints(self.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision or default_precision(),
            log_with=None if config.logger == "none" else config.logger,
            project_config=ProjectConfiguration(
                project_dir=str(self.output_dir), logging_dir=str(self.output_dir / config.logging_dir)
            ),
            **arguments,
        )
        check_launch(self.accelerator)

    @abstractmethod
    def _work(self) -> Any:
        """Train, in a folder that is claimed, and save and return the result."""

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that continues it."""

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """The options that change the result and may change when a run is resumed."""

    def _settings(self) -> dict[str, Any]:
        """What is written down of the options."""
        settings: dict[str, Any] = self.config.public()
        return settings

    def _state(self) -> dict[str, Any]:
        """What else a checkpoint has to know."""
        return {}

    def run(self) -> Any:
        """Train, and save the result.

        Returns:
            The result, as it was saved in ``output_dir``.

        Raises:
            FolderInUse: Another run is writing to ``output_dir``; nothing has been changed.
            SaveError: The disk is full, or the like; earlier checkpoints are whole.
            RuntimeError: The loss is not finite any more; the last checkpoint is kept.
            SystemExit: SIGTERM has ended the run; a checkpoint is saved.
        """
        self.accelerator.wait_for_everyone()  # nobody touches the output folder before everybody has checked it
        with lock_for_all(self.output_dir, PartialState()):
            if list_checkpoints(self.output_dir) != self._found:
                raise FolderInUse(
                    f"output_dir {str(self.output_dir)!r}: another run has saved checkpoints while this one was "
                    "starting. Start again."
                )
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                if self.config.overwrite_output_dir:
                    clear_run(self.output_dir)
                if self.resume_from is None:
                    self._save_configuration()
            self.accelerator.wait_for_everyone()
            return self._work()

    def _load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint, and clear up what lies behind it."""
        accelerator = self.accelerator
        self.lr_scheduler.load_state_dict(load_checkpoint(accelerator, checkpoint, self.ema)["lr_scheduler"])
        apply_options(self.config, self.optimizer, self.lr_scheduler)
        accelerator.step = 0
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            # Only now is it certain that the run goes on as it is told to.
            set_aside_later(self.output_dir, checkpoint, self.step)
            # A run that was killed between its last checkpoint and the deletions after it will save no other.
            remove_leftovers(self.output_dir)
            remove_surplus(self.output_dir, self.config.checkpoints_total_limit)
            self._save_configuration()

    def _stop(self, progress: Any, checkpoint: Path) -> NoReturn:
        """End the process after the checkpoint that SIGTERM has asked for."""
        progress.close()
        self.accelerator.end_training()
        logger.info(
            "SIGTERM, or the launcher has ended: stopped after step %d; saved %s. "
            "resume_from_checkpoint='latest' goes on.",
            self.step,
            checkpoint,
        )
        raise SystemExit(EXIT_CODE)

    def _save_configuration(self) -> None:
        text = json.dumps(self._settings(), indent=2) + "\n"
        with saving("The configuration", self.output_dir):
            write_whole(self.output_dir / CONFIG_FILE, lambda file: file.write_text(text))

    def _save_checkpoint(self) -> Path:
        state = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "processes": self.accelerator.num_processes,
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "identity": self._identity(),
            "options": self._options(),
            **self._state(),
        }
        limit = self.config.checkpoints_total_limit
        return save_checkpoint(self.accelerator, self.output_dir, state, self.ema, limit)

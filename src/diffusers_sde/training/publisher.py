"""Uploads during training, in the background; none of them can stop the run."""

from __future__ import annotations

import logging
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..shipping.cards import add_card
from ..shipping.uploads import create_repository, upload
from .configuration import TrainingConfig

logger = logging.getLogger(__name__)


class Publisher:
    """Sends pipelines to a repository, one at a time.

    Building it creates the repository, so that a wrong token or name is found before training.

    Args:
        config: The options of the run.
        command: The command line that repeats the run, for the card; None where there is none.

    Raises:
        ValueError: Not a repository name.
        OSError: The Hub refuses or cannot be reached; the message says what to do.
    """

    def __init__(self, config: TrainingConfig, command: str | None) -> None:
        self._config, self._command = config, command
        self._token = config.hub_token
        name = config.hub_model_id or Path(config.output_dir).resolve().name
        self.repo_id = create_repository(name, config.hub_private_repo, self._token)
        self._running: Future | None = None

    def start(self, pipeline: Any, message: str) -> None:
        """Upload a snapshot of the pipeline in the background; skipped while an earlier one is on its way."""
        if self._running is not None and not self._running.done():
            logger.info("%s is not uploaded: an earlier upload is still running.", message)
            return
        self._report()
        try:
            folder = tempfile.TemporaryDirectory()
        except OSError as error:
            self._explain(error)
            return
        try:
            pipeline.save_pretrained(folder.name)
            add_card(folder.name, pipeline, self.repo_id, {"training_command": self._command})
        except Exception as error:  # no room on the disk, in whatever words
            folder.cleanup()
            self._explain(error)
            return
        self._running = HfApi().run_as_future(self._upload, folder, message)

    def finish(self, pipeline: Any) -> None:
        """Upload the finished pipeline and wait for it. A failure is logged with the command that repeats it."""
        self._report()
        logger.info("Uploading to %s.", self.repo_id)
        self.start(pipeline, "The trained pipeline")
        self._report()

    def _upload(self, folder: tempfile.TemporaryDirectory, message: str) -> str:
        with folder:
            return upload(folder.name, self.repo_id, self._token, message)

    def _report(self) -> None:
        """Wait for the upload that is on its way, if any, and say how it ended."""
        if self._running is None:
            return
        error = self._running.exception()
        if error is None:
            logger.info("Uploaded to %s", self._running.result())
        else:
            self._explain(error)
        self._running = None

    def _explain(self, error: BaseException) -> None:
        logger.error(
            "The upload failed: %s Nothing is lost. When the run is over, repeat it by: python scripts/push_to_hub.py "
            "--model %s --hub_model_id %s",
            error,
            self._config.output_dir,
            self.repo_id,
        )

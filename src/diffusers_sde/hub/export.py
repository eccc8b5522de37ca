"""Export of a saved pipeline to the Hub, or to a folder that has all that a repository has."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..basics.options import CheckedOptions, option
from ..pipelines import PIPELINES, SDEPipeline
from ..shipping.cards import add_card
from ..shipping.uploads import create_repository, upload

VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ExportConfig(CheckedOptions):
    """What to export; each field is the option of ``scripts/push_to_hub.py`` with the same name.

    Raises:
        ValueError: An unknown name.
    """

    model: str = option(MISSING, "Folder or Hub name of a pipeline.")
    hub_model_id: str = option(
        MISSING, "Repository, user/name; created if it does not exist. With output_dir only the card says so."
    )
    output_dir: str | None = option(None, "Write the repository's files here, and upload nothing.")
    results: tuple[str, ...] = option(
        (),
        "JSON files for the card: metrics, recipes, data set, ... Later ones add to lists and replace the rest. "
        "Default: none.",
    )
    license: str | None = option(None, "Licence of the weights, such as apache-2.0.")
    pipeline: str | None = option(
        None, "Class to export as, such as InpaintSDEPipeline. Default: the model's own.", choices=tuple(PIPELINES)
    )
    variant: str | None = option(
        None, "Precision of weights that are written beside the float32 ones.", choices=tuple(VARIANTS)
    )
    max_shard_size: str | None = option(None, "Largest weight file, such as 2GB.")
    hub_private_repo: bool = option(False, "Make a new repository private.")
    create_pr: bool = option(False, "Open a pull request instead of committing.")
    update_card: bool = option(False, "Replace the card that is on the Hub.")
    hub_token: str | None = option(None, "Access token. Better: 'hf auth login', or HF_TOKEN.", secret=True)


def export(config: ExportConfig) -> str:
    """Write the files of a repository, and upload them unless they are for a folder.

    Args:
        config: What to export.

    Returns:
        The folder, or the address on the Hub.

    Raises:
        ValueError: Bad arguments, results that are not understood, or not a pipeline of this package.
        OSError: The upload failed; the message says what to do.
    """
    loader = PIPELINES.get(config.pipeline or "", DiffusionPipeline)
    pipe = loader.from_pretrained(config.model)
    if not isinstance(pipe, SDEPipeline):
        raise ValueError(f"{config.model!r} is a {type(pipe).__name__}: convert it first, by scripts/convert.py.")
    if config.variant is not None:
        pipe.to(dtype=VARIANTS[config.variant])
    results = _results(config)
    if config.output_dir is not None:
        _write(pipe, config.output_dir, config.hub_model_id, results, config)
        return config.output_dir
    token = config.hub_token
    repo_id = create_repository(config.hub_model_id, config.hub_private_repo, token)
    with tempfile.TemporaryDirectory() as folder:
        _write(pipe, folder, repo_id, results, config)
        return upload(folder, repo_id, token, None, config.create_pr, config.variant, replace_card=config.update_card)


def _write(pipe: Any, folder: str, repo_id: str, results: Mapping[str, Any], config: ExportConfig) -> None:
    pipe.save_pretrained(folder, variant=config.variant, max_shard_size=config.max_shard_size)
    add_card(folder, pipe, repo_id, results)


def _results(config: ExportConfig) -> dict[str, Any]:
    results: dict[str, Any] = {}
    recorded = Path(config.model) / "training_config.json"
    if recorded.is_file():
        try:
            results["training_command"] = _training_command(json.loads(recorded.read_text(encoding="utf-8")))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{recorded}: not the options of a training: {error}") from error
    for name in config.results:
        try:
            more = json.loads(Path(name).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"results: {name!r} cannot be read: {error}.") from error
        if not isinstance(more, dict):
            raise ValueError(f"results: {name!r} must hold an object, got a {type(more).__name__}.")
        for key, value in more.items():
            results[key] = results[key] + value if isinstance(results.get(key), list) else value
    if config.license is not None:
        results["license"] = config.license
    return results


def _training_command(recorded: Mapping[str, Any]) -> str | None:
    try:
        from ..training import TrainingConfig
    except ImportError:  # the extra that training needs is not installed, so the card does without the command
        return None
    if recorded.get("scheduler") is not None:
        return None  # it was given in Python, and no command line has it
    names = {f.name for f in fields(TrainingConfig)}
    return TrainingConfig(**{key: value for key, value in recorded.items() if key in names}).command()

"""Export a saved pipeline to the Hub, or to a folder that has all that a repository has: ``scripts/push_to_hub.py``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..pipelines import ClassConditionalSDEPipeline, InpaintSDEPipeline, RestorationSDEPipeline, SDEPipeline
from ..shipping.cards import add_card
from ..shipping.uploads import create_repository, upload

PIPELINES: dict[str, type[SDEPipeline]] = {
    cls.__name__: cls for cls in (SDEPipeline, ClassConditionalSDEPipeline, InpaintSDEPipeline, RestorationSDEPipeline)
}
VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to export.

    Args:
        model: Folder or Hub name of a pipeline.
        hub_model_id: Repository, ``user/name``. With ``output_dir``, only the card says so.
        output_dir: Folder to which the repository's files are written; nothing is uploaded then.
        results: JSON files for the card; see ``cards``. Later ones add to lists and replace the rest.
        license: Licence of the weights.
        pipeline: Class to export the model as, such as ``InpaintSDEPipeline``; its own class if None.
        variant: ``fp16`` or ``bf16``. Weights of that precision are written beside the float32 ones.
        max_shard_size: Largest weight file, such as ``2GB``.
        hub_private_repo: Whether a new repository is private.
        create_pr: Whether to open a pull request instead of committing.
        update_card: Whether to replace the card that is on the Hub.
    """

    model: str
    hub_model_id: str
    output_dir: str | None = None
    results: Sequence[str] = ()
    license: str | None = None
    pipeline: str | None = None
    variant: str | None = None
    max_shard_size: str | None = None
    hub_private_repo: bool = False
    create_pr: bool = False
    update_card: bool = False

    def __post_init__(self) -> None:
        if self.variant is not None and self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}.")
        if self.pipeline is not None and self.pipeline not in PIPELINES:
            raise ValueError(f"pipeline must be one of {', '.join(PIPELINES)}, got {self.pipeline!r}.")


def export(config: ExportConfig, token: str | None = None) -> str:
    """Write the files of a repository, and upload them unless they are for a folder.

    Args:
        config: What to export.
        token: Access token; that of ``hf auth login`` or HF_TOKEN if None.

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
    names = {f.name for f in fields(TrainingConfig)}
    return TrainingConfig(**{key: value for key, value in recorded.items() if key in names}).command()


def parse_args(argv: Sequence[str] | None = None) -> tuple[ExportConfig, str | None]:
    """The configuration and the token that a command line describes.

    Raises:
        ValueError: See ``ExportConfig``.
        SystemExit: An unknown option.
    """
    parser = argparse.ArgumentParser(
        prog="push_to_hub.py",
        description="Upload a saved pipeline with its code and a model card, so that anyone can load it.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="Folder or Hub name of a pipeline.")
    parser.add_argument("--hub_model_id", required=True, help="Repository, user/name; created if it does not exist.")
    parser.add_argument("--output_dir", help="Write the repository's files here, and upload nothing.")
    parser.add_argument(
        "--results", nargs="+", default=(), metavar="JSON", help="Files for the card: metrics, recipes, data set, ..."
    )
    parser.add_argument("--license", help="Licence of the weights, such as apache-2.0.")
    parser.add_argument("--pipeline", choices=PIPELINES, help="Class to export as. Default: the model's own.")
    parser.add_argument("--variant", choices=VARIANTS, help="Weights of that precision, beside the float32 ones.")
    parser.add_argument("--max_shard_size", help="Largest weight file, such as 2GB.")
    parser.add_argument("--hub_private_repo", action="store_true", help="Make a new repository private.")
    parser.add_argument("--create_pr", action="store_true", help="Open a pull request instead of committing.")
    parser.add_argument("--update_card", action="store_true", help="Replace the card that is on the Hub.")
    parser.add_argument("--hub_token", help="Access token. Better: 'hf auth login', or HF_TOKEN.")
    arguments = vars(parser.parse_args(argv))
    token = arguments.pop("hub_token")
    return ExportConfig(**arguments), token


def main(argv: Sequence[str] | None = None) -> None:
    """Export as the command line says; mistakes end in one line and exit code 2."""
    try:
        print(export(*parse_args(argv)))
    except (ValueError, OSError) as error:
        print(f"push_to_hub.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None

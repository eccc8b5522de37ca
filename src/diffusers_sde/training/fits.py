"""The command ``diffusers-sde fit``: a sampler fitted to the network of a saved pipeline."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch

from ..basics.files import write_whole
from ..basics.options import LARGEST_SEED, CheckedOptions, fail, names_of, option, parse_options
from ..evaluation.data import read_images
from ..evaluation.samplers import Sampler, as_sde_pipeline, launched_processes, load_pipeline
from ..pipelines import SDEPipeline
from ..pipelines.fit_subjects import is_told_captions
from ..pipelines.fits import FIT_PRECISIONS, OBJECTIVES, SchedulerFit, fit_scheduler

logger = logging.getLogger(__name__)

REPORT_FILE = "fit.json"


@dataclass(frozen=True, kw_only=True)
class FitConfig(CheckedOptions):
    """What to fit; each field is the option of ``scripts/fit_sampler.py`` with the same name.

    Raises:
        ValueError: A value out of range or an unknown name.
    """

    model: str = option(MISSING, "Folder or Hub name of a pipeline.")
    output_dir: str = option("outputs/fitted", "Where the pipeline with its fitted scheduler, and fit.json, go.")
    num_inference_steps: int = option(8, "Noise levels that the sampler is fitted for.", least=2)
    sampler: str = option(
        "",
        "The sampler to start from, 'key=value, key=value' with arguments of the scheduler, such as "
        "'probability_flow=true' or 'corrector=langevin'. Default: the pipeline's own.",
    )
    objective: str | None = option(
        None,
        "'paired': end points of a fine solution of the probability flow; 'energy': energy distance to data, or to a "
        "fine reverse SDE without. Default: paired for the probability flow without data, energy otherwise.",
        choices=OBJECTIVES,
    )

    # ------------------------------------------------------------------ data
    dataset_name: str | None = option(
        None, "'digits' or a name on the Hub: images to be like. Default: data_dir, or a fine sampler of the network."
    )
    data_dir: str | None = option(None, "Local data: a folder of images or Parquet, or such a file.", aliases=["data"])
    dataset_split: str = option("train", "Split of the images.")
    image_column: str | None = option(None, "Column with the images. Default: the data's image column.")
    label_column: str | None = option(None, "Column with the classes. Default: the data's class column, if any.")
    white_level: int | None = option(
        None, "Value of white in grey images of more than 8 bits. Default: 65535.", least=1, most=2**31 - 1
    )
    num_images: int = option(20_000, "Images of the split, evenly spread over it, at most.", least=50)

    # ------------------------------------------------------------------ the fit
    prompts: tuple[str, ...] | None = option(
        None,
        "Captions that images have in turn, for a model that is told captions. One of diffusers is run through its own "
        "loop, which takes no gradients and needs more images.",
    )
    guidance_scale: float = option(
        1.0, "Classifier-free guidance of models that are told classes or captions.", least=0.0
    )
    steps: int | None = option(
        None, "Steps of the optimiser. Default: 120, 80 for 'paired', 60 without gradients.", least=1
    )
    batch_size: int | None = option(
        None, "Images of a step. Default: 128, 256 for 'paired', 32 without gradients.", least=2
    )
    learning_rate: float | None = option(
        None, "Learning rate of Adam. Default: 0.03, and 0.02 without gradients.", above=0.0
    )
    held_out: int | None = option(
        None, "Images of the report. Default: 2048, 512 for 'paired', 128 without gradients.", least=2
    )
    teacher_steps: int | None = option(
        None, "Levels of the fine sampler. Default: 60 for 'paired', 50 for 'energy', or more.", least=2
    )
    gradients: bool = option(True, "Pass gradients through the network; otherwise they are estimated without.")
    checkpointing: bool = option(False, "Compute activations again in the backward pass, which saves memory.")
    mixed_precision: str | None = option(
        None,
        "Precision of the network in the steps of the optimiser; the report is of the network as it is. Default: bf16 "
        "where the hardware computes in it, or else no.",
        choices=FIT_PRECISIONS,
    )
    seed: int = option(0, "Seed of everything that is drawn.", least=0, most=LARGEST_SEED)


def fit_saved(config: FitConfig) -> SchedulerFit:
    """Fit the sampler of a saved pipeline, and save the pipeline with it.

    Raises:
        ValueError: Options that do not fit the model or each other, or several processes.
        OSError: There is no such model, or the folder cannot be written.
    """
    if launched_processes().num_processes > 1:
        raise ValueError("a sampler is fitted by one process: launch it with --num_processes 1.")
    folder = Path(config.output_dir)
    if folder.resolve() == Path(config.model).resolve():
        raise ValueError(f"output_dir must be another folder than model, got {config.output_dir!r} for both.")
    pipe: Any = load_pipeline(config.model).to(launched_processes().device)
    has_data = config.dataset_name is not None or config.data_dir is not None
    if is_told_captions(pipe) is not (config.prompts is not None):
        raise ValueError(
            f"prompts are for a model that is told captions, and it needs them: got {config.prompts!r} for a "
            f"{type(pipe).__name__}."
        )
    if config.prompts is None:
        pipe = as_sde_pipeline(pipe)
        told: dict[str, Any] = {"guidance_scale": config.guidance_scale, "gradients": config.gradients}
    elif has_data and not isinstance(pipe, SDEPipeline):
        raise ValueError(f"dataset_name and data_dir must be left out for a {type(pipe).__name__}.")
    else:
        told = {"call": {"prompt": list(config.prompts), "guidance_scale": config.guidance_scale}}
        if isinstance(pipe, SDEPipeline):
            told["gradients"] = config.gradients
    data = None
    if has_data:
        data = read_images(config, pipe, config.dataset_split, config.num_images, show_progress=True).pixels
    with torch.enable_grad():
        fit = fit_scheduler(
            pipe,
            config.num_inference_steps,
            data,
            sampler=Sampler.parse(f"sampler: {config.sampler}").options,
            objective=config.objective,
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            held_out=config.held_out,
            teacher_steps=config.teacher_steps,
            checkpointing=config.checkpointing,
            mixed_precision=config.mixed_precision,
            seed=config.seed,
            **told,
        )
    pipe.scheduler = fit.scheduler
    pipe.save_pretrained(folder)
    text = json.dumps(fit.report, indent=2) + "\n"
    write_whole(folder / REPORT_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    return fit


def fit_main(argv: Sequence[str] | None = None, prog: str = "fit_sampler.py") -> None:
    """Fit as the command line says; mistakes end in one line and exit code 2."""
    try:
        config = parse_options(
            FitConfig,
            argv,
            prog=prog,
            description="Fit the numbers of a sampler to the network of a saved pipeline, for few network calls.",
        )
        fit = fit_saved(config)
    except (ValueError, OSError) as error:
        raise fail(prog, error, names=names_of(FitConfig)) from None
    print(fit)

"""The demo: train a score model on real handwritten digits, then sample the same network in many ways.

It leaves in its folder the saved pipeline, samples.png (real digits, reverse SDE, predictor-corrector, probability-flow
ODE, and by class) and conditional.png (digits that the network has not seen, inpainted and super-resolved).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from ..basics.options import fail
from ..guidance import Downsampling
from ..images.loading import load_digits
from ..pipelines import ClassConditionalSDEPipeline, InpaintSDEPipeline, RestorationSDEPipeline, SDEPipeline
from ..schedulers import VPSDEScheduler

COLUMNS = 20
SEEN = 1700  # digits to train on, of 1797

# The same network, three samplers: title, scheduler options, noise levels.
SAMPLERS = (
    ("reverse SDE", {"predictor": "exponential"}, 100),
    ("predictor-corrector", {"predictor": "reverse_diffusion", "corrector": "langevin", "snr": 0.1}, 100),
    ("probability-flow ODE", {"predictor": "heun", "probability_flow": True}, 25),
)


def run(*command: str) -> None:
    """Run a Python program and show its output."""
    print(f"\n$ python {' '.join(command)}", flush=True)
    # OpenMP's threads wait for each other by spinning, which on shared cores slows them down tenfold: spin for a tenth
    # of a millisecond, then sleep.
    environment = {"GOMP_SPINCOUNT": "30000", **os.environ}
    subprocess.run([sys.executable, *command], env=environment, check=True)


def train(output: Path, steps: int) -> None:
    """Train through accelerate, as a user would."""
    threads = str(os.cpu_count() or 1)  # accelerate would give the process one thread
    run(
        *("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"),
        *("--mixed_precision", "no", "--num_cpu_threads_per_process", threads),
        *("-m", "diffusers_sde.commands", "train"),
        *("--dataset_name", "digits", "--dataset_split", f"train[:{SEEN}]"),
        # Half of the images without their class: one network for everything, with classes and without.
        *("--sde", "vp", "--prediction_type", "v_prediction", "--class_conditional", "--label_dropout", "0.5"),
        *("--train_batch_size", "128", "--learning_rate", "2e-3", "--adam_beta2", "0.99"),
        *("--max_train_steps", str(steps), "--sample_every", "0", "--checkpointing_steps", str(steps)),
        *("--output_dir", str(output), "--overwrite_output_dir"),
    )


def enlarge(image: np.ndarray, size: int = 64) -> np.ndarray:
    """A grey image in [0, 1], smoothly enlarged."""
    picture = Image.fromarray(np.uint8(np.rint(255 * image))).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture) / 255.0


def generators() -> list[torch.Generator]:
    """One per image: rows start from the same noise, and no image depends on its batch mates."""
    return [torch.Generator().manual_seed(i) for i in range(COLUMNS)]


def as_arrays(images: list[Image.Image]) -> list[np.ndarray]:
    """Grey pictures as numbers in [0, 1], shape (H, W, 1)."""
    return [np.asarray(image, dtype=np.float32)[..., None] / 255 for image in images]


def draw_rows(rows: list[tuple[str, list[np.ndarray]]], path: Path) -> None:
    """Titled rows of small pictures, enlarged smoothly, since eight pixels are read more easily so."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(12, 0.95 * len(rows) + 0.3), layout="constrained")
    for axis, (title, images) in zip(axes, rows, strict=True):
        strip = np.concatenate([np.pad(enlarge(image[..., 0]), 4, constant_values=0.35) for image in images], axis=1)
        axis.imshow(strip, cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=9, loc="left", pad=2)
        axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_samples(output: Path) -> None:
    """Sample the saved pipeline and draw the rows beside real digits."""
    pipe = SDEPipeline.from_pretrained(output)
    trained = pipe.scheduler.config
    rows = [("real digits", as_arrays(load_digits()["image"][:COLUMNS]))]
    for title, options, levels in SAMPLERS:
        pipe.scheduler = VPSDEScheduler.from_config(trained, **options)
        pipe.set_progress_bar_config(desc=title)
        images = pipe(COLUMNS, levels, generators(), output_type="np").images
        rows.append((f"{title}, {pipe.num_timesteps} calls", images))

    by_class = ClassConditionalSDEPipeline.from_pretrained(output)
    by_class.set_progress_bar_config(desc="by class")
    labels = [i * 10 // COLUMNS for i in range(COLUMNS)]
    images = by_class(
        labels, guidance_scale=2.0, num_inference_steps=50, generator=generators(), output_type="np"
    ).images
    rows.append(("by class: 0, 0, 1, 1, ... with classifier-free guidance 2", images))
    draw_rows(rows, output / "samples.png")


def draw_conditional(output: Path) -> None:
    """Digits that the network has not seen, with a part of each hidden: what it makes of the rest."""
    digits, each = load_digits()["image"][SEEN : SEEN + 4], 8
    inpaint, restore = (cls.from_pretrained(output) for cls in (InpaintSDEPipeline, RestorationSDEPipeline))
    inpaint.set_progress_bar_config(desc="inpainting")
    restore.set_progress_bar_config(desc="super-resolution")
    run = {"num_samples": each, "num_inference_steps": 50, "output_type": "np"}
    hole = np.zeros((8, 8), dtype=np.uint8)
    hole[4:] = 255
    painted = inpaint(digits, Image.fromarray(hole), generator=torch.manual_seed(0), **run).images
    truth = np.stack(as_arrays(digits))
    operator = Downsampling(2, restore.sample_shape)
    small = operator.apply(2.0 * torch.from_numpy(truth).permute(0, 3, 1, 2) - 1.0)
    restored = restore(small, operator, generator=torch.manual_seed(0), **run).images
    coarse = 0.5 + 0.5 * small.permute(0, 2, 3, 1).numpy()
    rows = []
    for i, image in enumerate(truth):
        mine, blank = slice(i * each, (i + 1) * each), np.ones_like(image)
        visible = np.where(hole[..., None] > 0, 0.35, image)
        rows.append(("", [image, visible, *painted[mine], blank, coarse[i], *restored[mine]]))
    title = "digits that the network has not seen, their upper halves, completions; in 4 x 4 pixels, super-resolutions"
    rows[0] = (title, rows[0][1])
    draw_rows(rows, output / "conditional.png")


def closing_lines(output: Path) -> tuple[str, str]:
    """Two lines of Python that load the saved pipeline and show what it draws."""
    return (
        "import PIL.ImageOps, diffusers, diffusers_sde; "
        f"pipe = diffusers.DiffusionPipeline.from_pretrained({str(output)!r})",
        'framed = [PIL.ImageOps.expand(i.resize((120, 120)), 4, "white") for i in pipe(batch_size=16).images]; '
        "diffusers.utils.make_image_grid(framed, rows=2, cols=8).show()",
    )


def run_demo(output: Path, steps: int, draw_more: Callable[[Path], Path] | None = None) -> None:
    """Train, sample and draw, and say how to go on.

    Args:
        output: Folder for everything.
        steps: Optimiser steps.
        draw_more: Draws one more picture into the folder that it is given, and returns its file.
    """
    output = output.resolve()
    train(output, steps)
    draw_samples(output)
    draw_conditional(output)
    pictures = [output / "samples.png", output / "conditional.png"]
    if draw_more is not None:
        pictures.append(draw_more(output))
    print(f"\nLook at {', '.join(map(str, pictures))}.\nDraw more, in {sys.executable}:\n")
    print("\n".join(closing_lines(output)))


def build_parser(prog: str, output: Path) -> argparse.ArgumentParser:
    """The options of the demo; ``output`` is where its files go by default."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=output, help="where everything goes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps (default: 1000)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "demo.py") -> None:
    """Run the demo as the command line says; a step that fails has printed why, and ends it with exit code 1."""
    arguments = build_parser(prog, Path("outputs/demo")).parse_args(argv)
    try:
        run_demo(arguments.output_dir, arguments.steps)
    except subprocess.CalledProcessError as error:
        raise fail(prog, error, 1) from None

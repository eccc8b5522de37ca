"""`make demo`: train a score model on real handwritten digits, then sample the same network in three ways.

Leaves in outputs/demo: the saved pipeline, samples.png (real digits, reverse SDE, predictor-corrector, probability-flow
ODE) and trajectories.png (the paper's Figure 2).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import diffusers_sde  # noqa: F401 - makes saved pipelines loadable by name
from diffusers_sde import VPSDEScheduler
from diffusers_sde.training.data import load_digits

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 20

# The same network, three samplers: title, scheduler options, noise levels.
SAMPLERS = (
    ("reverse SDE", {"predictor": "exponential"}, 100),
    ("predictor-corrector", {"predictor": "reverse_diffusion", "corrector": "langevin", "snr": 0.1}, 100),
    ("probability-flow ODE", {"predictor": "heun", "probability_flow": True}, 25),
)


def run(*command: str) -> None:
    """Run a Python program from the project's folder and show its output."""
    print(f"\n$ python {' '.join(command)}", flush=True)
    # OpenMP's threads wait for each other by spinning, which on shared cores slows them down tenfold: spin for a tenth
    # of a millisecond, then sleep.
    environment = {"GOMP_SPINCOUNT": "30000", **os.environ}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)


def train(output: Path, steps: int) -> None:
    """Train through accelerate, as a user would."""
    threads = str(os.cpu_count() or 1)  # accelerate would give the process one thread
    run(
        *("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"),
        *("--mixed_precision", "no", "--num_cpu_threads_per_process", threads, "scripts/train.py"),
        *("--dataset_name", "digits", "--sde", "vp", "--prediction_type", "v_prediction"),
        *("--train_batch_size", "128", "--learning_rate", "2e-3", "--adam_beta2", "0.99"),
        *("--max_train_steps", str(steps), "--sample_every", "0", "--checkpointing_steps", str(steps)),
        *("--output_dir", str(output), "--overwrite_output_dir"),
    )


def enlarge(image: np.ndarray, size: int = 64) -> np.ndarray:
    """A grey image in [0, 1], smoothly enlarged."""
    picture = Image.fromarray(np.uint8(np.rint(255 * image))).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture) / 255.0


def draw(output: Path) -> None:
    """Sample the saved pipeline and draw the rows beside real digits."""
    pipe = DiffusionPipeline.from_pretrained(output)
    trained = pipe.scheduler.config
    real = [np.asarray(image, dtype=np.float32)[..., None] / 255 for image in load_digits()["image"][:COLUMNS]]
    rows = [("real digits", real)]
    for title, options, levels in SAMPLERS:
        pipe.scheduler = VPSDEScheduler.from_config(trained, **options)
        pipe.set_progress_bar_config(desc=title)
        # One generator per image: the rows start from the same noise, and no image depends on its batch mates.
        generators = [torch.Generator().manual_seed(i) for i in range(COLUMNS)]
        images = pipe(COLUMNS, levels, generators, output_type="np").images
        rows.append((f"{title}, {pipe.num_timesteps} calls", images))

    figure, axes = plt.subplots(len(rows), 1, figsize=(12, 0.95 * len(rows) + 0.3), layout="constrained")
    for axis, (title, images) in zip(axes, rows, strict=True):
        # Eight pixels are read more easily when enlarged smoothly, each in a frame of its own.
        strip = np.concatenate([np.pad(enlarge(image[..., 0]), 4, constant_values=0.35) for image in images], axis=1)
        axis.imshow(strip, cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=9, loc="left", pad=2)
        axis.axis("off")
    figure.savefig(output / "samples.png", dpi=110)
    plt.close(figure)


def main() -> None:
    """Train, sample and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "demo", help="where everything goes")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps (default: 1000)")
    arguments = parser.parse_args()
    output = arguments.output_dir.resolve()
    train(output, arguments.steps)
    draw(output)
    run("examples/trajectories.py", "--output", str(output / "trajectories.png"))
    print(f"\nLook at {output / 'samples.png'} and {output / 'trajectories.png'}. The model:")
    print(f'  import diffusers_sde; pipe = diffusers.DiffusionPipeline.from_pretrained("{output}")')


if __name__ == "__main__":
    main()

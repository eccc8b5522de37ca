"""How good completions are at few and at many levels, by a proper score: orders of the steps, and posterior methods.

    python benchmarks/completions.py
    python benchmarks/completions.py --model examples/space/models/fashion --images path/to/fashion_mnist/test.parquet

The lower half of images is hidden and completed M times. With y the hidden half and x, x' two completions, the energy
score is the mean of |x - y| - |x - x'|/2 over the images. It is smallest for the true posterior, and for nothing else
(Gneiting & Raftery 2007): completions that vary too little lose as those that are off do. ``+-`` is the standard error
of the difference to the first row, from the same noise.

Without ``--model`` the images are drawn from a Gaussian mixture that was fitted to the 8x8 digits, whose score is
exact, and only the sampler and the approximation of the posterior can be wrong.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from fitted import ExactNetwork
from mixtures import fitted
from samplers import SCHEDULERS
from torch import Tensor

from diffusers_sde import InpaintSDEPipeline
from diffusers_sde.images.source import ImageSource
from diffusers_sde.training import TrainingConfig

ORDERS: dict[str, dict[str, Any]] = {
    "nothing set": {},
    "solver_order=1": {"solver_order": 1},
    "solver_order=2": {"solver_order": 2},
    "solver_order=3": {"solver_order": 3},
    "solver_order=1, no correction": {"solver_order": 1, "solver_correction": False},
}


def energy_scores(drawn: Tensor, truth: Tensor) -> Tensor:
    """The score of each image, shape (N,), for completions (M, N, n) of the truth (N, n)."""
    count = len(drawn)
    off = (drawn - truth).norm(dim=2).mean(0)
    apart = torch.stack([(a - b).norm(dim=1) for i, a in enumerate(drawn) for b in drawn[:i]]).sum(0)
    return off - apart / (count * (count - 1))


def exact_pipeline(path: str, count: int) -> tuple[InpaintSDEPipeline, Tensor]:
    """A pipeline whose network is the exact denoiser of the mixture, and images drawn from that."""
    data, scheduler = fitted("digits"), SCHEDULERS[path](prediction_type="sample", time_conditioning="time")
    pipe = InpaintSDEPipeline(ExactNetwork(data, scheduler.sde), scheduler, sample_shape=(1, 8, 8))
    return pipe, data.sample(count, seed=77).float().reshape(-1, 1, 8, 8).clamp(-1.0, 1.0)


def trained_pipeline(folder: Path, file: Path, count: int) -> tuple[InpaintSDEPipeline, Tensor]:
    """A saved pipeline and the first images of a Parquet file, as its network sees them."""
    pipe = InpaintSDEPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    config = TrainingConfig(resolution=pipe.unet.config.sample_size, channels=pipe.unet.config.in_channels)
    images = datasets.load_dataset("parquet", data_files=str(file), split="train").select(range(count))
    pixels = torch.from_numpy(ImageSource(images, config).get_many(range(count)))
    return pipe, pixels.float() / 127.5 - 1.0


def completed(pipe: Any, images: Tensor, posterior: str, levels: int, times: int) -> Tensor:
    """Hidden halves in [0, 1], shape (M, N, n); every image has a generator of its own."""
    half = images.shape[2] // 2
    mask = torch.zeros(images.shape[2:])
    mask[half:] = 1.0
    drawn = []
    for k in range(times):
        generators = [torch.Generator().manual_seed(1000 * k + i) for i in range(len(images))]
        out = pipe(
            images, mask, num_inference_steps=levels, posterior=posterior, generator=generators, output_type="pt"
        )
        drawn.append(out.images[:, :, half:].flatten(1).double())
    return torch.stack(drawn)


def report(
    pipe: Any, images: Tensor, posteriors: list[str], levels: list[int], times: int, settings: dict[str, Any]
) -> None:
    """Print a row for each setting."""
    truth = (0.5 * images[:, :, images.shape[2] // 2 :] + 0.5).flatten(1).double()
    own = pipe.scheduler
    make: Callable[..., Any] = type(own).from_config
    for posterior in posteriors:
        for n in levels:
            first = None
            for label, config in settings.items():
                pipe.scheduler = make(own.config, **{"fitted_plan": None, **config})
                scores = energy_scores(completed(pipe, images, posterior, n, times), truth)
                first = scores if first is None else first
                difference = scores - first
                error = float(difference.std()) / math.sqrt(len(scores))
                numbers = f"{float(scores.mean()):.4f}  {float(difference.mean()):+.4f} +- {error:.4f}"
                print(f"{posterior:12s}{n:4d} levels  {label:34s}{numbers}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a pipeline; None for the mixture")
    parser.add_argument("--images", type=Path, help="Parquet file with a column of images, for --model")
    parser.add_argument("--path", choices=tuple(SCHEDULERS), default="vp", help="of the mixture")
    parser.add_argument("--posteriors", nargs="+", default=["pigdm", "mmps", "dps"])
    parser.add_argument("--levels", nargs="+", type=int, default=[10, 25, 50, 100])
    parser.add_argument("--count", type=int, default=256, help="images")
    parser.add_argument("--times", type=int, default=4, help="completions of each")
    parser.add_argument("--settings", help="JSON: label -> arguments of from_config, in place of the orders")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.model is None:
        pipe, images = exact_pipeline(args.path, args.count)
    else:
        pipe, images = trained_pipeline(args.model, args.images, args.count)
    pipe.set_progress_bar_config(disable=True)
    settings = ORDERS if args.settings is None else json.loads(args.settings)
    report(pipe, images, args.posteriors, args.levels, args.times, settings)


if __name__ == "__main__":
    main()

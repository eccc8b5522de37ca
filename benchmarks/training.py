"""Images per second of training: scripts/train.py and the loop of diffusers' train_unconditional.py, side by side.

python benchmarks/training.py [--train_data_dir path/to/parquet] [--steps 60] [--output outputs/training_speed.json]

Both train the same UNet2DModel from the same weights on the same images with DDPM's loss, optimiser, learning rate and
averaging of weights, each in a process of its own with its own defaults otherwise. They take turns of a few steps, so
that load on the machine hits both alike, and ratios are those of the processor time and of the wall time per step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_sde.images.loading import load_images
from diffusers_sde.images.source import ImageSource
from diffusers_sde.training import Trainer, TrainingConfig
from diffusers_sde.training.networks import build_unet


class Turns:
    """The clock of one contestant: called before each step, it hands the machine over after every turn."""

    def __init__(self, pipe: Connection, steps: int) -> None:
        self.pipe, self.steps, self.done, self.losses = pipe, steps, 0, []  # type: ignore[var-annotated]

    def before_step(self) -> None:
        if self.done % self.steps == 0:
            if self.done:
                self.report()
            self.pipe.recv()
            self.began = time.perf_counter(), time.process_time()
        self.done += 1

    def report(self) -> None:
        wall, cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)
        self.pipe.send((wall / self.steps, cpu / self.steps, mib, [float(loss) for loss in self.losses]))
        self.losses.clear()


def ours(pipe: Connection, options: dict[str, Any], turn: int, threads: int) -> None:
    torch.set_num_threads(threads)
    turns = Turns(pipe, turn)
    trainer = Trainer(TrainingConfig(**options))
    loss = trainer.loss

    def timed(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        turns.before_step()
        value = loss(batch)
        turns.losses.append(value.detach().mean())
        return value

    trainer.loss = timed  # type: ignore[method-assign]
    save = trainer._save_result
    trainer._save_result = lambda: (turns.report(), save())[1]  # type: ignore[method-assign]
    trainer.run()


def diffusers_loop(pipe: Connection, options: dict[str, Any], turn: int, threads: int) -> None:
    """What train_unconditional.py does with --use_ema and its defaults: the images are decoded for every batch."""
    torch.set_num_threads(threads)
    turns = Turns(pipe, turn)
    config = TrainingConfig(**options)
    accelerator = Accelerator(mixed_precision="no")
    dataset = load_images(config)
    column = "image" if "image" in dataset.features else next(iter(dataset.features))
    source = ImageSource(dataset.select(range(256)), config)
    torch.manual_seed(config.seed)
    model = build_unet(config, source)
    mode, side = ("L" if source.channels == 1 else "RGB"), source.resolution

    def augment(image: Image.Image) -> torch.Tensor:
        scale = side / min(image.size)
        image = image.convert(mode).resize(tuple(round(v * scale) for v in image.size), Image.Resampling.BILINEAR)
        left, top = ((v - side) // 2 for v in image.size)
        pixels = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32) / 255.0
        return torch.from_numpy(pixels.reshape(side, side, -1)).permute(2, 0, 1).sub(0.5).div(0.5)

    dataset.set_transform(lambda rows: {"input": [augment(image) for image in rows[column]]})
    loader = DataLoader(dataset, batch_size=config.train_batch_size, shuffle=True, num_workers=0)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8
    )
    steps = config.max_train_steps or 0
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    noise_scheduler, step = DDPMScheduler(num_train_timesteps=1000), 0
    model.train()
    while step < steps:
        for batch in loader:
            if step == steps:
                break
            turns.before_step()
            images = batch["input"]
            noise = torch.randn(images.shape)
            timesteps = torch.randint(0, 1000, (len(images),)).long()
            noisy = noise_scheduler.add_noise(images, noise, timesteps)
            with accelerator.accumulate(model):
                loss = functional.mse_loss(model(noisy, timesteps).sample.float(), noise)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            ema.step(model.parameters())
            step += 1
            turns.losses.append(loss.detach().item())
            accelerator.log({"loss": turns.losses[-1], "lr": schedule.get_last_lr()[0]}, step=step)
    turns.report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", help="images, as for scripts/train.py (default: digits, enlarged)")
    parser.add_argument("--resolution", type=int, default=28)
    parser.add_argument("--block_out_channels", type=int, nargs="+", default=[32, 64, 64])
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of each (default: 60)")
    parser.add_argument("--turn", type=int, default=5, help="steps of a turn (default: 5)")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), help="of ours (default: its own)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each process")
    parser.add_argument("--output", type=Path, help="write the numbers here, as JSON")
    arguments = parser.parse_args()
    if arguments.steps % arguments.turn:
        parser.error(f"--steps must be a multiple of --turn, got {arguments.steps} and {arguments.turn}")
    contestants = {"diffusers": diffusers_loop, "ours": ours}
    context, results = multiprocessing.get_context("spawn"), {name: [] for name in contestants}  # type: ignore[var-annotated]
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "train_data_dir": arguments.train_data_dir,
            "resolution": arguments.resolution,
            "block_out_channels": tuple(arguments.block_out_channels),
            "layers_per_block": 1,
            "train_batch_size": arguments.train_batch_size,
            "max_train_steps": arguments.steps,
            "discrete": True,
            "learning_rate": 1e-3,
            "lr_warmup_steps": arguments.steps // 10,
            "sample_every": 0,
            "checkpointing_steps": 0,
            "logger": "none",
            "output_dir": folder,
        }
        if arguments.mixed_precision is not None:
            options["mixed_precision"] = arguments.mixed_precision
        pipes = {}
        for name, function in contestants.items():
            pipes[name], end = context.Pipe()
            context.Process(
                target=function, args=(end, options, arguments.turn, arguments.threads), daemon=True
            ).start()
        for _ in tqdm(range(arguments.steps // arguments.turn), desc="Turns"):
            for name, pipe in pipes.items():
                pipe.send("go")
                results[name].append(pipe.recv())
                wall, cpu, mib, losses = results[name][-1]
                tqdm.write(
                    f"{name:9s} {wall:.3f} s, {cpu:.3f} processor s a step; {mib:.0f} MiB; loss {losses[-1]:.3f}"
                )

    summary: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    for name, turns in results.items():
        losses = [loss for turn in turns for loss in turn[3]]
        summary[name] = {
            "wall_seconds_per_step": statistics.median(turn[0] for turn in turns[1:]),
            "cpu_seconds_per_step": statistics.median(turn[1] for turn in turns[1:]),
            "images_per_second": arguments.train_batch_size / statistics.median(turn[0] for turn in turns[1:]),
            "peak_memory_mib": turns[-1][2],
            "loss_of_last_quarter": statistics.mean(losses[-len(losses) // 4 :]),
        }
    for i, name in enumerate(("wall", "cpu")):
        ratios = [a[i] / b[i] for a, b in zip(results["diffusers"][1:], results["ours"][1:], strict=True)]
        summary[f"speedup_{name}"] = statistics.median(ratios)
    print(json.dumps(summary, indent=2))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Speed of training on latents: images per second of processor time with the cache, without it, and on pixels.

    python benchmarks/latents.py --vae outputs/autoencoder --train_data_dir DATA --resolution 32

Each run takes the same steps. Processor time is that of this process with one thread, so that other work on the machine
counts as little as possible.
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path

import torch

from diffusers_sde.images.loading import load_images
from diffusers_sde.training import Trainer, TrainingConfig


def measure(name: str, images, steps: int, warm: int, **options) -> float:
    with tempfile.TemporaryDirectory() as folder:
        common = {"sample_every": 0, "checkpointing_steps": 0, "logger": "none", "class_conditional": True}
        config = TrainingConfig(output_dir=folder, max_train_steps=warm + steps, **common, **options)
        trainer = Trainer(config, images)
        take, marks, losses = trainer._take_step, [], []

        def timed() -> None:
            marks.append(time.process_time())
            take()
            losses.append(float(trainer._loss_sum) / trainer._steps_summed)

        trainer._take_step = timed
        trainer.run()
        # The last step is followed by saving, which is left out.
        spent = marks[-1] - marks[warm]
        rate = (steps - 1) * config.train_batch_size / spent
    print(f"{name:28} {rate:8.1f} images per second, mean loss {losses[-1]:.6f}", flush=True)
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--block_out_channels", type=int, nargs="+", default=(32, 64))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    data = TrainingConfig(train_data_dir=args.train_data_dir, resolution=args.resolution)
    images = load_images(data).select(range(args.images))
    common = {"resolution": args.resolution, "train_batch_size": args.train_batch_size}
    run = {"steps": args.steps, "warm": args.warm}
    with tempfile.TemporaryDirectory() as cache:
        latent = common | {"vae": args.vae}
        cached = latent | {"cache_latents": True, "latent_cache_dir": str(Path(cache))}
        unet = {"block_out_channels": tuple(args.block_out_channels), "layers_per_block": 1}
        for kind, sizes in (("dit", {}), ("unet", unet)):
            measure(f"{kind}, latents, cached", images, **run, **cached, model_type=kind, **sizes)
            measure(f"{kind}, latents, on the way", images, **run, **latent, model_type=kind, **sizes)
        measure("unet, pixels", images, **run, **common, **unet)


if __name__ == "__main__":
    main()

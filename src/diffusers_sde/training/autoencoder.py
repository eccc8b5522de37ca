"""Training of an autoencoder of images, on whose latents a denoiser can then be trained.

    loss = |x - decode(z)| per pixel + kl_weight KL(q(z | x) || N(0, 1)) per latent number,    z ~ q(z | x),

with images x in [-1, 1] and diffusers' ``AutoencoderKL``, whose encoder returns the Gaussian q (Kingma & Welling 2014;
Rombach et al. 2022, arXiv:2112.10752, section 3.1, without the perceptual and adversarial losses, which need networks
trained on other data).
"""

from __future__ import annotations

import logging
import math
import time
from functools import partial
from typing import Any

import datasets
import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ..basics.files import saving, write_whole
from ..basics.networks import describe_network
from ..images.arrays import to_bytes, to_network
from ..images.loading import load_images
from ..images.pictures import tile
from ..images.samples import batches
from ..images.source import ImageSource
from .autoencoder_configuration import AutoencoderTrainingConfig
from .averaging import averaged_weights
from .checkpoints import (
    check_output_dir,
    check_weights,
    read_state,
    save_model,
)
from .identity import as_recorded, check_same_run, log_changes
from .logs import describe_source, due, log_pictures, progress_bar, start_trackers
from .networks import network_identity
from .optimisation import build_average, build_optimizer, check_optimizer
from .saved_run import SavedRun
from .sharding import is_sharded
from .signals import StopSignal

logger = logging.getLogger(__name__)

SHOWN = 8  # images beside their reconstructions
_CHANGING = (
    *("learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay"),
    *("adam_epsilon", "max_grad_norm", "train_batch_size", "gradient_accumulation_steps", "random_flip", "center_crop"),
    *("ema_inv_gamma", "ema_power", "ema_max_decay"),
)


class ReconstructionLoss(nn.Module):
    """The loss of an autoencoder on a batch; a module, so that all processes average its gradients.

    Args:
        vae: An ``AutoencoderKL``.
        reconstruction: ``l1`` or ``l2``.
        kl_weight: Weight of the Kullback-Leibler divergence per latent number.
    """

    def __init__(self, vae: AutoencoderKL, reconstruction: str, kl_weight: float) -> None:
        super().__init__()
        self.vae, self._squared, self._kl_weight = vae, reconstruction == "l2", kl_weight

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the reconstruction error per pixel and the divergence per latent number, each averaged.

        Args:
            x: Images in [-1, 1], shape (B, C, H, W).
            noise: Unit noise of the latents, shape (B, c, h, w), by which z = mean + std noise is drawn.
        """
        q = self.vae.encode(x).latent_dist
        mean, std = q.mean.float(), q.std.float()
        difference = self.vae.decode((mean + std * noise).to(x.dtype)).sample.float() - x.float()
        error = difference.square().mean() if self._squared else difference.abs().mean()
        kl = 0.5 * (mean.square() + std.square() - 1.0 - 2.0 * std.log()).mean()
        return error + self._kl_weight * kl, error.detach(), kl.detach()


class AutoencoderTrainer(SavedRun):
    """One training run of an ``AutoencoderKL``. Building it checks everything and changes nothing; ``run`` works.

    Args:
        config: What to train on what, and how.
        dataset: Images, instead of those that ``config`` names.

    Raises:
        ValueError: Anything wrong with the configuration, the data or the output folder.
    """

    def __init__(self, config: AutoencoderTrainingConfig, dataset: datasets.Dataset | None = None) -> None:
        check_optimizer(config)
        super().__init__(config, gradient_accumulation_steps=config.gradient_accumulation_steps)
        if is_sharded(self.accelerator):
            raise ValueError("An autoencoder is small: launch its training without FSDP.")
        with self.accelerator.main_process_first():
            images = load_images(config) if dataset is None else dataset
        if not isinstance(images, datasets.Dataset):
            raise ValueError(f"dataset must be a datasets.Dataset, got {type(images).__name__}.")
        self.source = ImageSource(images, config, show_progress=self.accelerator.is_main_process)
        if self.source.resolution % config.downsampling:
            raise ValueError(
                f"downsampling must divide the resolution {self.source.resolution}, got {config.downsampling!r}."
            )
        set_seed(config.seed)
        self.network = self._build()
        if self.accelerator.is_main_process:
            weights = sum(p.numel() * p.element_size() for p in self.network.parameters())
            check_output_dir(self.output_dir, 5 * weights)
        batch = config.train_batch_size * self.accelerator.num_processes
        self.global_batch_size = batch * config.gradient_accumulation_steps
        steps = math.ceil(config.num_epochs * len(self.source) / self.global_batch_size)
        self.max_steps = config.max_train_steps or max(1, steps)
        self.step = self.samples_seen = 0
        if self.resume_from is not None:
            state = read_state(self.resume_from)
            check_same_run(state["identity"], self._identity())
            check_weights(self.resume_from, ReconstructionLoss(self.network, config.reconstruction, config.kl_weight))
            if self.accelerator.is_main_process:
                log_changes(state.get("options"), self._options())
            self.step, self.samples_seen = state["step"], state["samples_seen"]

    def _build(self) -> AutoencoderKL:
        config, levels = self.config, len(self.config.level_channels)
        return AutoencoderKL(
            in_channels=self.source.channels,
            out_channels=self.source.channels,
            block_out_channels=config.level_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=max(1, math.gcd(*config.level_channels, 128) // 4),
            sample_size=self.source.resolution,
            scaling_factor=1.0,
        )

    # ------------------------------------------------------------------ the run

    def _work(self) -> AutoencoderKL:
        config, accelerator = self.config, self.accelerator
        self._prepare()
        logger.info("Data: %s.", describe_source(self.source))
        logger.info("Network: %s.", describe_network(self.network))
        logger.info("Training: steps %d to %d of %d images.", self.step, self.max_steps, self.global_batch_size)
        samples = self.source.samples(config.seed, config.random_flip)
        side = self.source.resolution // config.downsampling
        samples.noise_shape = (config.latent_channels, side, side)
        self._batches = batches(
            samples,
            self.samples_seen,
            config.train_batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            config.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        with StopSignal(accelerator) as stop:
            self._loop(stop)
        result = self._save_result()
        accelerator.end_training()
        return result

    def _prepare(self) -> None:
        config, accelerator = self.config, self.accelerator
        loss = ReconstructionLoss(self.network, config.reconstruction, config.kl_weight)
        parameters = list(loss.parameters())
        optimizer, self.lr_scheduler = build_optimizer(config, parameters, self.max_steps, accelerator.device)
        self.model, self.optimizer = accelerator.prepare(loss, optimizer)
        self.ema = build_average(config, list(self.model.parameters()), 0.999, foreach=True)
        start_trackers(accelerator, config)
        if self.resume_from is not None:
            self._load(self.resume_from)

    def _loop(self, stop: StopSignal) -> None:
        config, accelerator = self.config, self.accelerator
        progress = progress_bar(accelerator, self.max_steps, self.step, "Training", "step")
        sums, steps, since = torch.zeros(3, device=accelerator.device), 0, time.perf_counter()
        self.model.train()
        while self.step < self.max_steps:
            sums += self._take_step()
            steps += 1
            progress.update()
            last = self.step == self.max_steps
            stopped = stop.on_any_process() and not last
            checkpoint_due = stopped or due(self.step, config.checkpointing_steps, last)
            if checkpoint_due or due(self.step, config.logging_steps, last):
                rate = steps * self.global_batch_size / (time.perf_counter() - since)
                self._log(progress, accelerator.reduce(sums, "mean") / steps, rate)
                sums, steps, since = torch.zeros_like(sums), 0, time.perf_counter()
            if checkpoint_due:
                checkpoint = self._save_checkpoint()
                if stopped:
                    self._stop(progress, checkpoint)
            if due(self.step, config.sample_every, last):
                self._save_samples()
        progress.close()

    def _take_step(self) -> Tensor:
        """One optimiser step; returns the means of loss, error and divergence, shape (3,)."""
        config, accelerator = self.config, self.accelerator
        sums = torch.zeros(3, device=accelerator.device)
        for _ in range(config.gradient_accumulation_steps):
            batch = next(self._batches)
            x = to_network(batch["images"].to(accelerator.device, non_blocking=True), -1.0)
            with accelerator.accumulate(self.model):
                parts = self.model(x, batch["noise"].to(accelerator.device, non_blocking=True))
                accelerator.backward(parts[0])
                if accelerator.sync_gradients and config.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            sums += torch.stack([part.detach() for part in parts]) / config.gradient_accumulation_steps
        if not accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(self.model.parameters())
        self.step += 1
        self.samples_seen += self.global_batch_size
        return sums

    def _log(self, progress: Any, means: Tensor, images_per_second: float) -> None:
        loss, error, kl = means.tolist()
        if not math.isfinite(loss):
            raise RuntimeError(
                f"The loss is {loss} at step {self.step}: lower learning_rate, or train in another precision. The last "
                f"checkpoint in {str(self.output_dir)!r} is kept."
            )
        values = {"loss": loss, "reconstruction": error, "kl": kl, "images_per_second": images_per_second}
        progress.set_postfix({"error": f"{error:.4f}", "kl": f"{kl:.2f}"})
        self.accelerator.log(values | {"lr": self.lr_scheduler.get_last_lr()[0]}, step=self.step)

    # ------------------------------------------------------------------ what is seen and saved

    @torch.no_grad()
    def _reconstructed(self, vae: AutoencoderKL, images: Tensor) -> Tensor:
        """What the autoencoder makes of images, bytes (N, C, H, W): bytes of the same shape."""
        parts = to_network(images, -1.0).split(self.config.train_batch_size)
        device = self.accelerator.device
        return torch.cat([to_bytes(vae.decode(vae.encode(x.to(device)).latent_dist.mean).sample, -1.0) for x in parts])

    def _averaged(self) -> Any:
        return averaged_weights(self.accelerator, self.model, self.ema, None, False)

    def _save_samples(self) -> None:
        """Save images, and below each its reconstruction."""
        with self._averaged() as model:
            if self.accelerator.is_main_process:
                images = self.source.spread(SHOWN)[0]
                rows = torch.stack([images, self._reconstructed(model.vae, images)])
                path = self.output_dir / "samples" / f"step-{self.step:07d}.png"
                with saving("Samples", self.output_dir):
                    write_whole(path, partial(tile(rows).save, format="PNG"))
                log_pictures(self.accelerator.trackers, "reconstructions", rows.flatten(0, 1), self.step)
        self.accelerator.wait_for_everyone()

    def _save_result(self) -> AutoencoderKL:
        """Save the averaged autoencoder, whose config says the scale of its latents, and log how well it does."""
        with self._averaged() as model:
            result = AutoencoderKL.from_config(model.vae.config).to(self.accelerator.device)
            result.load_state_dict(model.vae.state_dict())
        result.eval()
        images = self.source.spread(self.config.test_images)[0]
        with torch.no_grad():
            parts = to_network(images, -1.0).split(self.config.train_batch_size)
            z = torch.cat([result.encode(x.to(self.accelerator.device)).latent_dist.mean for x in parts])
        # That of Rombach et al. 2022, section 4.3.2: latents times it have unit standard deviation.
        result.register_to_config(scaling_factor=float(f"{1.0 / max(float(z.std()), 1e-6):.4g}"))
        error = (self._reconstructed(result, images).float() - images.float()).square().mean().item()
        psnr = 10.0 * math.log10(255.0**2 / max(error, 1e-12))
        self.accelerator.log({"psnr": psnr}, step=self.step)
        logger.info("Reconstruction of %d images: %.2f dB.", len(images), psnr)
        if self.accelerator.is_main_process:
            save_model(result, self.output_dir)
        self.accelerator.wait_for_everyone()
        return result

    def _identity(self) -> dict[str, Any]:
        config = self.config
        return as_recorded(
            {
                "task": "autoencoder",
                "reconstruction": config.reconstruction,
                "kl_weight": config.kl_weight,
                "use_ema": config.use_ema,
                "ema_relative_std": config.ema_relative_std,
                "use_8bit_adam": config.use_8bit_adam,
                "resolution": self.source.resolution,
                "channels": self.source.channels,
                "images": len(self.source),
                "data": self.source.fingerprint(),
                "seed": config.seed,
                **network_identity(self.network),
            }
        )

    def _options(self) -> dict[str, Any]:
        own = {name: getattr(self.config, name) for name in _CHANGING}
        return own | {"max_train_steps": self.max_steps, "processes": self.accelerator.num_processes}


def train_autoencoder(config: AutoencoderTrainingConfig, dataset: datasets.Dataset | None = None) -> AutoencoderKL:
    """Train an autoencoder and save it; arguments as in ``AutoencoderTrainer``.

    Returns:
        The autoencoder, as it was saved in ``config.output_dir``.
    """
    return AutoencoderTrainer(config, dataset).run()

"""The training loop, on accelerate."""

from __future__ import annotations

import copy
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from ..basics.files import FolderInUse, check_unlocked, saving, write_whole
from ..basics.processes import lock_for_all
from ..images.arrays import to_network
from ..images.loading import load_images
from ..images.samples import TrainingSamples, batches
from ..images.streaming import StreamedSamples, StreamSource, open_source
from ..networks.denoisers import call_network
from ..networks.losses import denoising_loss, importance_ratio, times_from_uniform
from ..pipelines import ClassConditionalSDEPipeline, SDEPipeline
from .averaging import PowerEMA
from .checkpoints import (
    CONFIG_FILE,
    TRACKER,
    check_output_dir,
    check_weights,
    clear_run,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_state,
    remove_leftovers,
    remove_surplus,
    save_checkpoint,
    save_model,
    set_aside_later,
)
from .configuration import TrainingConfig
from .networks import (
    build_scheduler,
    build_unet,
    check_trainable,
    default_precision,
    default_weighting,
    training_sde,
)
from .progress import ProgressOfSamples
from .publisher import Publisher
from .sharding import check_launch, compute_channels_last, copy_whole, is_sharded, prepare, whole
from .signals import EXIT_CODE, StopSignal

logger = logging.getLogger(__name__)

SHOWN_SIDE, FRAME = 64, 2  # pixels
# Options that change what comes out, and that a run may change when it is resumed: they count from there on.
_CHANGEABLE = (
    *("learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay"),
    *("adam_epsilon", "max_grad_norm", "train_batch_size", "gradient_accumulation_steps", "dropout", "random_flip"),
    *("center_crop", "stratified_times", "sampling_eps", "ema_inv_gamma", "ema_power", "ema_max_decay"),
    *("torch_compile", "channels_last"),
)
# What checkpoints of the first versions do not say about themselves.
_RECORDED_LATER = frozenset(("architecture", "data", "train_eps", "min_snr_gamma", "log_normal_mean", "log_normal_std"))
_NO_ARCHITECTURE = ("dropout", "sample_size", "id2label", "label2id")  # of a network's config


def train(config: TrainingConfig, dataset: datasets.Dataset | datasets.IterableDataset | None = None) -> SDEPipeline:
    """Train a network and save it as a pipeline.

    Args:
        config: What to train on what, and how.
        dataset: Images, instead of those that ``config`` names; an ``IterableDataset`` is streamed.

    Returns:
        The pipeline, as it was saved in ``config.output_dir``.

    Raises:
        ValueError: Anything wrong with the configuration, the data or the output folder, before training starts.
        RuntimeError: The loss is not finite any more; the last checkpoint is kept.
    """
    return Trainer(config, dataset).run()


class Trainer:
    """One training run. Building it checks everything and changes nothing on disk; ``run`` does the work.

    Args:
        config: What to train on what, and how.
        dataset: Images, instead of those that ``config`` names; an ``IterableDataset`` is streamed.

    Raises:
        ValueError: Anything wrong with the configuration, the data or the output folder.
    """

    def __init__(
        self, config: TrainingConfig, dataset: datasets.Dataset | datasets.IterableDataset | None = None
    ) -> None:
        self.config = config
        self.output_dir = Path(config.output_dir)
        check_unlocked(self.output_dir)
        self.resume_from = find_checkpoint(self.output_dir, config.resume_from_checkpoint, config.overwrite_output_dir)
        self._found = list_checkpoints(self.output_dir)
        self.accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision=config.mixed_precision or default_precision(),
            log_with=None if config.logger == "none" else config.logger,
            project_config=ProjectConfiguration(
                project_dir=str(self.output_dir), logging_dir=str(self.output_dir / config.logging_dir)
            ),
        )
        check_launch(self.accelerator)
        if config.torch_compile and is_sharded(self.accelerator):
            raise ValueError("torch_compile cannot be used with FSDP: leave it out, or train under DDP.")
        main_process = self.accelerator.is_main_process
        with self.accelerator.main_process_first():  # the others find what the first one has downloaded
            images = load_images(config) if dataset is None else dataset
        if config.streaming or isinstance(images, datasets.IterableDataset):
            config.check_streamed()
        self.source = open_source(images, config, show_progress=main_process)

        self.scheduler = build_scheduler(config, self.source)
        self.sde = training_sde(self.scheduler, config)
        self.weighting = default_weighting(config, self.scheduler)
        self.discrete_steps = config.num_train_timesteps if config.discrete else None
        check_trainable(
            self.sde, self.scheduler.parametrization, self.weighting, self.discrete_steps, config.time_sampling
        )
        with torch.device("meta"):  # nothing is allocated
            weights = sum(p.numel() * p.element_size() for p in self._build_network().parameters())
        self._check_memory(weights)
        set_seed(config.seed)
        self.unet = self._build_network()

        if main_process:
            copies = (4 if config.use_ema else 3) if config.checkpointing_steps else 0  # Adam has two
            check_output_dir(self.output_dir, (copies + 1) * weights)

        n = len(self.source)
        batch = config.train_batch_size * self.accelerator.num_processes
        self.global_batch_size = batch * config.gradient_accumulation_steps
        self.max_steps = config.max_train_steps or math.ceil(config.num_epochs * n / self.global_batch_size)
        self.sample_every = self._steps(config.save_images_epochs) or config.sample_every
        self.save_every = self._steps(config.save_model_epochs)
        self.step = self.samples_seen = 0
        if self.resume_from is not None:
            state = read_state(self.resume_from)
            self._check_resumable(state)
            check_weights(self.resume_from, self.unet)
            if main_process:
                self._log_changes(state)
            self.step, self.samples_seen = state["step"], state["samples_seen"]
            if isinstance(self.source, StreamSource):
                self.source.resume(*state["stream"])
            if config.dropout and state["processes"] != self.accelerator.num_processes:
                logger.warning(
                    "The checkpoint is of %d processes, this run has %d: the same images and noise, but other dropout.",
                    state["processes"],
                    self.accelerator.num_processes,
                )
        self.publisher = Publisher(config) if config.push_to_hub and main_process else None

    def _build_network(self) -> Any:
        return build_unet(self.config, self.source)

    def _check_memory(self, weights: int) -> None:
        """Refuse a network or a batch that the machine's memory cannot hold by far: activations are not counted."""
        batch, side = self.config.train_batch_size, self.source.resolution
        images = 5 * batch * self.source.channels * side**2  # bytes and noise
        available = psutil.virtual_memory().available
        if weights + images > available:
            raise ValueError(
                f"The weights of this network ({weights / 2**30:.1f} GiB) and one batch of {batch} images of side "
                f"{side} ({images / 2**30:.1f} GiB) do not fit into {available / 2**30:.1f} GiB of free memory: choose "
                "smaller block_out_channels, layers_per_block, resolution or train_batch_size."
            )

    def _steps(self, epochs: int | None) -> int | None:
        return None if epochs is None else max(1, round(epochs * len(self.source) / self.global_batch_size))

    # ------------------------------------------------------------------ the run

    def run(self) -> SDEPipeline:
        """Train, and save the pipeline.

        Returns:
            The pipeline, as it was saved in ``output_dir``.

        Raises:
            FolderInUse: Another run is writing to ``output_dir``; nothing has been changed.
            SaveError: The disk is full, or the like; earlier checkpoints are whole.
            RuntimeError: The loss is not finite any more; the last checkpoint is kept.
            SystemExit: SIGTERM has ended the run; a checkpoint is saved.
        """
        self.accelerator.wait_for_everyone()  # nobody touches the output folder before everybody has checked it
        with lock_for_all(self.output_dir, PartialState()):
            return self._run()

    def _run(self) -> SDEPipeline:
        config, accelerator = self.config, self.accelerator
        if list_checkpoints(self.output_dir) != self._found:
            raise FolderInUse(
                f"output_dir {str(self.output_dir)!r}: another run has saved checkpoints while this one was starting. "
                "Start again."
            )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if config.overwrite_output_dir:
                clear_run(self.output_dir)
            if self.resume_from is None:
                self._save_configuration()
        accelerator.wait_for_everyone()
        self._prepare()
        self._progress = ProgressOfSamples(config, self.source) if config.eval_every else None
        self._log_start()

        strata = self.global_batch_size if config.stratified_times else 1
        samples_class = StreamedSamples if isinstance(self.source, StreamSource) else TrainingSamples
        samples = samples_class(self.source, config.seed, config.random_flip, strata)
        self._batches = batches(
            samples,
            self.samples_seen,
            config.train_batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            config.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        # Everything that could draw from the global generators has been built; from here on only dropout does.
        set_seed(config.seed, device_specific=True)
        if self.resume_from is not None:
            self.lr_scheduler.load_state_dict(load_checkpoint(accelerator, self.resume_from, self.ema)["lr_scheduler"])
            self._apply_optimiser_options()
            accelerator.step = 0
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                # Only now is it certain that the run goes on as it is told to.
                set_aside_later(self.output_dir, self.resume_from, self.step)
                # A run that was killed between its last checkpoint and the deletions after it will save no other.
                remove_leftovers(self.output_dir)
                remove_surplus(self.output_dir, config.checkpoints_total_limit)
                self._save_configuration()
        with StopSignal(accelerator) as stop:
            self._loop(stop)
        pipeline = self._save_pipeline()
        if self.publisher is not None:
            self.publisher.finish(pipeline)
        accelerator.end_training()
        return pipeline

    def _save_configuration(self) -> None:
        settings = json.dumps(self.config.public(), indent=2) + "\n"
        with saving("The configuration", self.output_dir):
            write_whole(self.output_dir / CONFIG_FILE, lambda file: file.write_text(settings))

    def _apply_optimiser_options(self) -> None:
        """Let the run's own options count, where loading a checkpoint has restored those that it was trained with."""
        config, schedule = self.config, self.lr_scheduler
        schedule.base_lrs = [config.learning_rate] * len(schedule.base_lrs)
        rates = [config.learning_rate * factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group |= {
                "lr": rate,
                "initial_lr": config.learning_rate,
                "betas": (config.adam_beta1, config.adam_beta2),
                "weight_decay": config.adam_weight_decay,
                "eps": config.adam_epsilon,
            }
        schedule._last_lr = rates

    def _prepare(self) -> None:
        config, accelerator = self.config, self.accelerator
        # Where nobody has the whole network: on the host, to hold averaged weights while they are sampled or saved.
        self._whole_network = copy.deepcopy(self.unet) if is_sharded(accelerator) else None
        if config.channels_last:
            compute_channels_last(accelerator, self.unet)
        if config.torch_compile:
            # In place: names of weights stay as they are. On the CPU inductor's own choice of layouts gives UNet2DModel
            # wrong gradients (torch 2.13).
            self.unet.compile(options={"layout_optimization": False} if accelerator.device.type == "cpu" else None)
        optimizer = torch.optim.AdamW(
            self.unet.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        warmup = config.lr_warmup_steps
        # Not prepared by accelerate, which would step it once per process: it counts optimiser steps.
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=min(500, self.max_steps // 10) if warmup is None else warmup,
            num_training_steps=self.max_steps,
        )
        self.model, self.optimizer = prepare(accelerator, self.unet, optimizer)
        self.ema: EMAModel | None = None
        if config.use_ema:
            parameters = list(self.unet.parameters())
            # Sharded ones that are frozen have no foreach copy.
            foreach = self._whole_network is None or all(parameter.requires_grad for parameter in parameters)
            if config.ema_relative_std is not None:
                self.ema = PowerEMA(parameters, config.ema_relative_std, foreach=foreach)
            else:
                default = 0.999 if config.sde == "ve" else 0.9999
                self.ema = EMAModel(
                    parameters,
                    decay=default if config.ema_max_decay is None else config.ema_max_decay,
                    use_ema_warmup=True,
                    inv_gamma=config.ema_inv_gamma,
                    power=config.ema_power,
                    foreach=foreach,
                )
        if config.logger != "none":
            plain = {k: v for k, v in config.public().items() if isinstance(v, (bool, int, float, str))}
            accelerator.init_trackers(TRACKER, config=plain)

    def _loop(self, stop: StopSignal) -> None:
        config, accelerator = self.config, self.accelerator
        progress = tqdm(
            total=self.max_steps,
            initial=self.step,
            desc="Training",
            unit="step",
            disable=not accelerator.is_local_main_process,
            mininterval=0.1 if sys.stderr.isatty() else 10.0,  # a log file needs no animation
        )
        loss_sum, gradient_norm = torch.zeros((), device=accelerator.device), None
        steps_summed, since = 0, time.perf_counter()
        self.model.train()
        while self.step < self.max_steps:
            for _ in range(config.gradient_accumulation_steps):
                with accelerator.accumulate(self.model):
                    loss = self.loss(next(self._batches)).mean()
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and config.max_grad_norm > 0:
                        gradient_norm = accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                loss_sum += loss.detach() / config.gradient_accumulation_steps
            if not accelerator.optimizer_step_was_skipped:  # fp16 skips steps whose gradients overflow
                self.lr_scheduler.step()
                if self.ema is not None:
                    self.ema.step(self.unet.parameters())
            self.step += 1
            self.samples_seen += self.global_batch_size
            steps_summed += 1
            progress.update()

            last = self.step == self.max_steps
            stopped = stop.on_any_process() and not last
            checkpoint_due = stopped or _due(self.step, config.checkpointing_steps, last)
            if checkpoint_due or _due(self.step, config.logging_steps, last):
                mean_loss = self._mean_loss(loss_sum, steps_summed)
                now = time.perf_counter()
                values = {
                    "loss": mean_loss,
                    "lr": self.lr_scheduler.get_last_lr()[0],
                    "images_per_second": steps_summed * self.global_batch_size / (now - since),
                    "epoch": self.source.epoch(self.samples_seen),
                }
                progress.set_postfix({"loss": f"{mean_loss:.4f}", "lr": f"{values['lr']:.2g}"})
                if gradient_norm is not None:
                    values["gradient_norm"] = float(whole(gradient_norm))
                if self.ema is not None and self.ema.cur_decay_value is not None:
                    values["ema_decay"] = self.ema.cur_decay_value
                accelerator.log(values, step=self.step)
                loss_sum.zero_()
                steps_summed, since = 0, now
            if checkpoint_due:
                checkpoint = self._save_checkpoint()
                if config.push_to_hub and not last and not stopped:
                    with self._averaged_weights() as unet:
                        if self.publisher is not None:
                            self.publisher.start(self._pipeline(unet), f"Step {self.step}")
                since = time.perf_counter()
                if stopped:
                    progress.close()
                    accelerator.end_training()
                    logger.info(
                        "SIGTERM, or the launcher has ended: stopped after step %d; saved %s. "
                        "resume_from_checkpoint='latest' goes on.",
                        self.step,
                        checkpoint,
                    )
                    raise SystemExit(EXIT_CODE)
            if _due(self.step, self.sample_every, last):
                self._save_samples()
                since = time.perf_counter()
            if self._progress is not None and _due(self.step, config.eval_every, last):
                with self._averaged_weights() as unet:
                    values = {f"eval/{name}": value for name, value in self._progress(self._pipeline(unet)).items()}
                logger.info("Step %d: %s", self.step, ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
                accelerator.log(values, step=self.step)
                since = time.perf_counter()
            if _due(self.step, self.save_every, False):
                self._save_pipeline()
                since = time.perf_counter()
        progress.close()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Denoising score-matching loss of each sample of a batch from ``TrainingSamples``, shape (B,)."""
        config = self.config
        x0, eps, t = self._inputs(batch)
        conditioning = self.scheduler.conditioning
        arguments: dict[str, Tensor] = {}
        if config.class_conditional:
            hidden = batch["label_draw"] < config.label_dropout
            labels = torch.where(hidden, len(self.source.class_names), batch["labels"])
            arguments["class_labels"] = labels.to(x0.device, non_blocking=True)

        def network(x: Tensor, t: Tensor) -> Tensor:
            return call_network(self.model, x, conditioning.timestep(self.sde, t), **arguments)

        parametrization = self.scheduler.parametrization
        loss = denoising_loss(self.sde, parametrization, network, x0, t, eps, self.weighting, config.min_snr_gamma)
        return loss * importance_ratio(self.sde, t).to(loss) if config.time_sampling == "importance" else loss

    def _inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Data in the network's range and unit noise on the device, and SDE times."""
        config, device = self.config, self.accelerator.device
        x0 = to_network(batch["images"].to(device, non_blocking=True), config.data_min)
        eps = batch["noise"].to(device, non_blocking=True)
        # Times and their coefficients are float64 on the host, whatever the device and the precision of the network.
        log_normal = (config.log_normal_mean, config.log_normal_std)
        return x0, eps, times_from_uniform(self.sde, batch["u"], self.discrete_steps, config.time_sampling, log_normal)

    def _mean_loss(self, loss_sum: Tensor, steps: int) -> float:
        mean = float(self.accelerator.reduce(loss_sum, reduction="mean")) / steps
        if not math.isfinite(mean):
            raise RuntimeError(
                f"The loss is {mean} at step {self.step}: lower learning_rate, or train in another precision or "
                f"prediction_type. The last checkpoint in {str(self.output_dir)!r} is kept."
            )
        return mean

    # ------------------------------------------------------------------ what is written

    def _save_checkpoint(self) -> Path:
        state = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "processes": self.accelerator.num_processes,
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "identity": self._identity(),
            "options": self._options(),
        }
        if isinstance(self.source, StreamSource):
            state["stream"] = self.source.pass_at(self.samples_seen)
        limit = self.config.checkpoints_total_limit
        return save_checkpoint(self.accelerator, self.output_dir, state, self.ema, limit)

    @contextmanager
    def _averaged_weights(self) -> Iterator[UNet2DModel]:
        """The network in evaluation mode with its averaged weights, for a while; to be called on all processes.

        It is not compiled: that would be done again for evaluation, and for every other size of a batch.
        """
        if self._whole_network is not None:
            copy_whole(self.unet.parameters() if self.ema is None else self.ema.shadow_params, self._whole_network)
            yield self._whole_network.to(self.accelerator.device).eval()
            self._whole_network.to("cpu")
            return
        unet = self.accelerator.unwrap_model(self.model)
        parameters = list(unet.parameters())
        if self.ema is not None:
            self.ema.store(parameters)
            self.ema.copy_to(parameters)
        unet.eval()
        try:
            with torch.compiler.set_stance("force_eager") if self.config.torch_compile else nullcontext():
                yield unet
        finally:
            unet.train()
            if self.ema is not None:
                self.ema.restore(parameters)

    def _pipeline(self, unet: UNet2DModel) -> SDEPipeline:
        # A scheduler of its own: sampling leaves its mark on one.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        if not self.config.class_conditional:
            return SDEPipeline(unet=unet, scheduler=scheduler, data_min=self.config.data_min)
        names = self.source.class_names
        null_class = len(names) if self.config.label_dropout > 0.0 else None
        return ClassConditionalSDEPipeline(
            unet, scheduler, self.config.data_min, id2label=dict(enumerate(names)), null_class=null_class
        )

    def _save_samples(self) -> None:
        """A grid of samples, the same noise every time, as PNG and to the tracker; the training state is untouched."""
        accelerator = self.accelerator
        with self._averaged_weights() as unet:
            images = self._sample_images(unet) if accelerator.is_main_process else []
        if images:
            grid = self.output_dir / "samples" / f"step-{self.step:07d}.png"
            with saving("Samples", self.output_dir):
                write_whole(grid, partial(image_grid(images).save, format="PNG"))
            for tracker in accelerator.trackers:
                if tracker.name == "tensorboard":
                    array = np.stack([np.asarray(image.convert("RGB")) for image in images])
                    tracker.log_images({"samples": array}, step=self.step, dataformats="NHWC")
                elif tracker.name == "wandb":
                    tracker.log_images({"samples": images}, step=self.step)
        accelerator.wait_for_everyone()

    def _sample_images(self, unet: UNet2DModel) -> list[Image.Image]:
        config, pipeline = self.config, self._pipeline(unet)
        pipeline.set_progress_bar_config(desc="Sampling", leave=False)
        images: list[Image.Image] = []
        for start in range(0, config.num_sample_images, config.eval_batch_size):
            numbers = range(start, min(start + config.eval_batch_size, config.num_sample_images))
            generators = [torch.Generator().manual_seed(config.seed + number) for number in numbers]
            arguments: dict[str, Any] = {"batch_size": len(numbers)}
            if config.class_conditional:
                arguments = {"class_labels": [number % len(self.source.class_names) for number in numbers]}
            steps = config.num_inference_steps
            images += pipeline(**arguments, num_inference_steps=steps, generator=generators, return_dict=False)[0]
        return images

    def _save_pipeline(self) -> SDEPipeline:
        with self._averaged_weights() as unet:
            pipeline = self._pipeline(unet)
            if self.accelerator.is_main_process:
                save_model(pipeline, self.output_dir)
            if self.step >= self.max_steps:
                # The run is over: hand out the averaged weights themselves, without accelerate's wrapping.
                averaged = UNet2DModel.from_config(unet.config).to(self.accelerator.device)
                averaged.load_state_dict(unet.state_dict())
                pipeline = self._pipeline(averaged.eval())
        self.accelerator.wait_for_everyone()
        return pipeline

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that continues it: network, data and loss."""
        config, source = self.config, self.source
        settings = self.unet.config.items()
        architecture = {k: v for k, v in settings if not k.startswith("_") and k not in _NO_ARCHITECTURE}
        identity = {
            "sde": repr(self.scheduler.sde),
            "prediction_type": self.scheduler.config.prediction_type,
            "sigma_data": self.scheduler.config.sigma_data,
            "time_conditioning": self.scheduler.config.time_conditioning,
            "weighting": self.weighting,
            "min_snr_gamma": config.min_snr_gamma if self.weighting == "min_snr" else None,
            "time_sampling": config.time_sampling,
            "log_normal_mean": config.log_normal_mean if config.time_sampling == "log_normal" else None,
            "log_normal_std": config.log_normal_std if config.time_sampling == "log_normal" else None,
            "train_eps": config.train_eps,
            "discrete": config.discrete,
            "data_min": config.data_min,
            "use_ema": config.use_ema,
            "ema_relative_std": config.ema_relative_std,
            "resolution": source.resolution,
            "channels": source.channels,
            "block_out_channels": list(self.unet.config.block_out_channels),
            "layers_per_block": self.unet.config.layers_per_block,
            "architecture": architecture,
            "images": source.num_images,
            "data": source.fingerprint(config.class_conditional),
            "shuffle_buffer": config.shuffle_buffer if source.num_images is None else None,
            "seed": config.seed,
            "class_conditional": config.class_conditional,
            "label_dropout": config.label_dropout if config.class_conditional else None,
        }
        return json.loads(json.dumps(identity))  # as it is read again: JSON has no tuples

    def _check_resumable(self, state: dict[str, Any]) -> None:
        saved, own = dict(state["identity"]), self._identity()
        unrecorded = _RECORDED_LATER - set(saved)
        unknown = sorted(name for name in unrecorded if own[name] is not None)
        if unknown:
            logger.warning(
                "The checkpoint was saved by an earlier version, which did not record %s: make sure yourself that this "
                "run has the same.",
                ", ".join(unknown),
            )
        # A diffusers that is older or newer has fewer or more entries in a network's config.
        networks = [identity.pop("architecture", {}) for identity in (saved, own)]
        for name in networks[0].keys() & networks[1].keys():
            saved[f"network's {name}"], own[f"network's {name}"] = (network[name] for network in networks)
        # What has a name of its own first: other options may be why the data or the network are others.
        names = [name for name in {**own, **saved} if name not in unrecorded]
        for name in sorted(names, key=lambda name: (name == "data", name.startswith("network's"))):
            if saved.get(name) == own.get(name):
                continue
            if name == "data":
                raise ValueError(
                    "resume_from_checkpoint: the checkpoint was trained on other images or classes than those of this "
                    f"run (fingerprints {saved[name]} and {own[name]}), though they are as many."
                )
            raise ValueError(
                f"resume_from_checkpoint: the checkpoint was trained with {name}={saved.get(name)!r}, this run "
                f"has {own.get(name)!r}."
            )

    def _options(self) -> dict[str, Any]:
        """The options that change the result and may change when a run is resumed."""
        options = {name: getattr(self.config, name) for name in _CHANGEABLE}
        options |= {"max_train_steps": self.max_steps, "processes": self.accelerator.num_processes}
        return options | {"mixed_precision": self.accelerator.mixed_precision}

    def _log_changes(self, state: dict[str, Any]) -> None:
        saved, own = state.get("options"), self._options()
        if saved is None:
            logger.warning(
                "The checkpoint does not say which options it was trained with: those of this run count now."
            )
            return
        changes = [
            f"{name} {saved[name]!r} -> {own[name]!r}" for name in own if saved.get(name, own[name]) != own[name]
        ]
        if changes:
            logger.warning("Other options than those of the checkpoint count from now on: %s.", ", ".join(changes))

    def _log_start(self) -> None:
        parameters = sum(p.numel() for p in self.unet.parameters())
        source = self.source
        logger.info(
            "Data: %s images, %d channel(s), %dx%d pixels, %d classes.",
            source.num_images or "streamed",
            source.channels,
            source.resolution,
            source.resolution,
            len(source.class_names),
        )
        logger.info(
            "Network: %.2f million parameters, channels %s; %s.",
            parameters / 1e6,
            tuple(self.unet.config.block_out_channels),
            self._task(),
        )
        logger.info(
            "Training: %s, %s weighting, precision %s, steps %d to %d of %d images (%d process(es)).",
            self.sde if len(repr(self.sde)) < 200 else type(self.sde).__name__,
            self.weighting,
            self.accelerator.mixed_precision,
            self.step,
            self.max_steps,
            self.global_batch_size,
            self.accelerator.num_processes,
        )

    def _task(self) -> str:
        config = self.scheduler.config
        return f"predicts {config.prediction_type}, is fed {config.time_conditioning} time"


def image_grid(images: list[Image.Image]) -> Image.Image:
    """Images in rows, about as many as columns, with a frame around each; small ones are enlarged to be seen."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    factor = max(1, SHOWN_SIDE // images[0].width)
    # Smoothly: the eye does not read a digit of 8x8 squares.
    size = (images[0].width * factor, images[0].height * factor)
    shown = [image.convert("RGB").resize(size, Image.Resampling.BICUBIC) for image in images]
    framed = [ImageOps.expand(image, border=FRAME, fill="dimgrey") for image in shown]
    framed += [Image.new("RGB", framed[0].size, "dimgrey")] * (rows * columns - len(images))
    return make_image_grid(framed, rows, columns)


def _due(step: int, every: int | None, last: bool) -> bool:
    return every is not None and every > 0 and (last or step % every == 0)

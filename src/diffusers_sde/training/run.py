"""What every training run does, on accelerate: the loop, checkpoints, logs, and the averaged weights.

The file is long because the order of these things, across processes and interruptions, is read in one place.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from abc import abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import set_seed
from torch import Tensor

from ..basics.networks import describe_network
from ..images.arrays import to_network
from ..images.loading import load_images
from ..images.samples import TrainingSource, batches
from ..images.streaming import is_streamed, open_source
from ..schedulers import SDEScheduler
from .adapters import describe_adapter, has_adapter, keep_adapter_alone, trained_parameters
from .averaging import averaged_weights
from .checkpoints import (
    check_output_dir,
    check_weights,
    read_state,
)
from .configuration import CommonTrainingConfig
from .identity import changeable_options, check_same_run, identity_of, log_changes
from .logs import describe_source, due, progress_bar, start_trackers
from .networks import check_memory
from .optimisation import build_average, build_optimizer, check_optimizer
from .saved_run import SavedRun
from .sharding import compute_channels_last, is_sharded, prepare, whole
from .signals import StopSignal
from .trainable import (
    build_scheduler,
    check_given_scheduler,
    check_trainable,
    default_ema_max_decay,
    default_weighting,
    training_sde,
)

logger = logging.getLogger(__name__)


class TrainingRun(SavedRun):
    """One training run, of whatever network. Building it checks everything and changes nothing on disk.

    A subclass says which network is trained, what its loss is, and how the result is saved.

    Args:
        config: What to train on what, and how.
        dataset: Images, instead of those that ``config`` names; an ``IterableDataset`` is streamed.
        scheduler: What to train for, instead of the scheduler that ``config`` describes: its SDE, what the network
            predicts and what it is fed.

    Raises:
        ValueError: Anything wrong with the configuration, the data or the output folder.
    """

    def __init__(
        self,
        config: CommonTrainingConfig,
        dataset: datasets.Dataset | datasets.IterableDataset | None = None,
        scheduler: SDEScheduler | None = None,
    ) -> None:
        check_optimizer(config)
        if scheduler is not None:
            check_given_scheduler(scheduler, config)
        super().__init__(config, gradient_accumulation_steps=config.gradient_accumulation_steps)
        if config.torch_compile and is_sharded(self.accelerator):
            raise ValueError("torch_compile cannot be used with FSDP: leave it out, or train under DDP.")
        main_process = self.accelerator.is_main_process
        with self.accelerator.main_process_first():  # the others find what the first one has downloaded
            images = load_images(config) if dataset is None else dataset
        if is_streamed(images, config):
            config.check_streamed()
        self.source = self._seen(self._open(images))

        self.has_given_scheduler = scheduler is not None
        self.scheduler = self._build_scheduler() if scheduler is None else scheduler
        self.sde = training_sde(self.scheduler, config) if scheduler is None else scheduler.sde
        self.weighting = self._weighting()
        self.discrete_steps = self.scheduler.config.num_train_timesteps if config.discrete else None
        check_trainable(self.sde, self.scheduler.parametrization, self.weighting, self.discrete_steps, self._times)
        with torch.device("meta"):  # nothing is allocated
            weights = sum(p.numel() * p.element_size() for p in self._build_network().parameters())
        check_memory(weights, self.source, config.train_batch_size)
        set_seed(config.seed)
        self.network = self._build_network()
        self._prepare_network()
        if config.gradient_checkpointing:
            if not getattr(self.network, "_supports_gradient_checkpointing", False):
                raise ValueError(f"gradient_checkpointing is not supported by {type(self.network).__name__}.")
            self.network.enable_gradient_checkpointing()

        if main_process:
            copies = (4 if config.use_ema else 3) if config.checkpointing_steps else 0  # Adam has two
            check_output_dir(self.output_dir, (copies + 1) * weights)

        batch = config.train_batch_size * self.accelerator.num_processes
        self.global_batch_size = batch * config.gradient_accumulation_steps
        self.max_steps = config.max_train_steps or max(1, math.ceil(self._passes_to_steps(config.num_epochs)))
        self.save_every = self._steps(config.save_model_epochs)
        self.step = self.samples_seen = 0
        if self.resume_from is not None:
            self._check_checkpoint(self.resume_from)

    def _check_checkpoint(self, checkpoint: Path) -> None:
        """Take the place in the run from a checkpoint, which must be of a run like this one."""
        state = read_state(checkpoint)
        check_same_run(state["identity"], self._identity())
        check_weights(checkpoint, self.network)
        if self.accelerator.is_main_process:
            log_changes(state.get("options"), self._options())
        self.step, self.samples_seen = state["step"], state["samples_seen"]
        self.source.resume(state)
        if self.network.config.get("dropout") and state["processes"] != self.accelerator.num_processes:
            logger.warning(
                "The checkpoint is of %d processes, this run has %d: the same images and noise, but other dropout.",
                state["processes"],
                self.accelerator.num_processes,
            )

    # ------------------------------------------------------------------ what a subclass says

    @abstractmethod
    def _build_network(self) -> Any:
        """The network, a ``ModelMixin`` of diffusers with new weights."""

    @abstractmethod
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of each sample of a batch from ``TrainingSamples``, shape (B,)."""

    @abstractmethod
    def _save_result(self) -> Any:
        """Save what has been trained, with its averaged weights, and return it; to be called on all processes."""

    @abstractmethod
    def _task(self) -> str:
        """What the network does, in words."""

    def _prepare_network(self) -> None:
        """Change the new network, where that is due, before anything is compared with it."""

    def _open(self, images: datasets.Dataset | datasets.IterableDataset) -> TrainingSource:
        """The images as training data."""
        return open_source(images, self.config, show_progress=self.accelerator.is_main_process)

    def _seen(self, source: TrainingSource) -> TrainingSource:
        """The data as the network sees them."""
        return source

    def _x0(self, batch: dict[str, Tensor]) -> Tensor:
        """The network's data of a batch from ``TrainingSamples``, float32 on the device."""
        return to_network(batch["images"].to(self.accelerator.device, non_blocking=True), self.config.data_min)

    def _describe_data(self) -> str:
        """The data in words."""
        return describe_source(self.source)

    def _build_scheduler(self) -> SDEScheduler:
        """The scheduler that the options describe."""
        return build_scheduler(self.config, self.source)

    def _weighting(self) -> str:
        """How the loss is weighted over time."""
        return default_weighting(self.scheduler)

    def _begin(self) -> None:
        """Do what is to be done once before the first step."""

    def _observe(self, last: bool) -> bool:
        """Look at the network after a step, where that is due; returns whether it was."""
        return False

    def _publish(self) -> None:
        """Send out the network of a checkpoint."""

    def _end(self, result: Any) -> None:
        """Do what is to be done once with the finished result."""

    # ------------------------------------------------------------------ the run

    def _work(self) -> Any:
        config, accelerator = self.config, self.accelerator
        self._prepare()
        self._begin()
        self._log_start()

        strata = self.global_batch_size if config.stratified_times else 1
        self._batches = batches(
            self.source.samples(config.seed, config.random_flip, strata),
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
            self._load(self.resume_from)
        with StopSignal(accelerator) as stop:
            self._loop(stop)
        result = self._save_result()
        self._end(result)
        accelerator.end_training()
        return result

    def _prepare(self) -> None:
        config, accelerator = self.config, self.accelerator
        # Where nobody has the whole network: on the host, to hold averaged weights while they are sampled or saved.
        self._whole_network = copy.deepcopy(self.network) if is_sharded(accelerator) else None
        if config.channels_last:
            compute_channels_last(accelerator, self.network)
        if config.torch_compile:
            # In place: names of weights stay as they are. On the CPU inductor's own choice of layouts gives UNets
            # wrong gradients (torch 2.13).
            self.network.compile(options={"layout_optimization": False} if accelerator.device.type == "cpu" else None)
        parameters = trained_parameters(self.network)
        optimizer, self.lr_scheduler = build_optimizer(config, parameters, self.max_steps, accelerator.device)
        self.model, self.optimizer = prepare(accelerator, self.network, optimizer)
        keep_adapter_alone(accelerator, self.network)
        parameters = trained_parameters(self.network)
        # Sharded ones that are frozen have no foreach copy.
        foreach = self._whole_network is None or all(parameter.requires_grad for parameter in parameters)
        self.ema = build_average(config, parameters, default_ema_max_decay(self.scheduler), foreach)
        start_trackers(accelerator, config)

    def _loop(self, stop: StopSignal) -> None:
        config, accelerator = self.config, self.accelerator
        progress = progress_bar(accelerator, self.max_steps, self.step, "Training", "step")
        self._loss_sum = torch.zeros((), device=accelerator.device)
        self._gradient_norm: Tensor | None = None
        self._steps_summed, self._since = 0, time.perf_counter()
        self.model.train()
        while self.step < self.max_steps:
            self._take_step()
            progress.update()
            last = self.step == self.max_steps
            stopped = stop.on_any_process() and not last
            checkpoint_due = stopped or due(self.step, config.checkpointing_steps, last)
            if checkpoint_due or due(self.step, config.logging_steps, last):
                self._log_progress(progress)
            if checkpoint_due:
                checkpoint = self._save_checkpoint()
                if not last and not stopped:
                    self._publish()
                if stopped:
                    self._stop(progress, checkpoint)
            observed = self._observe(last)
            save_due = due(self.step, self.save_every, False)
            if save_due:
                self._save_result()
            if checkpoint_due or observed or save_due:
                self._since = time.perf_counter()  # images per second are those of training alone
        progress.close()

    def _take_step(self) -> None:
        config, accelerator = self.config, self.accelerator
        for _ in range(config.gradient_accumulation_steps):
            with accelerator.accumulate(self.model):
                loss = self.loss(next(self._batches)).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients and config.max_grad_norm > 0:
                    self._gradient_norm = accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self._loss_sum += loss.detach() / config.gradient_accumulation_steps
        if not accelerator.optimizer_step_was_skipped:  # fp16 skips steps whose gradients overflow
            self.lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(trained_parameters(self.network))
        self.step += 1
        self.samples_seen += self.global_batch_size
        self._steps_summed += 1

    def _inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Data in the network's range and unit noise on the device, and SDE times."""
        device = self.accelerator.device
        x0 = self._x0(batch)
        eps = batch["noise"].to(device, non_blocking=True)
        # Times and their coefficients are float64 on the host, whatever the device and the precision of the network.
        return x0, eps, self._times(batch["u"])

    def _times(self, u: Tensor) -> Tensor:
        """SDE times for numbers that are uniform in [0, 1), same shape."""
        return self.config.times(self.sde, u, self.discrete_steps, self.source.resolution)

    # ------------------------------------------------------------------ what is logged

    def _log_progress(self, progress: Any) -> None:
        """Log the mean loss since the last time, and how training goes."""
        mean_loss, now = self._mean_loss(self._loss_sum, self._steps_summed), time.perf_counter()
        values = {
            "loss": mean_loss,
            "lr": self.lr_scheduler.get_last_lr()[0],
            "images_per_second": self._steps_summed * self.global_batch_size / (now - self._since),
            "epoch": self.source.epoch(self.samples_seen),
        }
        progress.set_postfix({"loss": f"{mean_loss:.4f}", "lr": f"{values['lr']:.2g}"})
        if self._gradient_norm is not None:
            values["gradient_norm"] = float(whole(self._gradient_norm))
        if self.ema is not None and self.ema.cur_decay_value is not None:
            values["ema_decay"] = self.ema.cur_decay_value
        self.accelerator.log(values, step=self.step)
        self._loss_sum.zero_()
        self._steps_summed, self._since = 0, now

    def _mean_loss(self, loss_sum: Tensor, steps: int) -> float:
        mean = float(self.accelerator.reduce(loss_sum, reduction="mean")) / steps
        if not math.isfinite(mean):
            raise RuntimeError(
                f"The loss is {mean} at step {self.step}: lower learning_rate, or train in another precision or "
                f"prediction_type. The last checkpoint in {str(self.output_dir)!r} is kept."
            )
        return mean

    def _log_start(self) -> None:
        sde = self.sde
        if self.config.resume_from_checkpoint is not None and self.resume_from is None:
            logger.info("Resuming: %s holds no checkpoint yet, so the run starts at step 0.", self.output_dir)
        logger.info("Data: %s.", self._describe_data())
        logger.info("Network: %s; it %s.", describe_network(self.network), self._task())
        if has_adapter(self.network):
            logger.info("Trained: %s.", describe_adapter(self.network))
        logger.info(
            "Training: %s, %s weighting, precision %s, steps %d to %d of %d images (%d process(es)).",
            sde if len(repr(sde)) < 200 else type(sde).__name__,
            self.weighting,
            self.accelerator.mixed_precision,
            self.step,
            self.max_steps,
            self.global_batch_size,
            self.accelerator.num_processes,
        )

    # ------------------------------------------------------------------ what is saved

    def _settings(self) -> dict[str, Any]:
        settings = super()._settings()
        if self.has_given_scheduler:
            settings["scheduler"] = type(self.scheduler).__name__  # which no option describes
        return settings

    def _state(self) -> dict[str, Any]:
        return self.source.state(self.samples_seen)

    def _averaged_weights(self) -> AbstractContextManager[Any]:
        """The network with its averaged weights, for a while; see ``averaging.averaged_weights``."""
        return averaged_weights(self.accelerator, self.model, self.ema, self._whole_network, self.config.torch_compile)

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that continues it: network, data and loss."""
        return identity_of(self.config, self.source, self.scheduler, self.sde, self.weighting, self.network)

    def _options(self) -> dict[str, Any]:
        """The options that change the result and may change when a run is resumed."""
        return changeable_options(self.config, self.network) | {
            "max_train_steps": self.max_steps,
            "processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
        }

    def _passes_to_steps(self, epochs: int) -> float:
        """Optimiser steps of so many passes through the data, whose number of images must be known."""
        images = self.source.num_images
        assert images is not None, "check_streamed has refused options that count passes"
        return epochs * images / self.global_batch_size

    def _steps(self, epochs: int | None) -> int | None:
        return None if epochs is None else max(1, round(self._passes_to_steps(epochs)))

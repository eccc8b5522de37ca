"""Training of a denoiser by score matching: its loss, its pipeline, and samples along the way."""

from __future__ import annotations

import logging
from dataclasses import fields
from functools import partial
from typing import Any

import datasets
import torch
from accelerate import PartialState
from torch import Tensor

from ..basics.files import saving, write_whole
from ..basics.networks import traits_of
from ..evaluation.generate import fingerprint
from ..images.arrays import to_bytes
from ..images.options import ImageOptions
from ..images.pictures import sheet
from ..images.samples import TrainingSource
from ..images.streaming import is_streamed, open_source, open_stream
from ..networks.denoisers import call_network
from ..networks.losses import denoising_loss, importance_ratio
from ..pipelines import ClassConditionalSDEPipeline, SDEPipeline, TextSDEPipeline
from ..schedulers import SDEScheduler
from .adapters import adapter_identity, add_adapter, merged
from .captions import CAPTION_NUMBERS, StoredCaptions, StreamedCaptions, TrainingCaptions, caption_encoder
from .checkpoints import save_model
from .configuration import TrainingConfig
from .encoders import LatentSource, load_autoencoder
from .identity import log_other_scheduler
from .logs import describe_source, due, log_pictures
from .networks import SavedModel, build_network, checked_classes
from .progress import ProgressOfSamples
from .publisher import Publisher
from .run import TrainingRun
from .sharding import is_sharded
from .trainable import build_scheduler, check_network

logger = logging.getLogger(__name__)


def train(
    config: TrainingConfig,
    dataset: datasets.Dataset | datasets.IterableDataset | None = None,
    scheduler: SDEScheduler | None = None,
) -> SDEPipeline:
    """Train a network and save it as a pipeline.

    Args:
        config: What to train on what, and how.
        dataset: Images, instead of those that ``config`` names; an ``IterableDataset`` is streamed.
        scheduler: What to train for, instead of the scheduler that ``config`` describes: its SDE, what the network
            predicts and what it is fed. It may be of a class of your own.

    Returns:
        The pipeline, as it was saved in ``config.output_dir``.

    Raises:
        ValueError: Anything wrong with the configuration, the data or the output folder, before training starts.
        RuntimeError: The loss is not finite any more; the last checkpoint is kept.
    """
    return Trainer(config, dataset, scheduler).run()


class Trainer(TrainingRun):
    """One training run of a denoiser. Building it checks everything and changes nothing on disk; ``run`` does the work.

    Args:
        config: What to train on what, and how.
        dataset: Images, instead of those that ``config`` names; an ``IterableDataset`` is streamed.
        scheduler: What to train for, instead of the scheduler that ``config`` describes; see ``train``.

    Raises:
        ValueError: Anything wrong with the configuration, the data or the output folder.
    """

    config: TrainingConfig

    def __init__(
        self,
        config: TrainingConfig,
        dataset: datasets.Dataset | datasets.IterableDataset | None = None,
        scheduler: SDEScheduler | None = None,
    ) -> None:
        self._saved = None if config.init_from is None else SavedModel.load(config.init_from)
        super().__init__(config, dataset, scheduler)
        check_network(traits_of(self.network), self.scheduler)
        if self._saved is not None and self.resume_from is None:
            log_other_scheduler(self._saved.scheduler, self.scheduler)
        self.sample_every = self._steps(config.save_images_epochs) or config.sample_every
        self.publisher: Publisher | None = None
        if config.push_to_hub and self.accelerator.is_main_process:
            # A scheduler from Python has no command line.
            self.publisher = Publisher(config, None if self.has_given_scheduler else config.command())

    def _build_scheduler(self) -> SDEScheduler:
        with torch.device("meta"):
            network = traits_of(self._build_network())
        return build_scheduler(self.config, self.source, self.config, network, of_pixels=self._latents is None)

    def _prepare_network(self) -> None:
        self._frozen: str | None = None
        if self.config.lora_rank is not None:
            if is_sharded(self.accelerator):
                raise ValueError("lora_rank cannot be used with FSDP: an adapter is small, train it under DDP.")
            self._frozen = fingerprint(self.network)
            add_adapter(self.network, self.config, self.config.seed)

    def _open(self, images: datasets.Dataset | datasets.IterableDataset) -> TrainingSource:
        self._captions: TrainingCaptions | None = None
        if self.config.caption_column is None:
            return super()._open(images)
        config, device, show_progress = self.config, self.accelerator.device, self.accelerator.is_main_process
        with self.accelerator.main_process_first():
            encoder = caption_encoder(config, None if self._saved is None else self._saved.captions, device)
        options = {f.name: getattr(config, f.name) for f in fields(ImageOptions)}
        if is_streamed(images, config):
            stream = open_stream(images, ImageOptions(**options), show_progress, config.caption_column)
            self._captions = StreamedCaptions(config, encoder, device, stream.captions)
            return stream
        # To stored data a caption is a class: its number goes where labels go, and is hidden as labels are.
        assert isinstance(images, datasets.Dataset), "others are streamed"
        self._captions = stored = StoredCaptions(config, encoder, device, images)
        options |= {"label_column": CAPTION_NUMBERS, "num_classes": len(stored.captions)}
        return open_source(stored.numbered, ImageOptions(**options), show_progress)

    def _seen(self, source: TrainingSource) -> TrainingSource:
        self._latents: LatentSource | None = None
        if self.config.vae is None:
            return source
        with self.accelerator.main_process_first():
            vae = load_autoencoder(self.config, self.accelerator.device)
        self._latents = LatentSource(source, self.config, vae, self.config.random_flip)
        return self._latents

    def _x0(self, batch: dict[str, Tensor]) -> Tensor:
        return super()._x0(batch) if self._latents is None else self._latents.x0(batch, self.accelerator.device)

    def _describe_data(self) -> str:
        if self._captions is None:
            return super()._describe_data()
        return describe_source(self.source, self._captions.describe())

    def _weighting(self) -> str:
        return self.config.weighting or super()._weighting()

    def _build_network(self) -> Any:
        classes = None
        if self.config.class_conditional:  # the null class, which stands for a hidden label, is the last one
            classes = checked_classes(self.source) + (1 if self.config.label_dropout > 0.0 else 0)
        width = None if self._captions is None else self._captions.width
        if self._saved is not None:
            return self._saved.network_for(self.source, classes, width)
        return build_network(self.config, self.source, classes, width)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Denoising score-matching loss of each sample of a batch from ``TrainingSamples``, shape (B,)."""
        config = self.config
        x0, eps, t = self._inputs(batch)
        conditioning = self.scheduler.conditioning
        arguments = traits_of(self.network).constant_labels(len(x0), x0.device)
        if config.class_conditional:
            hidden = batch["label_draw"] < config.label_dropout
            labels = torch.where(hidden, len(self.source.class_names), batch["labels"])
            arguments["class_labels"] = labels.to(x0.device, non_blocking=True)
        if self._captions is not None:
            arguments |= self._captions.arguments(batch)

        def network(x: Tensor, t: Tensor) -> Tensor:
            return call_network(self.model, x, conditioning.timestep(self.sde, t), **arguments)

        parametrization = self.scheduler.parametrization
        loss = denoising_loss(self.sde, parametrization, network, x0, t, eps, self.weighting, config.min_snr_gamma)
        return loss * importance_ratio(self.sde, t).to(loss) if config.time_sampling == "importance" else loss

    # ------------------------------------------------------------------ along the way

    def _begin(self) -> None:
        if self._latents is not None:
            self._latents.prepare(PartialState())
        if self._captions is not None:
            self._captions.prepare(PartialState())
        self._progress = None
        if self.config.eval_every:
            captions = None if self._captions is None else self._captions.spread(self.config.num_eval_images)
            self._progress = ProgressOfSamples(self.config, self.source, captions)

    def _observe(self, last: bool) -> bool:
        observed = due(self.step, self.sample_every, last)
        if observed:
            self._save_samples()
        if self._progress is not None and due(self.step, self.config.eval_every, last):
            observed = True
            with self._averaged_weights() as network:
                values = {f"eval/{name}": value for name, value in self._progress(self._pipeline(network)).items()}
            logger.info("Step %d: %s", self.step, ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
            self.accelerator.log(values, step=self.step)
        for resting in (self._latents, self._captions):
            if observed and resting is not None and not last:
                resting.rest()
        return observed

    def _publish(self) -> None:
        if self.config.push_to_hub:
            with self._averaged_weights() as network:
                if self.publisher is not None:
                    self.publisher.start(self._pipeline(merged(network)), f"Step {self.step}")

    def _end(self, result: SDEPipeline) -> None:
        if self.publisher is not None:
            self.publisher.finish(result)

    def _save_samples(self) -> None:
        """Save a sheet of samples, the same noise every time, and log them; the training state is untouched."""
        accelerator = self.accelerator
        with self._averaged_weights() as network:
            images = self._sample_images(network) if accelerator.is_main_process else None
        if images is not None:
            path = self.output_dir / "samples" / f"step-{self.step:07d}.png"
            with saving("Samples", self.output_dir):
                write_whole(path, partial(sheet(images, len(images)).save, format="PNG"))
            log_pictures(accelerator.trackers, "samples", images, self.step)
        accelerator.wait_for_everyone()

    def _sample_images(self, network: Any) -> Tensor:
        """Samples as bytes, shape (N, C, H, W)."""
        config, pipeline = self.config, self._pipeline(network)
        pipeline.set_progress_bar_config(desc="Sampling", leave=False)
        parts: list[Tensor] = []
        for start in range(0, config.num_sample_images, config.eval_batch_size):
            numbers = range(start, min(start + config.eval_batch_size, config.num_sample_images))
            arguments: dict[str, Any] = {"batch_size": len(numbers)}
            if config.class_conditional:
                arguments = {"class_labels": [number % len(self.source.class_names) for number in numbers]}
            elif self._captions is not None:
                captions = self._captions.different
                arguments = {"prompt": [captions[number % len(captions)] for number in numbers]}
            generator = [torch.Generator().manual_seed(config.seed + number) for number in numbers]
            images = pipeline(
                **arguments,
                num_inference_steps=config.num_inference_steps,
                generator=generator,
                output_type="pt",
                return_dict=False,
            )[0]
            parts.append(to_bytes(images, 0.0))
        return torch.cat(parts)

    # ------------------------------------------------------------------ what is saved

    def _pipeline(self, network: Any) -> SDEPipeline:
        # A scheduler of its own: sampling leaves its mark on one.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        parts: dict[str, Any] = {"data_min": self.config.data_min}
        if self._latents is not None:
            self._latents.wake()
            latents = self._latents.encoder
            parts |= {"vae": latents.vae, "latents_mean": list(latents.mean), "latents_std": list(latents.std)}
        if self._captions is not None:
            self._captions.wake()
            encoder = self._captions.encoder
            return TextSDEPipeline(
                network,
                scheduler,
                encoder.text_encoder,
                encoder.tokenizer,
                **parts,
                max_caption_length=encoder.max_length,
                shows_padding=encoder.shows_padding,
                null_caption="" if self.config.caption_dropout > 0.0 else None,
            )
        if not self.config.class_conditional:
            return SDEPipeline(network, scheduler, **parts)
        names = self.source.class_names
        null_class = len(names) if self.config.label_dropout > 0.0 else None
        return ClassConditionalSDEPipeline(
            network, scheduler, **parts, id2label=dict(enumerate(names)), null_class=null_class
        )

    def _save_result(self) -> SDEPipeline:
        with self._averaged_weights() as network:
            whole = merged(network)
            pipeline = self._pipeline(whole)
            if self.accelerator.is_main_process:
                save_model(pipeline, self.output_dir, network)
            if self.step >= self.max_steps:
                # The run is over: hand out the averaged weights themselves, without accelerate's wrapping.
                averaged = type(network).from_config(network.config).to(self.accelerator.device)
                averaged.load_state_dict(whole.state_dict())
                pipeline = self._pipeline(averaged.eval())
        self.accelerator.wait_for_everyone()
        return pipeline

    def _identity(self) -> dict[str, Any]:
        config, identity = self.config, super()._identity()
        if self.weighting == "min_snr":
            identity["min_snr_gamma"] = config.min_snr_gamma
        identity |= adapter_identity(config, self._frozen)
        if config.class_conditional:
            identity["label_dropout"] = config.label_dropout
        if self._latents is not None:
            identity |= self._latents.identity()
        if self._captions is not None:
            identity |= {"class_conditional": False} | self._captions.identity()
        # Checkpoints of before there was a choice do not say it.
        if config.init_from is not None and type(self.network).__name__ != "UNet2DModel":
            return identity | {"network": type(self.network).__name__}
        return identity | ({} if config.model_type == "unet" else {"network": config.model_type})

    def _task(self) -> str:
        config = self.scheduler.config
        return f"predicts {config.prediction_type} and is fed {config.time_conditioning} time"

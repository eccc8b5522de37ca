"""The options of training by subject. A configuration is composed of those that its kind of training takes."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from ..basics.options import CheckedOptions, option
from ..images.options import LARGEST_SEED_OF_NUMPY
from ..metrics import FEATURES
from ..networks.losses import TIME_SAMPLINGS, WEIGHTINGS, times_from_uniform
from ..sdes import SDE
from .checkpoints import check_logging_dir
from .trainable import by_sde

LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
LOGGERS = ("tensorboard", "wandb", "none")
PRECISIONS = ("no", "fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class LoadingOptions(CheckedOptions):
    """How images become training data."""

    random_flip: bool = option(False, "Mirror half of the images left to right. Not for digits or letters.")
    dataloader_num_workers: int = option(
        0, "Processes that load data, per training process. 0: load in the training process.", least=0
    )


@dataclass(frozen=True, kw_only=True)
class ClassOptions(CheckedOptions):
    """Whether the network is told the class of each image."""

    class_conditional: bool = option(
        False, "Train a network that is told the class of each image, for generation by class."
    )
    label_dropout: float = option(
        0.1,
        "With class_conditional: fraction of images whose class is hidden from the network, which guidance needs; 0 "
        "trains without a null class.",
        least=0.0,
        most=0.999,
    )


@dataclass(frozen=True, kw_only=True)
class TimeOptions(CheckedOptions):
    """How training times are drawn."""

    time_sampling: str = option(
        "uniform",
        "How training times are drawn: 'uniform', 'importance' (for likelihood weighting: density g^2/sigma^2, the "
        "loss divided by it, so that it has the same mean and less variance), 'log_normal' (EDM's: log(sigma/alpha) "
        "is normal, which moves weight to the middle of the noise levels) or 'logit_normal' (that of flows in Esser et "
        "al. 2024: log(t/(1 - t)) is normal).",
        choices=TIME_SAMPLINGS,
    )
    log_normal_mean: float = option(-1.2, "Mean of log(sigma/alpha) with log_normal; EDM's is for [-1, 1].")
    log_normal_std: float = option(1.2, "Standard deviation of log(sigma/alpha) with log_normal.", above=0.0)
    logit_normal_mean: float = option(0.0, "Mean of log(t/(1 - t)) with logit_normal.")
    logit_normal_std: float = option(1.0, "Standard deviation of log(t/(1 - t)) with logit_normal.", above=0.0)
    time_shift: float = option(
        1.0,
        "Move training times towards the noise, t -> s t / (1 + (s - 1) t), which on a flow multiplies sigma/alpha by "
        "s: images of more pixels need more noise (Esser et al. 2024, who take 3 for 1024 pixels).",
        above=0.0,
    )
    time_shift_base_resolution: int | None = option(
        None,
        "Multiply time_shift by the resolution over this one, so that it is right for images of any size where it is "
        "right for these. Default: time_shift as it is.",
        least=1,
    )
    stratified_times: bool = option(
        True, "Draw one time from each of B equal parts of the range in a batch of B: the same mean, less variance."
    )

    def time_shift_at(self, resolution: int) -> float:
        """The factor s of ``time_shift`` for images of this side."""
        base = self.time_shift_base_resolution
        return self.time_shift * (1.0 if base is None else resolution / base)

    def times(self, sde: SDE, u: Tensor, discrete_steps: int | None, resolution: int) -> Tensor:
        """Training times for numbers ``u``, uniform in [0, 1); see ``times_from_uniform``.

        Args:
            sde: Times lie in its [t_min, t_max].
            u: Any shape.
            discrete_steps: N for the times of a table of N entries; None for continuous time.
            resolution: Side of the images.
        """
        return times_from_uniform(
            sde,
            u,
            discrete_steps,
            self.time_sampling,
            (self.log_normal_mean, self.log_normal_std),
            (self.logit_normal_mean, self.logit_normal_std),
            self.time_shift_at(resolution),
        )


@dataclass(frozen=True, kw_only=True)
class LossOptions(CheckedOptions):
    """How the loss is weighted over time."""

    weighting: str | None = option(
        None,
        "Weight of the loss over time: 'paper' (lambda = sigma^2: weight 1 on the noise estimate), 'likelihood' "
        "(lambda = g^2), 'output' (weight 1 on what the network predicts) or 'min_snr' (min(SNR, min_snr_gamma) on "
        "x0). Default: paper for epsilon and score, output otherwise.",
        choices=WEIGHTINGS,
    )
    min_snr_gamma: float = option(5.0, "Largest weight of min_snr weighting.", above=0.0, aliases=["snr_gamma"])


@dataclass(frozen=True, kw_only=True)
class OptimiserOptions(CheckedOptions):
    """With which steps and at which precision weights are changed."""

    learning_rate: float = option(2e-4, "Learning rate after warm-up.", above=0.0)
    lr_scheduler: str = option("cosine", "Course of the learning rate after warm-up.", choices=LR_SCHEDULERS)
    lr_warmup_steps: int | None = option(
        None, "Optimiser steps of linear warm-up. Default: 500, but at most a tenth of the run.", least=0
    )
    adam_beta1: float = option(0.9, "First-moment decay of AdamW.", least=0.0, most=1.0)
    adam_beta2: float = option(0.999, "Second-moment decay of AdamW.", least=0.0, most=1.0)
    adam_weight_decay: float = option(0.0, "Weight decay of AdamW.", least=0.0)
    adam_epsilon: float = option(1e-8, "Epsilon of AdamW.", above=0.0)
    use_8bit_adam: bool = option(
        False, "Keep AdamW's moments in 8 bits, which takes a quarter of their memory; needs bitsandbytes."
    )
    max_grad_norm: float = option(1.0, "Clip the gradient's norm to this; 0 does not clip.", least=0.0)
    mixed_precision: str | None = option(
        None,
        "Precision of the network's forward and backward pass; weights, noise and times stay float32. Default: what "
        "accelerate was launched with, or else bf16 where the hardware computes in it, or else no.",
        choices=PRECISIONS,
    )


@dataclass(frozen=True, kw_only=True)
class OptimisationOptions(OptimiserOptions):
    """How long, with which steps and at which precision a network is trained on images."""

    max_train_steps: int | None = option(
        None, "Optimiser steps to train for; counts before num_epochs. Default: from num_epochs.", least=1
    )
    num_epochs: int = option(100, "Passes through the data, where max_train_steps is not given.", least=1)
    train_batch_size: int = option(64, "Images per process and forward pass.", least=1)
    gradient_accumulation_steps: int = option(1, "Forward passes per optimiser step.", least=1)
    torch_compile: bool = option(False, "Compile the network with torch.compile; worth its minutes on GPUs.")
    channels_last: bool = option(False, "Keep the network's weights channels last; faster on GPUs.")
    seed: int = option(
        0, "Seed of weights, data order, times, noise and sample grids.", least=0, most=LARGEST_SEED_OF_NUMPY
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_train_steps is not None and (self.lr_warmup_steps or 0) >= max(self.max_train_steps, 1):
            raise ValueError(
                f"lr_warmup_steps must be less than max_train_steps, got {self.lr_warmup_steps!r} and "
                f"{self.max_train_steps!r}."
            )


@dataclass(frozen=True, kw_only=True)
class AveragingOptions(CheckedOptions):
    """How the weights are averaged over the run."""

    use_ema: bool = option(True, "Keep an exponential moving average of the weights, and sample and save that.")
    ema_inv_gamma: float = option(
        1.0, "Inverse gamma of the warm-up, decay = 1 - (1 + step/inv_gamma)^-power.", above=0
    )
    ema_power: float = option(0.75, "Power of that warm-up.", above=0.0)
    ema_max_decay: float | None = option(
        None,
        f"Largest decay. Default: {by_sde(lambda family: family.ema_max_decay)}, as in the paper.",
        least=0.0,
        most=1.0,
    )
    ema_relative_std: float | None = option(
        None,
        "Average with EDM2's power function instead, of this width as a fraction of the run, such as 0.1 (Karras et "
        "al. 2024). Default: the exponential average above.",
        above=0.0,
        most=0.28,
    )


@dataclass(frozen=True, kw_only=True)
class OutputOptions(CheckedOptions):
    """Where a run writes, what it saves and logs, and from where it goes on."""

    output_dir: str = option("outputs/training", "Where checkpoints, samples, logs and the final pipeline go.")
    overwrite_output_dir: bool = option(
        False, "Delete what an earlier run wrote in output_dir, and nothing else, and start anew."
    )
    checkpointing_steps: int = option(
        500, "Save a checkpoint for resuming every so many optimiser steps, and at the end; 0: never.", least=0
    )
    checkpoints_total_limit: int | None = option(None, "Keep only so many of the latest checkpoints.", least=1)
    resume_from_checkpoint: str | None = option(
        None,
        "Continue from a checkpoint: its folder, or 'latest' for the last one in output_dir (a new run if there is "
        "none yet). With the same options the run continues exactly; others count from there on and are logged, but "
        "another network, loss or data are refused. Later checkpoints are kept as abandoned-checkpoint-<step>.",
    )
    logger: str = option("tensorboard", "Tracker.", choices=LOGGERS)
    logging_dir: str = option("logs", "Folder for the tracker inside output_dir.")
    logging_steps: int = option(10, "Log loss, learning rate and speed every so many optimiser steps.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output_dir:
            raise ValueError("output_dir must not be empty.")
        check_logging_dir(self.logging_dir)


@dataclass(frozen=True, kw_only=True)
class RunOptions(OutputOptions):
    """What a run over images saves, beside what every run does."""

    save_model_epochs: int | None = option(
        None, "Save the pipeline every so many epochs. It is always saved at the end.", least=1
    )


@dataclass(frozen=True, kw_only=True)
class SampleOptions(CheckedOptions):
    """Samples that are drawn and measured while a denoiser is trained."""

    sample_every: int | None = option(
        1000, "Draw a grid of samples every so many optimiser steps, and at the end; 0: never.", least=0
    )
    save_images_epochs: int | None = option(None, "The same in epochs; counts before sample_every.", least=1)
    num_sample_images: int = option(16, "Images in that grid.", least=1)
    num_inference_steps: int = option(
        100, "Noise levels used to sample them.", least=1, aliases=["ddpm_num_inference_steps"]
    )
    eval_batch_size: int = option(64, "Images sampled at a time.", least=1)
    eval_every: int | None = option(
        0, "Draw and measure num_eval_images samples every so many optimiser steps, and at the end; 0: never.", least=0
    )
    num_eval_images: int = option(512, "Samples to measure; only numbers of equally many compare.", least=5)
    eval_features: str | None = option(
        None,
        "What is compared with the data: features of a small classifier of its own classes, of Inception, or pixels. "
        "Default: classifier where the data have classes, pixels elsewhere.",
        choices=FEATURES,
    )


@dataclass(frozen=True, kw_only=True)
class HubOptions(CheckedOptions):
    """Whether and where the pipeline is uploaded."""

    push_to_hub: bool = option(
        False,
        "Upload the pipeline, with its code and a model card, at every checkpoint and at the end. Training goes on "
        "meanwhile, and what fails to go up can be sent later by scripts/push_to_hub.py.",
    )
    hub_model_id: str | None = option(
        None, "Repository for it, user/name; created if it does not exist. Default: the name of output_dir."
    )
    hub_private_repo: bool = option(False, "Make a new repository private.")
    hub_token: str | None = option(
        None, "Access token, kept out of files and logs. Default: that of 'hf auth login' or HF_TOKEN.", secret=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        idle = [f.name for f in fields(HubOptions) if f.name != "push_to_hub" and getattr(self, f.name)]
        if idle and not self.push_to_hub:
            raise ValueError(f"{', '.join(idle)} has no effect without push_to_hub.")

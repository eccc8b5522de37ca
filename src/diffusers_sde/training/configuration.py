"""What a training run is told: one documented dataclass, from which the command line is generated."""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from ..basics.options import option as _option
from ..images.options import LARGEST_SEED_OF_NUMPY, ImageOptions, is_local
from ..metrics import FEATURES
from ..networks.conditioning import TIME_CONDITIONINGS
from ..networks.losses import TIME_SAMPLINGS, WEIGHTINGS
from ..networks.parametrizations import PREDICTION_TYPES
from ..sdes import BETA_SCHEDULES
from .checkpoints import check_logging_dir
from .recipes import RECIPES

TRAINABLE_SDES = ("ve", "vp", "sub_vp", "flow")
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
LOGGERS = ("tensorboard", "wandb", "none")
TIME_EMBEDDINGS = ("positional", "fourier")
_HUB = ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_token")
_LOCAL = (*("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "cache_dir", "logging_dir"), *_HUB)


def _without_folders(name: str, word: str) -> str:
    """A word of a command line for others, without the folders of this machine."""
    word = " ".join(word.split()) if "\n" in word or "\r" in word else word  # a card shows one line
    looks_local = word.startswith(("/", "~", ".", "file:")) or "\\" in word or re.match("[A-Za-z]:", word) is not None
    may_be_local = name in ("dataset_name", "model_config_name_or_path")  # or a name on the Hub
    if name == "train_data_dir" or looks_local or (may_be_local and (word.count("/") > 1 or is_local(word))):
        last = re.split(r"[/\\]", word.rstrip("/\\"))[-1]
        return f"path/to/{last.strip('~.') or 'data'}"
    return word


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(ImageOptions):
    """Everything that a training run is told; each field is the command-line option of the same name.

    ``scripts/train.py --help`` and ``TrainingConfig.describe()`` say what each one means. Names are those of diffusers'
    ``train_unconditional.py`` where it has the option. A default of None is chosen per SDE or from the data.

    Raises:
        ValueError: A value out of range, an unknown name, or options that contradict each other.
    """

    excluded_options: ClassVar[frozenset[str]] = frozenset()  # of a subclass: what it inherits and does not take

    # ------------------------------------------------------------------ data
    label_dropout: float = _option(
        0.1,
        "With class_conditional: fraction of images whose class is hidden from the network, which guidance needs; 0 "
        "trains without a null class.",
        least=0.0,
        most=0.999,
    )
    random_flip: bool = _option(False, "Mirror half of the images left to right. Not for digits or letters.")
    dataloader_num_workers: int = _option(
        0, "Processes that load data, per training process. 0: load in the training process.", least=0
    )

    # ------------------------------------------------------------------ the SDE and what the network predicts
    sde: str = _option(
        "vp", "Forward SDE: variance exploding, variance preserving, sub-VP or rectified flow.", choices=TRAINABLE_SDES
    )
    discrete: bool = _option(
        False,
        "Train on the N noise levels of the discrete models instead of continuous time: DDPM's table for vp, SMLD's "
        "geometric scales for ve, i/N for the others.",
    )
    prediction_type: str | None = _option(
        None,
        "What the network predicts. Default: edm for ve, flow_prediction for flow, epsilon otherwise.",
        choices=tuple(PREDICTION_TYPES),
    )
    time_conditioning: str | None = _option(
        None,
        "What the network is fed for SDE time t: t N - 1 (discrete), t N (continuous), t (N - 1) (score_sde), or a "
        "function of sigma/alpha. Default: discrete for --sde vp --discrete, continuous otherwise.",
        choices=tuple(TIME_CONDITIONINGS),
    )
    weighting: str | None = _option(
        None,
        "Weight of the loss over time: 'paper' (lambda = sigma^2: weight 1 on the noise estimate), 'likelihood' "
        "(lambda = g^2), 'output' (weight 1 on what the network predicts) or 'min_snr' (min(SNR, min_snr_gamma) on "
        "x0). Default: paper for epsilon and score, output otherwise.",
        choices=WEIGHTINGS,
    )
    min_snr_gamma: float = _option(5.0, "Largest weight of min_snr weighting.", above=0.0, aliases=["snr_gamma"])
    time_sampling: str = _option(
        "uniform",
        "How training times are drawn: 'uniform', 'importance' (for likelihood weighting: density g^2/sigma^2, the "
        "loss divided by it, so that it has the same mean and less variance) or 'log_normal' (EDM's: log(sigma/alpha) "
        "is normal, which moves weight to the middle of the noise levels).",
        choices=TIME_SAMPLINGS,
    )
    log_normal_mean: float = _option(-1.2, "Mean of log(sigma/alpha) with log_normal; EDM's is for [-1, 1].")
    log_normal_std: float = _option(1.2, "Standard deviation of log(sigma/alpha) with log_normal.", above=0.0)
    stratified_times: bool = _option(
        True, "Draw one time from each of B equal parts of the range in a batch of B: the same mean, less variance."
    )
    train_eps: float = _option(1e-5, "Smallest training time: t lies in [train_eps, 1].", above=0.0)
    sampling_eps: float | None = _option(
        None, "Last time of sampling with the trained model. Default: the scheduler's own.", above=0.0
    )
    num_train_timesteps: int = _option(
        1000,
        "N: length of the discrete table and scale of the network's timesteps.",
        least=2,
        aliases=["ddpm_num_steps"],
    )
    beta_schedule: str = _option(
        "linear",
        "Table of --sde vp --discrete. Continuous time is always linear in beta.",
        choices=BETA_SCHEDULES,
        aliases=["ddpm_beta_schedule"],
    )
    beta_start: float = _option(1e-4, "beta(0)/N for vp and sub_vp (the paper's beta_min is N times this).", above=0.0)
    beta_end: float = _option(0.02, "beta(1)/N for vp and sub_vp (the paper's beta_max is N times this).", above=0.0)
    data_min: float = _option(
        -1.0,
        "Value of black in what the network sees, white is 1: -1, or 0 for images in [0, 1], such as the paper's VE "
        "models. It is saved with the pipeline.",
        least=-1.0,
        most=0.0,
    )
    sigma_min: float | None = _option(
        None, "Smallest noise of ve. Default: 0.02 for images in [-1, 1], the paper's 0.01 for [0, 1].", above=0.0
    )
    sigma_max: float | None = _option(
        None,
        "Largest noise of ve (the paper's 50 is for CIFAR-10 in [0, 1]: 100 for [-1, 1]). Default: the largest "
        "distance between two training images, as Song & Ermon (2020) recommend.",
        above=0.0,
    )
    sigma_data: float | None = _option(
        None, "Standard deviation of the data, for edm prediction. Default: measured.", above=0.0
    )

    # ------------------------------------------------------------------ the network
    model_config_name_or_path: str | None = _option(
        None, "Config of a UNet2DModel, a folder or Hub name, instead of the options below."
    )
    block_out_channels: tuple[int, ...] | None = _option(
        None, "Channels per resolution level, such as 32 64. Default: chosen from the resolution.", least=1, most=65536
    )
    layers_per_block: int = _option(2, "Residual blocks per resolution level.", least=1, most=256)
    attention_resolutions: tuple[int, ...] = _option(
        (8, 16), "Sides of feature maps that get self-attention, below the full resolution.", least=1
    )
    dropout: float = _option(0.0, "Dropout in the residual blocks.", least=0.0, most=0.999)
    time_embedding_type: str = _option(
        "positional",
        "How the network embeds its timestep. 'fourier' is the paper's NCSN++: it divides the output by the timestep, "
        "so it needs --prediction_type score --time_conditioning sigma.",
        choices=TIME_EMBEDDINGS,
    )

    # ------------------------------------------------------------------ optimisation
    max_train_steps: int | None = _option(
        None, "Optimiser steps to train for; counts before num_epochs. Default: from num_epochs.", least=1
    )
    num_epochs: int = _option(100, "Passes through the data, where max_train_steps is not given.", least=1)
    train_batch_size: int = _option(64, "Images per process and forward pass.", least=1)
    gradient_accumulation_steps: int = _option(1, "Forward passes per optimiser step.", least=1)
    learning_rate: float = _option(2e-4, "Learning rate after warm-up.", above=0.0)
    lr_scheduler: str = _option("cosine", "Course of the learning rate after warm-up.", choices=LR_SCHEDULERS)
    lr_warmup_steps: int | None = _option(
        None, "Optimiser steps of linear warm-up. Default: 500, but at most a tenth of the run.", least=0
    )
    adam_beta1: float = _option(0.9, "First-moment decay of AdamW.", least=0.0, most=1.0)
    adam_beta2: float = _option(0.999, "Second-moment decay of AdamW.", least=0.0, most=1.0)
    adam_weight_decay: float = _option(0.0, "Weight decay of AdamW.", least=0.0)
    adam_epsilon: float = _option(1e-8, "Epsilon of AdamW.", above=0.0)
    max_grad_norm: float = _option(1.0, "Clip the gradient's norm to this; 0 does not clip.", least=0.0)
    mixed_precision: str | None = _option(
        None,
        "Precision of the network's forward and backward pass; weights, noise and times stay float32. Default: what "
        "accelerate was launched with, or else bf16 where the hardware computes in it, or else no.",
        choices=("no", "fp16", "bf16"),
    )
    torch_compile: bool = _option(False, "Compile the network with torch.compile; worth its minutes on GPUs.")
    channels_last: bool = _option(False, "Keep the network's weights channels last; faster on GPUs.")
    seed: int = _option(
        0, "Seed of weights, data order, times, noise and sample grids.", least=0, most=LARGEST_SEED_OF_NUMPY
    )

    # ------------------------------------------------------------------ averaging of weights
    use_ema: bool = _option(True, "Keep an exponential moving average of the weights, and sample and save that.")
    ema_inv_gamma: float = _option(
        1.0, "Inverse gamma of the warm-up, decay = 1 - (1 + step/inv_gamma)^-power.", above=0
    )
    ema_power: float = _option(0.75, "Power of that warm-up.", above=0.0)
    ema_max_decay: float | None = _option(
        None, "Largest decay. Default: 0.999 for ve, 0.9999 otherwise, as in the paper.", least=0.0, most=1.0
    )

    ema_relative_std: float | None = _option(
        None,
        "Average with EDM2's power function instead, of this width as a fraction of the run, such as 0.1 (Karras et "
        "al. 2024). Default: the exponential average above.",
        above=0.0,
        most=0.28,
    )

    # ------------------------------------------------------------------ samples, logs and checkpoints
    output_dir: str = _option("outputs/training", "Where checkpoints, samples, logs and the final pipeline go.")
    overwrite_output_dir: bool = _option(
        False, "Delete what an earlier run wrote in output_dir, and nothing else, and start anew."
    )
    sample_every: int | None = _option(
        1000, "Draw a grid of samples every so many optimiser steps, and at the end; 0: never.", least=0
    )
    save_images_epochs: int | None = _option(None, "The same in epochs; counts before sample_every.", least=1)
    num_sample_images: int = _option(16, "Images in that grid.", least=1)
    num_inference_steps: int = _option(
        100, "Noise levels used to sample them.", least=1, aliases=["ddpm_num_inference_steps"]
    )
    eval_batch_size: int = _option(64, "Images sampled at a time.", least=1)
    eval_every: int | None = _option(
        0, "Draw and measure num_eval_images samples every so many optimiser steps, and at the end; 0: never.", least=0
    )
    num_eval_images: int = _option(512, "Samples to measure; only numbers of equally many compare.", least=5)
    eval_features: str | None = _option(
        None,
        "What is compared with the data: features of a small classifier of its own classes, of Inception, or pixels. "
        "Default: classifier where the data have classes, pixels elsewhere.",
        choices=FEATURES,
    )
    save_model_epochs: int | None = _option(
        None, "Save the pipeline every so many epochs. It is always saved at the end.", least=1
    )
    checkpointing_steps: int = _option(
        500, "Save a checkpoint for resuming every so many optimiser steps, and at the end; 0: never.", least=0
    )
    checkpoints_total_limit: int | None = _option(None, "Keep only so many of the latest checkpoints.", least=1)
    resume_from_checkpoint: str | None = _option(
        None,
        "Continue from a checkpoint: its folder, or 'latest' for the last one in output_dir (a new run if there is "
        "none yet). With the same options the run continues exactly; others count from there on and are logged, but "
        "another network, loss or data are refused. Later checkpoints are kept as abandoned-checkpoint-<step>.",
    )
    logger: str = _option("tensorboard", "Tracker.", choices=LOGGERS)
    logging_dir: str = _option("logs", "Folder for the tracker inside output_dir.")
    push_to_hub: bool = _option(
        False,
        "Upload the pipeline, with its code and a model card, at every checkpoint and at the end. Training goes on "
        "meanwhile, and what fails to go up can be sent later by scripts/push_to_hub.py.",
    )
    hub_model_id: str | None = _option(
        None, "Repository for it, user/name; created if it does not exist. Default: the name of output_dir."
    )
    hub_private_repo: bool = _option(False, "Make a new repository private.")
    hub_token: str | None = _option(
        None, "Access token, kept out of files and logs. Default: that of 'hf auth login' or HF_TOKEN.", secret=True
    )
    logging_steps: int = _option(10, "Log loss, learning rate and speed every so many optimiser steps.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_eps >= 1.0 or (self.sampling_eps or 0.0) >= 1.0:
            raise ValueError(
                f"train_eps and sampling_eps must lie in (0, 1), got {self.train_eps!r} and {self.sampling_eps!r}."
            )
        if self.time_sampling == "importance" and self.weighting != "likelihood":
            raise ValueError(
                f"time_sampling 'importance' is for weighting 'likelihood', got weighting={self.weighting!r}."
            )
        if self.time_sampling != "uniform" and self.discrete:
            raise ValueError(f"time_sampling {self.time_sampling!r} needs continuous time, got discrete=True.")
        if self.time_embedding_type == "fourier" and (self.prediction_type, self.time_conditioning) != (
            "score",
            "sigma",
        ):
            raise ValueError(
                "time_embedding_type 'fourier' divides the network's output by its timestep: it needs prediction_type "
                f"'score' and time_conditioning 'sigma', got {self.prediction_type!r} and {self.time_conditioning!r}."
            )
        if self.beta_schedule != "linear" and not (self.sde == "vp" and self.discrete):
            raise ValueError(f"beta_schedule {self.beta_schedule!r} needs sde 'vp' and discrete.")
        if self.max_train_steps is not None and (self.lr_warmup_steps or 0) >= max(self.max_train_steps, 1):
            raise ValueError(
                f"lr_warmup_steps must be less than max_train_steps, got {self.lr_warmup_steps!r} and "
                f"{self.max_train_steps!r}."
            )
        if not self.output_dir:
            raise ValueError("output_dir must not be empty.")
        check_logging_dir(self.logging_dir)
        idle = [name for name in _HUB[1:] if getattr(self, name) and not self.push_to_hub]
        if idle:
            raise ValueError(f"{', '.join(idle)} has no effect without push_to_hub.")

    def check_streamed(self) -> None:
        """Check that the options suit data whose number is not known.

        Raises:
            ValueError: They do not.
        """
        if self.max_train_steps is None:
            raise ValueError("Streamed data need max_train_steps: how many images a pass has is not known.")
        for name in ("save_images_epochs", "save_model_epochs"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} cannot be used with streamed data: how many images a pass has is not known.")

    def command(self) -> str:
        """The command line of this run, to be pasted into a shell: nothing of one machine or account only is in it.

        What names a file or folder here becomes ``path/to/`` and its last part.
        """
        words = ["accelerate", "launch", "scripts/train.py"]
        for f in fields(self):
            value = getattr(self, f.name)
            if value == f.default or f.name in _LOCAL:
                continue
            if isinstance(value, bool):
                words.append(f"--{f.name}" if value else f"--no-{f.name}")
                continue
            given = [_without_folders(f.name, str(v)) for v in (value if isinstance(value, tuple) else [value])]
            if len(given) == 1 and given[0].startswith("-"):
                words.append(f"--{f.name}={given[0]}")  # the parser would take it for an option
            else:
                words += [f"--{f.name}", *given]
        return shlex.join(words)

    def public(self) -> dict[str, Any]:
        """All options as a dictionary for files and logs; the token is not among them."""
        options = asdict(self)
        del options["hub_token"]
        return options

    @classmethod
    def from_recipe(cls, recipe: str | None = None, **options: Any) -> TrainingConfig:
        """The settings of a recipe, such as ``paper_vp_continuous``, which ``options`` override.

        Args:
            recipe: One of ``RECIPES``; None for the defaults.
            **options: Fields of this class.

        Raises:
            ValueError: Unknown recipe, or see the class.
        """
        if recipe is not None and recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}.")
        settings = dict(RECIPES[recipe]) if recipe is not None else {}
        if "num_epochs" in options:
            settings.pop("max_train_steps", None)  # it would count before what was asked for
        return cls(**(settings | options))

    @classmethod
    def describe(cls) -> str:
        """All options, one per paragraph, with their defaults."""
        return "\n".join(f"{f.name} ({f.default!r}): {f.metadata['help']}" for f in fields(cls))


@dataclass(frozen=True, kw_only=True)
class ClassifierTrainingConfig(TrainingConfig):
    """What the training of a classifier is told: the options of ``TrainingConfig`` that concern it, and two of its own.

    Raises:
        ValueError: See ``TrainingConfig``; or an option that only a denoiser has.
    """

    class_conditional: bool = _option(True, "Fixed.")
    label_dropout: float = _option(0.0, "Fixed.")
    sample_every: int | None = _option(0, "Fixed.")
    learning_rate: float = _option(3e-4, "Learning rate after warm-up.", above=0.0)
    output_dir: str = _option("outputs/classifier", "Where checkpoints, logs and the classifier go.")
    test_split: str | None = _option(
        None, "Split on which the accuracy is measured at the end; of the embedded digits a slice like 'train[1500:]'."
    )

    excluded_options: ClassVar[frozenset[str]] = frozenset(
        "class_conditional label_dropout prediction_type time_conditioning weighting min_snr_gamma sampling_eps "
        "sigma_data time_embedding_type sample_every save_images_epochs num_sample_images num_inference_steps "
        "eval_batch_size eval_every num_eval_images eval_features push_to_hub hub_model_id hub_private_repo "
        "hub_token".split()
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for f in fields(self):
            if f.name in self.excluded_options and getattr(self, f.name) != f.default:
                raise ValueError(f"{f.name} is an option of a denoiser's training, not of a classifier's.")

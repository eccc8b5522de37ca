"""Trained networks as what is denoised, and the Frechet distance of a classifier's features as what judges.

A network trained on one path can be sampled on any: x_t/alpha is the same variable on all of them, and sigma/alpha says
at which of the network's own times it belongs.
"""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_sde import FlowSDEScheduler, SubVPSDEScheduler, VESDEScheduler
from diffusers_sde.images.loading import load_images
from diffusers_sde.images.source import ImageSource
from diffusers_sde.metrics import ClassifierFeatures, load_classifier, train_feature_classifier
from diffusers_sde.metrics.distances import frechet_distance
from diffusers_sde.training import TrainingConfig

BATCH = 64
SAMPLING = (  # arguments of a scheduler that say how to sample
    "predictor corrector correct_steps snr probability_flow stochasticity solver_order solver_type solver_correction "
    "gaussian_std time_grid rho sampling_eps denoise_final clip_sample"
).split()
PATHS = {VESDEScheduler: "ve", SubVPSDEScheduler: "sub_vp", FlowSDEScheduler: "flow"}


class Network:
    """The network of a saved pipeline, as a denoiser of x_t = alpha x_0 + sigma noise.

    Args:
        folder: A pipeline saved by scripts/train.py. A class-conditional one is asked for no class.
        bf16: Run the network in mixed precision.
    """

    def __init__(self, folder: str, bf16: bool = False) -> None:
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.unet.eval().requires_grad_(False)
        self.folder, self.shape, self.bf16 = folder, pipe.sample_shape, bf16
        # The folder says what path the network is for; how to sample is what its class has as defaults today.
        cls = type(pipe.scheduler)
        defaults = {name: inspect.signature(cls.__init__).parameters[name].default for name in SAMPLING}
        self.scheduler = cls.from_config(pipe.scheduler.config, **defaults)
        self.path = PATHS.get(type(self.scheduler), "vp")
        null_class = getattr(pipe.config, "null_class", None)
        labels = {} if null_class is None else {"class_labels": torch.full((BATCH,), null_class)}
        self._denoisers = (
            self.scheduler.denoiser(pipe.unet, **labels),
            lambda n: self.scheduler.denoiser(pipe.unet, **{key: value[:n] for key, value in labels.items()}),
        )

    def denoise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """x0_hat, shape (B, C, H, W)."""
        sde = self.scheduler.sde
        t = sde.t_max if alpha == 0.0 else float(sde.time_of(2.0 * math.log(alpha / sigma)))
        t = min(max(t, 1e-5), sde.t_max)
        own = float(sde.alpha(t)) / alpha if alpha > 0.0 else 1.0
        whole, part = self._denoisers
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            parts = [(whole if len(rows) == BATCH else part(len(rows)))(rows * own, t) for rows in x.split(BATCH)]
        return torch.cat(parts)


def real_images(reference: str, network: Network) -> tuple[Tensor, Tensor]:
    """Bytes, shape (N, C, H, W), and classes, shape (N,), of a Parquet file, a folder or 'digits'."""
    where = {"dataset_name": "digits"} if reference == "digits" else {"train_data_dir": reference}
    config = TrainingConfig(**where, resolution=network.shape[-1], channels=network.shape[0], center_crop=True)
    source = ImageSource(load_images(config), config)
    return torch.from_numpy(source.get_many(range(len(source)))), torch.as_tensor(source.labels)


class NetworkJudge:
    """Frechet distance of a classifier's features between samples and real images.

    Args:
        network: What is judged.
        reference: Real images, see ``real_images``.
        n: Number of samples.
        classifier: File of the classifier; trained on the reference and written where there is none.
    """

    def __init__(self, network: Network, reference: str, n: int, classifier: Path) -> None:
        images, labels = real_images(reference, network)
        if not classifier.exists():
            train_feature_classifier(images, labels, steps=600).save(classifier)
        self._classifier: ClassifierFeatures = load_classifier(classifier, images, labels)
        self._real = self._features(images)
        generator = torch.Generator().manual_seed(3)
        draws = [torch.randperm(len(images), generator=generator)[:n] for _ in range(8)]
        scores = torch.tensor([frechet_distance(self._real[draw], self._real) for draw in draws])
        self.floor, self.noise = {"fd": float(scores.mean())}, {"fd": float(scores.std())}
        self.about = (
            f"Trained network {Path(network.folder).name}, {n} samples against {len(images)} real images; FD of the "
            f"features of a classifier ({100 * self._classifier.accuracy:.1f} % right on images it did not see)."
        )

    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self._classifier(part)[0] for part in images.split(512)])

    def __call__(self, x: Tensor) -> dict[str, Any]:
        return {"fd": self.fd(x) if bool(torch.isfinite(x).all()) else math.inf}

    def fd(self, x: Tensor) -> float:
        """The Frechet distance, of finite samples."""
        levels = (127.5 * (x.clamp(-1.0, 1.0) + 1.0)).round().to(torch.uint8)
        return float(frechet_distance(self._features(levels), self._real))

"""The scheduler configs that pipelines ship, what their networks return, and how their pipelines run a scheduler.

The keys are those of the scheduler_config.json in the repositories of the models (or of diffusers' script that converts
them), and the networks are fed what diffusers' own schedulers of those models feed them.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import diffusers
import numpy as np
import torch
from torch import Tensor

from diffusers_sde import FlowSDEScheduler, VESDEScheduler, VPSDEScheduler

OURS = {"vp": VPSDEScheduler, "edm": VESDEScheduler, "flow": FlowSDEScheduler}


class Data(Protocol):
    """What can be denoised: a mixture with its exact denoiser, or a trained network."""

    def denoise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x_0 | x_t] at x_t = alpha x_0 + sigma noise."""


@dataclass(frozen=True)
class Shipped:
    """A scheduler config as a pipeline has it.

    Attributes:
        about: The model, and how many steps its pipeline takes by default.
        path: ``vp``, ``edm`` or ``flow``.
        config: What scheduler_config.json says.
        swapped: A scheduler that users put in its place before, a class name and arguments of from_config.
        passes_sigmas: Whether the pipeline passes sigmas=linspace(1, 1/n, n) to set_timesteps.
        mu: What the pipeline passes as mu.
        sigma_data: Of a network inside EDM's preconditioning.
    """

    about: str
    path: str
    config: dict[str, Any]
    swapped: tuple[str, dict[str, Any]] | None = None
    passes_sigmas: bool = False
    mu: float | None = None
    sigma_data: float = 0.5

    def scheduler(self) -> Any:
        """The stock scheduler that a pipeline holds."""
        scheduler = getattr(diffusers, self.config["_class_name"]).from_config(dict(self.config))
        if self.swapped is not None:
            name, arguments = self.swapped
            scheduler = getattr(diffusers, name).from_config(scheduler.config, **arguments)
        return scheduler

    def lay_out(self, scheduler: Any, calls: int) -> None:
        """As many noise levels as the calls allow, the way the pipeline asks for them."""
        takes = inspect.signature(scheduler.set_timesteps).parameters
        for levels in range(calls // getattr(scheduler, "order", 1) + 1, 0, -1):
            arguments: dict[str, Any] = {} if self.mu is None else {"mu": self.mu}
            if self.passes_sigmas and "sigmas" in takes:
                arguments["sigmas"] = np.linspace(1.0, 1.0 / levels, levels)
            else:
                # DPM-Solver takes no sigmas, so that such a pipeline refuses it; it is compared on its own grid.
                arguments["num_inference_steps"] = levels
            scheduler.set_timesteps(**arguments)
            if len(scheduler.timesteps) <= calls:
                return
        raise ValueError(f"{type(scheduler).__name__} needs more than {calls} calls")


@dataclass
class Network:
    """The network of a shipped config: (model input, timestep) -> model output, made from a denoiser.

    Attributes:
        shipped: The config.
        data: What is denoised.
        calls: How often it was called.
    """

    shipped: Shipped
    data: Data
    calls: int = 0
    _log_ratio: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        scheduler = self.shipped.scheduler()
        self.prediction_type = scheduler.config.get("prediction_type", "flow_prediction")
        if self.shipped.path == "vp":
            table = scheduler.alphas_cumprod.double().numpy()
            self._log_ratio = 0.5 * np.log((1.0 - table) / table)

    def level(self, timestep: float) -> tuple[float, float]:
        """Alpha and sigma of the noise level for which a timestep stands."""
        if self.shipped.path == "edm":  # a quarter of log sigma
            return 1.0, math.exp(4.0 * timestep)
        if self.shipped.path == "flow":
            return 1.0 - timestep / 1000.0, timestep / 1000.0
        # Between the entries of its table a network has learned nothing; log sigma/alpha is close to linear there.
        ratio = math.exp(float(np.interp(timestep, np.arange(len(self._log_ratio)), self._log_ratio)))
        alpha = 1.0 / math.sqrt(1.0 + ratio**2)
        return alpha, ratio * alpha

    def __call__(self, inputs: Tensor, timestep: Tensor) -> Tensor:
        self.calls += 1
        alpha, sigma = self.level(float(timestep))
        if self.shipped.path == "edm":
            d = self.shipped.sigma_data
            total = sigma**2 + d**2
            x = inputs * math.sqrt(total)
            sign = 1.0 if self.prediction_type == "epsilon" else -1.0
            return (self.data.denoise(x, 1.0, sigma) - d**2 / total * x) * (sign * math.sqrt(total) / (sigma * d))
        x0_hat = self.data.denoise(inputs, alpha, sigma)
        noise = (inputs - alpha * x0_hat) / sigma
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return alpha * noise - sigma * x0_hat
        return noise - x0_hat


def run(shipped: Shipped, scheduler: Any, network: Network, z: Tensor, calls: int, seed: int) -> Tensor:
    """Sample as a pipeline does: through timesteps, init_noise_sigma, scale_model_input and step."""
    shipped.lay_out(scheduler, calls)
    scale = getattr(scheduler, "scale_model_input", None)
    takes = "generator" in inspect.signature(scheduler.step).parameters
    generator = {"generator": torch.Generator().manual_seed(1_000 + seed)} if takes else {}
    torch.manual_seed(1_000 + seed)  # some stock schedulers draw from the global generator
    x = z * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t in scheduler.timesteps:
        inputs = x if scale is None else scale(x, t)
        x = scheduler.step(network(inputs, t), t, x, **generator, return_dict=False)[0]
    return x


def peers(shipped: Shipped) -> dict[str, tuple[str, Any]]:
    """The stock schedulers, each by from_config as users do it: label -> (kind, scheduler).

    The kind is ``ode`` or ``sde``.
    """
    own = shipped.scheduler()
    sde: dict[str, Any] = {"algorithm_type": "sde-dpmsolver++"}
    rows: dict[str, tuple[str, str, dict[str, Any]]]
    if shipped.path == "vp":
        rows = {
            "DPM++(2M)": ("ode", "DPMSolverMultistepScheduler", {}),
            "UniPC": ("ode", "UniPCMultistepScheduler", {}),
            "Euler": ("ode", "EulerDiscreteScheduler", {}),
            "SDE-DPM++(2M)": ("sde", "DPMSolverMultistepScheduler", sde),
            "Euler ancestral": ("sde", "EulerAncestralDiscreteScheduler", {}),
        }
    elif shipped.path == "edm":
        data: dict[str, Any] = {} if "sigma_data" in own.config else {"sigma_data": shipped.sigma_data}
        rows = {
            "EDM DPM++(2M)": ("ode", "EDMDPMSolverMultistepScheduler", data),
            "EDM SDE-DPM++(2M)": ("sde", "EDMDPMSolverMultistepScheduler", {**data, **sde}),
        }
    else:
        shift = own.config.get("shift", own.config.get("flow_shift"))
        flow: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
        rows = {
            "FlowMatchEuler": ("ode", "FlowMatchEulerDiscreteScheduler", {"shift": shift}),
            "DPM++(2M)": ("ode", "DPMSolverMultistepScheduler", flow),
            "UniPC": ("ode", "UniPCMultistepScheduler", flow),
            "FlowMatchEuler, stochastic": (
                "sde",
                "FlowMatchEulerDiscreteScheduler",
                {"shift": shift, "stochastic_sampling": True},
            ),
            "SDE-DPM++(2M)": ("sde", "DPMSolverMultistepScheduler", {**flow, **sde}),
        }
    found: dict[str, tuple[str, Any]] = {}
    for label, (kind, name, arguments) in rows.items():
        scheduler = getattr(diffusers, name).from_config(own.config, **arguments)
        if type(scheduler) is type(own) and _settings(scheduler) == _settings(own):
            label += ", came with it"
        found[label] = (kind, scheduler)
    if not any(label.endswith("came with it") for label in found):
        name = type(own).__name__.removesuffix("Scheduler").removesuffix("Discrete")
        found = {f"{name}, came with it": ("sde" if name == "DDPM" else "ode", own), **found}
    return found


def _settings(scheduler: Any) -> dict[str, Any]:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


_STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
_SD15 = {"_class_name": "PNDMScheduler", **_STABLE_DIFFUSION}
_SOLVER = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "num_train_timesteps": 1000,
    "dynamic_thresholding_ratio": 0.995,
    "lower_order_final": True,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}


def _mu(tokens: int, base_tokens: int, max_tokens: int, base_shift: float, max_shift: float) -> float:
    """The shift that pipelines compute from the number of image tokens: linear between two sizes."""
    return base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)


CONFIGS: dict[str, Shipped] = {
    "sd15": Shipped("Stable Diffusion 1.5: PNDM, epsilon.", "vp", _SD15),
    "sd15-dpm": Shipped(
        "Stable Diffusion 1.5 after users chose DPM++(2M) Karras.",
        "vp",
        _SD15,
        swapped=("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ),
    "sd15-unipc": Shipped(
        "Stable Diffusion 1.5 after users chose UniPC.", "vp", _SD15, swapped=("UniPCMultistepScheduler", {})
    ),
    "sd2": Shipped(
        "Stable Diffusion 2.1 at 768 pixels: DDIM, v-prediction.",
        "vp",
        {"_class_name": "DDIMScheduler", **_STABLE_DIFFUSION, "prediction_type": "v_prediction"},
    ),
    "sdxl": Shipped(
        "Stable Diffusion XL: Euler, leading.",
        "vp",
        {
            "_class_name": "EulerDiscreteScheduler",
            **_STABLE_DIFFUSION,
            "interpolation_type": "linear",
            "prediction_type": "epsilon",
            "sample_max_value": 1.0,
            "timestep_spacing": "leading",
            "use_karras_sigmas": False,
        },
    ),
    "ddpm-cifar10": Shipped(
        "DDPM for CIFAR-10: DDPM, linear betas, clipped to [-1, 1].",
        "vp",
        {
            "_class_name": "DDPMScheduler",
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "clip_sample": True,
            "num_train_timesteps": 1000,
            "trained_betas": None,
            "variance_type": "fixed_large",
        },
    ),
    "ldm": Shipped(
        "Latent diffusion for faces: DDIM.",
        "vp",
        {
            "_class_name": "DDIMScheduler",
            "beta_start": 0.0015,
            "beta_end": 0.0195,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "num_train_timesteps": 1000,
            "trained_betas": None,
        },
    ),
    "pixart": Shipped(
        "PixArt-alpha: DPM++(2M), linspace.",
        "vp",
        {
            "_class_name": "DPMSolverMultistepScheduler",
            **_SOLVER,
            "algorithm_type": "dpmsolver++",
            "euler_at_final": False,
            "lambda_min_clipped": -math.inf,
            "prediction_type": "epsilon",
            "solver_type": "midpoint",
            "use_lu_lambdas": False,
            "variance_type": None,
        },
    ),
    "sd3": Shipped("Stable Diffusion 3: flow, shift 3.", "flow", {**_FLOW, "shift": 3.0}),
    "flux": Shipped(
        "Flux at 1024 pixels: flow, shift by image size, the pipeline passes sigmas.",
        "flow",
        {
            **_FLOW,
            "base_image_seq_len": 256,
            "base_shift": 0.5,
            "max_image_seq_len": 4096,
            "max_shift": 1.15,
            "shift": 3.0,
            "use_dynamic_shifting": True,
        },
        passes_sigmas=True,
        mu=_mu(4096, 256, 4096, 0.5, 1.15),
    ),
    "qwen-image": Shipped(
        "Qwen-Image at 1328 pixels: flow, shift by image size, stretched to end at 0.02, the pipeline passes sigmas.",
        "flow",
        {
            **_FLOW,
            "base_image_seq_len": 256,
            "base_shift": 0.5,
            "invert_sigmas": False,
            "max_image_seq_len": 8192,
            "max_shift": 0.9,
            "shift": 1.0,
            "shift_terminal": 0.02,
            "stochastic_sampling": False,
            "time_shift_type": "exponential",
            "use_beta_sigmas": False,
            "use_dynamic_shifting": True,
            "use_exponential_sigmas": False,
            "use_karras_sigmas": False,
        },
        passes_sigmas=True,
        mu=_mu((1328 // 16) ** 2, 256, 8192, 0.5, 0.9),
    ),
    "wan": Shipped(
        "Wan 2.2 TI2V: UniPC on a flow, shift 5.",
        "flow",
        {
            "_class_name": "UniPCMultistepScheduler",
            **_SOLVER,
            "disable_corrector": [],
            "final_sigmas_type": "zero",
            "flow_shift": 5.0,
            "predict_x0": True,
            "prediction_type": "flow_prediction",
            "rescale_betas_zero_snr": False,
            "solver_p": None,
            "solver_type": "bh2",
            "use_beta_sigmas": False,
            "use_exponential_sigmas": False,
            "use_flow_sigmas": True,
        },
    ),
    "edm": Shipped(
        "EDM-preconditioned latents (Playground 2.5): EDM Euler, Karras.",
        "edm",
        {
            "_class_name": "EDMEulerScheduler",
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "rho": 7.0,
            "sigma_data": 0.5,
            "sigma_max": 80.0,
            "sigma_min": 0.002,
        },
    ),
    "svd": Shipped(
        "Stable Video Diffusion: Euler, v-prediction, continuous, Karras.",
        "edm",
        {
            "_class_name": "EulerDiscreteScheduler",
            **_STABLE_DIFFUSION,
            "interpolation_type": "linear",
            "prediction_type": "v_prediction",
            "sigma_max": 700.0,
            "sigma_min": 0.002,
            "timestep_spacing": "leading",
            "timestep_type": "continuous",
            "use_karras_sigmas": True,
        },
        sigma_data=1.0,
    ),
}

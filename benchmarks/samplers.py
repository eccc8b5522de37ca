"""The samplers that benchmarks/quality.py compares: ours, and peers through their own packages.

A sampler takes a problem (a path, a network that counts its calls, the noise to start from) and a number of network
calls, and returns samples. The network is evaluated at the noise level at which a sampler really stands, even where its
own timesteps are rounded.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

import diffusers
import torch
from torch import Tensor

from diffusers_sde import FlowSDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from diffusers_sde.sdes import SDE

SCHEDULERS: dict[str, Any] = {
    "vp": VPSDEScheduler,
    "ve": VESDEScheduler,
    "sub_vp": SubVPSDEScheduler,
    "flow": FlowSDEScheduler,
}
MAX_RATIO = 80.0  # where samplers that need a finite sigma/alpha start on the flow path


class Data(Protocol):
    """What can be denoised: a mixture with its exact denoiser, or a trained network."""

    def denoise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x_0 | x_t] at x_t = alpha x_0 + sigma noise."""


@dataclass
class Problem:
    """What a sampler is run on.

    Attributes:
        path: Name of the path, a key of ``SCHEDULERS``.
        scheduler: Our scheduler of that path, with the constants of the network where there is one.
        data: What is denoised.
        z: Unit noise to start from.
        seed: Of the noise that is drawn on the way.
        calls: Network calls so far.
    """

    path: str
    scheduler: Any
    data: Data
    z: Tensor
    seed: int = 0
    calls: int = 0

    @property
    def sde(self) -> SDE:
        """The path."""
        return self.scheduler.sde

    def denoise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """One network call."""
        self.calls += 1
        return self.data.denoise(x, alpha, sigma)

    def generator(self) -> torch.Generator:
        """Of the noise that is drawn on the way."""
        return torch.Generator().manual_seed(1_000 + self.seed)

    def ratios(self) -> tuple[float, float]:
        """sigma/alpha at the two ends of the path."""
        first = math.exp(-0.5 * float(self.sde.log_snr(self.sde.t_max)))
        last = float(self.sde.sigma(1e-3) / self.sde.alpha(1e-3)) if self.path != "ve" else 0.01
        return min(first, MAX_RATIO if self.path == "flow" else math.inf), last


Sampler = Callable[[Problem, int], Tensor]


def run_scheduler(problem: Problem, scheduler: Any, x: Tensor) -> Tensor:
    """One of ours, through its own step()."""
    generator = problem.generator()
    for i, t in enumerate(scheduler.timesteps):
        time = scheduler.rows[i].t
        x0_hat = problem.denoise(x, float(scheduler.sde.alpha(time)), float(scheduler.sde.sigma(time)))
        x = scheduler.step(x0_hat, t, x, generator=generator, return_dict=False)[0]
    return x


def ours(**config: Any) -> Sampler:
    def sampler(problem: Problem, calls: int) -> Tensor:
        changes = {"prediction_type": "sample", **config}
        scheduler = type(problem.scheduler).from_config(problem.scheduler.config, **changes)
        levels = max(calls // scheduler.order, 1)
        scheduler.set_timesteps(levels)
        if len(scheduler.timesteps) < calls:  # the last level may cost less
            scheduler.set_timesteps(levels + 1)
            if len(scheduler.timesteps) > calls:
                scheduler.set_timesteps(levels)
        return run_scheduler(problem, scheduler, problem.z * scheduler.init_noise_sigma)

    return sampler


def stock(name: str, **config: Any) -> Sampler:
    """A diffusers scheduler on the path its config describes, at the exact noise level of each of its steps."""

    def sampler(problem: Problem, calls: int) -> Tensor:
        cls, options = getattr(diffusers, name), dict(config)
        if "clip_sample" in inspect.signature(cls.__init__).parameters:
            options.setdefault("clip_sample", False)
        if problem.path == "ve":
            options["sigma_max"], options["sigma_min"] = problem.ratios()
        scheduler = cls(**options)
        scheduler.set_timesteps((calls + 1) // 2 if "Heun" in name else calls)
        table = getattr(scheduler, "alphas_cumprod", None)
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        takes = "generator" in inspect.signature(scheduler.step).parameters
        generator = {"generator": problem.generator()} if takes else {}
        torch.manual_seed(1_000 + problem.seed)
        x = problem.z * float(getattr(scheduler, "init_noise_sigma", 1.0))
        for i, t in enumerate(scheduler.timesteps):
            inputs = scale(x, t)
            if problem.path == "flow":
                s = float(scheduler.sigmas[i])
                output = (x - problem.denoise(x, 1.0 - s, s)) / s
            elif problem.path == "ve":  # EDM: the network inside the preconditioning
                s = float(scheduler.sigmas[i])
                d, total = scheduler.config.sigma_data, s**2 + scheduler.config.sigma_data**2
                output = (problem.denoise(x, 1.0, s) - d**2 / total * x) / (s * d / math.sqrt(total))
            else:
                if hasattr(scheduler, "sigmas"):
                    ratio = float(scheduler.sigmas[i])
                else:
                    ratio = float(((1 - table[t]) / table[t]).sqrt())
                alpha = 1.0 / math.sqrt(1.0 + ratio**2)
                output = (inputs - alpha * problem.denoise(inputs, alpha, ratio * alpha)) / (ratio * alpha)
            x = scheduler.step(output, t, x, **generator).prev_sample
        return x

    return sampler


@functools.cache
def k_diffusion_sampling() -> Any:
    """k_diffusion.sampling alone: the package imports torchvision, CLIP and more, which sampling does not use.

    Raises:
        ImportError: k-diffusion is not installed.
    """
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("k_diffusion is not installed")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    unused = {name: mock.MagicMock() for name in ("torchvision", "torchvision.transforms") if not _installed(name)}
    with mock.patch.dict(sys.modules, {"k_diffusion": package, **unused}):
        return importlib.import_module("k_diffusion.sampling")


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name.split(".")[0]) is not None


def from_k_diffusion(name: str, grid: str, per_step: int = 1) -> Sampler:
    """On every path in its variance-exploding coordinates x/alpha, which is how k-diffusion wraps other networks."""

    def sampler(problem: Problem, calls: int) -> Tensor:
        sampling = k_diffusion_sampling()
        first, last = problem.ratios()
        n = calls if per_step == 1 else (calls + 1) // 2
        make = sampling.get_sigmas_karras if grid == "karras" else sampling.get_sigmas_exponential
        sigmas = make(n, last, first)
        generator = problem.generator()

        def model(x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
            return problem.denoise(x, 1.0, float(sigma[0]))

        arguments: dict[str, Any] = {"disable": True}
        if "sde" in name or "ancestral" in name:
            arguments["noise_sampler"] = lambda *_: torch.randn(problem.z.shape, generator=generator)
        # The path's own prior, in these coordinates.
        scale = first if problem.path == "flow" else problem.sde.prior_std / float(problem.sde.alpha(problem.sde.t_max))
        return getattr(sampling, name)(model, problem.z * scale, sigmas, **arguments)

    return sampler


def from_azula(name: str, grid: str, per_step: int = 1, **arguments: Any) -> Sampler:
    """On the path itself; in its own time or in one in which log-SNR is uniform."""

    def sampler(problem: Problem, calls: int) -> Tensor:
        import azula.sample
        from azula.denoise import Denoiser, DiracPosterior

        sde = problem.sde
        end = 1e-3 if problem.path != "ve" else 1e-5
        begin = sde.t_max if problem.path != "flow" else float(sde.time_of(-2 * math.log(MAX_RATIO)))
        high, low = float(sde.log_snr(end)), float(sde.log_snr(begin))

        def schedule(t: Tensor) -> tuple[Tensor, Tensor]:
            t = t.double()
            time = end + t * (begin - end) if grid == "uniform" else sde.time_of(high + t * (low - high))
            return sde.alpha(time).float(), sde.sigma(time).float()

        class Exact(Denoiser):
            def __init__(self) -> None:
                super().__init__()
                self.schedule = schedule

            def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
                alpha, sigma = schedule(t)
                return DiracPosterior(problem.denoise(x, float(alpha), float(sigma)))

        denoiser = Exact()
        torch.manual_seed(1_000 + problem.seed)
        steps = (calls - 1) // per_step
        x = getattr(azula.sample, name)(denoiser, steps=max(steps, 1), silent=True, **arguments)(
            problem.z * problem.sde.prior_std
        )
        return denoiser(x, torch.zeros(())).mean

    return sampler


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
OWN_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours, reverse SDE": ("sde", {}),
    "ours, probability flow": ("ode", {"probability_flow": True}),
    "ours, PC": ("pc", {"probability_flow": True, "corrector": "ornstein_uhlenbeck", "snr": 0.2}),
}
OURS: dict[str, tuple[str, Sampler]] = {label: (kind, ours(**config)) for label, (kind, config) in OWN_SETTINGS.items()}
TOLD = ", data_std"


def ours_on_scaled_data(scale: float, spread: float) -> dict[str, tuple[str, Sampler]]:
    """Ours down to a noise that is as small beside the data as otherwise; with nothing set, and told their spread."""
    end = {"sampling_sigma": 0.01 * scale}
    rows = {label: (kind, ours(**config, **end)) for label, (kind, config) in OWN_SETTINGS.items()}
    told = {
        label + TOLD: (kind, ours(**config, **end, data_std=spread)) for label, (kind, config) in OWN_SETTINGS.items()
    }
    return {**rows, **told}


# On networks only: far from exact at few calls, which trained networks need not mind; see docs/results.md.
ON_NETWORKS: dict[str, tuple[str, Sampler]] = {
    "ours, reverse SDE, Karras": (
        "sde",
        ours(solver_order=2, solver_type="midpoint", gaussian_std=0.0, time_grid="karras"),
    ),
}
PEERS: dict[str, dict[str, tuple[str, Sampler]]] = {
    "vp": {
        "diffusers DDIM": ("ode", stock("DDIMScheduler", timestep_spacing="trailing")),
        "diffusers Euler, Karras": ("ode", stock("EulerDiscreteScheduler", use_karras_sigmas=True)),
        "diffusers Heun, Karras": ("ode", stock("HeunDiscreteScheduler", use_karras_sigmas=True)),
        "diffusers DPM++(2M), Karras": ("ode", stock("DPMSolverMultistepScheduler", use_karras_sigmas=True)),
        "diffusers DPM++(2M), LU": ("ode", stock("DPMSolverMultistepScheduler", use_lu_lambdas=True)),
        "diffusers UniPC, Karras": ("ode", stock("UniPCMultistepScheduler", use_karras_sigmas=True)),
        "diffusers UniPC, exponential": ("ode", stock("UniPCMultistepScheduler", use_exponential_sigmas=True)),
        "diffusers DEIS, Karras": ("ode", stock("DEISMultistepScheduler", use_karras_sigmas=True)),
        "diffusers DDPM": ("sde", stock("DDPMScheduler", timestep_spacing="trailing")),
        "diffusers Euler ancestral": ("sde", stock("EulerAncestralDiscreteScheduler")),
        "diffusers SDE-DPM++(2M), Karras": (
            "sde",
            stock("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", use_karras_sigmas=True),
        ),
        "diffusers SDE-DPM++(2M), LU": (
            "sde",
            stock("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", use_lu_lambdas=True),
        ),
        "diffusers SASolver, exponential": ("sde", stock("SASolverScheduler", use_exponential_sigmas=True)),
    },
    "ve": {
        "diffusers EDM Euler": ("ode", stock("EDMEulerScheduler")),
        "diffusers EDM DPM++(2M)": ("ode", stock("EDMDPMSolverMultistepScheduler")),
        "diffusers EDM SDE-DPM++(2M)": (
            "sde",
            stock("EDMDPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
        ),
    },
    "sub_vp": {},
    "flow": {
        "diffusers FlowMatchEuler": ("ode", stock("FlowMatchEulerDiscreteScheduler")),
        "diffusers FlowMatchHeun": ("ode", stock("FlowMatchHeunDiscreteScheduler")),
        "diffusers DPM++(2M), flow": ("ode", stock("DPMSolverMultistepScheduler", **FLOW)),
        "diffusers UniPC, flow": ("ode", stock("UniPCMultistepScheduler", **FLOW)),
        "diffusers SDE-DPM++(2M), flow": (
            "sde",
            stock("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", **FLOW),
        ),
    },
}


def optional_peers() -> dict[str, tuple[str, Sampler]]:
    """Peers that are compared where they are installed; they sample every path."""
    peers: dict[str, tuple[str, Sampler]] = {}
    try:
        k_diffusion_sampling()
        for grid in ("karras", "exponential"):
            peers |= {
                f"k-diffusion LMS, {grid}": ("ode", from_k_diffusion("sample_lms", grid)),
                f"k-diffusion Heun, {grid}": ("ode", from_k_diffusion("sample_heun", grid, 2)),
                f"k-diffusion DPM++(2M), {grid}": ("ode", from_k_diffusion("sample_dpmpp_2m", grid)),
                f"k-diffusion Euler ancestral, {grid}": ("sde", from_k_diffusion("sample_euler_ancestral", grid)),
                f"k-diffusion DPM++(2M) SDE, {grid}": ("sde", from_k_diffusion("sample_dpmpp_2m_sde", grid)),
                f"k-diffusion DPM++(3M) SDE, {grid}": ("sde", from_k_diffusion("sample_dpmpp_3m_sde", grid)),
            }
    except ImportError as error:
        print(f"k-diffusion is left out: {error}")
    try:
        import azula.sample  # noqa: F401

        for grid in ("uniform", "log_snr"):
            peers |= {
                f"azula xEAB, {grid}": ("ode", from_azula("xEABSampler", grid)),
                f"azula zEAB, {grid}": ("ode", from_azula("zEABSampler", grid)),
                f"azula DDIM, {grid}": ("ode", from_azula("DDIMSampler", grid)),
                f"azula REAB, {grid}": ("sde", from_azula("REABSampler", grid)),
                f"azula DDPM, {grid}": ("sde", from_azula("DDPMSampler", grid)),
            }
    except ImportError as error:
        print(f"azula is left out: {error}")
    return peers

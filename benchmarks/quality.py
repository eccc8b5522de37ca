"""Quality per model call, judged with an exact score: only the sampler can be wrong.

python benchmarks/quality.py [--quick] [--paths vp ve sub_vp flow] [--data digits patches] [--output outputs/quality]

The data are Gaussian mixtures with full covariances, fitted to the 8x8 digits or to 8x8 colour patches of photographs
(both ship with scikit-learn). Their score is known in closed form on every path, so the network of every sampler is
exact, and the samples are judged against the truth:

* FD, the Frechet distance between mean and covariance of the samples and those of the data;
* SW, the sliced Wasserstein distance (order 2, 256 directions) to exact samples;
* nats/dim, the mean log-density of the samples minus that of the data, per dimension: above 0 is too clean, below too
  noisy.

Peers run in the same process through their own packages, with the network evaluated at the noise level at which their
sampler really stands, even where their timesteps are rounded. k-diffusion and azula join where they are installed
(pip install "diffusers-sde[benchmark]"). All samplers start from the same noise. Calls are counted by the network
itself: correctors, second stages and all. Written are OUTPUT.json, OUTPUT.md (tables, and whether the targets are
met) and OUTPUT.png.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from diffusers_sde import FlowSDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from diffusers_sde.sdes import SDE

CALLS = (5, 8, 10, 12, 15, 20, 30, 40, 50, 100)
QUICK_CALLS = (5, 10, 12, 20, 40)
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "vp": (VPSDEScheduler, {}),
    "ve": (VESDEScheduler, {}),
    "sub_vp": (SubVPSDEScheduler, {}),
    "flow": (FlowSDEScheduler, {}),
}
TARGETS = {"ode": 12, "sde": 20, "pc": 40}
MAX_RATIO = 80.0  # where samplers that need a finite sigma/alpha start on the flow path

# ---------------------------------------------------------------------- data


class Mixture:
    """A Gaussian mixture with full covariances and its exact denoiser, float32 in and out."""

    def __init__(self, weights: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> None:
        self.weights, self.means, covariance = (
            torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, covariances)
        )
        self.variances, self.axes = torch.linalg.eigh(covariance)
        self.variances.clamp_(min=1e-6)
        self.components, self.dim = self.means.shape
        self.mean = self.weights @ self.means
        centred = self.means - self.mean
        outer = covariance + centred[:, :, None] * centred[:, None, :]
        self.covariance = (self.weights[:, None, None] * outer).sum(0)
        values, vectors = torch.linalg.eigh(self.covariance)
        self.root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        self._into = self.axes.permute(1, 0, 2).reshape(self.dim, -1)
        self._out = self.axes.transpose(1, 2).reshape(-1, self.dim)
        self._centre = torch.einsum("kd,kde->ke", self.means, self.axes)

    def _parts(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        along = (x @ self._into.to(x)).view(-1, self.components, self.dim) - (alpha * self._centre).to(x)
        variance = alpha**2 * self.variances + sigma**2
        constant = torch.log(self.weights) - 0.5 * torch.log(2 * math.pi * variance).sum(1)
        logits = constant.to(x) - 0.5 * torch.einsum("bke,ke->bk", along.square(), (1 / variance).to(x))
        return along, variance, logits

    def denoise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x_0 | x_t], shape (B, d)."""
        along, variance, logits = self._parts(x, alpha, sigma)
        posterior = torch.softmax(logits, 1)
        gain = (alpha * self.variances / variance).to(x)
        along.mul_(gain).mul_(posterior[:, :, None])
        return posterior @ self.means.to(x) + along.flatten(1) @ self._out.to(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of data, nats, shape (B,)."""
        return torch.cat([torch.logsumexp(self._parts(part.double(), 1.0, 0.0)[2], 1) for part in x.split(2048)])

    def sample(self, n: int, seed: int) -> Tensor:
        """Exact samples, shape (n, d), float64."""
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.dim, dtype=torch.float64, generator=generator)
        z = self.variances[k].sqrt() * z
        return self.means[k] + torch.cat(
            [torch.einsum("nde,ne->nd", self.axes[a], b) for a, b in zip(k.split(512), z.split(512), strict=True)]
        )


def fitted(data: str) -> Mixture:
    from sklearn import datasets
    from sklearn.mixture import GaussianMixture

    if data == "digits":
        x = datasets.load_digits().data / 8.0 - 1.0
    else:
        rng, patches = np.random.default_rng(0), []
        for image in datasets.load_sample_images().images:
            for _ in range(6000):
                i, j = (int(rng.integers(0, size - 16)) for size in image.shape[:2])
                # Every second pixel, which is smoother than white noise and rougher than a gradient.
                patches.append(image[i : i + 16 : 2, j : j + 16 : 2].reshape(-1) / 127.5 - 1.0)
        x = np.stack(patches)
    fit = GaussianMixture(20, covariance_type="full", random_state=0, reg_covar=1e-3, max_iter=60).fit(x)
    return Mixture(fit.weights_, fit.means_, fit.covariances_)


# ---------------------------------------------------------------------- metrics


class Judge:
    """The distances of a sample set to the truth, and what exact samples score."""

    def __init__(self, data: Mixture, n: int) -> None:
        self.data, self.n = data, n
        reference = data.sample(100_000, seed=99)
        self.log_prob = float(data.log_prob(reference[:20_000]).mean())
        directions = torch.randn(data.dim, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        self.directions = directions / directions.norm(dim=0)
        quantiles = (reference @ self.directions).sort(0).values
        centre = ((torch.arange(n, dtype=torch.float64) + 0.5) / n * len(quantiles)).long()
        self.quantiles = quantiles[centre]
        floors = [self(data.sample(n, seed=100 + i)) for i in range(8)]
        self.floor = {key: float(np.mean([f[key] for f in floors])) for key in floors[0]}
        self.noise = {key: float(np.std([f[key] for f in floors], ddof=1)) for key in floors[0]}
        # Every sampler here ends with x0_hat at sigma/alpha = 0.01: what exact samples of that level score then.
        x = data.sample(n, seed=200)
        x = x + 0.01 * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(201))
        self.floor["nats_at_end"] = self(data.denoise(x, 1.0, 0.01))["nats"]

    def __call__(self, x: Tensor) -> dict[str, float]:
        x = x.double()
        if not bool(torch.isfinite(x).all()):
            return {"fd": math.inf, "sw": math.inf, "nats": -math.inf}
        data, mean, covariance = self.data, x.mean(0), torch.cov(x.T)
        cross = torch.linalg.eigvalsh(data.root @ covariance @ data.root).clamp(min=0).sqrt().sum()
        fd = (mean - data.mean).square().sum() + torch.trace(data.covariance) + torch.trace(covariance) - 2 * cross
        sw = ((x @ self.directions).sort(0).values - self.quantiles).square().mean().sqrt()
        nats = (data.log_prob(x).mean() - self.log_prob) / data.dim
        return {"fd": float(fd), "sw": float(sw), "nats": float(nats)}


# ---------------------------------------------------------------------- samplers


@dataclass
class Problem:
    """What a sampler is run on: a path, an exact denoiser that counts its calls, and the noise to start from."""

    path: str
    sde: SDE
    data: Mixture
    z: Tensor
    calls: int = 0

    def denoise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        self.calls += 1
        return self.data.denoise(x, alpha, sigma)

    def ratios(self) -> tuple[float, float]:
        """sigma/alpha at the two ends of the path."""
        first = math.exp(-0.5 * float(self.sde.log_snr(self.sde.t_max)))
        last = float(self.sde.sigma(1e-3) / self.sde.alpha(1e-3)) if self.path != "ve" else 0.01
        return min(first, MAX_RATIO if self.path == "flow" else math.inf), last


Sampler = Callable[[Problem, int], Tensor]


def run_scheduler(problem: Problem, scheduler: Any, x: Tensor) -> Tensor:
    """One of ours, through its own step()."""
    generator = torch.Generator().manual_seed(7)
    for i, t in enumerate(scheduler.timesteps):
        time = scheduler._rows[i].t
        x0_hat = problem.denoise(x, float(scheduler.sde.alpha(time)), float(scheduler.sde.sigma(time)))
        x = scheduler.step(x0_hat, t, x, generator=generator, return_dict=False)[0]
    return x


def ours(**config: Any) -> Sampler:
    def sampler(problem: Problem, calls: int) -> Tensor:
        cls, path_config = SCHEDULERS[problem.path]
        scheduler = cls(prediction_type="sample", **{**path_config, **config})
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
        cls = getattr(diffusers, name)
        if problem.path == "vp" and "clip_sample" in cls.__init__.__wrapped__.__code__.co_varnames:
            config.setdefault("clip_sample", False)
        scheduler = cls(**config)
        steps = calls
        if "Heun" in name or "Singlestep" in name or "KDPM2" in name:
            steps = (calls + 1) // 2 if "Singlestep" not in name else calls
        scheduler.set_timesteps(steps)
        table = getattr(scheduler, "alphas_cumprod", None)
        x, generator = (
            problem.z * float(scheduler.init_noise_sigma if problem.path != "flow" else 1.0),
            torch.Generator().manual_seed(7),
        )
        takes = "generator" in scheduler.step.__code__.co_varnames
        for i, t in enumerate(scheduler.timesteps):
            scale = getattr(scheduler, "scale_model_input", None)
            inputs = x if scale is None else scale(x, t)
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
            x = scheduler.step(output, t, x, **({"generator": generator} if takes else {})).prev_sample
        return x

    return sampler


def from_k_diffusion(name: str, grid: str, per_step: int = 1) -> Sampler:
    """On every path in its variance-exploding coordinates x/alpha, which is how k-diffusion wraps other networks."""

    def sampler(problem: Problem, calls: int) -> Tensor:
        from k_diffusion import sampling

        first, last = problem.ratios()
        n = calls if per_step == 1 else (calls + 1) // 2
        make = sampling.get_sigmas_karras if grid == "karras" else sampling.get_sigmas_exponential
        sigmas = make(n, last, first)
        generator = torch.Generator().manual_seed(7)

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
        torch.manual_seed(7)
        steps = (calls - 1) // per_step
        x = getattr(azula.sample, name)(denoiser, steps=max(steps, 1), silent=True, **arguments)(
            problem.z * problem.sde.prior_std
        )
        return denoiser(x, torch.zeros(())).mean

    return sampler


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
OURS: dict[str, tuple[str, Sampler]] = {
    "ours, reverse SDE": ("sde", ours(probability_flow=False, stochasticity=1.0)),
    "ours, probability flow": ("ode", ours(probability_flow=True)),
    "ours, PC": ("pc", ours(probability_flow=True, corrector="ornstein_uhlenbeck", snr=0.2)),
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
        "diffusers EDM Euler": ("ode", stock("EDMEulerScheduler", sigma_min=0.01, sigma_max=50.0)),
        "diffusers EDM DPM++(2M)": ("ode", stock("EDMDPMSolverMultistepScheduler", sigma_min=0.01, sigma_max=50.0)),
        "diffusers EDM SDE-DPM++(2M)": (
            "sde",
            stock("EDMDPMSolverMultistepScheduler", sigma_min=0.01, sigma_max=50.0, algorithm_type="sde-dpmsolver++"),
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
    peers: dict[str, tuple[str, Sampler]] = {}
    try:
        import k_diffusion.sampling  # noqa: F401

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


# ---------------------------------------------------------------------- the run


def measure(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"samples": args.samples, "calls": args.calls, "data": {}}
    optional = {} if args.no_optional else optional_peers()
    for name in args.data:
        data = fitted(name)
        judge = Judge(data, args.samples)
        z = torch.randn(args.samples, data.dim, generator=torch.Generator().manual_seed(1))
        entry: dict[str, Any] = {"dimension": data.dim, "floor": judge.floor, "noise": judge.noise, "paths": {}}
        result["data"][name] = entry
        # One draw of noise is a little lucky or unlucky, and the flow carries that to its end: what the flow scores.
        path = args.paths[0]
        problem = Problem(path, SCHEDULERS[path][0](**SCHEDULERS[path][1]).sde, data, z)
        judge.floor["fd_of_flow"] = judge(ours(probability_flow=True)(problem, 120))["fd"]
        print(f"{name}: {data.dim} dimensions, floor {judge.floor}, its noise {judge.noise}", flush=True)
        for path in args.paths:
            cls, config = SCHEDULERS[path]
            rows = entry["paths"].setdefault(path, {})
            samplers = {**OURS, **({} if args.only_ours else {**PEERS[path], **optional})}
            for label, (kind, sampler) in samplers.items():
                scores: dict[str, Any] = {}
                for calls in args.calls:
                    problem = Problem(path, cls(**config).sde, data, z)
                    began = time.perf_counter()
                    try:
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")
                            x = sampler(problem, calls)
                    except Exception as error:
                        scores[str(calls)] = {"error": f"{type(error).__name__}: {error}"[:200]}
                        print(path, label, calls, scores[str(calls)]["error"], flush=True)
                        continue
                    if problem.calls > calls:
                        scores[str(calls)] = {"error": f"needs {problem.calls} calls"}
                        continue
                    scores[str(calls)] = {
                        **judge(x),
                        "used": problem.calls,
                        "seconds": round(time.perf_counter() - began, 2),
                    }
                rows[label] = {"kind": kind, "scores": scores}
                shown = " ".join(f"{c}:{s['fd']:.3f}/{s['nats']:+.3f}" for c, s in scores.items() if "fd" in s)
                print(f"{path:7s}{label:36s}{shown}", flush=True)
            save(result, args.output)
    return result


def save(result: dict[str, Any], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(result, indent=1))
    output.with_suffix(".md").write_text(table(result))


def reached(row: dict[str, Any], floor: dict[str, float], calls: int) -> bool | None:
    score = row["scores"].get(str(calls), {})
    best = max(floor["fd"], floor["fd_of_flow"]) if row["kind"] == "ode" else floor["fd"]
    if "fd" not in score:
        return None
    return bool(score["fd"] <= 1.1 * best and abs(score["nats"] - floor["nats_at_end"]) <= 0.02)


def table(result: dict[str, Any]) -> str:
    lines = [
        "# Quality per model call",
        "",
        "Each cell is FD / nats per dimension; in bold the lowest FD of the column.",
    ]
    for name, entry in result["data"].items():
        floor, noise = entry["floor"], entry["noise"]
        for path, rows in entry["paths"].items():
            lines += ["", f"## {name}, {path}", ""]
            lines += [
                f"Exact samples: FD {floor['fd']:.4f} (standard deviation {noise['fd']:.4f}), "
                f"nats {floor['nats']:+.4f} ({noise['nats']:.4f}), "
                f"and {floor['nats_at_end']:+.4f} if denoised from sigma/alpha = 0.01, "
                f"where all samplers end; FD of the exact flow from the noise of this run: {floor['fd_of_flow']:.4f}; "
                f"{result['samples']} samples.",
                "",
                "| sampler | kind | " + " | ".join(map(str, result["calls"])) + " |",
                "|---|---|" + "---|" * len(result["calls"]),
            ]
            best = {
                c: min((r["scores"].get(str(c), {}).get("fd", math.inf) for r in rows.values()), default=math.inf)
                for c in result["calls"]
            }
            for label, row in rows.items():
                cells = []
                for c in result["calls"]:
                    score = row["scores"].get(str(c), {})
                    if "fd" not in score:
                        cells.append("-")
                        continue
                    mark = "**" if score["fd"] == best[c] else ""
                    cells.append(f"{mark}{score['fd']:.3f}{mark} / {score['nats']:+.3f}")
                lines.append(f"| {label} | {row['kind']} | " + " | ".join(cells) + " |")
            lines.append("")
            for label, row in rows.items():
                if label.startswith("ours") and TARGETS[row["kind"]] in result["calls"]:
                    calls = TARGETS[row["kind"]]
                    met = reached(row, floor, calls)
                    lines.append(f"- {label}: floor at {calls} calls {'reached' if met else 'NOT reached'}.")
    return "\n".join(lines) + "\n"


def picture(result: dict[str, Any], output: Path) -> None:
    """Frontiers: FD against calls, one panel per data set and path; ours in colour, peers in grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(d, p, e, r) for d, e in result["data"].items() for p, r in e["paths"].items()]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.6 * rows), squeeze=False)
    colours = {"sde": "tab:red", "ode": "tab:blue", "pc": "tab:green"}
    for axis, (name, path, entry, samplers) in zip(axes.flat, panels, strict=False):
        for label, row in samplers.items():
            points = [(int(c), s["fd"]) for c, s in row["scores"].items() if math.isfinite(s.get("fd", math.inf))]
            if not points or label == "ours, defaults":
                continue
            mine = label.startswith("ours")
            style = {"color": colours[row["kind"]], "lw": 2.2, "zorder": 3, "label": label} if mine else {
                "color": "0.6", "lw": 0.8, "ls": {"ode": "-", "sde": "--", "pc": ":"}[row["kind"]],
            }  # fmt: skip
            axis.plot(*zip(*points, strict=True), **style)
        axis.axhline(entry["floor"]["fd"], color="k", lw=0.8, ls=":")
        axis.set(xscale="log", yscale="log", title=f"{name}, {path}", xlabel="model calls", ylabel="Frechet distance")
        axis.set_ylim(0.8 * entry["floor"]["fd"], 300 * entry["floor"]["fd"])
        axis.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
    axes.flat[0].legend(fontsize=7, title="grey: peers (dashed: SDE)", title_fontsize=7)
    figure.tight_layout()
    figure.savefig(output.with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=("digits", "patches"), default=["digits", "patches"])
    parser.add_argument("--paths", nargs="+", choices=tuple(SCHEDULERS), default=list(SCHEDULERS))
    parser.add_argument("--calls", nargs="+", type=int)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--quick", action="store_true", help="digits only, 2048 samples, fewer numbers of calls")
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--no-optional", action="store_true", help="leave k-diffusion and azula out")
    parser.add_argument("--output", type=Path, default=Path("outputs/quality"))
    args = parser.parse_args()
    args.calls = args.calls or list(QUICK_CALLS if args.quick else CALLS)
    args.samples = args.samples or (2048 if args.quick else 4096)
    if args.quick:
        args.data = ["digits"]
    result = measure(args)
    save(result, args.output)
    picture(result, args.output)
    print(table(result))


if __name__ == "__main__":
    main()

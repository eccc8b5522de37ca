"""What `step()` costs: our schedulers and diffusers' own, side by side in one run.

python benchmarks/step_overhead.py [--device cuda] [--output outputs/step_overhead.json]

For each scheduler a full sampling loop runs with a model output that costs nothing. Printed are the microseconds of one
`step()` call, and the ratio to the bare tensor arithmetic of the same kind: one `x*a + m*b` for deterministic samplers,
plus one `randn` for stochastic ones, plus the two norms and the second update for Langevin. Repetitions of all
schedulers are interleaved and the fastest is reported, so that load on the machine hits all of them alike.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from tqdm.auto import tqdm

from diffusers_sde import FlowSDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler

SHAPES = ((1, 3, 32, 32), (2, 4, 128, 128), (16, 3, 256, 256))


def schedulers() -> dict[str, tuple[str, Any]]:
    """name -> (kind, scheduler); the kind decides which bare arithmetic it is compared with."""
    single: dict[str, Any] = {"solver_order": 1, "solver_correction": False, "gaussian_std": 0.0}
    ours: dict[str, tuple[str, Any]] = {
        "VP probability flow, order 1": ("ode", VPSDEScheduler(probability_flow=True, **single)),
        "VP probability flow (default)": ("multistep", VPSDEScheduler(probability_flow=True)),
        "VP reverse SDE, order 1": ("sde", VPSDEScheduler(**single)),
        "VP reverse SDE (default)": ("multistep sde", VPSDEScheduler()),
        "VP ancestral": ("sde", VPSDEScheduler(predictor="ancestral")),
        "sub-VP reverse SDE, order 1": ("sde", SubVPSDEScheduler(**single)),
        "VE reverse diffusion": ("sde", VESDEScheduler(predictor="reverse_diffusion")),
        "flow probability flow, order 1": ("ode", FlowSDEScheduler(probability_flow=True, **single)),
        "flow reverse SDE, order 1": ("sde", FlowSDEScheduler(**single)),
        "VP corrector only (Langevin)": ("langevin", VPSDEScheduler(predictor="none", corrector="langevin")),
    }
    stock: dict[str, tuple[str, Any]] = {
        "diffusers FlowMatchEuler": ("ode", diffusers.FlowMatchEulerDiscreteScheduler()),
        "diffusers Euler": ("ode", diffusers.EulerDiscreteScheduler()),
        "diffusers DDIM": ("ode", diffusers.DDIMScheduler(clip_sample=False)),
        "diffusers DPMSolver++(2M)": ("multistep", diffusers.DPMSolverMultistepScheduler()),
        "diffusers UniPC": ("multistep", diffusers.UniPCMultistepScheduler()),
        "diffusers DEIS": ("multistep", diffusers.DEISMultistepScheduler()),
        "diffusers DDPM": ("sde", diffusers.DDPMScheduler(clip_sample=False)),
        "diffusers EulerAncestral": ("sde", diffusers.EulerAncestralDiscreteScheduler()),
        "diffusers SDE-DPMSolver++(2M)": (
            "multistep sde",
            diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        ),
        "diffusers SASolver": ("multistep sde", diffusers.SASolverScheduler()),
    }
    return {**ours, **stock}


def bare(kind: str, x: torch.Tensor, m: torch.Tensor) -> Callable[[], Any]:
    """The arithmetic that a sampler of this kind cannot do without."""
    if kind in ("ode", "multistep"):
        return lambda: x * 0.9 + m * 0.1
    if kind in ("sde", "multistep sde"):
        return lambda: (x * 0.9 + m * 0.1) + torch.randn_like(x)

    def langevin() -> torch.Tensor:
        score = x * -1.0 + m * 0.1
        z = torch.randn_like(x)
        axes = tuple(range(1, x.ndim))
        ratio = torch.linalg.vector_norm(z, dim=axes, keepdim=True) / torch.linalg.vector_norm(
            score, dim=axes, keepdim=True
        )
        step = 0.01 * ratio.square()
        return x + step * score + torch.sqrt(2.0 * step) * z

    return langevin


def loop(scheduler: Any, x: torch.Tensor, m: torch.Tensor, calls: int) -> float:
    """Seconds per step of one sampling loop of at least ``calls`` calls."""
    scheduler.set_timesteps(calls, device=x.device)
    generator = torch.Generator(x.device).manual_seed(0)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    arguments = {"generator": generator} if takes_generator else {}
    timesteps = list(scheduler.timesteps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    synchronise(x)
    start = time.perf_counter()
    for t in timesteps:
        scheduler.step(m, t, x, **arguments, return_dict=False)[0]
    synchronise(x)
    return (time.perf_counter() - start) / len(timesteps)


def synchronise(x: torch.Tensor) -> None:
    """Wait for the device."""
    if x.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--repetitions", type=int, default=7, help="interleaved repetitions, the fastest counts")
    parser.add_argument("--output", type=Path, default=Path("outputs/step_overhead.json"), help="JSON to write")
    arguments = parser.parse_args()
    entries = schedulers()
    results: dict[str, dict[str, dict[str, float]]] = {}
    for shape in SHAPES:
        calls = 200 if shape == SHAPES[0] else 50 if shape == SHAPES[1] else 8
        x, m = (torch.randn(shape, device=arguments.device) for _ in range(2))
        best: dict[str, float] = {}
        floor: dict[str, float] = {}
        for _ in tqdm(range(arguments.repetitions), desc=str(shape), leave=False):
            for kind in {kind for kind, _ in entries.values()}:
                operation = bare(kind, x, m)
                synchronise(x)
                start = time.perf_counter()
                for _ in range(calls):
                    operation()
                synchronise(x)
                floor[kind] = min(floor.get(kind, 1e9), (time.perf_counter() - start) / calls)
            for name, (_, scheduler) in entries.items():
                best[name] = min(best.get(name, 1e9), loop(scheduler, x, m, calls))
        print(f"\n{shape} on {arguments.device}, {torch.get_num_threads()} threads")
        print(f"{'scheduler':34s} {'us/step':>9s} {'x bare':>7s}")
        for name, (kind, _) in entries.items():
            print(f"{name:34s} {best[name] * 1e6:9.1f} {best[name] / floor[kind]:7.2f}")
        results[str(shape)] = {
            name: {"us": best[name] * 1e6, "ratio": best[name] / floor[kind]} for name, (kind, _) in entries.items()
        }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "device": arguments.device}
    arguments.output.write_text(json.dumps({"versions": versions, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()

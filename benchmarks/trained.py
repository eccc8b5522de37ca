"""Settings of ours beside diffusers' samplers on the trained networks of zoo.py, at few and at many calls.

    python benchmarks/trained.py --networks chosen --folder outputs/zoo --fashion FOLDER --cifar FOLDER
    python benchmarks/trained.py --networks held_out_2 ...

The networks that are held out are for the end: look at them once, when the settings are decided. Every sampler starts
from the same noise, SEEDS draws of SAMPLES images, and every network call is counted. The judge is a small classifier
of the data's classes, which has seen none of the samples: the Frechet distance (FD) of its features and the recall of
precision and recall. The spread of a cell is the standard deviation of FD between the draws, pooled over the samplers
of the cell. OUTPUT.json keeps what was measured, and a run measures only what is missing there.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import re
import time
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from samplers import FLOW, Problem, Sampler, ours, stock
from torch import Tensor
from zoo import RECIPES, TRANSFER, Folders, add_folders, all_of

from diffusers_sde import FlowSDEScheduler, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler, profile_grid
from diffusers_sde.images.arrays import to_bytes
from diffusers_sde.metrics.distances import frechet_distance, precision_recall
from diffusers_sde.metrics.extractors import make_extractor
from diffusers_sde.schedulers import SDEScheduler

CALLS = (5, 8, 10, 15, 20, 30, 50)
SAMPLES, SEEDS = 256, 2
CLASSIFIER_STEPS = (500, 500, 2000)  # of judges of seed 0, 1 and 2; the first decides
PATHS = {VESDEScheduler: "ve", SubVPSDEScheduler: "sub_vp", FlowSDEScheduler: "flow"}
SETS = {
    "chosen": "chosen on",
    "held_out": "held out, first round",
    "held_out_2": "held out, second round",
    "held_out_3": "held out, third round",
}
NOTHING_SET, NOTHING_SET_ODE = "nothing set", "nothing set, ODE"


class TrainedNetwork:
    """The network of a saved pipeline as a denoiser of x_t = alpha x_0 + sigma noise, on whichever path it is asked.

    Args:
        folder: A pipeline of zoo.py.
        bf16: Run it in mixed precision, as it was trained.
    """

    def __init__(self, folder: Path, bf16: bool = True) -> None:
        pipe = DiffusionPipeline.from_pretrained(folder)
        self.network = pipe.unet.eval().requires_grad_(False)
        self.bf16, self.config = bf16, dict(pipe.scheduler.config)
        self.is_stranger = not isinstance(pipe.scheduler, SDEScheduler)
        self.scheduler = VPSDEScheduler.from_config(self.config) if self.is_stranger else pipe.scheduler
        self.path = PATHS.get(type(self.scheduler), "vp")
        network = pipe.unet.config
        self.shape = (network.in_channels, network.sample_size, network.sample_size)
        self._denoiser = self.scheduler.denoiser(self.network)

    def denoise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """x0_hat, shape (B, C, H, W)."""
        sde = self.scheduler.sde
        first = 1.0 / self.scheduler.config.num_train_timesteps if self.is_stranger else 1e-5
        t = sde.t_max if alpha == 0.0 else float(sde.time_of(2.0 * math.log(alpha / sigma)))
        t = min(max(t, first), sde.t_max)
        own = float(sde.alpha(t)) / alpha if alpha > 0.0 else 1.0
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self._denoiser(x * own, t).float()

    def profile(self, images: int = 128) -> list[float]:
        """The knots of ``profile_grid``, with the estimates in the range of pixels."""
        noise = torch.randn(images, *self.shape, generator=torch.Generator().manual_seed(77))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return profile_grid(
                lambda x, t: self._denoiser(x, t).float().clamp(-1.0, 1.0), self.scheduler.sde, noise, levels=48
            )


class Judge:
    """Frechet distance of a classifier's features to real images, and recall.

    Args:
        images: Real images, bytes (N, C, H, W).
        labels: Their classes, shape (N,).
        file: Of the classifier, which is trained and written where there is none.
        samples: How many are judged at once.
        seed: Of its weights and of the order of the images; ``CLASSIFIER_STEPS`` has the length of its training.
    """

    def __init__(self, images: Tensor, labels: Tensor, file: Path, samples: int = SAMPLES, seed: int = 0) -> None:
        steps = CLASSIFIER_STEPS[seed]
        self._extractor = make_extractor("classifier", images, labels, file, steps=steps, seed=seed)
        with torch.no_grad():
            self._real = torch.cat([self._extractor(part)[0] for part in images.split(512)])
        draws = torch.randperm(len(images), generator=torch.Generator().manual_seed(3))
        self.accuracy = float(self._extractor.accuracy)  # type: ignore[attr-defined]
        self.floor = frechet_distance(self._real[draws[:samples]], self._real)
        self._some = self._real[draws[-samples:]]

    def __call__(self, x: Tensor) -> tuple[float, float]:
        """FD and recall of samples in [-1, 1], shape (B, C, H, W)."""
        if not bool(torch.isfinite(x).all()):
            return math.inf, 0.0
        features = self._extractor(to_bytes(x.clamp(-1.0, 1.0), -1.0))[0]
        return frechet_distance(features, self._real), precision_recall(features, self._some)[1]


def measure(sampler: Sampler, network: Any, judge: Any, calls: int, first_seed: int = 1) -> dict[str, Any]:
    """FD and recall of each draw; all draws are one batch, so that a draw costs no call of its own."""
    z = torch.randn(SEEDS * SAMPLES, *network.shape, generator=torch.Generator().manual_seed(first_seed))
    run = Problem(network.path, network.scheduler, network, z, first_seed)
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = sampler(run, calls)
    except Exception as error:  # a peer's limits are part of the result
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    if run.calls > calls:
        return {"error": f"needs {run.calls} calls"}
    seconds = round(time.process_time() - began, 2)
    each = [judge(part) for part in x.split(SAMPLES)]
    return {"fd": [fd for fd, _ in each], "recall": [recall for _, recall in each], "seconds": seconds}


# ---------------------------------------------------------------------- what is compared


def vp_peers(config: dict[str, Any]) -> dict[str, tuple[str, Sampler]]:
    """diffusers' samplers of networks with betas, as they are usually set."""
    sde = {"algorithm_type": "sde-dpmsolver++"}

    def peer(name: str, **options: Any) -> Sampler:
        known = inspect.signature(getattr(diffusers, name).__init__).parameters  # some do not clip
        return stock(name, **{k: v for k, v in config.items() if k in known}, **options)

    return {
        "DDIM": ("ode", peer("DDIMScheduler", timestep_spacing="trailing")),
        "Euler, Karras": ("ode", peer("EulerDiscreteScheduler", use_karras_sigmas=True)),
        "DPM++(2M)": ("ode", peer("DPMSolverMultistepScheduler")),
        "DPM++(2M), Karras": ("ode", peer("DPMSolverMultistepScheduler", use_karras_sigmas=True)),
        "UniPC": ("ode", peer("UniPCMultistepScheduler")),
        "DEIS": ("ode", peer("DEISMultistepScheduler")),
        "DDPM": ("sde", peer("DDPMScheduler", timestep_spacing="trailing")),
        "Euler ancestral": ("sde", peer("EulerAncestralDiscreteScheduler")),
        "SDE-DPM++(2M)": ("sde", peer("DPMSolverMultistepScheduler", **sde)),
        "SDE-DPM++(2M), Karras": ("sde", peer("DPMSolverMultistepScheduler", use_karras_sigmas=True, **sde)),
    }


VE_PEERS: dict[str, tuple[str, Sampler]] = {
    "EDM Euler": ("ode", stock("EDMEulerScheduler")),
    "EDM DPM++(2M)": ("ode", stock("EDMDPMSolverMultistepScheduler")),
    "EDM SDE-DPM++(2M)": ("sde", stock("EDMDPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")),
}
FLOW_PEERS: dict[str, tuple[str, Sampler]] = {
    "FlowMatchEuler": ("ode", stock("FlowMatchEulerDiscreteScheduler")),
    "DPM++(2M), flow": ("ode", stock("DPMSolverMultistepScheduler", **FLOW)),
    "UniPC, flow": ("ode", stock("UniPCMultistepScheduler", **FLOW)),
    "SDE-DPM++(2M), flow": ("sde", stock("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", **FLOW)),
}
# What describes the network in the config of a DDPMScheduler; the rest are settings of that sampler.
OF_THE_NETWORK = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "clip_sample", "clip_sample_range")


def peers(network: TrainedNetwork) -> dict[str, tuple[str, Sampler]]:
    """diffusers' samplers of a network; those of a stranger's get what its config says, clipping included."""
    if network.path in ("ve", "flow"):
        return VE_PEERS if network.path == "ve" else FLOW_PEERS
    config = {k: v for k, v in network.config.items() if k in OF_THE_NETWORK} if network.is_stranger else {}
    return vp_peers(config)


MIDPOINT = {"solver_order": 2, "solver_type": "midpoint", "gaussian_std": 0.0}
PLAIN = {"solver_order": 2, "gaussian_std": 0.0, "solver_correction": False, "stochasticity": 1.0}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    NOTHING_SET: ("sde", {}),
    NOTHING_SET_ODE: ("ode", {"probability_flow": True}),
    "Karras line": ("sde", {**MIDPOINT, "time_grid": "karras"}),
    "plain sech": ("sde", {**PLAIN, "time_grid": "sech"}),
    "order 2": ("sde", {"solver_order": 2}),
}
BOUND: dict[str, Any] = {"bound_above_sigma": 1.0, "data_range": [-1.0, 1.0]}


def settings(network: TrainedNetwork, more: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, tuple[str, Sampler]]:
    """Ours: with nothing set, and variants; ``time_grid="profile"`` stands for the knots of this network."""
    result: dict[str, tuple[str, Sampler]] = {}
    for label, (kind, config) in {**SETTINGS, **more}.items():
        if config.get("time_grid") == "profile":
            config = {**config, "time_grid": network.profile()}
        result[label] = (kind, ours(**config))
    return result


# ---------------------------------------------------------------------- what is written


def mean(values: list[float]) -> float:
    """The mean, infinite where nothing was measured."""
    return sum(values) / len(values) if values else math.inf


def fd(entry: dict[str, Any], label: str, calls: int) -> float:
    """The mean FD of a cell."""
    return mean(entry["rows"][label]["cells"].get(str(calls), {}).get("fd", []))


def spread(entry: dict[str, Any], calls: int) -> float:
    """The pooled spread of a cell around its best sampler."""
    cells = [row["cells"].get(str(calls), {}).get("fd", []) for row in entry["rows"].values()]
    return pooled_spread(cells, min((mean(values) for values in cells if len(values) > 1), default=math.inf))


def pooled_spread(cells: list[list[float]], best: float) -> float:
    """The standard deviation of FD between draws, pooled over the samplers within a factor of 2 of the best."""
    near = [values for values in cells if len(values) > 1 and mean(values) < 2.0 * best]
    return math.sqrt(mean([float(torch.tensor(values).double().var()) for values in near])) if near else math.inf


def best_peer(entry: dict[str, Any], calls: int) -> tuple[float, str]:
    """The lowest FD of diffusers' samplers, and whose it is."""
    found = [(fd(entry, label, calls), label) for label, row in entry["rows"].items() if row["peer"]]
    return min(found, default=(math.inf, "none"))


def verdict(entries: dict[str, Any], label: str, calls: tuple[int, ...]) -> str:
    """In how many cells a setting has no peer ahead of it by more than the spread."""
    good, lost, total = 0, [], 0
    for name, entry in entries.items():
        if label not in entry["rows"]:
            continue
        for c in calls:
            own, (peer, who), size = fd(entry, label, c), best_peer(entry, c), spread(entry, c)
            if not (math.isfinite(own) and math.isfinite(peer)):
                continue
            total += 1
            if own - peer <= size:
                good += 1
            else:
                lost.append(f"{name} at {c} ({own:.2f} against {peer:.2f} +- {size:.2f} of {who})")
    return f"- {label}: no peer ahead by more than the spread in {good} of {total} cells." + (
        " Behind: " + "; ".join(lost) + "." if lost else ""
    )


def table(entries: dict[str, Any], calls: tuple[int, ...]) -> str:
    """Markdown."""
    lines = ["# Samplers on trained networks", "", "Written by benchmarks/trained.py; FD / recall."]
    for held_out, title in enumerate(SETS.values()):
        group = {name: entry for name, entry in entries.items() if RECIPES[name].held_out == held_out}
        if not group:
            continue
        own = list(dict.fromkeys(n for e in group.values() for n, row in e["rows"].items() if not row["peer"]))
        lines += ["", f"Networks that are {title}:", "", *(verdict(group, label, calls) for label in own)]
    for name, entry in entries.items():
        lines += ["", f"## {name}", "", entry["about"], ""]
        lines += ["| sampler | kind | " + " | ".join(map(str, calls)) + " |", "|---|---|" + "---|" * len(calls)]
        best = {c: min(fd(entry, label, c) for label in entry["rows"]) for c in calls}
        for label, row in sorted(entry["rows"].items(), key=lambda item: item[1]["peer"]):
            cells = []
            for c in calls:
                value, recall = fd(entry, label, c), row["cells"].get(str(c), {}).get("recall", [])
                mark = "**" if value == best[c] else ""
                cells.append(f"{mark}{value:.2f}{mark} / {mean(recall):.2f}" if math.isfinite(value) else "-")
            lines.append(
                f"| {label if row['peer'] else 'ours, ' + label} | {row['kind']} | " + " | ".join(cells) + " |"
            )
        lines.append("| spread | | " + " | ".join(f"{spread(entry, c):.2f}" for c in calls) + " |")
    return "\n".join(lines) + "\n"


def load_judge(name: str, folders: Folders, folder: Path, samples: int = SAMPLES, seed: int = 0) -> Judge:
    """The judge of a network's data; ``samples`` are judged at once. Judges of other seeds have files of their own."""
    recipe = RECIPES[name]
    images, labels = all_of(folders.source(recipe, to_judge=True))
    kind = f"{recipe.data}-{recipe.resolution}-{recipe.channels}" + (f"-{seed}" if seed else "")
    return Judge(images, labels, folder / f"judge-{kind}.safetensors", samples, seed)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    parser.add_argument("--networks", nargs="+", default=["chosen"], help=f"{', '.join(SETS)}, or names of zoo.py")
    parser.add_argument("--folder", type=Path, default=Path("outputs/zoo"), help="where zoo.py wrote them")
    parser.add_argument("--calls", nargs="+", type=int, default=list(CALLS))
    parser.add_argument("--only", default="", help="regular expression: which samplers")
    parser.add_argument(
        "--more", default="{}", help="JSON: further settings, label -> [kind, arguments of from_config]"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/trained"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    folders = Folders(args.fashion, args.cifar)
    names = []
    for word in args.networks:
        held = list(SETS).index(word) if word in SETS else -1
        names += [n for n, recipe in RECIPES.items() if n not in TRANSFER and recipe.held_out == held] or [word]
    file = args.output.with_suffix(".json")
    entries: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in names:
        network, judge = TrainedNetwork(args.folder / name), load_judge(name, folders, args.folder)
        about = (
            f"FD / recall of {SEEDS} draws of {SAMPLES} samples; {SAMPLES} real images have FD {judge.floor:.2f}. The "
            f"classifier is right on {100.0 * judge.accuracy:.0f} % of images that it was not trained on."
        )
        entry = entries.setdefault(name, {"about": about, "rows": {}})
        own = settings(network, {k: (v[0], v[1]) for k, v in json.loads(args.more).items()})
        for label, (kind, sampler) in {**own, **peers(network)}.items():
            if not re.search(args.only, label):
                continue
            row = entry["rows"].setdefault(label, {"kind": kind, "peer": label not in own, "cells": {}})
            for calls in args.calls:
                if "fd" not in row["cells"].get(str(calls), {}):
                    row["cells"][str(calls)] = measure(sampler, network, judge, calls)
            shown = " ".join(f"{c}:{fd(entry, label, c):.2f}" for c in args.calls)
            print(f"{name:26s}{label:36s}{shown}", flush=True)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(entries) + "\n")
        args.output.with_suffix(".md").write_text(table(entries, tuple(args.calls)))


if __name__ == "__main__":
    main()

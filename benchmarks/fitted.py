"""Samplers fitted to a network beside the unfitted ones and diffusers', at few calls.

    python benchmarks/fitted.py --mixtures digits:vp digits:flow --networks digits-ddpm fashion-flow \\
        --folder outputs/zoo --fashion FOLDER --cifar FOLDER --output outputs/fitted

What is sampled: Gaussian mixtures with exact networks (mixtures.py) and trained networks (zoo.py). For each number of
calls our reverse SDE, probability flow and predictor-corrector are fitted by ``fit_scheduler`` to images that train,
with its defaults, once for each of ``--seeds`` seeds, and measured with noise that no fit has drawn:

* a mixture by the Frechet distance of its own moments (the fit minimises an energy distance, or pairs end points);
* a trained network by the Frechet distance of the features of a classifier, which no fit has seen;
* by recall beside it: of exact samples, or of real images in these features.

``cost`` is the number of network evaluations of one image and the seconds of a fit. ``+-`` is the standard deviation
between draws of noise and, where there are several, between fits. ``--transfer`` also runs each plan on another network
of the same data (TRANSFER of zoo.py) and in bfloat16, without fitting again. ``--judges`` asks further classifiers, of
other seeds and lengths of training, whether their verdict is the same.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from mixtures import Mixture, MixtureJudge, fitted
from samplers import PEERS, SCHEDULERS, Problem
from torch import Tensor, nn
from trained import BOUND, CLASSIFIER_STEPS, TrainedNetwork, load_judge, mean, peers, pooled_spread
from zoo import RECIPES, TRANSFER, Folders, add_folders, all_of

from diffusers_sde import SDEPipeline, VPSDEScheduler, fit_scheduler
from diffusers_sde.metrics.distances import precision_recall

CALLS = (4, 5, 6, 8, 10, 15, 20)
DRAWS = (101, 102)  # seeds of the noise that judges
SAMPLES = {"network": 1024, "mixture": 2048}
RECALLED = 1024  # samples in a recall, at most
FITTED_TO = 6000  # images, at most
KINDS: dict[str, dict[str, Any]] = {
    "SDE": {},
    "ODE": {"probability_flow": True},
    "PC": {"probability_flow": True, "corrector": "ornstein_uhlenbeck", "snr": 0.2},
}


class ExactNetwork(nn.Module):
    """x0_hat of a mixture in the form of a network that is fed t itself and predicts the data."""

    def __init__(self, data: Mixture, sde: Any) -> None:
        super().__init__()
        self.data, self.sde = data, sde

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """x0_hat, of the shape of ``sample``; all of a batch stand at one time."""
        t = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1)[0]
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        return self.data.denoise(sample.flatten(1), alpha, sigma).reshape(sample.shape).to(sample.dtype)


class Case:
    """One network with its data and its judge.

    Attributes:
        name: Of the mixture or the network.
        pipe: Its pipeline, with the scheduler that nothing is set of.
        images: Images to fit to, in the range of the network.
        judges: Each of them is samples -> FD and recall. The first decides.
        peers: diffusers' samplers by name.
        problem: What they are run on.
        others: Pipelines of other networks of the same data.
        samples: How many are drawn with each seed.
        shape: Of one of them.
        floor: The distance of exact samples, or of real images.
    """

    name: str
    pipe: Any
    images: Tensor
    judges: list[Callable[[Tensor], tuple[float, float]]]
    peers: dict[str, tuple[str, Any]]
    problem: Callable[[Tensor, int], Problem]
    others: dict[str, Any]

    samples: int
    shape: tuple[int, ...]
    floor: float

    def noise(self, seed: int) -> Tensor:
        """Unit noise to start from."""
        return torch.randn(self.samples, *self.shape, generator=torch.Generator().manual_seed(seed))


class MixtureCase(Case):
    """A mixture, ``data:path``."""

    def __init__(self, name: str) -> None:
        data_name, path = name.split(":")
        self.name, data = name, fitted(data_name)
        channels, side = (1, 8) if data_name == "digits" else (3, 6)
        self.shape, self.samples = (channels, side, side), SAMPLES["mixture"]
        scheduler = SCHEDULERS[path](prediction_type="sample", time_conditioning="time")
        self.pipe = SDEPipeline(ExactNetwork(data, scheduler.sde), scheduler, sample_shape=self.shape)
        self.images = data.sample(FITTED_TO, seed=7).float().reshape(-1, *self.shape)
        exact, self.others = MixtureJudge(data, self.samples), {}
        self.floor, some = exact.floor["fd"], data.sample(RECALLED, seed=8)

        def judge(x: Tensor) -> tuple[float, float]:
            rows = x.flatten(1).double()
            return exact.fd(rows), precision_recall(rows[:RECALLED], some)[1]

        self.judges, self.peers = [judge], PEERS[path]
        own = SCHEDULERS[path]()

        class Flat:
            """The mixture for the peers, whose samples are images here."""

            @staticmethod
            def denoise(x: Tensor, alpha: float, sigma: float) -> Tensor:
                return data.denoise(x.flatten(1), alpha, sigma).reshape(x.shape)

        self.problem = lambda z, seed: Problem(path, own, Flat(), z, seed)


class NetworkCase(Case):
    """A network of zoo.py."""

    def __init__(self, name: str, folder: Path, folders: Folders, judges: int = 1) -> None:
        network = TrainedNetwork(folder / name)
        self.name, self.shape, self.samples = name, network.shape, SAMPLES["network"]
        self.pipe = bounded_pipeline(folder / name)
        twins = [other for other, of in TRANSFER.items() if of == name and (folder / other).exists()]
        self.others = {other: bounded_pipeline(folder / other) for other in twins}
        images = all_of(folders.source(RECIPES[name], to_judge=False))[0]
        self.images = images[:FITTED_TO].float() / 127.5 - 1.0
        asked = [load_judge(name, folders, folder, self.samples, seed) for seed in range(judges)]
        self.judges, self.floor = [*asked], asked[0].floor
        self.peers = peers(network)
        self.problem = lambda z, seed: Problem(network.path, network.scheduler, network, z, seed)


def bounded_pipeline(folder: Path) -> Any:
    """A pipeline of ours, with the bound; a stranger's gets our scheduler."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    if not isinstance(pipe.scheduler, tuple(SCHEDULERS.values())):
        pipe.scheduler = VPSDEScheduler.from_config(pipe.scheduler.config, **BOUND)
    return pipe


def sampler_of(pipe: Any, scheduler: Any, levels: int, bf16: bool = False) -> Callable[[Tensor, int], Tensor]:
    """(unit noise, seed) -> samples by the loop of a pipeline."""
    network = pipe.unet.eval()

    def sample(z: Tensor, seed: int) -> Tensor:
        scheduler.set_timesteps(levels)
        generator, x = torch.Generator().manual_seed(1000 + seed), z * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = network(scheduler.scale_model_input(x, t), t)
            output = output if isinstance(output, Tensor) else getattr(output, "sample", output)
            x = scheduler.step(output.float(), t, x, generator=generator, return_dict=False)[0]
        return x

    return sample


def peer_of(case: Case, run: Any, calls: int) -> Callable[[Tensor, int], Tensor]:
    """(unit noise, seed) -> samples by a sampler of diffusers, which must not take more calls."""

    def sample(z: Tensor, seed: int) -> Tensor:
        problem = case.problem(z, seed)
        x: Tensor = run(problem, calls)
        if problem.calls > calls:
            raise ValueError(f"needs {problem.calls} calls")
        return x

    return sample


def judged(case: Case, sample: Callable[[Tensor, int], Tensor]) -> list[list[tuple[float, float]]]:
    """FD and recall of each draw by each judge."""
    draws = [sample(case.noise(seed), seed) for seed in DRAWS]
    return [[judge(x) for x in draws] for judge in case.judges]


def levels_of(scheduler: Any, calls: int) -> int:
    """Noise levels that cost so many calls, or 0 where none do."""
    levels = max(calls // scheduler.order, 1)
    scheduler.set_timesteps(levels)
    return levels if len(scheduler.timesteps) <= calls else 0


def measure(
    case: Case, calls: int, seeds: range, options: dict[str, Any], transfer: bool, with_peers: bool
) -> dict[str, Any]:
    """All samplers of one case at a number of calls: label -> values, by the first judge and by the others."""
    rows: dict[str, Any] = {}

    def note(label: str, found: list[list[tuple[float, float]]], **more: Any) -> None:
        row = rows.setdefault(label, {"fd": [], "recall": [], "fd_of_others": [[] for _ in found[1:]]})
        row["recall"] += [recall for _, recall in found[0]]
        for values, draws in zip([row["fd"], *row["fd_of_others"]], found, strict=True):
            values += [fd for fd, _ in draws]
        row.update(more)
        shown = "; ".join(" ".join(f"{fd:.3f}" for fd, _ in draws) for draws in found)
        print(f"{case.name:20s}{calls:3d} {label:34s}{shown}", more, flush=True)

    for label, (_, sampler) in case.peers.items() if with_peers else ():
        try:
            note(label, judged(case, peer_of(case, sampler, calls)), peer=True)
        except Exception as error:  # a peer's limits are part of the result
            rows[label] = {"fd": [], "recall": [], "peer": True, "error": str(error)[:200]}
    for kind, config in KINDS.items():
        scheduler = type(case.pipe.scheduler).from_config(case.pipe.scheduler.config, **config)
        levels = levels_of(scheduler, calls)
        if levels < 2:
            continue

        note(f"{kind}, unfitted", judged(case, sampler_of(case.pipe, scheduler, levels)))
        for seed in seeds:
            began = time.process_time()
            fit = fit_scheduler(
                case.pipe, levels, case.images, sampler=config, seed=seed, progress_bar=False, **options
            )
            cost = {"evaluations": fit.report["network_evaluations"], "seconds": time.process_time() - began}
            found = judged(case, sampler_of(case.pipe, fit.scheduler, levels))
            note(f"{kind}, fitted", found, **cost, is_fitted=fit.report["is_fitted"])
            if transfer and seed == seeds[0]:
                found = judged(case, sampler_of(case.pipe, fit.scheduler, levels, bf16=True))
                note(f"{kind}, fitted, in bf16", found)
                for other, pipe in case.others.items():
                    note(f"{kind}, unfitted, on {other}", judged(case, sampler_of(pipe, scheduler, levels)))
                    note(f"{kind}, fitted, on {other}", judged(case, sampler_of(pipe, fit.scheduler, levels)))
    return rows


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["# Fitted samplers", "", "Written by benchmarks/fitted.py: FD / recall, with the spread of FD.", ""]
    lines += [*verdict(results), ""]
    for judge in range(1, len(CLASSIFIER_STEPS)):
        if any(by_judge(rows, judge) for entry in results.values() for rows in entry["calls"].values()):
            lines += [f"By the classifier of seed {judge}:", "", *verdict(results, judge), ""]
    for name, entry in results.items():
        columns = sorted(entry["calls"], key=int)
        labels = list(dict.fromkeys(label for c in columns for label in entry["calls"][c]))
        labels.sort(key=lambda label: bool(entry["calls"][columns[0]].get(label, {}).get("peer")))
        lines += [f"## {name}", "", f"Exact samples, or real images: FD {entry['floor']:.3f}.", ""]
        lines += ["| sampler | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        best = {c: min((mean(row["fd"]) for row in entry["calls"][c].values()), default=math.inf) for c in columns}
        for label in labels:
            cells = []
            for c in columns:
                row = entry["calls"][c].get(label, {"fd": [], "recall": []})
                value = mean(row["fd"])
                if not math.isfinite(value):
                    cells.append("-")
                    continue
                mark = "**" if value == best[c] else ""
                spread = float(torch.tensor(row["fd"]).std())
                unchanged = " (unfitted)" if row.get("is_fitted") is False else ""
                cells.append(f"{mark}{value:.3f}{mark} +- {spread:.3f} / {mean(row['recall']):.2f}{unchanged}")
            own = not any(entry["calls"][c].get(label, {}).get("peer") for c in columns)
            lines.append(f"| {'ours, ' if own else ''}{label} | " + " | ".join(cells) + " |")
        cost = [
            f"{label} at {c}: {row['evaluations']} evaluations, {row['seconds']:.0f} s"
            for c in columns
            for label, row in entry["calls"][c].items()
            if "evaluations" in row
        ]
        lines += ["", "Cost of a fit, in network evaluations of one image: " + "; ".join(cost) + ".", ""]
    return "\n".join(lines)


def is_unfitted(label: str, row: dict[str, Any]) -> bool:
    """Whether a row is a sampler that knows nothing of the network, ours or diffusers', on the network itself."""
    return bool(row["fd"]) and (bool(row.get("peer")) or label.endswith(", unfitted"))


def by_judge(rows: dict[str, Any], judge: int) -> dict[str, Any]:
    """The rows of one cell with the FD of that judge in the place of the first one's; without those it has not seen."""
    if judge == 0:
        return rows
    seen = {label: row for label, row in rows.items() if len(row.get("fd_of_others", ())) >= judge}
    return {label: {**row, "fd": row["fd_of_others"][judge - 1]} for label, row in seen.items()}


def verdict(results: dict[str, Any], judge: int = 0) -> list[str]:
    """In how many cells the better fit is ahead of every unfitted sampler, and each fit of its own start."""
    cells = [by_judge(rows, judge) for entry in results.values() for rows in entry["calls"].values()]
    lines = []
    whose = [("The best fit", "every unfitted sampler", list(KINDS))]
    whose += [(f"The fit of the {kind}", "its start", [kind]) for kind in KINDS]
    for title, others, fits in whose:
        ahead = behind = total = 0
        for rows in cells:
            found = [mean(rows[f"{kind}, fitted"]["fd"]) for kind in fits if f"{kind}, fitted" in rows]
            unfitted = {label: mean(row["fd"]) for label, row in rows.items() if is_unfitted(label, row)}
            if not found:
                continue
            against = [unfitted[f"{fits[0]}, unfitted"]] if others == "its start" else list(unfitted.values())
            total += 1
            ahead += min(found) < min(against)
            spread = pooled_spread([row["fd"] for row in rows.values()], min(unfitted.values()))
            behind += min(found) > min(against) + spread
        lines.append(
            f"- {title} is ahead of {others} in {ahead} of {total} cells, behind by more than the spread in {behind}."
        )
    return lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    parser.add_argument(
        "--mixtures", nargs="*", default=[f"{d}:{p}" for d in ("digits", "patches") for p in SCHEDULERS]
    )
    parser.add_argument("--networks", nargs="*", default=[n for n in RECIPES if n not in TRANSFER])
    parser.add_argument("--folder", type=Path, default=Path("outputs/zoo"), help="where zoo.py wrote the networks")
    parser.add_argument("--calls", nargs="+", type=int, default=list(CALLS))
    parser.add_argument("--seeds", type=int, default=2, help="fits of each sampler")
    parser.add_argument("--first_seed", type=int, default=0, help="of these fits; the noise that judges stays the same")
    parser.add_argument(
        "--judges",
        type=int,
        choices=range(1, len(CLASSIFIER_STEPS) + 1),
        default=1,
        help="classifiers that judge a network",
    )
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--options", default="{}", help="JSON: arguments of fit_scheduler, such as steps")
    parser.add_argument("--transfer", action="store_true", help="also run the plans on other networks and in bfloat16")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="also run diffusers'")
    parser.add_argument("--output", type=Path, default=Path("outputs/fitted"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    for kind in [kind for kind in KINDS if kind not in args.kinds]:
        del KINDS[kind]
    folders, file = Folders(args.fashion, args.cifar), args.output.with_suffix(".json")
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name in [*args.mixtures, *args.networks]:
        case: Any = MixtureCase(name) if ":" in name else NetworkCase(name, args.folder, folders, args.judges)
        entry = results.setdefault(name, {"floor": case.floor, "calls": {}})
        for calls in args.calls:
            if str(calls) in entry["calls"]:
                continue
            options = json.loads(args.options)
            seeds = range(args.first_seed, args.first_seed + args.seeds)
            entry["calls"][str(calls)] = measure(case, calls, seeds, options, args.transfer, args.peers)
            file.write_text(json.dumps(results) + "\n")
            args.output.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()

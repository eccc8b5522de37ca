"""Quality per network call, beside peers, judged with an exact score or on trained networks.

python benchmarks/quality.py [--data digits patches] [--paths vp ve sub_vp flow] [--model DIR ...] [--jobs 2]

With --data the distributions are Gaussian mixtures fitted to real images (mixtures.py), whose score is known on every
path: only the sampler can be wrong. Its samples are judged against the truth:

* FD, the Frechet distance between mean and covariance of the samples and those of the data;
* SW, the sliced Wasserstein distance (order 2, 256 directions) to exact samples;
* nats/dim, the mean log-density of the samples minus that of the data, per dimension: above 0 is too clean, below too
  noisy.

With --model the networks are trained ones, saved by scripts/train.py, and FD is that of a classifier's features to
held-out real images (networks.py).

With --scale the data of a mixture are multiplied by a number, and ours is also run with ``data_std``, their spread.

Peers run in the same process through their own packages; k-diffusion and azula join where they are installed
(pip install -c constraints.txt -e ".[benchmark]"). In each repetition all samplers start from the same noise. Calls are
counted by the network itself: correctors, second stages and all. Written are OUTPUT.json, OUTPUT.md (tables, whether
the targets are met, and where a peer is better) and OUTPUT.png.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import re
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mixtures import MixtureJudge, Scaled, fitted
from samplers import (
    ON_NETWORKS,
    OURS,
    PEERS,
    SCHEDULERS,
    TOLD,
    Problem,
    Sampler,
    optional_peers,
    ours,
    ours_on_scaled_data,
)

CALLS = (5, 8, 10, 15, 20, 30, 50, 100)
MODEL_CALLS = (10, 20, 50, 100)
TARGETS = {"ode": 12, "sde": 20, "pc": 40}  # calls at which ours should be at the floor, on mixtures


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One data set or network on one path: every sampler at every number of calls."""
    torch.set_num_threads(1)
    n, path, seeds = task["samples"], task["path"], task["seeds"]
    if task["model"] is None:
        mixture, scale = fitted(task["data"]), task["scale"]
        data: Any = Scaled(mixture, scale)
        judge: Any = MixtureJudge(mixture, n)
        scheduler = SCHEDULERS[path]()
        shape: tuple[int, ...] = (mixture.dim,)
    else:
        from networks import Network, NetworkJudge

        data = Network(task["model"], task["bf16"])
        judge, scale = NetworkJudge(data, task["reference"], n, task["classifier"]), 1.0
        scheduler, shape, path = data.scheduler, data.shape, data.path

    def problem(seed: int) -> Problem:
        z = torch.randn(n, *shape, generator=torch.Generator().manual_seed(1 + seed))
        return Problem(path, scheduler, data, z, seed)

    own = OURS if task["model"] is None else {**OURS, **ON_NETWORKS}
    if scale != 1.0:
        own = ours_on_scaled_data(scale, scale * mixture.spread)
    samplers: dict[str, tuple[str, Sampler]] = {**own, **PEERS[path], **optional_peers()}
    samplers = {label: value for label, value in samplers.items() if re.search(task["only"], label)}
    rows: dict[str, Any] = {}
    for label, (kind, sampler) in samplers.items():
        extra = {TARGETS[kind]} if is_ours(label) and task["model"] is None else set()
        scores = {}
        for calls in sorted({*task["calls"], *extra}):
            scores[str(calls)] = score(sampler, problem, judge, calls, seeds, scale)
        rows[label] = {"kind": kind, "scores": scores}
        shown = " ".join(f"{c}:{s['fd']:.3f}/{s.get('nats', 0):+.3f}" for c, s in scores.items() if "fd" in s)
        print(f"{task['name']:12s}{path:7s}{label:36s}{shown}", flush=True)
    floor = dict(judge.floor)
    if task["model"] is None:
        # One draw of noise is a little lucky or unlucky, and the flow carries that to its end: what the flow scores.
        fine = ours(probability_flow=True, data_std=0.5 * scale)
        floor["fd_of_flow"] = score(fine, problem, judge, 60, seeds, scale)["fd"]
    return {"path": path, "floor": floor, "noise": judge.noise, "rows": rows, "about": judge.about}


def score(sampler: Sampler, problem: Any, judge: Any, calls: int, seeds: int, scale: float = 1.0) -> dict[str, Any]:
    """The metrics of a sampler at a number of calls, their means over the repetitions, in units of ``scale``."""
    found, used, began = [], 0, time.perf_counter()
    for seed in range(seeds):
        run = problem(seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                x = sampler(run, calls)
        except Exception as error:  # a peer's limits are part of the result
            return {"error": f"{type(error).__name__}: {error}"[:200]}
        if run.calls > calls:
            return {"error": f"needs {run.calls} calls"}
        used = run.calls
        found.append(judge(x / scale))
    means = {key: float(np.mean([f[key] for f in found])) for key in found[0]}
    seconds = round((time.perf_counter() - began) / seeds, 2)
    return {**means, "runs": seeds, "used": used, "seconds": seconds}


# ---------------------------------------------------------------------- what is written


def save(result: dict[str, Any], output: Path) -> None:
    """JSON, tables and picture."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(result) + "\n")
    output.with_suffix(".md").write_text(table(result))
    picture(result, output)


def is_ours(label: str) -> bool:
    """Whether a row is one of this package's."""
    return label.removesuffix(TOLD) in OURS or label in ON_NETWORKS


def fd(row: dict[str, Any], calls: int) -> float:
    """FD of a sampler at a number of calls, infinite where it has none."""
    return float(row["scores"].get(str(calls), {}).get("fd", math.inf))


def noise(entry: dict[str, Any], *rows: dict[str, Any], calls: int) -> float:
    """Twice the standard deviation of the mean FD of exact samples, over as many repetitions as the fewest of rows."""
    runs = min(row["scores"].get(str(calls), {}).get("runs", 1) for row in rows)
    return 2.0 * float(entry["noise"]["fd"]) / math.sqrt(runs)


def reached(entry: dict[str, Any], row: dict[str, Any]) -> str:
    """Whether one of ours is at the floor at its target: FD within 10 %, density within 0.02 nats per dimension."""
    calls = TARGETS[row["kind"]]
    floor, found = entry["floor"], row["scores"][str(calls)]
    best = max(floor["fd"], floor["fd_of_flow"]) if row["kind"] == "ode" else floor["fd"]
    if abs(found["nats"] - floor["nats_at_end"]) > 0.02 or found["fd"] > 1.1 * best + noise(entry, row, calls=calls):
        return "NOT reached"
    return "reached" if found["fd"] <= 1.1 * best else "reached within the noise"


def verdicts(result: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """The targets, and every number of calls at which a peer is better than the best of ours."""
    rows, lines = entry["rows"], []
    for label, row in rows.items():
        if is_ours(label) and entry["exact"]:
            calls = TARGETS[row["kind"]]
            lines.append(f"- {label}: floor at {calls} calls {reached(entry, row)} (FD {fd(row, calls):.4f}).")
    for calls in result["calls"] if entry["exact"] else result["model_calls"]:
        own = [(fd(row, calls), label) for label, row in rows.items() if is_ours(label)]
        peers = [(fd(row, calls), label) for label, row in rows.items() if not is_ours(label)]
        (best, mine), (peer, name) = (min(found, default=(math.inf, "none")) for found in (own, peers))
        if peer < best:
            size = noise(entry, rows[name], *([rows[mine]] if mine in rows else []), calls=calls)
            verdict = "by more than the noise" if best - peer > size else "within the noise"
            lines.append(
                f"- {calls} calls: {name} is better, {peer:.4f} against {best:.4f} of {mine}, {verdict} ({size:.4f})."
            )
    return lines


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# Quality per network call",
        "",
        "Written by benchmarks/quality.py. Each cell is FD, of one repetition unless the row says of how many it is "
        "the mean; on mixtures with the error of the log-density in nats per dimension; in bold the lowest FD of the "
        "column. A peer that is better than the best of ours is named below its table; the noise is twice the standard "
        "deviation of the FD of exact samples, over the square root of the number of repetitions. All samplers start "
        "from the same noise.",
    ]
    for entry in result["entries"]:
        floor, deviation, rows = entry["floor"], entry["noise"], entry["rows"]
        columns = sorted({int(c) for row in rows.values() for c in row["scores"]})
        lines += ["", f"## {entry['name']}, {entry['path']}", "", entry["about"], ""]
        text = f"Exact samples: FD {floor['fd']:.4f} (standard deviation {deviation['fd']:.4f})"
        if entry["exact"]:
            text += (
                f", nats {floor['nats']:+.4f} ({deviation['nats']:.4f}), and {floor['nats_at_end']:+.4f} if denoised "
                "from sigma/alpha = 0.01, where all samplers end; FD of the exact flow from the noise of this run: "
                f"{floor['fd_of_flow']:.4f}"
            )
        lines += [
            text + ".",
            "",
            "| sampler | kind | " + " | ".join(map(str, columns)) + " |",
            "|---|---|" + "---|" * len(columns),
        ]
        best = {c: min(fd(row, c) for row in rows.values()) for c in columns}
        for label, row in rows.items():
            cells = []
            for c in columns:
                value = fd(row, c)
                mark = "**" if value == best[c] else ""
                cell = f"{mark}{value:.3f}{mark}" if math.isfinite(value) else "-"
                nats = row["scores"].get(str(c), {}).get("nats")
                cells.append(cell if nats is None or cell == "-" else f"{cell} / {nats:+.3f}")
            runs = {score.get("runs", 1) for score in row["scores"].values()} - {1}
            mean_of = f" (mean of {', '.join(map(str, sorted(runs)))})" if runs else ""
            lines.append(f"| {label}{mean_of} | {row['kind']} | " + " | ".join(cells) + " |")
        lines += ["", *verdicts(result, entry)]
    return "\n".join(lines) + "\n"


def picture(result: dict[str, Any], output: Path) -> None:
    """Frontiers: FD against calls, one panel per data set and path; ours in colour, peers in grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = result["entries"]
    columns = min(4, len(entries))
    rows = -(-len(entries) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 3.2 * rows), squeeze=False)
    colours = {"sde": "tab:red", "ode": "tab:blue", "pc": "tab:green"}
    for axis in axes.flat[len(entries) :]:
        axis.set_axis_off()
    for axis, entry in zip(axes.flat, entries, strict=False):
        for label, row in entry["rows"].items():
            points = [(int(c), s["fd"]) for c, s in row["scores"].items() if math.isfinite(s.get("fd", math.inf))]
            if not points:
                continue
            if is_ours(label):
                style: dict[str, Any] = {"color": colours[row["kind"]], "lw": 2.2, "zorder": 3, "label": label}
                style["ls"] = "-" if label in OURS else "--"
            else:
                style = {"color": "0.6", "lw": 0.8, "ls": {"ode": "-", "sde": "--", "pc": ":"}[row["kind"]]}
            axis.plot(*zip(*points, strict=True), **style)
        floor = entry["floor"]["fd"]
        axis.axhline(floor, color="k", lw=0.8, ls=":")
        axis.set(xscale="log", yscale="log", title=f"{entry['name']}, {entry['path']}")
        axis.set_ylim(0.7 * floor, 300 * floor)
        axis.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
        axis.minorticks_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("Frechet distance")
    for axis in axes[-1]:
        axis.set_xlabel("network calls")
    axes.flat[0].legend(fontsize=7, title="grey: peers (dashed: SDE); dotted: exact samples", title_fontsize=6)
    figure.tight_layout()
    figure.savefig(output.with_suffix(".png"), dpi=90)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", nargs="*", choices=("digits", "patches"), help="mixtures; default: both, or none with --model"
    )
    parser.add_argument("--paths", nargs="+", choices=tuple(SCHEDULERS), default=list(SCHEDULERS))
    parser.add_argument("--model", nargs="+", default=[], help="folders of pipelines saved by scripts/train.py")
    parser.add_argument("--reference", help="with --model: held-out images with classes, a Parquet file; or 'digits'")
    parser.add_argument("--calls", nargs="+", type=int, default=list(CALLS))
    parser.add_argument("--model-calls", nargs="+", type=int, default=list(MODEL_CALLS))
    parser.add_argument("--scale", type=float, default=1.0, help="what the data of a mixture are multiplied by")
    parser.add_argument("--samples", type=int, default=4096, help="from a mixture, half as many patches")
    parser.add_argument("--model-samples", type=int, default=1024, help="from a network")
    parser.add_argument("--bf16", action="store_true", help="run the networks in mixed precision")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions, with other noise")
    parser.add_argument("--only", default="", help="regular expression: which samplers, by their names in the table")
    parser.add_argument("--update", type=Path, help="JSON of an earlier run, whose other values are kept")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--output", type=Path, default=Path("outputs/quality"))
    args = parser.parse_args()
    if args.model and args.reference is None:
        parser.error("--model needs --reference")
    common = {key: getattr(args, key) for key in ("seeds", "reference", "only", "bf16", "scale")}
    common["classifier"] = args.output.with_suffix(".classifier.safetensors")
    names = args.data if args.data is not None else [] if args.model else ["digits", "patches"]
    tasks: list[dict[str, Any]] = []
    for name in names:
        label = name if args.scale == 1.0 else f"{name} x {args.scale:g}"
        about = {"name": label, "data": name, "model": None, "calls": args.calls}
        about["samples"] = args.samples if name == "digits" else args.samples // 2
        tasks += [{**common, **about, "path": path} for path in args.paths]
    for folder in args.model:
        about = {"name": Path(folder).name, "model": folder, "samples": args.model_samples, "calls": args.model_calls}
        tasks.append({**common, **about, "path": ""})
    result: dict[str, Any] = {key: getattr(args, key) for key in ("calls", "model_calls", "samples", "model_samples")}
    result["entries"] = []
    if args.update:
        earlier = json.loads(args.update.read_text())
        if any(earlier[key] != result[key] for key in ("samples", "model_samples")):
            parser.error("--update needs the same number of samples")
        result = {**result, **earlier}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        for task, found in zip(tasks, pool.map(measure, tasks), strict=True):
            entry = {"name": task["name"], "exact": task["model"] is None, **found}
            same = [e for e in result["entries"] if (e["name"], e["path"]) == (entry["name"], entry["path"])]
            for old in same:
                for label, row in entry["rows"].items():
                    row["scores"] = {**old["rows"].get(label, row)["scores"], **row["scores"]}
                old.update(entry, rows={**old["rows"], **entry["rows"]})
            if not same:
                result["entries"].append(entry)
            save(result, args.output)
    print(table(result))


if __name__ == "__main__":
    main()

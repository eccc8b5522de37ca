"""Our schedulers where users put them: on the scheduler configs that pipelines ship, with nothing else set.

python benchmarks/swapped.py --output docs/swapped
python benchmarks/swapped.py --ours 'time_grid="sech"' --output outputs/grids
python benchmarks/swapped.py --model outputs/vp --reference digits --output docs/swapped --update docs/swapped.json

For each config of shipped.py, SCHEDULER.from_config(pipe.scheduler.config) is run as the pipeline runs it: the network
is called with scale_model_input(x, t) for each t of scheduler.timesteps, the pipeline's sigmas and mu are passed. Rows:

* ours: the reverse SDE (nothing set), the ODE (probability_flow=True), and PC (corrector="langevin", snr as in SNR
  below); --ours ARGUMENTS adds the same rows with these arguments of from_config in addition, to compare variants;
* the scheduler that came with the config, and the stock ones that users swap in, each by from_config.

Every row gets the same number of network calls. What is denoised:

* digits, patches: Gaussian mixtures with exact scores (mixtures.py), judged by FD and nats/dim as in quality.py; for a
  config that clips to [-1, 1] they are shrunk to lie there;
* gaussian: N(0, c^2 I) for the c in STDS; shown is the standard deviation of the samples over c, to half a per cent;
  clip_sample is off there, because such data have no range;
* with --model: a trained network, judged by the FD of a classifier's features (networks.py), on the configs of its own
  path. Two small ones, ten minutes of one core each:

  python scripts/train.py --sde vp --discrete --prediction_type epsilon --output_dir outputs/vp RECIPE
  python scripts/train.py --sde flow --output_dir outputs/flow RECIPE

  with RECIPE = --dataset_name digits --block_out_channels 32 64 --layers_per_block 1 --attention_resolutions 4
  --max_train_steps 6000 --train_batch_size 64 --learning_rate 1e-3 --lr_warmup_steps 100 --seed 0
  --sample_every 0 --logger none

FD of finitely many samples is above 0 even for exact ones, and less so for samples that vary too little. So what is
compared is the excess: FD with the part that the number of samples adds removed by the jackknife, leaving out an eighth
of the samples at a time. It is 0 for exact samples, and may come out a little below. Better beyond the noise: the mean
excess over the seeds is lower by more than two standard errors of the difference, from the same jackknife, so that
noise that two samplers share, such as that they start from, cancels. (On 24 draws of 2048 exact digits: FD 0.0628,
excess -0.0040 with a standard deviation of 0.0062, which the jackknife puts at 0.0094; on the same scaled by 1.1, whose
true FD is 0.457: 0.526, 0.452, 0.0162, 0.0186.) Stochastic stock schedulers stand against our SDE, deterministic ones
against our ODE. Written are OUTPUT.json, OUTPUT.md and OUTPUT.png.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import functools
import inspect
import json
import math
import multiprocessing
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from mixtures import Mixture, MixtureJudge, fitted
from shipped import CONFIGS, OURS, Network, Shipped, peers, run
from torch import Tensor

CALLS = (10, 20, 30, 50)
STDS = (0.05, 0.2, 0.5, 1.0)
SNR = 0.1
BLOCKS = 8  # of the jackknife
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sde": ("ours, reverse SDE", {}),
    "ode": ("ours, probability flow", {"probability_flow": True}),
    "pc": ("ours, PC", {"corrector": "langevin", "snr": SNR}),
}
NAMES = {"sde": "stochastic", "ode": "deterministic"}
QUICK = {"configs": ["sd15", "sd3", "edm"], "calls": [10, 20], "samples": 512, "data": ["gaussian", "digits"]}


class Gaussians:
    """N(0, c^2 I), one row for each c, and its judge."""

    def __init__(self, dim: int) -> None:
        self.c, self.dim = torch.tensor(STDS)[:, None], dim
        self.floor: dict[str, float] = {}
        self.about = f"N(0, c^2 I) with the exact score, {dim} numbers for each c; standard deviation of the samples/c."

    def denoise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return alpha * self.c**2 / (alpha**2 * self.c**2 + sigma**2) * x

    def noise(self, seed: int) -> Tensor:
        z = torch.randn(len(STDS), self.dim, generator=torch.Generator().manual_seed(seed))
        return z / z.std(1, keepdim=True)

    def __call__(self, x: Tensor) -> dict[str, float]:
        return {f"{c:g}": float(s) for c, s in zip(STDS, x.double().std(1) / self.c[:, 0], strict=True)}


class Shrunk:
    """A mixture made smaller to lie in [-1, 1], but for one number in 10,000, for configs that clip; and its judge.

    Judged in the units of the mixture itself.
    """

    def __init__(self, data: Mixture, judge: MixtureJudge) -> None:
        self.data, self.judge = data, judge
        self.floor, self.noise = judge.floor, judge.noise
        self.factor = 1.0 / float(np.quantile(data.sample(10_000, seed=98).abs().numpy(), 0.9999))
        self.about = judge.about + f" Shrunk by {self.factor:.2f}, to lie in [-1, 1]."

    def denoise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return self.factor * self.data.denoise(x, alpha * self.factor, sigma)

    def __call__(self, x: Tensor) -> dict[str, float]:
        return self.judge(x / self.factor)

    def fd(self, x: Tensor) -> float:
        return self.judge.fd(x / self.factor)


@functools.cache
def problem(name: str, samples: int, reference: str | None, classifier: Path) -> tuple[Any, Any, tuple[int, ...]]:
    """What is denoised, what judges, and the shape of the samples; shared by the tasks of a process."""
    if name == "gaussian":
        data = Gaussians(32768)
        return data, data, (data.dim,)
    if name in ("digits", "patches"):
        mixture = fitted(name)
        return mixture, MixtureJudge(mixture, samples), (samples, mixture.dim)
    from networks import Network as Trained
    from networks import NetworkJudge

    if reference is None:
        raise ValueError("a trained network needs a reference")
    network = Trained(name)
    return network, NetworkJudge(network, reference, samples, classifier), (samples, *network.shape)


def samplers(shipped: Shipped, variants: list[str], clips: bool) -> dict[str, tuple[str, Any]]:
    """Label -> (kind, scheduler): ours, with nothing set first, and the stock ones."""
    config = shipped.scheduler().config
    if not clips and config.get("clip_sample"):
        config = {**config, "clip_sample": False}
    rows: dict[str, tuple[str, Any]] = {}
    for variant in ["", *variants]:
        changes = arguments(variant)
        if not set(changes) <= set(inspect.signature(OURS[shipped.path].__init__).parameters):
            continue  # an argument of another path
        if shipped.passes_sigmas and "time_grid" in changes:
            continue  # the pipeline's sigmas are the grid
        for kind, (label, own) in KINDS.items():
            scheduler = OURS[shipped.path].from_config(config, **{**own, **changes})
            rows[f"{label}, {variant}" if variant else label] = (kind, scheduler)
    for label, (kind, stock) in peers(shipped).items():
        if not clips and stock.config.get("clip_sample"):
            stock = type(stock).from_config(stock.config, clip_sample=False)
        rows[label] = (kind, stock)
    return rows


def arguments(variant: str) -> dict[str, Any]:
    """The keyword arguments written in a text such as 'time_grid="sech", rho=5.0'."""
    call = ast.parse(f"f({variant})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
        raise ValueError(f"--ours takes keyword arguments of from_config, got {variant!r}.")
    known = {name for cls in OURS.values() for name in inspect.signature(cls.__init__).parameters} - {"self"}
    for keyword in call.keywords:
        if keyword.arg not in known:
            raise ValueError(f"--ours takes {', '.join(sorted(known))}, got {keyword.arg!r}.")
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One config on one distribution: every sampler at every number of calls."""
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    shipped = CONFIGS[task["config"]]
    data, judge, shape = problem(task["name"], task["samples"], task["reference"], task["classifier"])
    closed = task["name"] == "gaussian"
    if closed:
        shape = (len(STDS), *shape)
    if task["name"] in ("digits", "patches") and shipped.scheduler().config.get("clip_sample"):
        data = judge = Shrunk(data, judge)
    rows: dict[str, Any] = {}
    for label, (kind, scheduler) in samplers(shipped, task["ours"], not closed).items():
        if not re.search(task["only"], label):
            continue
        scores: dict[str, Any] = {}
        for calls in task["calls"]:
            found: list[dict[str, Any]] = []
            began = time.perf_counter()
            try:
                for seed in range(1 if closed else task["seeds"]):
                    network = Network(shipped, data)
                    start = judge.noise(1 + seed) if closed else torch.randn(*shape, generator=_generator(1 + seed))
                    x = run(shipped, scheduler, network, start, calls, seed)
                    found.append({**judge(x), "used": network.calls})
                    if not closed:
                        found[-1]["without"] = without_blocks(judge, x)
            except Exception as error:  # what a scheduler cannot do is part of the result
                scores[str(calls)] = {"error": f"{type(error).__name__}: {error}"[:200]}
                continue
            summary: dict[str, Any] = {key: float(np.mean([f[key] for f in found])) for key in judge_keys(found[0])}
            if not closed:
                summary["fds"] = [f["fd"] for f in found]
                summary["without"] = [f["without"] for f in found]
            used, seconds = found[0]["used"], round((time.perf_counter() - began) / len(found), 2)
            scores[str(calls)] = {**summary, "used": used, "seconds": seconds}
        rows[label] = {"kind": kind, "scores": scores}
        key = "1" if closed else "fd"
        shown = " ".join(f"{c}:{s[key]:.4g}" if key in s else f"{c}:-" for c, s in scores.items())
        print(f"{task['shown']:10s}{task['config']:14s}{label:44s}{shown}", flush=True)
    return {"about": judge.about, "floor": judge.floor, "noise": {} if closed else judge.noise, "rows": rows}


def judge_keys(found: dict[str, Any]) -> list[str]:
    """The keys of a judgement that are distances or ratios."""
    return [key for key in found if key not in ("used", "without")]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def without_blocks(judge: Any, x: Tensor) -> list[float]:
    """FD without each of the blocks, for the jackknife; empty for samples that are not finite."""
    if not bool(torch.isfinite(x).all()):
        return []
    parts = x.chunk(BLOCKS)
    return [judge.fd(torch.cat([p for j, p in enumerate(parts) if j != i])) for i in range(BLOCKS)]


# ---------------------------------------------------------------------- what is concluded


def fd(row: dict[str, Any], calls: int) -> float:
    """Mean FD of a sampler at a number of calls, infinite where it has none."""
    value = float(row["scores"].get(str(calls), {}).get("fd", math.inf))
    return value if math.isfinite(value) else math.inf


def excess(row: dict[str, Any], calls: int) -> float:
    """FD less what the number of samples adds to it, infinite where it is."""
    score = row["scores"].get(str(calls), {})
    if not math.isfinite(fd(row, calls)) or not all(score["without"]):
        return math.inf
    corrected = [
        BLOCKS * whole - (BLOCKS - 1) * float(np.mean(without))
        for whole, without in zip(score["fds"], score["without"], strict=True)
    ]
    return float(np.mean(corrected))


def noise(row: dict[str, Any], other: dict[str, Any], calls: int) -> float:
    """Two standard errors of the difference of two rows' mean excess."""
    one, two = (r["scores"][str(calls)]["without"] for r in (row, other))
    variances = []
    for a, b in zip(one, two, strict=False):
        if len(a) == len(b) == BLOCKS:
            difference = np.subtract(a, b)
            variances.append((BLOCKS - 1) / BLOCKS * float(np.square(difference - difference.mean()).sum()))
    return 2.0 * math.sqrt(sum(variances)) / len(variances) if variances else math.inf


def is_ours(label: str) -> bool:
    return label.startswith("ours")


def comparison(rows: dict[str, Any], kind: str, variant: str, calls: int) -> dict[str, Any] | None:
    """Ours of a kind beside the stock schedulers of that kind: excess of both, and which are better beyond the noise.

    None where ours was not run; the best stock scheduler is infinite where none was.
    """
    label = KINDS[kind][0] + (f", {variant}" if variant else "")
    others = {name: row for name, row in rows.items() if not is_ours(name) and row["kind"] == kind}
    stock = sorted((excess(row, calls), name) for name, row in others.items())
    if label not in rows or str(calls) not in rows[label]["scores"]:
        return None
    mine = excess(rows[label], calls)
    # Not only the best of them: another one may share more of the noise with ours.
    beaten = [n for v, n in stock if v < mine and (math.isinf(mine) or mine - v > noise(rows[label], rows[n], calls))]
    return {"ours": mine, "best": stock[0][0] if stock else math.inf, "beaten": beaten}


def summary(result: dict[str, Any]) -> list[str]:
    """For each config and number of calls, whether a stock scheduler beats ours beyond the noise."""
    lines = ["## Summary", ""]
    for variant in ["", *result["ours"]]:
        count = {k: [0, 0] for k in NAMES}
        named: list[str] = []
        for entry, kind, calls in comparisons(result):
            found = comparison(entry["rows"], kind, variant, calls)
            if found is None or math.isinf(found["best"]):
                continue
            count[kind][0] += bool(found["beaten"])
            count[kind][1] += 1
            for other in found["beaten"][:1]:
                label = KINDS[kind][0] + (f", {variant}" if variant else "")
                size = noise(entry["rows"][label], entry["rows"][other], calls)
                named.append(
                    f"- {entry['config']}, {entry['name']}, {calls} calls, {NAMES[kind]}: {other} "
                    f"{excess(entry['rows'][other], calls):.4f} against {found['ours']:.4f} (noise {size:.4f})."
                )
        total = ", ".join(f"{NAMES[k]} in {a} of {b}" for k, (a, b) in count.items())
        what = f"`{variant}`" if variant else "nothing set"
        lines += [f"With {what} a stock scheduler is better than ours beyond the noise: {total}.", "", *named, ""]
    shown = "".join(f" / `{variant}`" for variant in result["ours"])
    lines += [
        f"Excess of ours with nothing set{shown} / of the best stock scheduler of the same kind; in bold those of ours "
        "that a stock scheduler beats beyond the noise.",
        "",
    ]
    columns = [f"{NAMES[k]}, {c}" for k in NAMES for c in result["calls"]]
    lines += ["| config | data | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    cells: dict[tuple[str, str], list[str]] = {}
    for entry, kind, calls in comparisons(result):
        values, best = [], math.inf
        for variant in ["", *result["ours"]]:
            found = comparison(entry["rows"], kind, variant, calls)
            mark = "**" if found is not None and found["beaten"] else ""
            values.append("-" if found is None or math.isinf(found["ours"]) else f"{mark}{found['ours']:.4f}{mark}")
            best = best if found is None else found["best"]
        values.append(f"{best:.4f}" if math.isfinite(best) else "-")
        cells.setdefault((entry["config"], entry["name"]), []).append(" / ".join(values))
    lines += [f"| {config} | {name} | " + " | ".join(row) + " |" for (config, name), row in cells.items()]
    return [*lines, "", *closed_summary(result)]


def closed_summary(result: dict[str, Any]) -> list[str]:
    """How far the standard deviations of Gaussian data are off, ours beside the best stock scheduler."""
    entries = [entry for entry in result["entries"] if entry["closed"]]
    if not entries:
        return []
    columns = [f"{NAMES[k]}, {c}" for k in NAMES for c in result["calls"]]
    shown = "".join(f" / `{variant}`" for variant in result["ours"])
    lines = [
        f"Gaussian data: the largest of |std/true - 1| over c, of ours with nothing set{shown} / of the best stock "
        "scheduler of the same kind; in bold those of ours above 0.25.",
        "",
        "| config | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for entry in entries:
        cells = []
        for kind, calls in ((k, c) for k in NAMES for c in result["calls"]):
            values = []
            for variant in ["", *result["ours"]]:
                value = off(entry["rows"].get(KINDS[kind][0] + (f", {variant}" if variant else "")), calls)
                mark = "**" if 0.25 < value < math.inf else ""
                values.append(f"{mark}{value:.2f}{mark}" if math.isfinite(value) else "-")
            stock = (off(r, calls) for name, r in entry["rows"].items() if not is_ours(name) and r["kind"] == kind)
            nearest = min(stock, default=math.inf)
            values.append(f"{nearest:.2f}" if math.isfinite(nearest) else "-")
            cells.append(" / ".join(values))
        lines.append(f"| {entry['config']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def off(row: dict[str, Any] | None, calls: int) -> float:
    """The largest of |std/true - 1| of a sampler, infinite where it has none."""
    score = row["scores"].get(str(calls), {}) if row is not None else {}
    values = [abs(score.get(f"{c:g}", math.inf) - 1.0) for c in STDS]
    return max(values) if all(map(math.isfinite, values)) else math.inf


def comparisons(result: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, int]]:
    """What is compared: (entry, kind, calls)."""
    for entry in result["entries"]:
        if not entry["closed"]:
            yield from ((entry, kind, calls) for kind in NAMES for calls in result["calls"])


# ---------------------------------------------------------------------- what is written


def save(result: dict[str, Any], output: Path) -> None:
    """JSON, tables and picture."""
    save_values(result, output)
    output.with_suffix(".md").write_text(table(result))
    picture(result, output)


def save_values(result: dict[str, Any], output: Path) -> None:
    """JSON alone."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(rounded(result)) + "\n")


def rounded(value: Any) -> Any:
    """Numbers to six digits: the file is kept under version control."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# Swapped into the configs that pipelines ship",
        "",
        "Written by benchmarks/swapped.py, which says what is measured and what excess and beyond the noise mean. Ours "
        "are `from_config(pipe.scheduler.config)` with nothing else set for the reverse SDE, with "
        f'`probability_flow=True` for the probability flow, with `corrector="langevin", snr={SNR}` for PC. Means over '
        f"{result['seeds']} seeds; {result['samples']} samples of digits, half as many patches.",
        "",
        *summary(result),
    ]
    for entry in result["entries"]:
        floor, rows, calls = entry["floor"], entry["rows"], result["calls"]
        lines += [f"## {entry['config']}, {entry['name']}", "", CONFIGS[entry["config"]].about + " " + entry["about"]]
        if not entry["closed"]:
            text = f"Exact samples: FD {floor['fd']:.4f} (standard deviation {entry['noise']['fd']:.4f})"
            lines += ["", text + ". Cells: FD ± its standard deviation over the seeds, and nats per dimension."]
        columns = [f"{c} calls" for c in calls]
        if entry["closed"]:
            columns = [f"{c} calls, c = " + " / ".join(f"{s:g}" for s in STDS) for c in calls]
        lines += ["", "| sampler | kind | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(calls)]
        best = {c: min(fd(row, c) for row in rows.values()) for c in calls}
        for label, row in rows.items():
            cells = [cell(row["scores"].get(str(c), {}), best[c], entry["closed"]) for c in calls]
            lines.append(f"| {label} | {row['kind']} | " + " | ".join(cells) + " |")
        errors = {s["error"]: label for label, row in rows.items() for s in row["scores"].values() if "error" in s}
        lines += ["", *(f"- {label}: {error}" for error, label in errors.items()), ""][: None if errors else 1]
    return "\n".join(lines).rstrip() + "\n"


def cell(score: dict[str, Any], best: float, closed: bool) -> str:
    """One cell of a table."""
    if closed:
        values = [score.get(f"{c:g}", math.nan) for c in STDS]
        return " / ".join(f"{v:.2f}" for v in values) if all(map(math.isfinite, values)) else "-"
    value = score.get("fd", math.inf)
    if not math.isfinite(value):
        return "-"
    mark = "**" if value == best else ""
    spread = f" ± {np.std(score['fds'], ddof=1):.3f}" if len(score["fds"]) > 1 else ""
    nats = f" / {score['nats']:+.3f}" if "nats" in score else ""
    return f"{mark}{value:.3f}{mark}{spread}{nats}"


def picture(result: dict[str, Any], output: Path) -> None:
    """FD against calls, one panel per config and distribution; ours in colour, stock schedulers in grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [entry for entry in result["entries"] if not entry["closed"]]
    if not entries:
        return
    columns = min(7, len(entries))
    figure, axes = plt.subplots(
        -(-len(entries) // columns), columns, figsize=(2.6 * columns, 2.5 * -(-len(entries) // columns)), squeeze=False
    )
    colours = {"sde": "tab:red", "ode": "tab:blue", "pc": "tab:green"}
    for axis in axes.flat[len(entries) :]:
        axis.set_axis_off()
    for axis, entry in zip(axes.flat, entries, strict=False):
        highest = entry["floor"]["fd"]
        for label, row in entry["rows"].items():
            points = [(c, fd(row, c)) for c in result["calls"] if math.isfinite(fd(row, c))]
            if not points:
                continue
            plain = label in [name for name, _ in KINDS.values()]
            if is_ours(label):
                style: dict[str, Any] = {"color": colours[row["kind"]], "lw": 2.0, "zorder": 3, "label": label}
                style["ls"] = "-" if plain else "--"
            else:
                style = {"color": "0.6", "lw": 0.9, "ls": "-" if row["kind"] == "ode" else "--"}
            highest = max(highest, *(value for _, value in points))
            axis.plot(*zip(*points, strict=True), marker=".", ms=3, **style)
        floor = entry["floor"]["fd"]
        axis.axhline(floor, color="k", lw=0.8, ls=":")
        axis.set(xscale="log", yscale="log")
        axis.set_title(f"{entry['config']}, {entry['name']}", fontsize=8)
        axis.set_ylim(0.6 * floor, min(1.5 * highest, 1000 * floor))
        axis.set_xticks(result["calls"], [str(c) for c in result["calls"]])
        axis.tick_params(labelsize=7)
        axis.minorticks_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("Frechet distance", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("network calls", fontsize=8)
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    title = "grey: stock schedulers (dashed: stochastic); dotted: exact samples"
    width, height, below = *figure.get_size_inches(), 0.4 + 0.18 * -(-len(handles) // 3)
    figure.set_size_inches(width, height + below)
    figure.tight_layout(rect=(0, below / (height + below), 1, 1))
    figure.legend(handles.values(), handles, fontsize=8, title=title, title_fontsize=8, loc="lower center", ncols=3)
    figure.savefig(output.with_suffix(".png"), dpi=80)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", choices=tuple(CONFIGS), help="default: all")
    parser.add_argument(
        "--data", nargs="*", choices=("gaussian", "digits", "patches"), help="default: all, or none with --model"
    )
    parser.add_argument("--model", nargs="+", default=[], help="folders of pipelines saved by scripts/train.py")
    parser.add_argument("--reference", help="with --model: held-out images with classes, a Parquet file; or 'digits'")
    parser.add_argument("--calls", nargs="+", type=int, help=f"default: {' '.join(map(str, CALLS))}")
    parser.add_argument("--samples", type=int, help="of digits, half as many patches; default: 2048")
    parser.add_argument("--model-samples", type=int, default=512, help="from a network")
    parser.add_argument("--seeds", type=int, default=2, help="repetitions, with other noise")
    parser.add_argument("--ours", nargs="*", default=[], help="variants: arguments of from_config, each in quotes")
    parser.add_argument("--only", default="", help="regular expression: which samplers, by their names in the table")
    parser.add_argument("--update", type=Path, help="JSON of an earlier run, whose other values are kept")
    parser.add_argument("--quick", action="store_true", help=f"try it out: {QUICK}")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--output", type=Path, default=Path("outputs/swapped"))
    args = parser.parse_args()
    if args.model and args.reference is None:
        parser.error("--model needs --reference")
    defaults: dict[str, Any] = {"configs": list(CONFIGS), "calls": list(CALLS), "samples": 2048}
    defaults["data"] = [] if args.model else ["gaussian", "digits", "patches"]
    for key, value in ({**defaults, **QUICK} if args.quick and not args.model else defaults).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    for variant in args.ours:
        try:
            arguments(variant)
        except (ValueError, SyntaxError) as error:
            parser.error(str(error))

    result: dict[str, Any] = {key: getattr(args, key) for key in ("calls", "samples", "model_samples", "seeds", "ours")}
    result["entries"] = []
    if args.update:
        earlier = json.loads(args.update.read_text())
        for key in ("samples", "model_samples", "seeds"):
            if earlier[key] != result[key]:
                parser.error(f"--update needs the same {key}: {earlier[key]}, got {result[key]}")
        result = {**earlier, **{k: sorted({*earlier[k], *result[k]}) for k in ("calls", "ours")}}
    common = {key: getattr(args, key) for key in ("seeds", "reference", "only", "ours", "calls")}
    common["classifier"] = args.output.with_suffix(".classifier.safetensors")
    tasks: list[dict[str, Any]] = []
    for name in args.data:
        samples = args.samples // 2 if name == "patches" else args.samples
        tasks += [{**common, "name": name, "shown": name, "samples": samples, "config": c} for c in args.configs]
    for folder in args.model:
        path = path_of(folder)
        about = {"name": folder, "shown": Path(folder).name, "samples": args.model_samples}
        tasks += [{**common, **about, "config": c} for c in args.configs if CONFIGS[c].path == path]
    began = time.perf_counter()
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for task, found in zip(tasks, pool.map(measure, tasks), strict=True):
            about = {"name": task["shown"], "config": task["config"], "closed": task["name"] == "gaussian"}
            merge(result, {**about, **found})
            save_values(result, args.output)  # the tables at the end
    save(result, args.output)
    print("\n".join(summary(result)), f"\n{time.perf_counter() - began:.0f} s; see {args.output}.md")


def path_of(folder: str) -> str:
    """The path of a saved network, a value of Shipped.path."""
    from networks import Network as Trained

    return {"ve": "edm"}.get(path := Trained(folder).path, path)


def merge(result: dict[str, Any], entry: dict[str, Any]) -> None:
    """Put an entry into a result, over its own earlier values."""
    for old in result["entries"]:
        if (old["name"], old["config"]) == (entry["name"], entry["config"]):
            for label, row in entry["rows"].items():
                row["scores"] = {**old["rows"].get(label, row)["scores"], **row["scores"]}
            old.update(entry, rows={**old["rows"], **entry["rows"]})
            return
    result["entries"].append(entry)


if __name__ == "__main__":
    main()

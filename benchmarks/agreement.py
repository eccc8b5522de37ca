"""How well the distances that samplers are fitted by agree with a classifier about which of two samplers is better.

    python benchmarks/agreement.py --networks digits-ddpm spots-vp-epsilon --folder outputs/zoo

Samplers of ours and of diffusers draw from a network of zoo.py at 5, 8 and 20 calls. Each is judged by the Frechet
distance (FD) of a classifier's features, and by the parts of the energy distance of ``fit_scheduler``: whole images,
patches, and features of the middle of the network itself. Of the pairs of samplers whose FD differs by more than
``CLEARLY``, the table has the share that a part puts in the same order: of all pairs, and of those of good samplers,
whose FD is less than ``GOOD`` times the best. Half is chance.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

import diffusers
import torch
from fitted import KINDS, NetworkCase, peer_of, sampler_of
from torch import Tensor
from zoo import Folders, add_folders

from diffusers_sde.fitting import EnergyTarget
from diffusers_sde.fitting.families import PARTS
from diffusers_sde.fitting.targets import FEATURES, PATCHES, WHOLE
from diffusers_sde.pipelines.fit_subjects import DenoisedSubject

CALLS = (5, 8, 20)
CLEARLY, GOOD = 1.08, 2.0
SEED, REFERENCES = 101, 1000
SETTINGS: tuple[dict[str, Any], ...] = ({}, {"gaussian_std": 0.0}, {"solver_order": 2}, {"time_grid": "karras"})
COLUMNS = (WHOLE, PATCHES, FEATURES, "all")


def samplers(case: NetworkCase) -> Iterator[Callable[[Tensor, int], Tensor]]:
    """(unit noise, seed) -> samples, of each sampler at each number of calls."""
    own = case.pipe.scheduler
    for calls in CALLS:
        for _, sampler in case.peers.values():
            yield peer_of(case, sampler, calls)
        for kind, setting in product(("SDE", "ODE"), SETTINGS):
            yield sampler_of(case.pipe, type(own).from_config(own.config, **{**KINDS[kind], **setting}), calls)


def judged(case: NetworkCase) -> list[dict[str, float]]:
    """FD of each sampler, and by how much it is nearer than the first one, in all and in each part."""
    subject = DenoisedSubject(case.pipe, case.pipe.scheduler, CALLS[0], 1.0, None, None, PARTS, False, 256)
    half = len(case.images) // 2
    references = {"fit": case.images[:half], "report": case.images[half : half + REFERENCES]}
    target = EnergyTarget(references, bounds=subject.data_range, features=subject.features(case.images))
    held = target.batch("report", case.samples, torch.Generator().manual_seed(SEED))
    rows: list[dict[str, float]] = []
    first: Tensor | None = None
    for sample in samplers(case):
        try:
            x = sample(case.noise(SEED), SEED)
        except Exception:  # a peer's limits
            continue
        if not bool(torch.isfinite(x).all()):
            continue
        first = x if first is None else first
        with torch.no_grad():
            found = target.compare(x, first, held)
        gains = {name: gain.value for name, gain in found.parts.items()}
        rows.append({"fd": case.judges[0](x)[0], "all": found.gain, **gains})
    return rows


def agreement(rows: list[dict[str, float]], part: str) -> str:
    """The share of pairs that a part puts in the order of FD."""
    pairs = [(a, b) if a["fd"] < b["fd"] else (b, a) for a, b in combinations(rows, 2)]
    pairs = [(better, worse) for better, worse in pairs if worse["fd"] > CLEARLY * better["fd"]]
    same = sum(better[part] > worse[part] for better, worse in pairs)
    return f"{100.0 * same / max(len(pairs), 1):.0f} %"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    parser.add_argument("--networks", nargs="+", default=["digits-ddpm", "shoes-flow", "spots-vp-epsilon"])
    parser.add_argument("--folder", type=Path, default=Path("outputs/zoo"), help="where zoo.py wrote the networks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    print("| network | samplers, good ones | " + " | ".join(COLUMNS) + " |")
    print("|---|---|" + "---|" * len(COLUMNS))
    for name in args.networks:
        rows = judged(NetworkCase(name, args.folder, Folders(args.fashion, args.cifar)))
        good = [row for row in rows if row["fd"] < GOOD * min(row["fd"] for row in rows)]
        cells = [f"{agreement(rows, part)}, {agreement(good, part)}" for part in COLUMNS]
        print(f"| {name} | {len(rows)}, {len(good)} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

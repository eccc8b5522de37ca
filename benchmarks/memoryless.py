"""Samplers that look back on no earlier level, by network calls, without Monte Carlo: how wrong is the spread?

python benchmarks/memoryless.py [--calls 10 20 40]

Methods that go back in noise or change the sample between levels (restarts, RePaint, replacement) cannot use history.
The samples of Gaussian data are Gaussian under every plan, and their law is computed exactly. Printed is the largest
relative error of the standard deviation over data with standard deviations of 0.2, 0.5 and 1.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from analytic import push_gaussian

from diffusers_sde import VESDE, VPSDE, RectifiedFlowSDE, make_plan
from diffusers_sde.sampling import Ancestral, Exponential, Heun, Singlestep, get_time_grid

SDES = {"VP": (VPSDE(), 1e-3), "VE": (VESDE(0.01, 50.0), 1e-5), "flow": (RectifiedFlowSDE(), 1e-3)}
SAMPLERS = {
    "ancestral": (Ancestral(), 1.0),
    "singlestep": (Singlestep(), 1.0),
    "Heun, ODE": (Heun(), 0.0),
    "singlestep, ODE": (Singlestep(), 0.0),
    "multistep (default)": (Exponential(None, "heun", True, 0.05), None),
}


def error(sde, t_min, predictor, eta, calls):
    """Of a sampler with at most so many calls, the last of which gives x0_hat."""
    times = get_time_grid("sech", sde, max(2, calls // predictor.calls), sde.t_max, t_min)
    plan = make_plan(sde, times, predictor, stochasticity=eta)
    stds = (0.2, 0.5, 1.0)
    variances = [push_gaussian(plan, sde, 0.0, std, 0.0, float(sde.prior_std) ** 2)[1] for std in stds]
    return max(abs(math.sqrt(v) / std - 1.0) for v, std in zip(variances, stds, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, nargs="+", default=[10, 20, 40])
    args = parser.parse_args()
    print("| SDE | calls | " + " | ".join(SAMPLERS) + " |")
    print("|---|---|" + "---|" * len(SAMPLERS))
    for name, (sde, t_min) in SDES.items():
        for calls in args.calls:
            cells = [f"{error(sde, t_min, *sampler, calls):.3f}" for sampler in SAMPLERS.values()]
            print(f"| {name} | {calls} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

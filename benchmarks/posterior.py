"""Errors of posterior samplers where the true posterior is known: Gaussian and mixture data, a linear measurement.

    python benchmarks/posterior.py [--samples 20000] [--steps 100]

Mean and covariance are in units of the true posterior's standard deviation (|mean error| and the spectral norm of the
whitened covariance's error), weights are the largest error of a component's share. The first line is what that many
exact samples give.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from posteriors import COVARIANCE, GAUSSIAN, MIXTURE, NOISE_STD, OPERATOR, A, Y, errors, log_snr_plan, posterior

from diffusers_sde import VPSDE, sample
from diffusers_sde.guidance import POSTERIOR_METHODS, posterior_denoiser, smc_sample
from diffusers_sde.predictors import PredictorOptions

METHODS = [
    ("gaussian", {"covariance": COVARIANCE}),
    ("mmps", {"iterations": 1}),
    ("mmps", {"iterations": 2}),
    ("pigdm", {"data_std": 0.5}),
    ("pigdm", {"data_std": 1.0}),
    ("dps", {"scale": 0.3}),
    ("dps", {"scale": 1.0}),
    ("dps", {"scale": 3.0}),
]


def show(name, options, measured, seconds):
    settings = ", ".join(f"{k} {v:g}" for k, v in options.items() if isinstance(v, int | float))
    numbers = "".join(f"{measured[k]:>12.3f}" for k in ("mean", "covariance", "weights"))
    print(f"{name:10} {settings:18}{numbers}{seconds:>10.1f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20000)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    assert {name for name, _ in METHODS} == set(POSTERIOR_METHODS)
    sde, n = VPSDE(), args.samples
    plan, particle_plan = log_snr_plan(sde, args.steps, options=PredictorOptions(2)), log_snr_plan(sde, 3 * args.steps)
    for label, data in {"Gaussian": GAUSSIAN, "mixture": MIXTURE}.items():
        truth, evidence = posterior(data, A, Y, NOISE_STD)
        print(f"\n{label} data, {args.steps} steps, {n} samples: {'mean':>10}{'covariance':>12}{'weights':>12}")
        generator = torch.Generator().manual_seed(0)
        show("exact", {}, errors(truth.sample(n, generator), truth), 0.0)
        for name, options in METHODS:
            start = time.perf_counter()
            y = Y.expand(n, 2)
            denoiser = posterior_denoiser(data.denoiser(sde), sde, OPERATOR, y, NOISE_STD, name, **options)
            x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
            show(name, options, errors(sample(plan, denoiser, x, generator), truth), time.perf_counter() - start)
        for particles in (4, 16, 64):
            start = time.perf_counter()
            problems = n // 20
            y = Y.expand(problems, 2)
            prior = data.denoiser(sde)
            result = smc_sample(particle_plan, prior, sde, OPERATOR, y, NOISE_STD, particles, generator, data_std=0.5)
            measured = errors(result.draw(generator), truth)
            show("smc", {"particles": particles}, measured, time.perf_counter() - start)
            each = torch.tensor([errors(result.samples[i], truth, w)["mean"] for i, w in enumerate(weights(result))])
            print(
                f"{'':30}of one run's mean {each.square().mean().sqrt():.3f}, log-evidence off by "
                f"{mean_evidence(result) - evidence:+.3f} nats; smallest ESS {float(result.effective.mean()):.1f}"
            )


def weights(result):
    return result.log_weights.exp()


def mean_evidence(result):
    return float(torch.logsumexp(result.log_evidence, 0)) - math.log(len(result.log_evidence))


if __name__ == "__main__":
    main()

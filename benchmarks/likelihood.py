"""The likelihood solver against its peers: calls, solver error, scatter of the estimate, time on a network.

python benchmarks/likelihood.py [--model outputs/demo] [--output outputs/likelihood.json]

Part one is a Gaussian mixture of 20 components fitted to scikit-learn's digits (64 dimensions), whose log-density is
known in closed form and whose exact score stands in for a network. Every solver integrates the probability-flow ODE of
the same SDE with its change of density, from t = 1e-5 to 1:

* `scipy RK45`: rtol = atol = 1e-5 in t for the whole batch at once, what the paper's official code does;
* `torchdiffeq dopri5`: the same in torch, the usual way today;
* `torchode dopri5`: the same with a step size for every sample;
* `ours`.

Solver error: mean over images of |log p - closed form| with the exact trace, in bits per dimension; what
N(0, prior_std^2) leaves out of p at t_max is known in closed form and subtracted for all alike. Scatter: standard
deviation of the estimate of one image over probes, root mean square over images, with one Rademacher probe per call;
and at equal cost, that is with as many probes per call as make (calls x probes) that of `scipy RK45`.

Part two, with --model, times a trained pipeline's network: bits/dim by ours and by torchdiffeq, in time per image, and
the round trip of encode and decode. Peers that are not installed (`pip install torchdiffeq torchode`) are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from analytic import GaussianMixture

from diffusers_sde import VESDE, VPSDE, RectifiedFlowSDE, SubVPSDE
from diffusers_sde.basics.noise import sample_generators
from diffusers_sde.flow.likelihood import log_prob
from diffusers_sde.flow.quantized import Quantization
from diffusers_sde.flow.solver import ODEOptions
from diffusers_sde.flow.trace import TraceOptions

BITS = math.log(2.0)


def digits_mixture(low: float, high: float) -> tuple[GaussianMixture, torch.Tensor]:
    """The mixture, and the dequantised digits it was fitted to, in [low, high]."""
    from sklearn import datasets
    from sklearn.mixture import GaussianMixture as Fit

    data = datasets.load_digits().data
    data = low + (high - low) * (data + np.random.default_rng(0).random(data.shape)) / 17
    fit = Fit(20, random_state=0).fit(data)
    return GaussianMixture(fit.weights_, fit.means_, fit.covariances_), torch.from_numpy(data)


# ---------------------------------------------------------------------- the peers, on the ODE in t as the paper has it


class InTime:
    """d(x, log p)/dt = (f x - g^2/2 score, -div), with one probe or the exact trace."""

    def __init__(self, denoiser, sde, x, probe):
        self.denoiser, self.sde, self.shape, self.probe, self.calls = denoiser, sde, x.shape, probe, 0

    def __call__(self, t, state):
        """``state`` of shape (B, d + 1), ``t`` of shape () or (B,)."""
        self.calls += 1
        n = len(state)
        d = state.shape[1] - 1
        t = torch.as_tensor(t, dtype=torch.float64).expand(n)
        with torch.enable_grad():
            x = state[:, :d].reshape(n, *self.shape[1:]).detach().requires_grad_()
            x0 = self.denoiser(x, t)
            if self.probe is None:
                trace = 0.0
                for i in range(d):
                    unit = torch.zeros(n, d, dtype=x0.dtype)
                    unit[:, i] = 1.0
                    row = torch.autograd.grad(x0, x, unit.reshape(x0.shape), retain_graph=i + 1 < d)[0]
                    trace = trace + row.reshape(n, d)[:, i]
            else:
                product = torch.autograd.grad(x0, x, self.probe.to(x0.dtype))[0]
                trace = (product * self.probe).reshape(n, d).sum(1)
        f, g2, alpha = (v.to(state)[:, None] for v in (self.sde.f(t), self.sde.g2(t), self.sde.alpha(t)))
        variance = torch.exp(2 * self.sde.log_sigma(t)).to(state)[:, None]
        flat, estimate = state[:, :d], x0.detach().reshape(n, d)
        velocity = f * flat - 0.5 * g2 * (alpha * estimate - flat) / variance
        divergence = d * f - 0.5 * g2 * (alpha * trace.detach()[:, None] - d) / variance
        return torch.cat([velocity, divergence], 1)


def scipy_rk45(field, state, t0, t1, tolerance):
    from scipy.integrate import solve_ivp

    def flat(t, y):
        return field(t, torch.from_numpy(y).reshape(state.shape)).reshape(-1).numpy()

    solved = solve_ivp(flat, (t0, t1), state.reshape(-1).numpy(), rtol=tolerance, atol=tolerance, method="RK45")
    return torch.from_numpy(solved.y[:, -1]).reshape(state.shape), field.calls


def torchdiffeq_dopri5(field, state, t0, t1, tolerance):
    from torchdiffeq import odeint

    times = torch.tensor([t0, t1], dtype=torch.float64)
    return odeint(field, state, times, rtol=tolerance, atol=tolerance, method="dopri5")[-1], field.calls


def torchode_dopri5(field, state, t0, t1, tolerance):
    import torchode

    term = torchode.ODETerm(field)
    controller = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), controller)
    n = len(state)
    problem = torchode.InitialValueProblem(
        y0=state,
        t_start=torch.full((n,), t0, dtype=torch.float64),
        t_end=torch.full((n,), t1, dtype=torch.float64),
    )
    solved = solver.solve(problem)
    return solved.ys[:, -1], float(solved.stats["n_f_evals"].double().mean())


PEERS = {
    "scipy RK45": (scipy_rk45, "scipy"),
    "torchdiffeq dopri5": (torchdiffeq_dopri5, "torchdiffeq"),
    "torchode dopri5": (torchode_dopri5, "torchode"),
}


def installed_peers():
    return {name: solve for name, (solve, module) in PEERS.items() if importlib.util.find_spec(module)}


def peer_log_prob(solve, denoiser, sde, x, probe, tolerance=1e-5, t_min=None):
    field = InTime(denoiser, sde, x, probe)
    state = torch.cat([x.flatten(1), torch.zeros(len(x), 1, dtype=x.dtype)], 1)
    end, calls = solve(field, state, sde.t_min if t_min is None else t_min, sde.t_max, tolerance)
    latents = end[:, :-1].reshape(x.shape)
    return (sde.prior_log_prob(latents) + end[:, -1]).double(), latents, calls


# ---------------------------------------------------------------------- part one


def rademacher(x, seed):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randint(0, 2, x.shape, generator=generator) - 1).to(x.dtype)


def on_mixture(images: int, repeats: int) -> list[dict]:
    rows = []
    paths = {"VP": (VPSDE(), -1.0, 1.0), "sub-VP": (SubVPSDE(), -1.0, 1.0), "VE": (VESDE(), 0.0, 1.0)}
    # Rectified flow's ODE in t is singular in the score at t = 1: peers are run to the last time that they can reach.
    paths["flow"] = (RectifiedFlowSDE(t_max=1.0), -1.0, 1.0)
    for path, (sde, low, high) in paths.items():
        model, data = digits_mixture(low, high)
        x, denoiser, d = data[:images], model.denoiser(sde), data.shape[1]
        exact = model.log_prob(sde, x, sde.t_min)
        options = ODEOptions(data_mean=0.5 * (low + high), data_std=0.25 * (high - low), batch_size=images * repeats)

        def error(value, latents, exact=exact, model=model, sde=sde, d=d):
            mismatch = sde.prior_log_prob(latents) - model.log_prob(sde, latents, sde.t_max)
            return (value - mismatch - exact) / (d * BITS)

        def scatter(values, d=d):
            return float(torch.stack(values).var(0).mean().sqrt()) / (d * BITS)

        official = None
        for name, solve in installed_peers().items():
            if path == "flow":
                continue
            value, latents, calls = peer_log_prob(solve, denoiser, sde, x, None)
            noisy = [peer_log_prob(solve, denoiser, sde, x, rademacher(x, i))[0] for i in range(repeats)]
            official = calls if official is None else official
            rows.append(
                {
                    "path": path,
                    "solver": name,
                    "calls": calls,
                    "error": float(error(value, latents).abs().mean()),
                    "bias": float(error(value, latents).mean()),
                    "scatter": scatter(noisy),
                    "scatter_at_equal_cost": scatter(noisy) * math.sqrt(calls / official),
                }
            )
            print_row(rows[-1])

        result = log_prob(denoiser, sde, x, TraceOptions("exact"), options)
        calls = float(result.calls.double().mean())
        many = max(1, int((official or calls) / calls))

        def repeated(trace, x=x, denoiser=denoiser, sde=sde, options=options):
            generators = [torch.Generator().manual_seed(i) for i in range(repeats * images)]
            value = log_prob(denoiser, sde, x.repeat(repeats, 1), trace, options, generator=generators).value
            return list(value.reshape(repeats, images))

        rows.append(
            {
                "path": path,
                "solver": "ours",
                "calls": calls,
                "error": float(error(result.value, result.latents * sde.prior_std).abs().mean()),
                "bias": float(error(result.value, result.latents * sde.prior_std).mean()),
                "scatter": scatter(repeated(TraceOptions())),
                "scatter_fixed_probe": scatter(repeated(TraceOptions("hutchinson"))),
                "probes_at_equal_cost": many,
                "scatter_at_equal_cost": scatter(repeated(TraceOptions(num_probes=many))),
            }
        )
        print_row(rows[-1])
    return rows


def print_row(row):
    print(
        f"{row['path']:7s} {row['solver']:20s} calls {row['calls']:6.1f}   solver error {row['error']:.5f}   scatter "
        f"{row['scatter']:.4f}, at equal cost {row['scatter_at_equal_cost']:.4f} bits/dim",
        flush=True,
    )


# ---------------------------------------------------------------------- part two


def on_network(folder: str, images: int) -> dict:
    from diffusers import DiffusionPipeline

    from diffusers_sde.images.loading import load_images
    from diffusers_sde.images.source import ImageSource
    from diffusers_sde.pipelines import ProbabilityFlow
    from diffusers_sde.training import TrainingConfig

    pipe = DiffusionPipeline.from_pretrained(folder)
    flow = ProbabilityFlow(pipe)
    config = TrainingConfig(dataset_name="digits")
    levels = torch.from_numpy(ImageSource(load_images(config), config).get_many(list(range(images))))
    quantization = Quantization(flow.data_min, flow.data_max)
    centers = quantization.centers(levels.reshape(images, *pipe.sample_shape))
    noise = torch.rand(centers.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    x = centers + noise * quantization.width
    d = x[0].numel()
    for parameter in flow.network.parameters():  # for the peers' sake: no graph to the weights
        parameter.requires_grad_(False)
    report: dict = {"model": type(flow.sde).__name__, "prediction_type": flow.scheduler.config.prediction_type}

    def bits(value):
        return (-value / (d * BITS) + quantization.offset).tolist()

    tight = flow.log_prob(x, TraceOptions(num_probes=4), flow.options(1e-5, 1e-5, 5000, images), generator=seed())
    report["reference"] = {"bits_per_dim": float(np.mean(bits(tight.value))), "calls": mean(tight.calls)}
    print("reference, ours at 1e-5 with 4 probes:", report["reference"], flush=True)
    runs = {
        f"ours, rtol {rtol:g}": lambda rtol=rtol: run_ours(flow, x, flow.options(rtol, rtol, 5000, images))
        for rtol in (1e-3, 3e-4, 1e-4)
    }
    if "torchdiffeq dopri5" in installed_peers():
        for rtol in (1e-3, 1e-4, 1e-5):
            runs[f"torchdiffeq dopri5, rtol {rtol:g}"] = lambda rtol=rtol: run_peer(flow, x, rtol)
    for name, run in runs.items():
        begin = time.perf_counter()
        value, calls = run()
        fastest = time.perf_counter() - begin
        report[name] = {
            "bits_per_dim": float(np.mean(bits(value))),
            "rms_difference_per_image": float(np.std(np.subtract(bits(value), bits(tight.value)))),
            "calls": calls,
            "seconds_per_image": fastest / images,
        }
        print(name, report[name], flush=True)
    code = flow.options(1e-5, 1e-5, 5000, images)
    codes = flow.encode(centers, code)
    back = flow.decode(codes.sample, code)
    report["round_trip"] = {
        "rms": float((back.sample - centers).square().mean().sqrt()),
        "calls": [mean(codes.calls), mean(back.calls)],
    }
    print("round trip at rtol 1e-5:", report["round_trip"], flush=True)
    return report


def seed():
    return torch.Generator().manual_seed(0)


def mean(calls):
    return float(calls.double().mean())


def run_ours(flow, x, options):
    result = flow.log_prob(x, options=options, generator=seed())
    return result.value, mean(result.calls)


def run_peer(flow, x, tolerance):
    def denoiser(x, t):
        return flow.denoiser(x.float(), t)

    sources = sample_generators(x, seed(), "probes")
    probe = torch.stack([2 * torch.randint(0, 2, x.shape[1:], generator=source) - 1 for source in sources])
    value, _, calls = peer_log_prob(torchdiffeq_dopri5, denoiser, flow.sde, x.double(), probe, tolerance, flow.t_min)
    return value, calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=[], help="Folders of pipelines trained on the digits.")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20, help="Probes per image.")
    parser.add_argument("--skip_mixture", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="outputs/likelihood.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = {
        "torch": torch.__version__,
        "threads": arguments.threads,
        "mixture": [] if arguments.skip_mixture else on_mixture(arguments.images, arguments.repeats),
        "networks": [on_network(folder, arguments.images) for folder in arguments.model],
    }
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()

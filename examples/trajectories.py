"""Figure 2 of the paper, redrawn: a one-dimensional mixture carried from data to prior and back.

python examples/trajectories.py --output trajectories.png [--sde vp]

The density p_t in the background is exact. Paths of the SDE (forward on the left, reverse on the right) are coloured,
paths of the probability-flow ODE are white: both have the same marginals, shown as histograms beside the exact curves.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from diffusers_sde import SDES, make_plan, sample
from diffusers_sde.sampling import get_time_grid
from diffusers_sde.sdes import SDE

MEANS = torch.tensor([-1.6, -0.2, 1.5], dtype=torch.float64)
STDS = torch.tensor([0.15, 0.25, 0.2], dtype=torch.float64)
WEIGHTS = torch.tensor([0.35, 0.25, 0.4], dtype=torch.float64)


def component_density(sde: SDE, x: Tensor, t: Tensor | float) -> Tensor:
    """Weight times density of each component of p_t at x, shape x.shape + (3,)."""
    alpha, variance = sde.alpha(t), sde.sigma(t) ** 2
    mean, std = alpha * MEANS, torch.sqrt((alpha * STDS) ** 2 + variance)
    return WEIGHTS * torch.exp(torch.distributions.Normal(mean, std).log_prob(x.unsqueeze(-1)))


def density(sde: SDE, x: Tensor, t: Tensor | float) -> Tensor:
    """p_t(x)."""
    return component_density(sde, x, t).sum(-1)


def denoise(sde: SDE, x: Tensor, t: Tensor) -> Tensor:
    """E[x_0 | x_t = x], exactly."""
    responsibility = component_density(sde, x, t)
    responsibility = responsibility / responsibility.sum(-1, keepdim=True).clamp_min(1e-300)
    alpha = sde.alpha(t)
    gain = alpha * STDS**2 / ((alpha * STDS) ** 2 + sde.sigma(t) ** 2)
    return (responsibility * (MEANS + gain * (x.unsqueeze(-1) - alpha * MEANS))).sum(-1)


def draw_data(n: int, generator: torch.Generator) -> Tensor:
    """n draws from the mixture."""
    component = torch.multinomial(WEIGHTS, n, replacement=True, generator=generator)
    return MEANS[component] + STDS[component] * torch.randn(n, generator=generator, dtype=torch.float64)


def forward_sde(sde: SDE, x: Tensor, times: Tensor, generator: torch.Generator) -> Tensor:
    """Exact forward paths through increasing times, shape (len(times), n)."""
    path = [x]
    for s, t in zip(times[:-1], times[1:], strict=True):
        factor, variance = sde.transition(s, t)
        path.append(factor * path[-1] + variance.sqrt() * torch.randn(x.shape, generator=generator, dtype=x.dtype))
    return torch.stack(path)


def reverse(sde: SDE, x: Tensor, times: Tensor, generator: torch.Generator, stochasticity: float) -> Tensor:
    """Reverse paths through decreasing times, shape (len(times), n)."""
    plan = make_plan(sde, times, "exponential", stochasticity=stochasticity, denoise_final=False)
    path = [x]
    sample(plan, lambda x, t: denoise(sde, x, t), x, generator, callback=lambda i, x: path.append(x))
    return torch.stack(path)


def draw(path: Path, sde: SDE, n: int = 4000, steps: int = 400) -> None:
    """Draw the figure for one SDE."""
    g = torch.Generator().manual_seed(0)
    down = get_time_grid("uniform", sde, steps, sde.t_max, max(sde.t_min, 1e-3))
    up = down.flip(0)
    data = draw_data(n, g)
    first = sde.alpha(up[0]) * data + sde.sigma(up[0]) * torch.randn(n, generator=g, dtype=torch.float64)
    forward = forward_sde(sde, first, up, g)
    prior = sde.prior_sample((n,), g, torch.float64)
    backward = reverse(sde, prior, down, g, 1.0)
    flow_back = reverse(sde, prior, down, g, 0.0)

    shown, scale = 5, sde.prior_std if sde.prior_std > 1.5 else 1.0
    limit = 3.2 * max(scale, 1.0)
    grid = torch.linspace(-limit, limit, 400, dtype=torch.float64)
    image = torch.stack([density(sde, grid, t) for t in up], dim=1)
    image = (image / image.amax(0, keepdim=True)).sqrt()

    figure, axes = plt.subplots(
        1, 5, figsize=(15, 4), width_ratios=[0.8, 4, 0.8, 4, 0.8], sharey=True, layout="constrained"
    )
    colours = plt.get_cmap("autumn")(torch.linspace(0.1, 0.9, shown).numpy())
    panels = [
        (axes[1], image, up, forward, flow_back.flip(0), "forward SDE: data to prior"),
        (axes[3], image.flip(1), up, backward, flow_back, "reverse SDE: prior to data"),
    ]
    for axis, picture, times, sde_paths, ode_paths, title in panels:
        axis.imshow(
            picture.numpy(), extent=(0, 1, -limit, limit), origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1
        )
        x = (times / sde.t_max).numpy()
        for k in range(shown):
            axis.plot(x, sde_paths[:, k].numpy(), color=colours[k], linewidth=0.8)
        # White: the ODE from evenly spread quantiles, so that the paths follow the mass.
        order = ode_paths[0].argsort()
        for k in order[torch.linspace(0.03 * n, 0.97 * n, 9).long()]:
            axis.plot(x, ode_paths[:, k].numpy(), color="white", linewidth=1.3)
        axis.set_title(f"{title}  (colour: SDE, white: ODE)", fontsize=10)
        axis.set_xlim(0, 1)
        axis.set_xlabel("t" if title.startswith("forward") else "T - t")
    ends = [
        (axes[0], forward[0], flow_back[-1], up[0], "$p_0$"),
        (axes[2], forward[-1], prior, up[-1], "$p_T$"),
        (axes[4], backward[-1], flow_back[-1], up[0], "$p_0$"),
    ]
    for axis, by_sde, by_ode, t, title in ends:
        style = {"bins": 80, "range": (-limit, limit), "density": True, "orientation": "horizontal"}
        axis.hist(by_sde.numpy(), color="tab:orange", alpha=0.6, label="SDE", **style)
        axis.hist(by_ode.numpy(), color="tab:blue", histtype="step", label="ODE", **style)
        axis.plot(density(sde, grid, t).numpy(), grid.numpy(), color="black", linewidth=1, label="exact")
        axis.set_title(title)
        axis.set_xticks([])
    axes[0].invert_xaxis()
    axes[0].set_ylim(-limit, limit)
    axes[0].legend(fontsize=7, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Parse arguments and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/trajectories.png"), help="PNG to write")
    parser.add_argument("--sde", choices=sorted(SDES), default="vp", help="which SDE (default: vp)")
    arguments = parser.parse_args()
    sde = SDES[arguments.sde](sigma_max=4.0) if arguments.sde == "ve" else SDES[arguments.sde]()
    draw(arguments.output, sde)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()

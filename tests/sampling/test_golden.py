"""Parity with what the paper's official PyTorch code computes, recorded in float32 on six samples with times of their
own.

Where the two agree by construction the tolerance is float32 rounding. Where the official code takes its discrete tables
at index floor(t (N - 1)), ours is put on the same table: SMLD's scale i is the VE path at t = i/(N - 1), DDPM's entry i
the discrete VP path at t = (i + 1)/N. There the update is equal too, because both are exact transitions of that table.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_sde.networks.parametrizations import get_parametrization
from diffusers_sde.sampling.classical import Ancestral
from diffusers_sde.sampling.planning import make_plan
from diffusers_sde.sampling.rows import advance
from diffusers_sde.sdes import VESDE, VPSDE, DiscreteVPSDE, SubVPSDE

GOLDEN = {
    key: torch.from_numpy(np.asarray(value)).double()
    for key, value in np.load(Path(__file__).parents[1] / "data" / "score_sde_golden.npz").items()
}
N = 1000
X, SCORE, NOISE, T = (GOLDEN[key] for key in ("x", "score", "noise", "t"))
INDEX = (T.float() * (N - 1)).long().tolist()  # float32, as the official code has it
SDES = {"ve": VESDE(), "vp": VPSDE(), "subvp": SubVPSDE()}
TABLE = DiscreteVPSDE()  # DDPM's betas, which are the official discrete_betas at N = 1000
every_sde = pytest.mark.parametrize("name", SDES)


def close(ours, key, rtol=1e-5, samples=slice(None)):
    """To ``rtol`` of the largest number in the recorded array: the official sums are float32."""
    theirs = GOLDEN[key][samples]
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))


def rows(sde, pairs, predictor="ancestral", corrector=None, **kwargs):
    """The first row for each sample's own (t, s), for a model that returns the score."""
    score = get_parametrization("score")
    plans = [make_plan(sde, torch.tensor(p, dtype=torch.float64), predictor, corrector, **kwargs) for p in pairs]
    return [plan.fold(score, sde).rows[0] for plan in plans]


def updates(rows, samples, noise=True):
    """One recorded update per row: x, or x_mean without its noise."""
    draw = NOISE if noise else torch.zeros_like(NOISE)
    return torch.cat(
        [
            advance(row, X[i, None], SCORE[i, None], [], lambda: draw[i, None])[0]  # noqa: B023
            for row, i in zip(rows, samples, strict=True)
        ]
    )


# ---------------------------------------------------------------------- the SDE


@every_sde
def test_drift_diffusion_marginal_and_prior(name):
    sde = SDES[name]
    close(sde.drift(X, T), f"{name}/drift")
    mean, std = sde.marginal(X, T)
    close(mean, f"{name}/marginal_mean")
    torch.testing.assert_close(sde.prior_log_prob(X), GOLDEN[f"{name}/prior_logp"], rtol=1e-5, atol=0)
    # Per entry to 1e-5, plus the rounding of the official 1 - exp(-B) in float32: 6e-8/B, 5e-4 of it at t = 1e-3.
    integral = VPSDE()._integral_beta(T)
    for ours, key in ((std.flatten(), "marginal_std"), (sde.diffusion(T), "diffusion")):
        theirs = GOLDEN[f"{name}/{key}"]
        cancellation = 0.0 if name == "ve" else 1.2e-7 / integral
        assert ((ours / theirs - 1).abs() < 1e-5 + cancellation).all()


# ---------------------------------------------------------------------- predictors


@every_sde
def test_euler_maruyama(name):
    """The official step is dt = -1/N, whatever the grid."""
    sde = SDES[name]
    got = rows(sde, [(float(t), float(t) - 1 / N) for t in T], "euler_maruyama", denoise_final=False)
    close(updates(got, range(6)), f"{name}/N1000/euler_maruyama/x")
    close(updates(got, range(6), noise=False), f"{name}/N1000/euler_maruyama/x_mean")


# Official predictor names, and ours with the options that make them equal.
TABLE_PREDICTORS = {
    "reverse_diffusion": ("reverse_diffusion", {}),
    "reverse_diffusion_ode": ("reverse_diffusion", {"stochasticity": 0.0}),
    "ancestral_sampling": ("ancestral", {}),
}


def of_the_table(official):
    """On DDPM's table the official ancestral noise is sqrt(beta): fixed_large in diffusers' words."""
    ours, kwargs = TABLE_PREDICTORS[official]
    return (Ancestral("fixed_large") if ours == "ancestral" else ours), kwargs


@pytest.mark.parametrize("official", TABLE_PREDICTORS)
def test_vp_predictors_on_ddpms_table(official):
    """Entry i at t = (i + 1)/N."""
    ours, kwargs = of_the_table(official)
    pairs = [((i + 1) / N, i / N) for i in INDEX]
    got = rows(TABLE, pairs, ours, denoise_final=False, **kwargs)
    close(updates(got, range(6)), f"vp/N1000/{official}/x")
    close(updates(got, range(6), noise=False), f"vp/N1000/{official}/x_mean")


@pytest.mark.parametrize("official", TABLE_PREDICTORS)
def test_ve_predictors_on_smlds_scales(official):
    """Scale i at t = i/(N - 1); the last sample is at i = 0, below which the official code puts sigma = 0."""
    ours, kwargs = TABLE_PREDICTORS[official]
    assert INDEX[:-1] == [999, 749, 499, 199, 49] and INDEX[-1] == 0
    pairs = [(i / (N - 1), (i - 1) / (N - 1)) for i in INDEX[:-1]]
    got = rows(SDES["ve"], pairs, ours, denoise_final=False, **kwargs)
    close(updates(got, range(5)), f"ve/N1000/{official}/x", samples=slice(5))
    close(updates(got, range(5), noise=False), f"ve/N1000/{official}/x_mean", samples=slice(5))

    if official != "reverse_diffusion_ode":
        # From sigma_min to the data: our last row, x0_hat. Official reverse diffusion adds noise sigma_min to it.
        (row,) = rows(SDES["ve"], [(0.0,)])
        x0_hat = updates([row], [5])
        close(x0_hat, f"ve/N1000/{official}/x_mean", samples=slice(5, 6))
        noise = 0.01 * NOISE[5:] if official == "reverse_diffusion" else 0.0
        close(x0_hat + noise, f"ve/N1000/{official}/x", samples=slice(5, 6))


@pytest.mark.parametrize("suffix, eta", [("", 1.0), ("_ode", 0.0)])
def test_sub_vp_reverse_diffusion_is_euler_maruyama_there(suffix, eta):
    """The official sub-VP SDE has no table of its own and falls back to f dt and g sqrt(dt) with dt = 1/N."""
    sde, key = SDES["subvp"], f"subvp/N1000/reverse_diffusion{suffix}"
    pairs = [(float(t), float(t) - 1 / N) for t in T]
    got = rows(sde, pairs, "euler_maruyama", stochasticity=eta, denoise_final=False)
    close(updates(got, range(6)), f"{key}/x")
    close(updates(got, range(6), noise=False), f"{key}/x_mean")

    # Ours takes the exact transition over the step, int g^2 exp(-int beta) rather than g^2 dt at its end: smaller by
    # (d log g^2/dt) dt/2, which is dt/t near 0, and by the decay, beta dt/2 = |f| dt; 1 % at t = 1.
    exact = rows(sde, pairs[:-1], "reverse_diffusion", stochasticity=eta, denoise_final=False)
    for ours, theirs, (t, s) in zip(exact, got[:-1], pairs, strict=False):
        g2 = sde.g2(torch.tensor([t, s], dtype=torch.float64)).log()
        allowed = 0.55 * float(g2[0] - g2[1]) + 1.1 * float(sde.f(t)) / -N
        assert 0.8 * allowed < 1 - ours.model / theirs.model < allowed
        assert ours.x == pytest.approx(theirs.x, abs=1e-4)


@pytest.mark.parametrize("official", TABLE_PREDICTORS)
def test_the_continuous_vp_path_differs_from_the_table_by_its_beta(official):
    """On VPSDE the same step [i/N, (i + 1)/N] has 1 - exp(-int beta) for beta_i: beta_i/2 + 1/(2 i) relative, at most
    1.5 % here, and the update changes by that share of its length."""
    ours, kwargs = of_the_table(official)
    samples = range(5)
    pairs = [((i + 1) / N, i / N) for i in INDEX[:-1]]
    got = updates(rows(SDES["vp"], pairs, ours, denoise_final=False, **kwargs), samples)
    theirs = GOLDEN[f"vp/N1000/{official}/x"][:5]
    length = (theirs - X[:5]).flatten(1).norm(dim=1)
    difference = (got - theirs).flatten(1).norm(dim=1)
    assert (difference > 1e-5 * length).all() and (difference < 0.015 * length).all()


# ---------------------------------------------------------------------- correctors


def corrector_rows(name, corrector, snr):
    if name == "ve":
        return rows(SDES["ve"], [(float(t), 0.99 * float(t)) for t in T], corrector=corrector, snr=snr)
    return rows(TABLE, [((i + 1) / N, i / N) for i in INDEX], corrector=corrector, snr=snr, denoise_final=False)


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_langevin(name):
    """Each sample alone: its own norms. x_mean is checked through x - sqrt(2 step) z = x_mean."""
    snr = float(GOLDEN[f"{name}/N1000/langevin/snr"])
    got = corrector_rows(name, "langevin", snr)
    ours = updates(got, range(6))
    close(ours, f"{name}/N1000/langevin/x")
    for i, row in enumerate(got):
        step = row.langevin * (NOISE[i].norm() / SCORE[i].norm()) ** 2
        close((ours[i] - (2 * step).sqrt() * NOISE[i])[None], f"{name}/N1000/langevin/x_mean", samples=slice(i, i + 1))


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_langevin_with_the_batch_mean_of_the_norms(name):
    """The official code for a batch. alpha_i is each sample's own (they have their own times), the norms are shared."""
    snr = float(GOLDEN[f"{name}/N1000/langevin/snr"])
    got = corrector_rows(name, "langevin", snr)
    ours = [advance(row, X, SCORE, [], lambda: NOISE, batch_norms=True)[0][i] for i, row in enumerate(got)]
    close(torch.stack(ours), f"{name}/N1000/langevin_batch/x")
    assert not torch.allclose(torch.stack(ours), GOLDEN[f"{name}/N1000/langevin/x"], rtol=1e-3)


@pytest.mark.parametrize("batch", ["", "_batch"])
def test_annealed_langevin_ve(batch):
    got = corrector_rows("ve", "annealed_langevin", float(GOLDEN["ve/N1000/ald/snr"]))
    close(updates(got, range(6)), f"ve/N1000/ald{batch}/x")
    if not batch:
        close(updates(got, range(6), noise=False), "ve/N1000/ald/x_mean")


@pytest.mark.parametrize("batch", ["", "_batch"])
def test_annealed_langevin_vp(batch):
    """The official code mixes sigma of the continuous path at t with alpha_i = 1 - beta_i of the table at floor(t (N -
    1)).

    On the continuous path alpha_i = exp(-int beta) over one step: a relative difference in the step size below 1e-4,
    and so below 1e-4 in the update. (At t = 1e-3 a step of 1/N leads to the data itself.)
    """
    snr = float(GOLDEN["vp/N1000/ald/snr"])
    pairs = [(float(t), max(float(t) - 1 / N, 1e-12)) for t in T]
    got = updates(rows(SDES["vp"], pairs, corrector="annealed_langevin", snr=snr), range(6))
    theirs = GOLDEN[f"vp/N1000/ald{batch}/x"]
    ratio = (got - theirs).flatten(1).norm(dim=1) / (theirs - X).flatten(1).norm(dim=1)
    assert (ratio < 5e-4).all()

"""VP and sub-VP paths on [0, t_max] with linear or constant beta, against their closed forms."""

import math

import pytest
import torch
from analytic import PointwiseGaussian
from diffusers import DDIMScheduler

from diffusers_sde import ODEOptions, SubVPSDEScheduler, TraceOptions, VPSDEScheduler, log_prob
from diffusers_sde.sdes import VPSDE, SubVPSDE

CONSTANT = {"num_train_timesteps": 1, "beta_start": 1.0, "beta_end": 1.0, "t_max": 10.0, "time_conditioning": "time"}
MAKE = {
    "vp": lambda **k: VPSDEScheduler(**CONSTANT | {"continuous": True} | k),
    "sub_vp": lambda **k: SubVPSDEScheduler(**CONSTANT | k),
}
# sigma(t) and g(t)^2 for beta = 1 (Song et al. 2021, eq. 11, 12 and 29)
SIGMA = {"vp": lambda t: torch.sqrt(1.0 - torch.exp(-t)), "sub_vp": lambda t: 1.0 - torch.exp(-t)}
G2 = {"vp": torch.ones_like, "sub_vp": lambda t: 1.0 - torch.exp(-2.0 * t)}
both = pytest.mark.parametrize("name", MAKE)


@both
def test_constant_beta(name):
    sde = MAKE[name]().sde
    t = torch.linspace(0.01, 10.0, 100, dtype=torch.float64)
    torch.testing.assert_close(sde.alpha(t), torch.exp(-t / 2.0), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(sde.sigma(t), SIGMA[name](t), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(sde.f(t), torch.full_like(t, -0.5), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(sde.g2(t), G2[name](t), rtol=1e-9, atol=0.0)
    torch.testing.assert_close(sde.time_of(sde.log_snr(t)), t, rtol=1e-9, atol=0.0)
    assert (sde.t_max, sde.prior_std) == (10.0, 1.0)


@pytest.mark.parametrize("cls", [VPSDE, SubVPSDE])
def test_linear_beta_reaches_its_end_at_t_max(cls):
    sde = cls.from_ends(0.1, 4.0, 5.0)
    ends = torch.tensor([0.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(-2.0 * sde.f(ends), torch.tensor([0.1, 4.0], dtype=torch.float64))
    # B(t_max) is the mean of the betas times the length.
    assert float(sde.log_alpha(5.0)) == pytest.approx(-0.5 * 5.0 * 0.5 * (0.1 + 4.0))
    assert cls.from_ends(0.1, 20.0) == cls(0.1, 20.0)  # bit for bit, so that saved models stay what they are
    scheduler = VPSDEScheduler(100, 0.001, 0.04, continuous=True, t_max=5.0)
    assert scheduler.sde == VPSDE.from_ends(0.1, 4.0, 5.0)


@both
def test_the_network_is_fed_t_itself(name):
    scheduler = MAKE[name](time_grid="uniform", sampling_eps=0.1)
    assert scheduler.timesteps.tolist() == [10.0]
    scheduler.set_timesteps(12)
    torch.testing.assert_close(scheduler.timesteps, torch.linspace(10.0, 0.1, 12))
    x0, noise, t = torch.ones(2, 1), torch.full((2, 1), 2.0), torch.tensor([1.0, 7.0])
    noisy = scheduler.add_noise(x0, noise, t)
    torch.testing.assert_close(noisy[:, 0], torch.exp(-t / 2.0) + 2.0 * SIGMA[name](t))
    with pytest.raises(ValueError, match=r"between 0 and 10, got"):
        scheduler.add_noise(x0, noise, torch.tensor([1.0, 10.5]))


@both
def test_counts_are_relative_to_t_max(name):
    scheduler = MAKE[name](num_train_timesteps=100, beta_start=0.01, beta_end=0.01, time_conditioning="continuous")
    assert scheduler.timesteps.tolist() == list(range(100, 0, -1))
    assert float(scheduler.sde_time(25.0)) == pytest.approx(2.5)
    index = MAKE[name](num_train_timesteps=100, beta_start=0.01, beta_end=0.01, time_conditioning="discrete")
    assert index.timesteps.tolist() == list(range(99, -1, -1))
    assert float(index.sde_time(24)) == pytest.approx(2.5)
    torch.testing.assert_close(index.add_noise(torch.ones(1), torch.zeros(1), 24), torch.full((1,), math.exp(-1.25)))
    stock_grid = MAKE[name](
        num_train_timesteps=100, beta_start=0.01, beta_end=0.01, time_conditioning="discrete", time_grid=None
    )
    stock_grid.set_timesteps(4)
    assert stock_grid.timesteps.tolist() == [75, 50, 25, 0]
    assert [row.t for row in stock_grid.rows] == pytest.approx([7.6, 5.1, 2.6, 0.1])


@both
def test_samples_and_densities_are_those_of_the_exact_model(name):
    model, scheduler = PointwiseGaussian(), MAKE[name](prediction_type="score", probability_flow=True)
    sde = scheduler.sde

    def score(x, t):
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        estimate = alpha.reshape(-1, 1) * model.denoise(x.double(), alpha, sigma)
        return (estimate - x.double()) / sigma.reshape(-1, 1) ** 2

    scheduler.set_timesteps(200)
    x = start = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(score(x, t.double()), t, x).prev_sample
    shift, scale = model.mean - start.mean() * model.std, model.std
    torch.testing.assert_close(x, shift + scale * start, rtol=0.0, atol=0.03)
    assert float(x.std()) == pytest.approx(model.std * float(start.std()), rel=0.01)
    x0 = torch.tensor([[0.1], [0.9]], dtype=torch.float64)
    denoise = scheduler.denoiser(lambda x, t: score(x, t).to(x.dtype))
    found = log_prob(denoise, sde, x0, TraceOptions("exact"), ODEOptions(rtol=1e-7, atol=1e-7))
    exact = torch.distributions.Normal(model.mean, model.std).log_prob(x0[:, 0])
    torch.testing.assert_close(found.value, exact, atol=0.01, rtol=0.0)


@both
def test_the_config_keeps_it(name, tmp_path):
    scheduler = MAKE[name]()
    scheduler.save_pretrained(tmp_path)
    again = type(scheduler).from_pretrained(tmp_path)
    through_stock = type(scheduler).from_config(DDIMScheduler.from_config(scheduler.config).config)
    assert scheduler.sde == again.sde == through_stock.sde
    assert again.config.t_max == 10.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"beta_start": 2.0}, "beta_start must be at most beta_end"),
        ({"beta_start": 0.0, "beta_end": 0.0}, "beta_end must be"),
        ({"t_max": 0.0}, "t_max must be"),
        ({"t_max": 2000.0}, "times t_max"),
        ({"sampling_eps": 10.0}, "sampling_eps must be"),
    ],
)
@both
def test_what_is_refused(name, arguments, words):
    with pytest.raises(ValueError, match=words):
        MAKE[name](**arguments)


def test_a_table_lies_on_the_unit_interval():
    with pytest.raises(ValueError, match="t_max must be 1 for a table of betas, got 10"):
        VPSDEScheduler(t_max=10.0)
    assert VPSDEScheduler(beta_start=0.01, beta_end=0.01).betas.unique().tolist() == pytest.approx([0.01])

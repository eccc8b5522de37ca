"""Everything that runs on a device runs on one without float64, as Apple's are, and gives what the CPU gives.

``test_without_float64`` runs this file in a process of its own.
"""

import diffusers
import pytest
import torch
from hub_models import tiny_pipeline
from pretend_device import DEVICE, pretended_device, register
from tiny_networks import tiny_unet
from tiny_parts import HAS_TRANSFORMERS

from diffusers_sde import (
    ClassConditionalSDEPipeline,
    FlowSDEScheduler,
    InpaintSDEPipeline,
    RestorationSDEPipeline,
    SDEPipeline,
    SubVPSDEScheduler,
    VESDEScheduler,
    VPSDEScheduler,
    bits_per_dim,
    collect_rollout,
    fit_scheduler,
    log_prob,
    make_plan,
    profile_grid,
    sample,
    sample_adaptive,
)
from diffusers_sde.basics import precision
from diffusers_sde.fitting import EnergyTarget, PairedTarget
from diffusers_sde.fitting.targets import SETS, Batch
from diffusers_sde.flow.codes import decode, encode, interpolate, sample_flow
from diffusers_sde.flow.solver import ODEOptions
from diffusers_sde.flow.trace import TraceOptions
from diffusers_sde.guidance.operators import Downsampling, GaussianBlur, Mask
from diffusers_sde.guidance.particles import SMC
from diffusers_sde.guidance.posteriors import POSTERIOR_METHODS, posterior_denoiser
from diffusers_sde.guidance.replacement import renoise
from diffusers_sde.networks.losses import denoising_loss, sample_times
from diffusers_sde.networks.parametrizations import Epsilon
from diffusers_sde.pipelines import ProbabilityFlow
from diffusers_sde.sampling.adaptive import SDEOptions
from diffusers_sde.sampling.observation import posterior_mean, posterior_samples
from diffusers_sde.sdes import SDES, expand_like

SCHEDULERS = {"vp": VPSDEScheduler, "sub_vp": SubVPSDEScheduler, "ve": VESDEScheduler, "flow": FlowSDEScheduler}
every_sde = pytest.mark.parametrize("sde", [cls() for cls in SDES.values()], ids=SDES)
REGISTERED = register()
LOOSE = ODEOptions(rtol=1e-3, atol=1e-3)


@pytest.fixture
def pretended(monkeypatch):
    """The name of the device."""
    if not REGISTERED:
        pytest.skip("this torch knows no devices written in Python")
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", frozenset({DEVICE}))
    with pretended_device() as device:
        yield device


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generators(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def denoiser_of(sde):
    """The denoiser of pixels that are N(0.3, 0.5^2), in the precision of the state."""

    def denoise(x, t, **conditioning):
        assert t.device == x.device
        alpha, sigma = (expand_like(v, x).to(x) for v in (sde.alpha(t), sde.sigma(t)))
        return 0.3 + alpha * 0.25 * (x - 0.3 * alpha) / (alpha.square() * 0.25 + sigma.square())

    return denoise


def agrees(device, run, *inputs, atol=2e-4):
    """``run`` of tensors gives the same numbers on the device as on the CPU."""
    there = run(*(x.to(device) for x in inputs))
    here = run(*inputs)
    for found, right in zip(there, here, strict=True) if isinstance(here, tuple) else ((there, here),):
        found, right = (torch.as_tensor(v).cpu().double() for v in (found, right))
        assert bool(torch.isfinite(right).all())
        torch.testing.assert_close(found, right, rtol=2e-3, atol=atol)


def test_what_the_device_refuses(pretended):
    x = normal(2).to(pretended)
    assert x.device.type == pretended and (2 * x).cpu().tolist() == (2 * normal(2)).tolist()
    for refused in (
        lambda: x.double(),
        lambda: x.to("cpu", torch.float64),
        lambda: torch.zeros(2, dtype=torch.float64, device=pretended),
        lambda: torch.tensor([1.0], dtype=torch.float64, device=pretended),
        lambda: normal(2).double().to(pretended),
    ):
        with pytest.raises(TypeError, match="float64"):
            refused()
    with pytest.raises(RuntimeError, match="host"):
        x + normal(2)


# ---------------------------------------------------------------------- schedulers and samplers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"probability_flow": True},
        {"solver_type": "midpoint", "solver_order": 2},
        {"probability_flow": True, "corrector": "ornstein_uhlenbeck", "snr": 0.2},
        {"corrector": "langevin", "snr": 0.16},
        {"time_grid": "karras", "clip_sample": True},
    ],
    ids=lambda options: "-".join(map(str, options)) or "nothing set",
)
@pytest.mark.parametrize("cls", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers(pretended, cls, options):
    scheduler = cls(**options)

    def run(z):
        scheduler.set_timesteps(6, device=z.device)
        x, g = z * scheduler.init_noise_sigma, torch.Generator().manual_seed(0)
        for t in scheduler.timesteps:
            assert t.device.type == z.device.type
            scheduler.scale_model_input(x, t)
            x = scheduler.step(0.8 * x / x.std(), t, x, generator=g).prev_sample
        noisy = scheduler.add_noise(z, z, scheduler.timesteps[:1].expand(len(z)))
        return x, noisy

    agrees(pretended, run, normal(3, 1, 4, 4), atol=2e-3)


@every_sde
def test_samplers(pretended, sde):
    denoise = denoiser_of(sde)
    times = torch.linspace(1.0, 0.02, 8, dtype=torch.float64) * sde.t_max
    plan = make_plan(sde, times, "exponential", corrector="langevin")
    start = normal(3, 4) * sde.prior_std
    agrees(pretended, lambda x: sample(plan, denoise, x, generators(3)), start)
    agrees(pretended, lambda x: renoise(sde, x, 0.2 * sde.t_max, 0.5 * sde.t_max, generators(3)), start)


@pytest.mark.parametrize("stochasticity", [0.0, 1.0])
@every_sde
def test_adaptive_steps(pretended, sde, stochasticity):
    options = SDEOptions(0.1, 0.1, stochasticity=stochasticity)

    def run(x):
        labels = torch.arange(len(x), device=x.device)
        return sample_adaptive(
            denoiser_of(sde), sde, x, options, conditioning={"labels": labels}, generator=generators(len(x))
        ).sample

    agrees(pretended, run, normal(3, 4) * sde.prior_std, atol=1e-3)


@every_sde
def test_observations(pretended, sde):
    std = 0.5
    agrees(pretended, lambda y: posterior_mean(denoiser_of(sde), sde, y, std), normal(3, 4))
    agrees(
        pretended,
        lambda y: posterior_samples(denoiser_of(sde), sde, y, std, 2, num_steps=6, generator=generators(6)),
        normal(3, 4),
    )


# ---------------------------------------------------------------------- the probability flow


@every_sde
def test_the_flow(pretended, sde):
    denoise = denoiser_of(sde)
    agrees(pretended, lambda x: sample_flow(denoise, sde, x, LOOSE).sample, normal(3, 4) * sde.prior_std)
    agrees(pretended, lambda x: encode(denoise, sde, x, LOOSE).sample / sde.prior_std, 0.5 * normal(3, 4))
    agrees(pretended, lambda z: decode(denoise, sde, z, LOOSE).sample, normal(3, 4))
    agrees(
        pretended,
        lambda a, b: interpolate(denoise, sde, a, b, 3, LOOSE).sample,
        0.5 * normal(2, 4),
        0.5 * normal(2, 4, seed=1),
    )


@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_likelihoods(pretended, method):
    sde, trace = SDES["vp"](), TraceOptions(method)

    def run(x):
        return log_prob(denoiser_of(sde), sde, x, trace, LOOSE, generator=generators(len(x))).value

    agrees(pretended, run, 0.5 * normal(3, 4), atol=0.05)


@pytest.mark.parametrize("dequantization", ["uniform", "truncated_normal"])
def test_bits(pretended, dequantization):
    sde, images = SDES["vp"](), torch.randint(256, (3, 1, 2, 2), generator=torch.Generator().manual_seed(0))

    def run(x):
        return bits_per_dim(
            denoiser_of(sde), sde, x, dequantization=dequantization, options=LOOSE, generator=generators(len(x))
        ).per_image

    agrees(pretended, run, images, atol=0.01)
    agrees(pretended, run, images / 127.5 - 1.0, atol=0.01)


# ---------------------------------------------------------------------- guidance


OPERATORS = {
    "mask": Mask((torch.arange(16) % 3 == 0).float().reshape(1, 4, 4), (1, 4, 4)),
    "downsampling": Downsampling(2, (1, 4, 4)),
    "blur": GaussianBlur(0.8, (1, 4, 4)),
}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("method", [name for name in POSTERIOR_METHODS if name not in ("smc", "psld")])
@pytest.mark.parametrize("name", ["vp", "flow"])
def test_posteriors(pretended, name, method, operator):
    sde = SCHEDULERS[name]().sde
    options = {"covariance": 0.25} if method == "gaussian" else {}

    def run(x, truth):
        y = operator.apply(truth)
        guided = posterior_denoiser(denoiser_of(sde), sde, operator, y, 0.1, method, **options)
        return guided(x, torch.tensor(0.5 * sde.t_max, device=x.device))

    agrees(pretended, run, normal(2, 1, 4, 4), 0.5 * normal(2, 1, 4, 4, seed=1))


def test_particles(pretended):
    sde, operator = SDES["vp"](), OPERATORS["mask"]
    times = torch.linspace(1.0, 0.02, 12, dtype=torch.float64)
    plan = make_plan(sde, times, "exponential", stochasticity=1.0)

    def run(truth):
        found = SMC(8, data_std=0.5).sample(
            plan, denoiser_of(sde), sde, operator, operator.apply(truth), 0.2, torch.Generator().manual_seed(0)
        )
        return found.mean(), found.log_evidence

    agrees(pretended, run, 0.5 * normal(2, 1, 4, 4), atol=0.02)


# ---------------------------------------------------------------------- training and fitting


@every_sde
def test_losses(pretended, sde):
    parametrization = Epsilon()

    def run(x0, eps):
        t = sample_times(sde, len(x0), torch.Generator().manual_seed(0)).to(torch.float32).to(x0.device)
        return denoising_loss(sde, parametrization, lambda x, t: 0.5 * x, x0, t, eps)

    agrees(pretended, run, 0.5 * normal(4, 3), normal(4, 3, seed=1), atol=1e-2)

    def with_times_of_the_host(x0, eps):
        t = sample_times(sde, len(x0), torch.Generator().manual_seed(0))
        return denoising_loss(sde, parametrization, lambda x, t: 0.5 * x, x0, t, eps)

    agrees(pretended, with_times_of_the_host, 0.5 * normal(4, 3), normal(4, 3, seed=1), atol=1e-2)
    assert sample_times(sde, 4, device=pretended).dtype == torch.float32


def test_distances(pretended):
    images, others = normal(64, 1, 6, 6), normal(32, 1, 6, 6, seed=1)

    def run(references, samples):
        target = EnergyTarget(dict.fromkeys(SETS, references), bounds=(-1.0, 1.0))
        batch = Batch(samples, references)
        found = target.compare(samples, 0.5 * samples, batch)
        paired = PairedTarget(dict.fromkeys(SETS, samples), dict.fromkeys(SETS, samples))
        ends = paired.compare(samples + 1, samples, Batch(samples, samples))
        return found.fitted, found.unfitted, found.error, target.loss(samples, batch), ends.fitted

    agrees(pretended, run, images, others, atol=1e-4)


# ---------------------------------------------------------------------- pipelines


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unconditional(scheduler=VPSDEScheduler, cls=SDEPipeline, **options):
    return quiet(cls(tiny_unet(), scheduler(prediction_type="v_prediction", **options)))


def draws_the_same(device, pipe, *arguments, generator=lambda: generators(2), **call):
    """The pipeline draws on the device what it draws on the CPU."""
    call = {"num_inference_steps": 3, "output_type": "np", **call}
    assert pipe.device.type == "cpu"
    here = pipe(*arguments, generator=generator(), **call).images
    pipe.to(device)
    assert pipe.device.type == device
    images = pipe(*arguments, generator=generator(), **call).images
    assert len(images) == 2 and here.std() > 0.0 and abs(images - here).max() < 1e-3


def test_pipelines(pretended):
    draws_the_same(pretended, unconditional(), batch_size=2)


def test_a_stock_pipeline(pretended):
    pipe = quiet(diffusers.DDPMPipeline(tiny_unet(), diffusers.DDPMScheduler()))
    pipe.scheduler = VPSDEScheduler.from_config(pipe.scheduler.config)
    draws_the_same(pretended, pipe, batch_size=2)


def test_pipelines_with_classes(pretended):
    scheduler = VPSDEScheduler(prediction_type="v_prediction")
    pipe = quiet(ClassConditionalSDEPipeline(tiny_unet(num_class_embeds=4), scheduler, null_class=3))
    draws_the_same(pretended, pipe, class_labels=[0, 1], guidance_scale=2.0)


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="captions need transformers")
def test_pipelines_with_captions(pretended):
    draws_the_same(pretended, quiet(tiny_pipeline("text")), ["a cab", "a lead"], guidance_scale=2.0)


def test_pipelines_on_latents(pretended):
    vqvae = diffusers.VQModel(block_out_channels=(4,), norm_num_groups=2, num_vq_embeddings=4, latent_channels=1)
    scheduler = VPSDEScheduler(prediction_type="v_prediction")
    draws_the_same(pretended, quiet(SDEPipeline(tiny_unet(), scheduler, vae=vqvae.eval())), batch_size=2)


IMAGES = normal(2, 1, 8, 8).clamp(-1, 1)


@pytest.mark.parametrize("posterior", ["mmps", "pigdm", "dps", "replacement"])
def test_completions(pretended, posterior):
    mask = (torch.arange(8) >= 4).float().expand(8, 8)
    draws_the_same(pretended, unconditional(cls=InpaintSDEPipeline), IMAGES, mask, posterior=posterior)


@pytest.mark.parametrize("posterior", ["mmps", "pigdm", "dps", "smc"])
def test_restorations(pretended, posterior):
    one = {"generator": lambda: torch.Generator().manual_seed(0)} if posterior == "smc" else {}
    operator, pipe = Downsampling(2, (1, 8, 8)), unconditional(cls=RestorationSDEPipeline)
    draws_the_same(pretended, pipe, operator.apply(IMAGES), operator, noise_std=0.1, posterior=posterior, **one)


def test_the_flow_of_a_pipeline(pretended):
    def run(images):
        flow = ProbabilityFlow(unconditional().to(images.device))
        found = flow.log_prob(images, options=LOOSE, generator=generators(2))
        return found.value / images[0].numel(), flow.encode(images, options=LOOSE).sample

    agrees(pretended, run, IMAGES, atol=5e-3)


def test_transitions_of_several_rows(pretended):
    scheduler = VPSDEScheduler(policy="exact")
    scheduler.set_timesteps(4)

    def run(x):
        law = scheduler.transition(0.5 * x, 0, x, index=[1, 2, 1])
        return law.mean, law.std

    agrees(pretended, run, normal(3, 1, 4, 4))


def test_rollouts(pretended):
    def run(device):
        pipe = unconditional(FlowSDEScheduler, policy="exact").to(device)
        return collect_rollout(pipe, batch_size=2, num_inference_steps=3, generator=generators(2)).log_probs

    agrees(pretended, lambda x: run(x.device), torch.zeros(1), atol=1e-3)


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_grids(pretended, name):
    sde = SDES[name]()
    agrees(pretended, lambda noise: torch.tensor(profile_grid(denoiser_of(sde), sde, noise)), normal(16, 4), atol=1e-3)


def test_fits(pretended):
    """The gradients reach the parameters, which stand on the host in float64."""
    images = normal(64, 1, 8, 8).clamp(-1, 1)

    def run(device):
        pipe = unconditional().to(device)
        report = fit_scheduler(pipe, 3, images, steps=2, batch_size=8, held_out=16, progress_bar=False).report
        return torch.tensor([report["fitted"], report["unfitted"]])

    agrees(pretended, lambda x: run(x.device), torch.zeros(1), atol=1e-3)

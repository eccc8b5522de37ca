"""The probability flow of pipelines: stock ones and ours, on small untrained networks."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)
from diffusers.schedulers import CMStochasticIterativeScheduler
from PIL import Image

from diffusers_sde import FlowSDEScheduler, SDEPipeline, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from diffusers_sde.flow.likelihood import log_prob
from diffusers_sde.flow.solver import ODEOptions
from diffusers_sde.flow.trace import TraceOptions
from diffusers_sde.networks.parametrizations import Parametrization
from diffusers_sde.pipelines import ProbabilityFlow


def network(scale=0.02, **changes):
    """A UNet whose output is small and smooth, so that few steps suffice; it still depends on everything."""
    torch.manual_seed(0)
    arguments = {
        "sample_size": 4,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    unet = UNet2DModel(**{**arguments, **changes}).eval()
    with torch.no_grad():
        unet.conv_out.weight.mul_(scale)
    return unet


def pipeline(cls, scheduler, **changes):
    pipe = cls(unet=network(**changes), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


OURS = [
    VPSDEScheduler(prediction_type="v_prediction"),
    SubVPSDEScheduler(prediction_type="v_prediction"),
    VESDEScheduler(prediction_type="edm"),
    FlowSDEScheduler(),
]
STOCK = [
    (DDPMPipeline, DDPMScheduler(prediction_type="v_prediction")),
    (DDIMPipeline, DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")),
    (DDPMPipeline, FlowMatchEulerDiscreteScheduler()),
    (DDPMPipeline, EDMEulerScheduler()),
]
PIPELINES = [(SDEPipeline, scheduler) for scheduler in OURS] + STOCK
every_pipeline = pytest.mark.parametrize(
    ("cls", "scheduler"), PIPELINES, ids=lambda v: getattr(v, "__name__", type(v).__name__)
)


def images(n=3, seed=0):
    return torch.randint(0, 256, (n, 1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@every_pipeline
def test_every_fitting_pipeline_has_a_likelihood(cls, scheduler):
    """The estimate agrees with the exact trace within 5 of its own standard errors."""
    pipe = pipeline(cls, scheduler)
    before = type(pipe.scheduler), dict(pipe.scheduler.config)
    flow = ProbabilityFlow(pipe)
    x = flow._state(images(1))
    exact = flow.log_prob(x, TraceOptions("exact"), flow.options(1e-3, 1e-3))
    estimate = flow.log_prob(x, TraceOptions(num_probes=4), flow.options(1e-3, 1e-3), generator=torch.manual_seed(0))
    assert torch.isfinite(exact.value).all()
    assert ((estimate.value - exact.value).abs() < 5 * estimate.standard_error + 0.02 * 16).all()
    assert (type(pipe.scheduler), dict(pipe.scheduler.config)) == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in pipe.unet.parameters())


@every_pipeline
def test_decode_inverts_encode(cls, scheduler):
    flow = ProbabilityFlow(pipeline(cls, scheduler))
    x = flow._state(images(1))
    options = flow.options(1e-4, 1e-4)
    back = flow.decode(flow.encode(x, options).sample, options).sample
    assert (back - x).square().mean().sqrt() < 5e-3


def test_a_stock_pipeline_and_ours_have_the_same_density():
    stock = ProbabilityFlow(pipeline(DDPMPipeline, DDPMScheduler(prediction_type="v_prediction")))
    ours = ProbabilityFlow(pipeline(SDEPipeline, VPSDEScheduler(prediction_type="v_prediction")))
    assert stock.t_min == ours.t_min == 1e-3
    values = [flow.bits_per_dim(images(), generator=torch.manual_seed(1)).per_image for flow in (stock, ours)]
    assert torch.equal(values[0], values[1])


def test_density_of_a_network_that_is_an_exact_gaussian():
    """Flow prediction F = 0 means x0_hat = x / (alpha + sigma): a linear flow with a density in closed form."""
    pipe = pipeline(SDEPipeline, FlowSDEScheduler())
    with torch.no_grad():
        pipe.unet.conv_out.weight.zero_()
        pipe.unet.conv_out.bias.zero_()
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.3
    result = pipe.log_prob(x, rtol=1e-6, atol=1e-6)
    # dx/dt = F = 0: the flow stands still and the density is the prior's.
    exact = torch.distributions.Normal(0.0, 1.0).log_prob(x.double()).flatten(1).sum(1)
    assert torch.allclose(result.value, exact, atol=16 * 1e-4)
    assert torch.allclose(result.latents, x, atol=1e-4)


def test_methods_of_the_pipeline():
    pipe = pipeline(SDEPipeline, FlowSDEScheduler())
    out = pipe(batch_size=3, generator=torch.manual_seed(0), output_type="pt", method="ode", rtol=1e-3, atol=1e-3)
    assert out.images.shape == (3, 1, 4, 4) and pipe.calls.shape == (3,) and pipe.num_timesteps == pipe.calls.max()
    alone = pipe(
        latents=torch.randn(3, 1, 4, 4, generator=torch.manual_seed(0))[1:2],
        output_type="pt",
        method="ode",
        rtol=1e-3,
        atol=1e-3,
    )
    assert (alone.images - out.images[1:2]).abs().max() < 1e-2
    codes = pipe.encode(images(), 1e-4, 1e-4)
    assert (pipe.decode(codes, 1e-4, 1e-4, output_type="latent") - (images() / 127.5 - 1)).square().mean().sqrt() < 1e-3
    strips = pipe.interpolate(images(1), images(1, 1), 3, 1e-3, 1e-3)
    assert len(strips) == 1 and len(strips[0]) == 3 and strips[0][0].size == (4, 4)
    difference = np.asarray(strips[0][0], dtype=float) - images(1)[0, 0].numpy()
    assert np.abs(difference).mean() < 1
    result = pipe.bits_per_dim(images(), rtol=1e-3, atol=1e-3, generator=torch.manual_seed(0))
    assert result.per_image.shape == (3,) and math.isfinite(result.standard_error)
    with pytest.raises(ValueError, match="method must be one of scheduler, ode, sde"):
        pipe(method="rk45")
    for method in ("ode", "sde"):
        with pytest.raises(ValueError, match="callback_on_step_end"):
            pipe(method=method, callback_on_step_end=lambda *a: {})


@pytest.mark.parametrize("scheduler", [VPSDEScheduler, VESDEScheduler, SubVPSDEScheduler, FlowSDEScheduler])
def test_the_adaptive_reverse_sde_of_the_pipeline(scheduler):
    """A network that is exact for N(0, 0.25): samples have that law, and an image has no batch mates."""
    pipe = pipeline(SDEPipeline, scheduler(prediction_type="sample"))
    sde = pipe.scheduler.sde

    class Exact(type(pipe.unet)):
        def forward(self, sample, timestep, **kwargs):
            t = pipe.scheduler.conditioning.time(sde, timestep.double())
            alpha, sigma = (f(t).to(sample)[:, None, None, None] for f in (sde.alpha, sde.sigma))
            return (0.25 * alpha / (0.25 * alpha**2 + sigma**2) * sample,)

    pipe.unet.__class__ = Exact
    arguments = {"method": "sde", "rtol": 0.02, "atol": 0.02, "output_type": "latent"}
    out = pipe(batch_size=200, generator=torch.manual_seed(0), **arguments).images
    assert abs(float(out.mean())) < 0.04 and float(out.std()) == pytest.approx(0.5, rel=0.05)  # of 3200 pixels
    assert pipe.calls.shape == (200,) and pipe.num_timesteps == pipe.calls.max() < 200
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(3)]  # noqa: E731
    together = pipe(batch_size=3, generator=generators(), **arguments).images
    alone = pipe(batch_size=1, generator=generators()[2:], **arguments).images
    assert torch.allclose(together[2:], alone, atol=1e-5)


def test_images_in_every_form_give_the_same_number():
    flow = ProbabilityFlow(pipeline(SDEPipeline, FlowSDEScheduler()))
    tensor = images(2)
    arrays = tensor.permute(0, 2, 3, 1).numpy()
    pil = [Image.fromarray(array[..., 0]) for array in arrays]
    forms = [(tensor, None), (arrays, None), (arrays[..., 0], None), (pil, None), (tensor / 255.0, (0.0, 1.0))]
    values = [
        flow.bits_per_dim(form, value_range, generator=torch.manual_seed(0)).per_image for form, value_range in forms
    ]
    assert all(torch.equal(values[0], value) for value in values)


def test_class_labels_stay_with_their_images():
    unet = network(scale=0.5, num_class_embeds=3)
    flow = ProbabilityFlow(SDEPipeline(unet=unet, scheduler=FlowSDEScheduler()))
    labels, x = torch.tensor([0, 1, 2]), flow._state(images(1)).expand(3, -1, -1, -1)

    def value(x, labels, batch_size=64):
        options = flow.options(1e-3, 1e-3, batch_size=batch_size)
        seed = torch.Generator().manual_seed(0)
        return flow.log_prob(x, options=options, conditioning={"class_labels": labels}, generator=seed).value

    together = value(x, labels, 2)
    assert len({round(v, 3) for v in together.tolist()}) == 3
    for i in range(3):
        assert torch.allclose(value(x[:1], labels[i : i + 1]), together[i : i + 1], atol=1e-2)


def test_half_precision_networks_keep_a_float32_state():
    flow = ProbabilityFlow(pipeline(SDEPipeline, FlowSDEScheduler()).to(torch.bfloat16))
    result = flow.encode(images(1), flow.options(5e-2, 5e-2))
    assert result.sample.dtype == torch.float32 and torch.isfinite(result.sample).all()


def test_a_latent_model_has_a_density_of_latents_only():
    vae = VQModel(
        in_channels=1,
        out_channels=1,
        latent_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    flow = ProbabilityFlow(LDMPipeline(vqvae=vae, unet=network(), scheduler=scheduler))
    assert flow.is_latent and flow.options().data_std == 1.0
    result = flow.log_prob(
        torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)), generator=torch.manual_seed(0)
    )
    assert torch.isfinite(result.value).all()
    with pytest.raises(ValueError, match="models latents"):
        flow.bits_per_dim(images())
    with pytest.raises(ValueError, match="models latents"):
        flow.encode(images())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pipeline(DDPMPipeline, DDPMScheduler(), out_channels=3), "1 input and 3 output channels"),
        (lambda: pipeline(DDPMPipeline, CMStochasticIterativeScheduler()), "consistency model|no SDE"),
        (
            lambda: (
                pipeline(
                    SDEPipeline, VPSDEScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
                ).scheduler
            ),
            "with a unet or a transformer",
        ),
        (lambda: pipeline(DDPMPipeline, DDPMScheduler(rescale_betas_zero_snr=True)), "does not determine the data"),
    ],
)
def test_pipelines_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        ProbabilityFlow(make())


def test_a_parametrisation_of_the_users_own_is_asked_for_the_data():
    """Half the noise, which determines the data only where there is a signal."""

    class HalfNoise(Parametrization):
        def coefficients(self, alpha, sigma):
            return 1.0 / alpha, -2.0 * sigma / alpha

    for scheduler, fits in ((VPSDEScheduler(), True), (FlowSDEScheduler(), False)):
        scheduler.parametrization = HalfNoise()
        pipe = pipeline(DDPMPipeline, scheduler)
        if fits:
            ProbabilityFlow(pipe)
        else:
            with pytest.raises(ValueError, match="HalfNoise.* does not determine the data at t = 1"):
                ProbabilityFlow(pipe)


def test_a_network_in_training_mode_with_dropout_is_refused():
    pipe = pipeline(SDEPipeline, FlowSDEScheduler(), dropout=0.1)
    ProbabilityFlow(pipe)
    pipe.unet.train()
    with pytest.raises(ValueError, match=r"eval\(\)"):
        ProbabilityFlow(pipe)


def test_bad_images_and_times_are_refused():
    pipe = pipeline(SDEPipeline, FlowSDEScheduler())
    flow = ProbabilityFlow(pipe)
    with pytest.raises(ValueError, match="one size and mode"):
        flow.bits_per_dim([Image.new("L", (4, 4)), Image.new("L", (5, 4))])
    with pytest.raises(ValueError, match="PIL images, an array or a tensor"):
        flow.bits_per_dim("image.png")
    with pytest.raises(ValueError, match="not on the grid"):
        flow.bits_per_dim(torch.rand(1, 1, 4, 4))
    with pytest.raises(ValueError, match="t_min"):
        ProbabilityFlow(pipe, t_min=1.0)
    with pytest.raises(ValueError, match="data_min"):
        ProbabilityFlow(pipe, data_min=1.0)


def test_plain_functions_take_the_flow_apart():
    """What the class does is log_prob of its denoiser and SDE."""
    flow = ProbabilityFlow(pipeline(SDEPipeline, FlowSDEScheduler()))
    x = flow._state(images(1))
    options = ODEOptions(3e-4, 3e-4, data_mean=0.0, data_std=0.5)
    seed = torch.Generator().manual_seed(0)
    by_function = log_prob(flow.denoiser, flow.sde, x, options=options, t_min=flow.t_min, generator=seed).value
    assert torch.equal(by_function, flow.log_prob(x, generator=torch.Generator().manual_seed(0)).value)

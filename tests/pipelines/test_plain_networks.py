"""Pipelines around networks that are no ``UNet2DModel``: a plain torch module, and a user's own diffusers model."""

import json
import sys
import types

import pytest
import torch
from analytic import GaussianMixture
from diffusers import ConfigMixin, DDPMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from exact_networks import quiet, seeded

from diffusers_sde import (
    ClassConditionalSDEPipeline,
    FlowSDEScheduler,
    InpaintSDEPipeline,
    SDEPipeline,
    SubVPSDEScheduler,
    VESDEScheduler,
    VPSDEScheduler,
    diagnose,
)

SHAPE = (1, 2, 2)
DATA = GaussianMixture.gaussian([0.3, -0.2, 0.1, 0.0], [0.04, 0.09, 0.01, 0.25])
SCHEDULERS = {
    "vp": lambda **k: VPSDEScheduler(continuous=True, **k),
    "long": lambda **k: VPSDEScheduler(
        1, 1.0, 1.0, continuous=True, t_max=10.0, time_conditioning="time", prediction_type="score", **k
    ),
    "sub_vp": lambda **k: SubVPSDEScheduler(prediction_type="v_prediction", **k),
    "ve": lambda **k: VESDEScheduler(prediction_type="edm", sigma_max=20.0, **k),
    "flow": lambda **k: FlowSDEScheduler(**k),
}
every_path = pytest.mark.parametrize("name", SCHEDULERS)


class Exact(torch.nn.Module):
    """What a perfect network returns for DATA; called as network(x, timestep), and nothing else is known of it."""

    def __init__(self, scheduler, dtype=torch.float64, learns=True):
        super().__init__()
        self.scheduler = scheduler
        if learns:
            self.weight = torch.nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, x, timestep):
        assert timestep.shape == (len(x),) and timestep.is_floating_point() and timestep.device == x.device
        t = self.scheduler.sde_time(timestep.double())
        alpha, sigma = self.scheduler.sde.alpha(t), self.scheduler.sde.sigma(t)
        scale = self.scheduler.parametrization.input_scale(alpha, sigma).reshape(-1, 1, 1, 1)
        state = x.double() / scale
        x0_hat = DATA.denoise(state.flatten(1), alpha, sigma).reshape(x.shape)
        return self.scheduler.parametrization.from_x0(x0_hat, state, alpha, sigma).to(x.dtype)


def pipeline(name, **arguments):
    scheduler = SCHEDULERS[name](**arguments)
    return quiet(SDEPipeline(Exact(scheduler), scheduler, sample_shape=SHAPE))


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "scheduler") for name in SCHEDULERS), ("long", "ode"), ("long", "sde"), ("ve", "ode")]
)
def test_samples_have_the_moments_of_the_data(name, method):
    pipe = pipeline(name)
    tolerances = {} if method == "scheduler" else {"rtol": 1e-3, "atol": 1e-3}
    x = pipe(3000, 30, generator=seeded(), output_type="latent", method=method, **tolerances).images
    assert x.shape == (3000, *SHAPE)
    flat = x.flatten(1).double()
    # Five standard errors; 4 coordinates and 8 runs: false alarms below 1e-4.
    error = 5.0 * (DATA.covariances[0].diag() / 3000).sqrt()
    assert ((flat.mean(0) - DATA.means[0]).abs() < error + 0.005).all()
    torch.testing.assert_close(flat.var(0), DATA.covariances[0].diag(), rtol=0.12, atol=2e-4)


@every_path
def test_densities_and_codes_are_exact(name):
    pipe = pipeline(name)
    x = DATA.sample(3, seeded()).reshape(3, *SHAPE)
    found = pipe.log_prob(x, trace="exact", rtol=1e-7, atol=1e-7)
    # The flow's own density: at t_max it starts from the prior, which differs from p_t there by the mean and variance
    # that the data still have.
    exact = DATA.log_prob(pipe.scheduler.sde, x, found.t_min)
    torch.testing.assert_close(found.value, exact, rtol=0.0, atol=0.06 if name == "ve" else 0.03)
    codes = pipe.encode(x, rtol=1e-8, atol=1e-8)
    again = pipe.decode(codes, rtol=1e-8, atol=1e-8, output_type="latent")
    torch.testing.assert_close(again.double(), x, rtol=0.0, atol=2e-4)


def test_a_stock_scheduler_and_integer_timesteps():
    scheduler = DDPMScheduler()
    ours = VPSDEScheduler.from_config(scheduler.config)
    pipe = quiet(SDEPipeline(Exact(ours, learns=False), scheduler, sample_shape=SHAPE))
    assert pipe(2, 5, generator=seeded(), output_type="pt").images.shape == (2, *SHAPE)
    assert (pipe.unet.dtype, pipe.device) == (torch.float32, torch.device("cpu"))


def test_the_shape_may_come_with_the_latents():
    scheduler = SCHEDULERS["vp"]()
    pipe = quiet(SDEPipeline(Exact(scheduler), scheduler))
    latents = torch.randn(3, *SHAPE, generator=seeded())
    assert pipe(latents=latents, num_inference_steps=3, output_type="latent").images.shape == (3, *SHAPE)
    with pytest.raises(ValueError, match=r"pass sample_shape=\(channels, height, width\)"):
        pipe(num_inference_steps=3)


def test_inpainting_runs_too():
    scheduler = SCHEDULERS["vp"]()
    pipe = quiet(InpaintSDEPipeline(Exact(scheduler), scheduler))
    image, mask = torch.zeros(1, *SHAPE), torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    assert pipe(image, mask, num_inference_steps=4, output_type="latent").images.shape == (1, *SHAPE)


def test_the_module_moves_and_is_cast_with_the_pipeline():
    pipe = pipeline("vp")
    assert pipe.unet.dtype == torch.float64 and not pipe.unet.eval().network.training
    pipe.to(dtype=torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16 == pipe.unet.network.weight.dtype
    pipe.to("meta")
    assert pipe.device == pipe.unet.network.weight.device == torch.device("meta")


def test_saving_says_what_is_missing(tmp_path, monkeypatch):
    pipe = pipeline("vp")
    words = r"Exact, a plain torch module.*'class Exact\(ModelMixin, ConfigMixin\)'.*register_to_config"
    with pytest.raises(ValueError, match=words):
        pipe.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("diffusers_sde.pipelines.base.create_repository", lambda *a: pytest.fail("created"))
    with pytest.raises(ValueError, match=words):
        pipe.push_to_hub("user/model")


def test_the_report_names_the_module():
    assert "network:      Exact, a variance-preserving" in str(diagnose(pipeline("vp")))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"unet": lambda x, t: x}, "unet must be a diffusers model or a torch module"),
        ({"sample_shape": (2, 2)}, r"sample_shape must be \(channels, height, width\), got \(2, 2\)"),
        ({"sample_shape": (0, 2, 2)}, "sample_shape must be a shape"),
        ({"scheduler": None}, "scheduler must be one of"),
        ({"null_class": 3}, "null_class must be None"),
    ],
)
def test_what_is_refused(arguments, words):
    scheduler = SCHEDULERS["vp"]()
    with pytest.raises(ValueError, match=words):
        SDEPipeline(**{"unet": Exact(scheduler), "scheduler": scheduler} | arguments)


# ---------------------------------------------------------------------- a user's own diffusers model


class OwnNetwork(ModelMixin, ConfigMixin):
    """Shifts what it is given by a number for each class."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, num_class_embeds=None, width=3):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.arange(float(width)))

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        shift = 0.0 if class_labels is None else self.shift[class_labels].reshape(-1, 1, 1, 1)
        output = 0.1 * sample + shift
        return UNet2DOutput(output) if return_dict else (output,)


@pytest.fixture
def own_module(monkeypatch):
    """A user's module with the class in it, and nothing else."""
    module = types.ModuleType("own_networks")
    module.OwnNetwork = OwnNetwork
    monkeypatch.setattr(OwnNetwork, "__module__", "own_networks")
    monkeypatch.setitem(sys.modules, "own_networks", module)


def test_a_model_of_the_user_s_own_is_saved_and_loaded(own_module, tmp_path):
    pipe = quiet(SDEPipeline(OwnNetwork(), VPSDEScheduler(), sample_shape=(3, 5, 7)))
    with pytest.raises(ValueError, match="sample_shape must be a shape"):
        SDEPipeline(OwnNetwork(), VPSDEScheduler(), sample_shape="357")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["own_networks", "OwnNetwork"] and index["sample_shape"] == [3, 5, 7]
    for cls in (SDEPipeline, DiffusionPipeline):
        loaded = quiet(cls.from_pretrained(tmp_path))
        assert type(loaded) is SDEPipeline and type(loaded.unet) is OwnNetwork
        assert loaded.sample_shape == (3, 5, 7)
        images = [p(2, 3, generator=seeded(), output_type="pt").images for p in (pipe, loaded)]
        assert torch.equal(*images)


def test_it_may_know_classes():
    network = OwnNetwork(num_class_embeds=3)
    pipe = quiet(ClassConditionalSDEPipeline(network, VPSDEScheduler(), null_class=2, sample_shape=SHAPE))
    assert pipe.num_classes == 3
    x = pipe(class_labels=[0, 1], num_inference_steps=3, generator=seeded(), output_type="latent").images
    assert x.shape == (2, *SHAPE)
    sde_pipe = quiet(SDEPipeline(network, VPSDEScheduler(), null_class=2, sample_shape=SHAPE))
    assert sde_pipe.unconditional(2)["class_labels"].tolist() == [2, 2]
    with pytest.raises(ValueError, match="knows no classes"):
        ClassConditionalSDEPipeline(OwnNetwork(), VPSDEScheduler(), sample_shape=SHAPE)

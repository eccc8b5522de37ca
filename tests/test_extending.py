"""docs/extending.md, executed; and what a scheduler of a user's own SDE can do beyond it."""

import importlib
import json
import math
import re
import sys
import types
from pathlib import Path

import diffusers
import processes
import pytest
import torch
from analytic import PointwiseGaussian
from diffusers import DDIMScheduler, DiffusionPipeline
from paths import INSTANCES, measured_order
from tiny_networks import tiny_unet

from diffusers_sde import (
    InpaintSDEPipeline,
    ODEOptions,
    SDEPipeline,
    TraceOptions,
    VPSDEScheduler,
    diagnose,
    log_prob,
    make_plan,
)
from diffusers_sde.guidance import POSTERIOR_METHODS
from diffusers_sde.sampling import PREDICTORS
from diffusers_sde.schedulers import SCHEDULERS, families

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
MODULE, TRAINING, TRAINER, LOADING, NETWORKS, NETWORK, NETWORK_TRAINING, SDE_FILE, SCHEDULER_FILE = BLOCKS[:9]
PREDICTOR, POSTERIOR, FITTING, DENSITY = BLOCKS[9:]
UNTOLD = "ignore:TutorialScheduler is saved without its code:UserWarning"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the module of the page is, and is imported from."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "tutorial_sde.py").write_text(MODULE, encoding="utf-8")
    (folder / "tutorial_networks.py").write_text(NETWORKS, encoding="utf-8")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in ("tutorial_sde", "tutorial_networks"):
        sys.modules.pop(name, None)
        diffusers.pipelines.__dict__.pop(name, None)


@pytest.fixture(scope="module")
def tutorial(folder):
    return importlib.import_module("tutorial_sde")


def run(code, folder):
    """In a process that has imported neither this package nor what is in the folder."""
    result = processes.run(code, folder, folder, *sys.path)
    assert result.returncode == 0, result.stderr
    return result


def test_the_page_runs_and_loads_in_a_fresh_process(folder):
    trained = run(TRAINING + "\nprint(sum(losses[:10]), sum(losses[-10:]))", folder)
    first, last = map(float, trained.stdout.split())
    assert last < 0.7 * first
    assert "TutorialScheduler is saved without its code, which is in the module 'tutorial_sde'" in trained.stderr
    index = json.loads((folder / "tutorial" / "model_index.json").read_text())
    assert index["scheduler"] == ["tutorial_sde", "TutorialScheduler"]
    assert not list((folder / "tutorial" / "scheduler").glob("*.py"))
    checks = """
assert type(pipe.scheduler) is tutorial_sde.TutorialScheduler and pipe.scheduler.config.predictor == "ancestral"
assert images.shape == (2, 1, 8, 8) and images.isfinite().all() and density.value.isfinite().all()
"""
    loaded = run(LOADING + checks, folder)
    assert "of an SDE of its own" in loaded.stdout and "t itself" in loaded.stdout
    assert "no scheduler here fits" not in loaded.stdout


def test_the_package_trains_for_the_scheduler_of_the_page(folder):
    checks = """
import json
from pathlib import Path
assert type(pipe.scheduler) is TutorialScheduler and pipe.scheduler.config.sigma_data == 0.6
options = json.loads(Path("tutorial-digits/training_config.json").read_text())
assert options["scheduler"] == "TutorialScheduler"
"""
    run(TRAINER + checks, folder)
    index = json.loads((folder / "tutorial-digits" / "model_index.json").read_text())
    assert index["scheduler"] == ["tutorial_sde", "TutorialScheduler"]


def test_the_package_trains_the_network_of_the_page(folder):
    """It is trained, saved, loaded in a fresh process, and draws the same image there."""
    (folder / "tutorial_network.py").write_text(NETWORK, encoding="utf-8")
    image = "\nimport numpy as np; print(np.asarray(image).sum(), type(pipe.unet).__name__)"
    drawn = run(NETWORK_TRAINING + image, folder).stdout
    assert drawn.split()[1] == "TutorialNetwork"
    load = """
import torch, tutorial_network
from diffusers_sde import SDEPipeline
pipe = SDEPipeline.from_pretrained("tutorial-network")
image = pipe(num_inference_steps=10, generator=torch.manual_seed(0)).images[0]
"""
    assert run(load + image, folder).stdout == drawn
    state = json.loads((folder / "tutorial-network" / "checkpoint-2" / "training_state.json").read_text())
    assert state["identity"]["network"] == "tutorial" and state["identity"]["architecture"]["width"] == 8


def test_the_mathematics_is_the_tutorial_s(tutorial):
    sde = tutorial.TutorialSDE(25.0)
    t = torch.linspace(0.01, 1.0, 50, dtype=torch.float64)
    assert torch.allclose(sde.diffusion(t), 25.0**t, rtol=1e-9)
    assert torch.equal(sde.f(t), torch.zeros_like(t))
    assert sde.prior_std == pytest.approx(math.sqrt((25.0**2 - 1.0) / (2.0 * math.log(25.0))))


def test_the_config_is_flat_and_goes_there_and_back(tutorial, tmp_path):
    own = tutorial.TutorialScheduler(base=10.0, snr=0.3)
    assert (own.config.base, own.config.snr, own.sde.base) == (10.0, 0.3, 10.0)
    assert (own.config.time_conditioning, own.config.prediction_type) == ("time", "score")
    with pytest.warns(UserWarning, match="in the module 'tutorial_sde'"):
        own.save_pretrained(tmp_path)
    again = tutorial.TutorialScheduler.from_pretrained(tmp_path)
    stock = DDIMScheduler.from_config(own.config)
    stock.save_pretrained(tmp_path / "stock")
    back = tutorial.TutorialScheduler.from_config(stock.config)
    read = tutorial.TutorialScheduler.from_config(DDIMScheduler.load_config(tmp_path / "stock"))
    public = {k: v for k, v in own.config.items() if not k.startswith("_")}
    for other in (again, back, read):
        assert type(other) is tutorial.TutorialScheduler and dict(other.config).items() >= public.items()
    for cls in SCHEDULERS.values():
        for config in (own.config, stock.config):
            with pytest.raises(ValueError, match=r"TutorialScheduler describes an SDE of its own.*Use TutorialSch"):
                cls.from_config(config)
    with pytest.raises(ValueError, match=r"Use VPSDEScheduler\.from_config"):
        tutorial.TutorialScheduler.from_config(diffusers.DDPMScheduler().config)
    with pytest.raises(ValueError, match="did you mean 'base'"):
        tutorial.TutorialScheduler.from_config(own.config, bases=2.0)


@pytest.mark.parametrize("name", ["beta_start", "beta_min", "sigma_min", "shift", "lambda_min_clipped"])
def test_an_argument_may_be_called_as_one_of_another_class(name, tutorial):
    namespace = {}
    body = f"def __init__(self, {name}: float = 0.0, **sampler): self.setup(TutorialSDE())"
    exec(body, vars(tutorial) | {"__name__": "tutorial_sde"}, namespace)
    cls = type(
        "OtherScheduler", (tutorial.SDEScheduler,), {"__init__": tutorial.sampler_arguments(namespace["__init__"])}
    )
    other = cls(**{name: -3.0})
    assert cls.from_config(other.config).config[name] == -3.0
    pipe = SDEPipeline(tiny_unet(), other)
    assert diagnose(pipe).family is None and diagnose(pipe).suggestions


@pytest.mark.filterwarnings(UNTOLD)
@pytest.mark.parametrize("hub_check", [False, True])
def test_a_pipeline_of_diffusers_loads_it_too(hub_check, tutorial, tmp_path):
    diffusers.DDPMPipeline(tiny_unet(), tutorial.TutorialScheduler(base=7.0)).save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipe) is diffusers.DDPMPipeline and type(pipe.scheduler) is tutorial.TutorialScheduler
    assert pipe.scheduler.config.base == 7.0
    if hub_check:  # what diffusers asks of a repository on the Hub before it downloads it
        from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders

        index = DiffusionPipeline.load_config(tmp_path)
        assert _get_custom_components_and_folders("user/model", index, filenames=[])[0] == {}


def test_samples_and_densities_are_those_of_the_exact_model(tutorial):
    """Pixels N(mean, std^2) with the exact score, fed t itself."""
    model = PointwiseGaussian()
    scheduler = tutorial.TutorialScheduler(probability_flow=True)

    def score(x, t):
        alpha, sigma = scheduler.sde.alpha(t), scheduler.sde.sigma(t)
        estimate = alpha.reshape(-1, 1) * model.denoise(x.double(), alpha, sigma)
        return (estimate - x.double()) / sigma.reshape(-1, 1) ** 2

    scheduler.set_timesteps(200)
    assert float(scheduler.timesteps[0]) == 1.0 and float(scheduler.timesteps[-1]) == pytest.approx(1e-3)
    x = start = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(score(x, float(t)), t, x).prev_sample
    mean, std = float(x.mean() - start.mean() * x.std() / start.std()), float(x.std() / start.std())
    assert (mean, std) == pytest.approx((model.mean, model.std), abs=0.02)
    denoise = scheduler.denoiser(lambda x, t: score(x, t).to(x.dtype))
    x0 = torch.tensor([[0.1], [0.9]], dtype=torch.float64)
    found = log_prob(denoise, scheduler.sde, x0, TraceOptions("exact"), ODEOptions(rtol=1e-7, atol=1e-7))
    # The flow scales x - mean by the ratio of the standard deviations at the two ends, and the prior has mean 0.
    first, last = (math.hypot(model.std, float(scheduler.sde.sigma(t))) for t in (found.t_min, 1.0))
    end = model.mean + (x0[:, 0].double() - model.mean) * last / first
    exact = torch.distributions.Normal(0.0, scheduler.sde.prior_std).log_prob(end) + math.log(last / first)
    assert torch.allclose(found.value, exact, atol=1e-5)


# ---------------------------------------------------------------------- parametrisations and conditionings of a user


@pytest.fixture(scope="module")
def networks(tutorial):
    return importlib.import_module("tutorial_networks")


def own_network(networks, **arguments):
    return networks.NetworkScheduler(prediction_type="scaled_score", time_conditioning="log_time", **arguments)


class Exact(torch.nn.Module):
    """sigma score of pixels N(mean, std^2), fed log t, on sigma(t)^2 = (25^(2t) - 1) / (2 log 25)."""

    def forward(self, x, timestep):
        model = PointwiseGaussian()
        variance = torch.expm1(2.0 * math.log(25.0) * timestep.double().exp()) / (2.0 * math.log(25.0))
        variance = variance.reshape(-1, 1, 1, 1)
        return (variance.sqrt() * (model.mean - x.double()) / (model.std**2 + variance)).to(x.dtype)


def test_a_parametrisation_and_a_conditioning_of_a_user_sample_and_evaluate(networks):
    scheduler, model = own_network(networks, sampling_sigma=0.01), PointwiseGaussian()
    scheduler.set_timesteps(30)
    assert float(scheduler.timesteps[0]) == pytest.approx(0.0, abs=1e-6)
    assert scheduler.timesteps.exp().tolist() == pytest.approx([row.t for row in scheduler.rows], rel=1e-5)
    pipe = SDEPipeline(Exact(), scheduler, sample_shape=(1, 20, 20))
    pipe.set_progress_bar_config(disable=True)
    x = pipe(50, 30, generator=torch.Generator().manual_seed(0), output_type="latent").images.double()
    # 20000 pixels: five standard errors of both.
    assert float(x.mean()) == pytest.approx(model.mean, abs=5.0 * model.std / math.sqrt(20000) + 0.002)
    assert float(x.std()) == pytest.approx(model.std, rel=5.0 / math.sqrt(40000) + 0.005)
    plain = networks.TutorialScheduler(probability_flow=True)
    x0 = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    sigma = plain.sde.sigma(t).reshape(-1, 1, 1, 1)
    found = scheduler.denoiser(Exact())(x0, t)
    exact = (model.mean * sigma**2 + model.std**2 * x0) / (model.std**2 + sigma**2)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
    report = str(diagnose(pipe))
    assert "is fed:       log t" in report and "predicts:     scaled_score" in report


def test_names_of_a_user_are_in_the_config_and_known_to_this_class_alone(networks, tmp_path):
    scheduler = own_network(networks)
    with pytest.warns(UserWarning, match="in the module 'tutorial_networks'"):
        scheduler.save_pretrained(tmp_path)
    again = networks.NetworkScheduler.from_pretrained(tmp_path)
    stock = DDIMScheduler.from_config(scheduler.config)
    for other in (again, networks.NetworkScheduler.from_config(stock.config)):
        assert (other.config.prediction_type, other.config.time_conditioning) == ("scaled_score", "log_time")
        assert type(other.parametrization) is networks.ScaledScore and other.conditioning.meaning == "log t"
    with pytest.raises(ValueError, match=r"prediction_type must be one of epsilon, .*edm, scaled_score, got 'eps'"):
        networks.NetworkScheduler(prediction_type="eps")
    with pytest.raises(ValueError, match=r"time_conditioning must be None or one of .*edm, log_time, got 'log_t'"):
        networks.NetworkScheduler(time_conditioning="log_t")
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        networks.TutorialScheduler(prediction_type="scaled_score")

    class OfTheirPath(VPSDEScheduler):
        prediction_types = {"scaled_score": networks.ScaledScore}

    assert OfTheirPath(prediction_type="scaled_score", time_conditioning="edm").parametrization.meaning.endswith(
        "score"
    )


# ---------------------------------------------------------------------- an SDE inside the package


@pytest.fixture
def brownian(monkeypatch):
    """The two files of the page as modules of the package, unregistered again after the test."""
    tables = (families.FAMILIES, families.FITTING_SCHEDULER, families.FAMILY_OF_CLASS)
    known = [dict(table) for table in tables]
    for package, name, code in (
        ("sdes", "brownian", SDE_FILE),
        ("schedulers", "scheduling_brownian_sde", SCHEDULER_FILE),
    ):
        module = types.ModuleType(f"diffusers_sde.{package}.{name}")
        module.__package__ = f"diffusers_sde.{package}"
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(code, vars(module))
    yield module.BrownianSDEScheduler
    for table, before in zip(tables, known, strict=True):
        table.clear()
        table.update(before)


def test_a_scheduler_inside_the_package_is_one_file(brownian):
    scheduler = brownian(rate=4.0, probability_flow=True)
    t = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(scheduler.sde.g2(t), torch.full_like(t, 16.0))
    assert scheduler.sde.prior_std == pytest.approx(4.0)
    assert families.config_family(scheduler.config) == "brownian"
    assert families.fitting_class(scheduler.config) == "BrownianSDEScheduler"
    assert brownian.from_config(scheduler.config).sde == scheduler.sde
    with pytest.raises(
        ValueError, match=r"describes a model of Brownian motion, which VPSDE.*Use BrownianSDEScheduler"
    ):
        VPSDEScheduler.from_config(scheduler.config)
    with pytest.raises(ValueError, match=r"DDPM-type\) model, which BrownianSDEScheduler cannot represent"):
        brownian.from_config(diffusers.DDPMScheduler().config)
    assert "sampling_sigma: " in brownian.__doc__ and "{common}" not in brownian.__doc__


def test_every_family_is_stated_by_its_class():
    stated = {name: cls.__name__ for cls in SCHEDULERS.values() for name in cls._families}
    assert families.FITTING_SCHEDULER == stated
    assert families.FAMILIES == {name: f for cls in SCHEDULERS.values() for name, f in cls._families.items()}


# ---------------------------------------------------------------------- samplers and posteriors of one's own


@pytest.mark.parametrize("sde", INSTANCES.values(), ids=INSTANCES.keys())
def test_a_predictor_of_ones_own_has_its_declared_order(sde):
    space = {"__name__": "tutorial_predictor"}
    exec(PREDICTOR, space)
    try:
        rule = space["Midpoint"]()
        order, error = measured_order(
            sde, lambda times: (make_plan(sde, times, rule, stochasticity=0.0, denoise_final=False), 0.0)
        )
        assert order == pytest.approx(rule.order, abs=0.1) and error < 0.02
        scheduler = VPSDEScheduler(predictor="midpoint", probability_flow=True)
        scheduler.set_timesteps(4)
        assert scheduler.order == 2 and len(scheduler.timesteps) == 7
        assert [row.continues for row in scheduler.rows] == [False, True] * 3 + [False]
    finally:
        del PREDICTORS["midpoint"]


def test_a_posterior_method_of_ones_own_runs_in_the_pipelines():
    exec(POSTERIOR, {"__name__": "tutorial_posterior"})
    try:
        unet, scheduler = tiny_unet(), VPSDEScheduler()
        size = unet.config.sample_size
        known = torch.zeros(size, size, dtype=torch.bool)
        known[:, : size // 2] = True
        image = torch.rand(1, unet.config.in_channels, size, size) * 2 - 1
        pipe = InpaintSDEPipeline(unet, scheduler)
        pipe.set_progress_bar_config(disable=True)
        run = {"num_inference_steps": 3, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        got = pipe(image, (~known).float(), posterior="null_space", **run).images
        assert torch.allclose(got[..., known], image[..., known], atol=1e-5)  # the last row returns x0_hat
        with pytest.raises(ValueError, match="null_space"):
            pipe(image, (~known).float(), posterior="none", **run)
    finally:
        del POSTERIOR_METHODS["null_space"]


def test_a_table_can_be_fitted():
    space = {}
    exec(FITTING, space)
    assert space["losses"][-1] < 0.1 * space["losses"][0]
    unfitted = space["sample"](space["few"], space["denoiser"], space["noise"])
    start = (unfitted - space["target"]).square().mean()
    assert float(start) == pytest.approx(space["losses"][0], rel=1e-9)  # the table does what the plan does


def test_a_step_has_a_density():
    space = {}
    exec(DENSITY, space)
    law, x_s = space["law"], space["x_s"]
    expected = torch.distributions.Normal(law.mean.detach(), law.std).log_prob(x_s).flatten(1).mean(1)
    torch.testing.assert_close(space["log_prob"].detach(), expected)
    assert float(space["output"].grad.abs().sum()) > 0

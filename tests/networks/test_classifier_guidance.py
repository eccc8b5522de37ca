"""Classifiers of noisy images: what they see, what they refuse, and guidance by them in a pipeline, by exact laws."""

import json
import math

import pytest
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from exact_networks import SCHEDULERS, SIZE, STEPS, ExactUNet, quiet, seeded, unet
from labelled import CLASS, COMPONENT, SDES, log_classifier
from posteriors import MIXTURE, errors

from diffusers_sde import (
    ClassConditionalSDEPipeline,
    InpaintSDEPipeline,
    NoiseConditionalClassifier,
    ODEOptions,
    ProbabilityFlow,
    SDEPipeline,
    TraceOptions,
    VPSDEScheduler,
    log_prob,
)
from diffusers_sde.guidance.classes import classifier_guidance
from diffusers_sde.networks.classifier import classifier_logits, trained_log_snr


def tiny(seed=0, **arguments):
    torch.manual_seed(seed)
    defaults = {"in_channels": 1, "num_classes": 3, "block_out_channels": (4, 8), "layers_per_block": 1}
    defaults |= {"attention_head_dim": 4, "norm_num_groups": 2, "id2label": {0: "cat", 1: "dog", 2: "bird"}}
    return NoiseConditionalClassifier(SIZE, **(defaults | arguments)).eval()


RUN = {"num_inference_steps": STEPS, "output_type": "latent"}

# ---------------------------------------------------------------------- the classifier


@pytest.mark.parametrize("name", SDES)
def test_what_it_sees_does_not_depend_on_the_sde(name):
    """The same image with the same sigma/alpha, on another path and at another scale: the same logits."""
    classifier, sde, vp = tiny(), SDES[name], SDES["vp"]
    x0, eps = torch.randn(2, 4, 1, SIZE, SIZE, generator=seeded(), dtype=torch.float64)
    for ratio in (0.05, 0.7, 5.0):
        logits = []
        for path in (sde, vp):
            t = path.time_of(-2.0 * torch.tensor(ratio, dtype=torch.float64).log())
            logits.append(classifier_logits(classifier, path, (path.alpha(t) * x0 + path.sigma(t) * eps).float(), t))
        torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(logits[0], logits[0][:1], atol=1e-3)


def test_it_is_told_the_noise_and_each_image_its_own():
    classifier, sde = tiny(), SDES["vp"]
    x, t = torch.randn(3, 1, SIZE, SIZE, generator=seeded()), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    together = classifier_logits(classifier, sde, x, t)
    for i in range(3):
        torch.testing.assert_close(classifier_logits(classifier, sde, x[i : i + 1], t[i])[0], together[i])
    assert not torch.allclose(classifier_logits(classifier, sde, x, t.flip(0))[0], together[0], atol=1e-3)
    labels = torch.tensor([2, 0, 1])
    expected = torch.log_softmax(together, 1)[torch.arange(3), labels]
    torch.testing.assert_close(classifier.log_prob(sde, labels)(x, t), expected)


def test_saved_and_loaded_alone(tmp_path):
    classifier = tiny(lowest_log_snr=-9.0)
    classifier.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    loaded = NoiseConditionalClassifier.from_pretrained(tmp_path)
    x, t = torch.randn(2, 1, SIZE, SIZE), torch.tensor(0.4)
    a, b = (classifier_logits(c, SDES["vp"], x, t) for c in (classifier, loaded))
    assert torch.equal(a, b) and loaded.config.lowest_log_snr == -9.0


def test_what_does_not_fit_is_refused():
    classifier, shape = tiny(lowest_log_snr=-4.0), (1, SIZE, SIZE)
    classifier.check_fits(SDES["ve"].__class__(0.01, 7.0), shape, -1.0, 1.0)
    with pytest.raises(ValueError, match=r"noise up to sigma/alpha = 7.39, .* begins at 152"):
        classifier.check_fits(SDES["vp"], shape, -1.0, 1.0)
    with pytest.raises(ValueError, match=r"images of shape \(1, 8, 8\), the unet's have \(3, 8, 8\)"):
        classifier.check_fits(SDES["vp"], (3, SIZE, SIZE), -1.0, 1.0)
    with pytest.raises(ValueError, match=r"images in \[-1, 1\], the unet's lie in \[0, 1\]"):
        tiny().check_fits(SDES["vp"], shape, 0.0, 1.0)
    for name in ("vp", "flow"):  # one trained on a path fits that path, and a path that ends in pure noise fits all
        low, high = trained_log_snr(SDES[name])
        tiny(lowest_log_snr=low, highest_log_snr=high).check_fits(SDES["vp"], shape, -1.0, 1.0)
    with pytest.raises(ValueError, match="one block for each"):
        tiny(block_out_channels=(4, 8, 8))
    with pytest.raises(ValueError, match="lowest_log_snr"):
        tiny(lowest_log_snr=3.0, highest_log_snr=1.0)


# ---------------------------------------------------------------------- guidance in the likelihood


def true_log_prob(sde, x, t_min, result):
    """Of the component's flow, which ends in p_T of the component and not quite in the prior."""
    end = result.latents.flatten(1) * sde.prior_std
    mismatch = sde.prior_log_prob(end) - COMPONENT.log_prob(sde, end, sde.t_max)
    return COMPONENT.log_prob(sde, x, t_min) + mismatch


def test_guided_likelihood_is_that_of_the_class():
    """log p(x | y) by the flow of the mixture guided by its exact classifier: Bayes' rule, with every trace."""
    sde = SDES["vp"]
    x = COMPONENT.sample(4, seeded())
    guided = classifier_guidance(MIXTURE.denoiser(sde), sde, log_classifier(sde))
    options = ODEOptions(1e-5, 1e-5, data_std=0.5)
    for trace, tolerance in ((TraceOptions("exact"), 1e-3), (TraceOptions("hutchinson", 64), None)):
        result = log_prob(guided, sde, x, trace, options, 1e-3, generator=seeded())
        error = (result.value - true_log_prob(sde, x, 1e-3, result)).abs()
        assert bool((error < (tolerance or 5.0 * result.standard_error)).all()), (trace.method, error)
    with pytest.raises(RuntimeError):  # not a wrong number
        log_prob(guided, sde, x, TraceOptions("exact", differentiation="forward"), t_min=1e-3)


# ---------------------------------------------------------------------- the pipeline


class ExactClassifier(ModelMixin, ConfigMixin):
    """The mixture's own classifier in the place of a trained one."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, num_classes=3, id2label=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def check_fits(self, *arguments):
        pass

    def log_prob(self, sde, labels):
        assert set(labels.tolist()) == {CLASS}
        return lambda x, t: log_classifier(sde)(x.flatten(1), t)


def exact_pipeline(scheduler, **options):
    network = ExactUNet()
    network.register_to_config(num_class_embeds=None)
    network.data = MIXTURE
    network.scheduler = SCHEDULERS[scheduler](**options)
    return quiet(ClassConditionalSDEPipeline(network, network.scheduler, classifier=ExactClassifier()))


@pytest.mark.parametrize("scheduler", ["vp", "pc", "ode", "ve", "sub_vp", "flow", "adaptive"])
def test_guided_images_follow_the_law_of_their_class(scheduler):
    """The whole way through a scheduler: an unconditional network, a classifier, and the closed form."""
    options = {"corrector": "ornstein_uhlenbeck"} if scheduler == "pc" else {}
    options |= {"prediction_type": "flow_prediction"} if scheduler == "flow" else {}
    pipe = exact_pipeline("vp" if scheduler == "adaptive" else scheduler, **options)
    run = {"method": "ode", "rtol": 1e-3, "atol": 1e-3} if scheduler == "adaptive" else {"num_inference_steps": 60}
    n = 400 if scheduler == "adaptive" else 2500
    out = pipe([CLASS] * n, generator=seeded(), output_type="latent", **run).images
    measured = errors(out.flatten(1), COMPONENT)
    # 2500 exact samples: 0.04 +- 0.015 and 0.07 +- 0.02, 400: 0.1 and 0.17; 70 % of the mixture lie elsewhere.
    wide = (2500 / n) ** 0.5
    assert measured["mean"] < 0.12 * wide and measured["covariance"] < 0.2 * wide, measured


def test_likelihood_and_codes_of_a_guided_pipeline():
    pipe, n = exact_pipeline("vp"), 6
    flow = pipe.probability_flow()
    x = COMPONENT.sample(n, seeded()).reshape(n, 1, 2, 2)
    labels = {"class_labels": torch.full((n,), CLASS)}
    result = flow.log_prob(x, TraceOptions("exact"), flow.options(1e-5, 1e-5), labels)
    truth = true_log_prob(pipe.scheduler.sde, x.flatten(1), flow.t_min, result)
    torch.testing.assert_close(result.value, truth, rtol=0, atol=1e-3)
    back = flow.decode(result.latents, flow.options(1e-6, 1e-6), conditioning=labels).sample
    torch.testing.assert_close(back, x, rtol=0, atol=1e-3)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_classifier_guides_every_network_through_every_scheduler(scheduler):
    for network, options in ((unet(), {}), (unet(num_class_embeds=4), {"null_class": 3})):
        pipe = quiet(ClassConditionalSDEPipeline(network, SCHEDULERS[scheduler](), classifier=tiny(), **options))
        runs = {
            scale: pipe(["dog", 2], classifier_guidance_scale=scale, generator=seeded(), **RUN).images
            for scale in (0.0, 1.0, 5.0)
        }
        assert all(bool(torch.isfinite(out).all()) for out in runs.values())
        assert not torch.equal(runs[0.0], runs[5.0])
        default = pipe(["dog", 2], generator=seeded(), **RUN).images
        assert torch.equal(default, runs[0.0 if options else 1.0])


def test_guidance_interval_silences_the_classifier():
    pipe, calls = quiet(ClassConditionalSDEPipeline(unet(), VPSDEScheduler(), classifier=tiny())), []
    pipe.classifier.register_forward_hook(lambda *_: calls.append(1))
    pipe(0, guidance_interval=(0.2, 3.0), **RUN)
    assert 0 < len(calls) < STEPS


def test_the_classifier_is_a_saved_component(tmp_path):
    pipe = quiet(ClassConditionalSDEPipeline(unet(), VPSDEScheduler(), classifier=tiny()))
    expected = pipe("dog", generator=seeded(), **RUN).images
    pipe.save_pretrained(tmp_path / "guided")
    assert (tmp_path / "guided" / "classifier" / "diffusion_pytorch_model.safetensors").exists()
    for cls in (ClassConditionalSDEPipeline, DiffusionPipeline):
        loaded = quiet(cls.from_pretrained(tmp_path / "guided"))
        assert type(loaded) is ClassConditionalSDEPipeline and type(loaded.classifier) is NoiseConditionalClassifier
        torch.testing.assert_close(loaded("dog", generator=seeded(), **RUN).images, expected, rtol=1e-3, atol=1e-3)
    # From the folder of an unconditional pipeline, with a classifier of one's own.
    quiet(SDEPipeline(unet(), VPSDEScheduler())).save_pretrained(tmp_path / "plain")
    joined = quiet(ClassConditionalSDEPipeline.from_pretrained(tmp_path / "plain", classifier=tiny()))
    torch.testing.assert_close(joined("dog", generator=seeded(), **RUN).images, expected, rtol=1e-3, atol=1e-3)
    # Without one: the component is optional.
    quiet(ClassConditionalSDEPipeline(unet(num_class_embeds=4), VPSDEScheduler())).save_pretrained(tmp_path / "free")
    assert json.loads((tmp_path / "free" / "model_index.json").read_text())["classifier"] == [None, None]
    assert ClassConditionalSDEPipeline.from_pretrained(tmp_path / "free").classifier is None


def test_pipeline_errors():
    with pytest.raises(ValueError, match="pass a classifier"):
        ClassConditionalSDEPipeline(unet(), VPSDEScheduler())
    pipe = quiet(ClassConditionalSDEPipeline(unet(), VPSDEScheduler(), classifier=tiny()))
    free = quiet(ClassConditionalSDEPipeline(unet(num_class_embeds=4), VPSDEScheduler(), null_class=3))
    other = quiet(ClassConditionalSDEPipeline(unet(), VPSDEScheduler(), 0.0, 1.0, classifier=tiny()))
    for run, message in (
        (lambda: pipe([3]), r"integer in \[0, 2\]"),
        (lambda: pipe("fish"), "the names are cat, dog, bird"),
        (lambda: pipe([0], guidance_scale=2.0), "guidance_scale must be 1 for a network without classes"),
        (lambda: pipe([0], classifier_guidance_scale=-1.0), "classifier_guidance_scale must be a finite number"),
        (lambda: free([0], classifier_guidance_scale=1.0), "needs a pipeline with a classifier"),
        (lambda: other([0]), "images in"),
        (lambda: pipe([0], method="ddim"), "method must be one of scheduler, ode"),
        (lambda: pipe([0], method="ode", callback_on_step_end=print), "callback_on_step_end"),
    ):
        with pytest.raises(ValueError, match=message):
            run()


# ---------------------------------------------------------------------- a network with classes, without a condition


@pytest.mark.parametrize(
    "options",
    [
        *({"sample_size": v} for v in ("8", None, 0, 10**9)),
        *({"in_channels": v} for v in ("1", 10**9)),
        *({"num_classes": v} for v in ("10", 10**9, 1.5)),
        *({"layers_per_block": v} for v in ("2", 10**9)),
        *({"block_out_channels": v} for v in ("ab", [10**9, 4], ["4", "8"], 4)),
        *({"dropout": v} for v in ("0", 1.0, math.nan)),
        *({"data_min": v} for v in ("0", 2.0)),
        *({"lowest_log_snr": v} for v in ("0", 30.0)),
        {"id2label": ["a"]},
    ],
    ids=str,
)
def test_every_key_of_a_classifiers_config_is_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        NoiseConditionalClassifier(**{"sample_size": 8, **options})


def test_the_null_class_is_unconditional_everywhere(tmp_path):
    network = unet(num_class_embeds=4)
    torch.nn.init.normal_(network.class_embedding.weight, std=3.0)
    pipe = quiet(ClassConditionalSDEPipeline(network, VPSDEScheduler(), null_class=3, id2label={0: "cat"}))
    as_a_class = quiet(ClassConditionalSDEPipeline(network, VPSDEScheduler()))
    expected = as_a_class([3], generator=seeded(), **RUN).images
    pipe.save_pretrained(tmp_path)
    plain = quiet(SDEPipeline.from_pretrained(tmp_path))
    assert torch.equal(pipe([0], guidance_scale=0.0, generator=seeded(), **RUN).images, expected)
    torch.testing.assert_close(plain(1, generator=seeded(), **RUN).images, expected, rtol=1e-3, atol=1e-3)
    inpaint = quiet(InpaintSDEPipeline.from_pretrained(tmp_path))
    image, hole = torch.zeros(1, 1, SIZE, SIZE), torch.ones(SIZE, SIZE)
    as_a_class.scheduler = VPSDEScheduler(solver_order=1)  # as guided steps are
    by_first_order = as_a_class([3], generator=seeded(), **RUN).images
    for posterior, drawn in (("replacement", expected), ("pigdm", by_first_order)):
        out = inpaint(image, hole, posterior=posterior, generator=seeded(), **RUN).images
        torch.testing.assert_close(out, drawn, rtol=1e-3, atol=1e-3)
    options = {"rtol": 1e-2, "atol": 1e-2}
    flow = ProbabilityFlow(plain)
    labelled = flow.encode(image, flow.options(**options), {"class_labels": torch.tensor([3])})
    assert torch.equal(plain.encode(image, **options), labelled.sample)
    blind = quiet(SDEPipeline(network, VPSDEScheduler()))
    with pytest.raises(ValueError, match="has no null_class"):
        blind(1, **RUN)
    with pytest.raises(ValueError, match="null_class must be None"):
        SDEPipeline(UNet2DModel(sample_size=8, block_out_channels=(32, 32), **BLOCKS), VPSDEScheduler(), null_class=1)


BLOCKS = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}

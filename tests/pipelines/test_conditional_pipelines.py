"""Conditional pipelines: on tiny networks for the contract, on exact ones for the law."""

import functools
import json
from dataclasses import dataclass

import diffusers
import numpy as np
import pytest
import torch
from analytic import GaussianMixture
from exact_networks import SCHEDULERS, SIZE, STEPS, ExactUNet, quiet, seeded, unet
from PIL import Image
from posteriors import COVARIANCE, errors
from posteriors import posterior as closed_form

from diffusers_sde import SDEPipeline, VESDEScheduler, VPSDEScheduler
from diffusers_sde.flow.solver import ODEOptions
from diffusers_sde.guidance.methods import GuidingMethod
from diffusers_sde.guidance.operators import Downsampling, GaussianBlur, Grayscale, Mask
from diffusers_sde.guidance.posteriors import POSTERIOR_METHODS
from diffusers_sde.pipelines import (
    ClassConditionalSDEPipeline,
    InpaintSDEPipeline,
    ProbabilityFlow,
    RestorationSDEPipeline,
    runs,
)
from diffusers_sde.pipelines.posterior_runs import posterior_of
from diffusers_sde.sampling.adaptive import SDEOptions

POSTERIORS = ("replacement", "repaint", "mmps", "pigdm", "dps")


def inpainter(scheduler="vp", channels=1, cls=InpaintSDEPipeline, **arguments):
    return quiet(cls(unet(channels), SCHEDULERS[scheduler](), **arguments))


def picture(n=2, channels=1, seed=0):
    return torch.rand(n, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


RIGHT = torch.zeros(SIZE, SIZE)
RIGHT[:, SIZE // 2 :] = 1.0  # to paint


# ---------------------------------------------------------------------- inpainting


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_known_pixels_are_exact(scheduler, posterior):
    pipe, image = inpainter(scheduler), picture()
    out = pipe(
        image,
        RIGHT,
        posterior=posterior,
        num_inference_steps=STEPS,
        generator=seeded(),
        output_type="latent",
        resamplings=2,
    ).images
    known = RIGHT == 0
    assert torch.equal(out[..., known], image[..., known]) and bool(torch.isfinite(out).all())
    assert float((out - image)[..., ~known].abs().min(dim=0).values.max()) > 0
    assert pipe.scheduler.config.solver_order == SCHEDULERS[scheduler]().config.solver_order


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_all_known_returns_the_image(posterior):
    image = picture()
    out = inpainter()(image, torch.zeros(SIZE, SIZE), posterior=posterior, num_inference_steps=2, output_type="latent")
    assert torch.equal(out.images, image)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("scheduler", ["vp", "pc", "ode", "ve", "clipped"])
def test_all_unknown_is_unconditional_sampling(scheduler, posterior, own):
    pipe = inpainter(scheduler)

    def generator():
        return [seeded(i) for i in range(2)] if own else seeded()

    # Where the order of the steps is left open, guided ones are of first order.
    order = {} if posterior in ("replacement", "repaint") else {"solver_order": 1}
    plain = quiet(SDEPipeline(pipe.unet, SCHEDULERS[scheduler](**order)))
    expected = plain(2, num_inference_steps=STEPS, generator=generator(), output_type="latent").images
    out = pipe(
        torch.full((2, 1, SIZE, SIZE), torch.nan),
        torch.ones(SIZE, SIZE),
        posterior=posterior,
        num_inference_steps=STEPS,
        generator=generator(),
        output_type="latent",
    ).images
    if posterior in ("replacement", "repaint"):
        assert torch.equal(out, expected)
    else:
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def completed(pipe, posterior, **run):
    options = {"num_inference_steps": STEPS, "generator": seeded(), "output_type": "latent"}
    return pipe(picture(), RIGHT, posterior=posterior, **(options | run)).images


@pytest.mark.parametrize("posterior", ["mmps", "pigdm", "dps", "gaussian"])
def test_guided_steps_are_of_first_order_where_the_order_is_open(posterior):
    pipe = inpainter()
    own, seen = pipe.scheduler, []

    def watch(pipe, index, timestep, tensors):
        seen.append(pipe.scheduler.config.solver_order)
        return tensors

    with_nothing_set = completed(pipe, posterior, callback_on_step_end=watch)
    assert pipe.scheduler is own and own.config.solver_order is None
    assert seen == [1] * STEPS
    pipe.scheduler = VPSDEScheduler(solver_order=1)
    assert torch.equal(completed(pipe, posterior), with_nothing_set)
    for asked in ({"solver_order": 2}, {"predictor": "ancestral"}):
        pipe.scheduler = VPSDEScheduler(**asked)
        other = completed(pipe, posterior, callback_on_step_end=watch)
        assert not torch.equal(other, with_nothing_set)
    assert seen == [1] * STEPS + [2] * STEPS + [None] * STEPS


def test_replacing_known_pixels_keeps_the_order():
    pipe = inpainter()
    drawn = completed(pipe, "replacement")
    pipe.scheduler = VPSDEScheduler(solver_order=1)
    assert not torch.equal(completed(pipe, "replacement"), drawn)


def test_first_order_completes_better_by_a_proper_score():
    """Two modes that the known half does not tell apart, exact scores; the energy score is smallest for the truth."""
    generator = torch.Generator().manual_seed(0)
    means = 0.5 * torch.randn(4, SIZE, SIZE, generator=generator).cumsum(1).tanh()
    means[1::2, :, : SIZE // 2] = means[::2, :, : SIZE // 2]
    loadings = torch.randn(4, 6, SIZE, SIZE, generator=generator).cumsum(2).cumsum(3).reshape(4, 6, -1).mT / SIZE
    loadings = 0.2 * loadings
    covariances = loadings @ loadings.mT + 1e-3 * torch.eye(SIZE**2)
    data = GaussianMixture(torch.ones(4), means.reshape(4, -1), covariances)
    count, times = 400, 3
    truth = data.sample(count, torch.Generator().manual_seed(1)).float().reshape(count, 1, SIZE, SIZE).clamp(-1.0, 1.0)
    hidden = truth[..., SIZE // 2 :].flatten(1)
    scores = {}
    for order in (None, 3):
        scheduler = VPSDEScheduler(solver_order=order)
        network = ExactUNet(SIZE)
        network.data, network.scheduler = data, scheduler
        pipe = quiet(InpaintSDEPipeline(network, scheduler))
        drawn = torch.stack(
            [
                pipe(truth, RIGHT, num_inference_steps=12, generator=seeded(k), output_type="latent").images
                for k in range(times)
            ]
        )[..., SIZE // 2 :].flatten(2)
        apart = sum((drawn[i] - drawn[j]).norm(dim=1) for i in range(times) for j in range(i))
        scores[order] = (drawn - hidden).norm(dim=2).mean(0) - apart / (times * (times - 1))
    gain = scores[3] - scores[None]
    assert float(gain.mean()) > 3.0 * float(gain.std()) / count**0.5


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_an_image_does_not_depend_on_its_batch(posterior):
    pipe, images = inpainter("pc"), picture(3)
    masks = (torch.rand(3, 1, SIZE, SIZE, generator=seeded()) < 0.5).float()
    run = {"posterior": posterior, "num_inference_steps": STEPS, "output_type": "latent", "resamplings": 2}
    together = pipe(images, masks, generator=[seeded(i) for i in range(3)], **run).images
    for i in range(3):
        alone = pipe(images[i : i + 1], masks[i : i + 1], generator=[seeded(i)], **run).images
        torch.testing.assert_close(alone[0], together[i], rtol=1e-3, atol=1e-3)


def test_inputs_of_every_kind_agree():
    pipe = inpainter(channels=3)
    array = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    pil = [Image.fromarray(a) for a in array]
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    mask = (RIGHT * 255).to(torch.uint8).numpy()
    run = {"num_inference_steps": 2, "output_type": "np"}
    masks = [Image.fromarray(mask), mask, mask[None], RIGHT.bool(), RIGHT[None, None], [Image.fromarray(mask)] * 2]
    images = [pil, array, tensor, tensor.double() / 127.5 - 1.0]
    results = [pipe(i, masks[0], generator=seeded(), **run).images for i in images]
    results += [pipe(pil, m, generator=seeded(), **run).images for m in masks]
    for result in results:
        np.testing.assert_allclose(result, results[0], atol=1e-6)
    outs = pipe(pil, masks[0], num_inference_steps=2).images
    assert isinstance(outs[0], Image.Image)
    for out, image in zip(outs, pil, strict=True):  # known pixels come back as the bytes they were
        np.testing.assert_array_equal(np.asarray(out)[:, : SIZE // 2], np.asarray(image)[:, : SIZE // 2])
    assert pipe(pil[0], masks[0], num_inference_steps=2, return_dict=False)[0][0].size == (SIZE, SIZE)


def test_ve_range():
    pipe = inpainter("ve", data_min=0.0)
    image = Image.fromarray(np.full((SIZE, SIZE), 255, np.uint8))
    out = pipe(image, RIGHT, num_inference_steps=2, output_type="latent").images
    assert float(out[..., : SIZE // 2].min()) == float(out[..., : SIZE // 2].max()) == 1.0


def test_several_completions_and_callback():
    pipe, images, calls = inpainter(), picture(2), []

    def callback(pipe, index, timestep, tensors):
        calls.append(index)
        return {}

    out = pipe(
        images,
        RIGHT,
        num_samples=3,
        num_inference_steps=STEPS,
        output_type="latent",
        callback_on_step_end=callback,
    ).images
    assert out.shape[0] == 6 and calls == list(range(STEPS)) and pipe.num_timesteps == STEPS
    for i in range(6):
        assert torch.equal(out[i, ..., : SIZE // 2], images[i // 3, ..., : SIZE // 2])
    assert float((out[0] - out[1]).abs().max()) > 0
    pipe(images, RIGHT, posterior="repaint", resamplings=3, num_inference_steps=STEPS)
    assert pipe.num_timesteps == 3 * (STEPS - 1) + 1


def test_known_pixels_need_not_be_kept():
    pipe, images = inpainter(), picture()
    out = pipe(images, RIGHT, posterior="dps", keep_known=False, num_inference_steps=2, output_type="latent").images
    assert not torch.equal(out[..., : SIZE // 2], images[..., : SIZE // 2])


def test_replacement_costs_one_call_per_row():
    pipe, calls = inpainter("pc"), []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    pipe(picture(), RIGHT, posterior="replacement", num_inference_steps=STEPS)
    assert len(calls) == len(pipe.scheduler.timesteps)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mask_image": torch.zeros(SIZE, SIZE + 1)}, r"mask_image must have the size of image, got 8 x 9 .* 8 x 8"),
        ({"mask_image": torch.zeros(3, SIZE, SIZE)}, "one for each image: got 3 for 2"),
        ({"mask_image": torch.full((SIZE, SIZE), 2.0)}, "mask_image must be boolean"),
        ({"mask_image": "mask.png"}, "mask_image must be PIL"),
        ({"mask_image": torch.zeros(2, 2, SIZE, SIZE)}, "channels"),
        ({"image": picture(2, 3)}, "image must have shape \\(B, 1, H, W\\)"),
        ({"image": picture() * torch.nan}, "finite"),
        ({"image": "image.png"}, "image"),
        ({"posterior": "ddrm"}, "posterior must be one of replacement"),
        ({"num_samples": 0}, "num_samples"),
        ({"output_type": "jpg"}, "output_type"),
        ({"posterior": "replacement", "posterior_options": {"scale": 1.0}}, "takes no posterior_options"),
        ({"method": "adaptive"}, "method must be one of scheduler, ode"),
        ({"method": "ode", "posterior": "replacement"}, "'ode' needs one of the posteriors dps"),
        (
            {"posterior": "dps", "posterior_options": {"scales": 1.0}},
            r"may hold scale, chunk_size, got 'scales' \(did you mean 'scale'",
        ),
        ({"method": "mmps"}, "method must be one of scheduler, ode, sde, got 'mmps'.*pass posterior='mmps'"),
        ({"method": "repaint"}, "pass posterior='repaint'"),
        ({"posterior": "smc"}, "noise_std must be positive"),
        ({"posterior": "replacement", "noise_std": 0.1}, "noise_std must be 0 for posterior 'replacement'"),
        ({"latents": torch.zeros(1, 1, SIZE, SIZE)}, "latents must have shape"),
        ({"posterior": "repaint", "resamplings": 0}, "resamplings"),
    ],
)
def test_inpainting_errors(change, message):
    arguments = {"image": picture(), "mask_image": RIGHT, "num_inference_steps": 2, **change}
    with pytest.raises(ValueError, match=message):
        inpainter()(arguments.pop("image"), arguments.pop("mask_image"), **arguments)


def test_a_foreign_scheduler_is_refused():
    pipe = quiet(InpaintSDEPipeline(unet(), diffusers.DDPMScheduler()))
    with pytest.raises(ValueError, match="from_config"):
        pipe(picture(), RIGHT)


# ---------------------------------------------------------------------- restoration


@pytest.mark.parametrize("posterior", ["mmps", "pigdm", "dps"])
@pytest.mark.parametrize(
    "make",
    [
        lambda shape: Downsampling(2, shape),
        lambda shape: GaussianBlur(1.0, shape),
        lambda shape: Grayscale(shape),
        lambda shape: Mask(RIGHT == 0, shape),
    ],
)
def test_any_operator_with_any_method(make, posterior):
    pipe = inpainter("vp", 3, RestorationSDEPipeline)
    operator = make(pipe.sample_shape)
    y = operator.measure(picture(2, 3), 0.05, seeded())
    run = {"posterior": posterior, "num_inference_steps": STEPS, "output_type": "latent"}
    out = pipe(y, operator, 0.05, num_samples=2, generator=seeded(), **run).images
    parts = pipe(
        y, operator, 0.05, num_samples=2, generator=seeded(), posterior_options={"chunk_size": 3}, **run
    ).images
    assert out.shape == (4, 3, SIZE, SIZE) and bool(torch.isfinite(out).all())
    torch.testing.assert_close(out, parts, rtol=1e-3, atol=1e-3 * float(out.abs().max()))


@pytest.mark.parametrize("scheduler", ["vp", "ve", "flow"])
def test_particles(scheduler):
    """Of an exact network and as many particles as the small problem takes: the posterior, whatever the scheduler."""
    network = ExactUNet()
    network.data = GaussianMixture.gaussian([0.3, -0.2, 0.5, 0.1], COVARIANCE)
    options = {"prediction_type": "flow_prediction"} if scheduler == "flow" else {}
    network.scheduler = SCHEDULERS[scheduler](**options)
    pipe = quiet(RestorationSDEPipeline(network, network.scheduler))
    operator, y = Downsampling(2, (1, 2, 2)), torch.tensor([[[[0.6]]]])
    run = {"num_samples": 400, "num_inference_steps": 60, "output_type": "latent", "generator": seeded()}
    out = pipe(y, operator, 0.1, "smc", posterior_options={"particles": 8}, **run).images
    truth, _ = closed_form(network.data, operator.matrix(), y.flatten().double(), 0.1)
    measured = errors(out.flatten(1), truth)
    # 400 exact samples: 0.1 +- 0.035 and 0.17 +- 0.05.
    assert measured["mean"] < 0.25 and measured["covariance"] < 0.45, measured
    for change, message in (
        ({"latents": torch.zeros(400, 1, 2, 2)}, "no latents"),
        ({"generator": [seeded()] * 400}, "list of generators"),
        ({"posterior_options": {"iterations": 3}}, "may hold particles"),
        ({"noise_std": 0.0}, "noise_std must be positive"),
        ({"method": "ode"}, "no method 'ode'"),
        ({"callback_on_step_end": lambda *_: {}}, "no callback_on_step_end"),
    ):
        arguments = {"noise_std": 0.1, "posterior": "smc", **run, **change}
        with pytest.raises(ValueError, match=message):
            pipe(y, operator, **arguments)


def test_small_pictures_are_measurements():
    pipe = inpainter("vp", 3, RestorationSDEPipeline)
    small = Image.fromarray(np.full((SIZE // 2, SIZE // 2, 3), 128, np.uint8))
    images = pipe(small, Downsampling(2, pipe.sample_shape), 0.1, num_inference_steps=2).images
    assert images[0].size == (SIZE, SIZE)


def test_restoration_errors():
    pipe = inpainter("vp", 1, RestorationSDEPipeline)
    operator, y = Downsampling(2, (1, SIZE, SIZE)), torch.zeros(1, 1, SIZE // 2, SIZE // 2)
    masks = Mask(torch.ones(3, 1, SIZE, SIZE), (1, SIZE, SIZE))
    for arguments, message in (
        ((y, Downsampling(2, (3, SIZE, SIZE))), "operator must be one for data"),
        ((torch.zeros(1, 1, SIZE, SIZE), operator), "measurement must have shape"),
        ((torch.zeros(2, 1, SIZE, SIZE), masks), "operator is for 3 images, got 2"),
        ((y * torch.nan, operator), "finite"),
        ((y, operator, -1.0), "noise_std"),
        ((y, operator, 0.0, "replacement"), "posterior must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(*arguments, num_inference_steps=2)
    with pytest.raises(ValueError, match="pass posterior='mmps'"):
        pipe(y, operator, method="mmps", num_inference_steps=2)


def test_defaults_follow_the_range_of_the_data():
    """The standard deviation of the data is taken for a quarter of their range."""
    for data_min, std in ((-1.0, 0.5), (0.0, 0.25)):
        pipe = inpainter("ve", data_min=data_min)
        assert posterior_of(pipe, "pigdm", None).data_std == posterior_of(pipe, "smc", {}).data_std == std
        assert posterior_of(pipe, "gaussian", None).covariance == std**2
        assert posterior_of(pipe, "pigdm", {"data_std": 0.7}).data_std == 0.7


@dataclass(frozen=True)
class Projection(GuidingMethod):
    """x0_hat + strength A^+ (y - A x0_hat), which meets the measurement for strength 1."""

    strength: float = 1.0

    def __call__(self, denoiser, sde, operator, y, noise_std=0.0):
        def denoise(x, t):
            x0_hat = denoiser(x, t)
            return x0_hat + self.strength * operator.pseudo_inverse(operator.residual(y, x0_hat))

        return denoise


def test_a_method_of_the_user_needs_a_class_and_a_line_in_the_registry(monkeypatch):
    monkeypatch.setitem(POSTERIOR_METHODS, "projection", Projection)
    run = {"posterior": "projection", "num_inference_steps": STEPS, "output_type": "latent"}
    pipe, operator = inpainter("vp", 1, RestorationSDEPipeline), Downsampling(2, (1, SIZE, SIZE))
    y = operator.apply(picture(2))
    out = pipe(y, operator, generator=seeded(), num_samples=2, **run).images
    torch.testing.assert_close(operator.apply(out), y.repeat_interleave(2, 0), rtol=0, atol=1e-4)
    half = pipe(y, operator, generator=seeded(), num_samples=2, posterior_options={"strength": 0.5}, **run).images
    assert float((operator.apply(half) - y.repeat_interleave(2, 0)).abs().max()) > 0.01
    adaptive = pipe(y, operator, method="sde", rtol=0.5, atol=0.5, generator=seeded(), **run).images
    torch.testing.assert_close(operator.apply(adaptive), y, rtol=0, atol=1e-4)
    filled = inpainter()(picture(2), RIGHT, keep_known=False, generator=seeded(), **run).images
    torch.testing.assert_close(filled[..., RIGHT == 0], picture(2)[..., RIGHT == 0], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"may hold strength, got 'strenght' \(did you mean 'strength'\?\)"):
        pipe(y, operator, posterior_options={"strenght": 0.5}, **run)
    for call in (lambda: pipe(y, operator, posterior="x"), lambda: inpainter()(picture(), RIGHT, posterior="x")):
        with pytest.raises(ValueError, match="posterior must be one of .*smc, projection"):
            call()
    with pytest.raises(ValueError, match="pass posterior='projection'"):
        pipe(y, operator, method="projection")


@pytest.mark.parametrize("posterior", ["gaussian", "smc"])
def test_holes_filled_by_methods_for_small_images(posterior):
    """With an exact network the hole follows the closed form, and noise is taken out of the known pixels."""
    network = ExactUNet()
    network.data = GaussianMixture.gaussian([0.3, -0.2, 0.5, 0.1], COVARIANCE)
    network.scheduler = SCHEDULERS["vp"]()
    pipe = quiet(InpaintSDEPipeline(network, network.scheduler))
    image, hole, noise_std, n = (
        torch.tensor([[[[0.6, 0.0], [0.2, 0.0]]]]),
        torch.tensor([[0.0, 1.0], [0.0, 1.0]]),
        0.2,
        1000,
    )
    options = {"covariance": COVARIANCE} if posterior == "gaussian" else {"particles": 8}
    run = {"num_samples": n, "num_inference_steps": 60, "output_type": "latent", "generator": seeded()}
    out = pipe(image, hole, posterior, noise_std=noise_std, posterior_options=options, keep_known=False, **run).images
    a = torch.eye(4, dtype=torch.float64)[hole.flatten() == 0]
    truth, _ = closed_form(network.data, a, image.flatten()[hole.flatten() == 0].double(), noise_std)
    measured = errors(out.flatten(1), truth)
    # 1000 exact samples: 0.06 +- 0.02 and 0.11 +- 0.03.
    assert measured["mean"] < 0.18 and measured["covariance"] < 0.3, measured


@pytest.mark.parametrize("scheduler", ["vp", "pc", "ode", "ve", "flow"])
def test_restored_images_follow_the_posterior(scheduler):
    """The whole way through a scheduler: conversion, guidance, and back, against the closed form."""
    network = ExactUNet()
    network.data = GaussianMixture.gaussian([0.3, -0.2, 0.5, 0.1], COVARIANCE)
    options = {"corrector": "ornstein_uhlenbeck"} if scheduler == "pc" else {}
    options |= {"prediction_type": "flow_prediction"} if scheduler == "flow" else {}
    network.scheduler = SCHEDULERS[scheduler](**options)
    pipe = quiet(RestorationSDEPipeline(network, network.scheduler))
    operator = Downsampling(2, (1, 2, 2))
    y, n, noise_std = torch.tensor([[[[0.6]]]]), 2500, 0.1
    out = pipe(
        y,
        operator,
        noise_std,
        num_samples=n,
        num_inference_steps=40,
        generator=seeded(),
        output_type="latent",
        posterior_options={"iterations": 2},
    ).images
    truth, _ = closed_form(network.data, operator.matrix(), y.flatten().double(), noise_std)
    measured = errors(out.flatten(1), truth)
    # 2500 exact samples: 0.04 +- 0.015 and 0.07 +- 0.02.
    assert measured["mean"] < 0.12 and measured["covariance"] < 0.2, measured


# ---------------------------------------------------------------------- classes


def by_class(scheduler="vp", **arguments):
    network = unet(num_class_embeds=4)
    torch.nn.init.normal_(network.class_embedding.weight, std=3.0)
    options = {"null_class": 3, "id2label": {0: "cat", 1: "dog", 2: "bird"}, **arguments}
    return quiet(ClassConditionalSDEPipeline(network, SCHEDULERS[scheduler](), **options))


RUN = {"num_inference_steps": STEPS, "output_type": "latent"}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_labels_by_number_and_name(scheduler):
    pipe = by_class(scheduler)
    a = pipe([0, 2], guidance_scale=2.0, generator=seeded(), **RUN).images
    b = pipe(["cat", "bird"], guidance_scale=2.0, generator=seeded(), **RUN).images
    c = pipe(torch.tensor([1, 2]), guidance_scale=2.0, generator=seeded(), **RUN).images
    assert torch.equal(a, b) and not torch.allclose(a[0], c[0])
    assert pipe("dog", **RUN).images.shape == (1, 1, SIZE, SIZE) == pipe(1, **RUN).images.shape


def test_guidance_is_the_difference_of_two_runs_of_the_network():
    """One level: x0_hat itself is returned, which is linear in the guidance scale."""
    pipe = by_class()
    run = {"num_inference_steps": 1, "output_type": "latent"}
    results = {s: pipe([1], guidance_scale=s, generator=seeded(), **run).images for s in (0.0, 1.0, 3.0)}
    expected = results[0.0] + 3.0 * (results[1.0] - results[0.0])
    torch.testing.assert_close(results[3.0], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    as_a_class = quiet(ClassConditionalSDEPipeline(pipe.unet, pipe.scheduler))
    null = as_a_class([3], guidance_scale=1.0, generator=seeded(), **run).images
    torch.testing.assert_close(results[0.0], null)


def test_one_call_per_row_with_twice_the_batch():
    pipe, sizes = by_class(), []
    pipe.unet.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    pipe([0, 1, 2], guidance_scale=2.0, **RUN)
    assert sizes == [6] * STEPS
    sizes.clear()
    pipe([0, 1, 2], **RUN)
    assert sizes == [3] * STEPS
    sizes.clear()
    pipe([0, 1, 2], guidance_scale=2.0, guidance_interval=(0.2, 3.0), **RUN)
    assert set(sizes) == {3, 6}


def test_unguided_is_the_network_as_it_is():
    pipe = by_class()
    labels = torch.tensor([0, 2])
    pipe.unet.class_embedding.weight.requires_grad_(False)
    out = pipe(labels, generator=seeded(), **RUN).images
    scheduler = SCHEDULERS["vp"]()
    scheduler.set_timesteps(STEPS)
    generator = seeded()
    x = torch.randn(2, 1, SIZE, SIZE, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.unet(x, t, labels).sample, t, x, generator=generator).prev_sample
    torch.testing.assert_close(out, x, rtol=1e-3, atol=1e-3 * float(x.abs().max()))


@pytest.mark.parametrize(
    "arguments, message",
    [
        *(
            ({"class_labels": [v]}, r"class_labels must be an integer in \[0, 2\]")
            for v in (4, -1, 1.5, True, None, [0])
        ),
        ({"class_labels": [0, 3]}, "must not hold 3, the null class"),
        ({"class_labels": np.array([3])}, "must not hold 3, the null class"),
        ({"class_labels": np.array([9])}, r"in \[0, 2\], got 9"),
        *(({"class_labels": v}, "must be numbers or names") for v in (b"a", {"a": 1}, 1.5)),
        ({"class_labels": []}, "at least one"),
        ({"class_labels": "fish"}, "'fish', but the names are cat, dog, bird"),
        ({"class_labels": [0], "guidance_scale": -1.0}, "scale"),
        ({"class_labels": [0], "guidance_interval": (3.0, 1.0)}, "guidance_interval"),
        ({"class_labels": [0], "output_type": "jpg"}, "output_type"),
    ],
)
def test_class_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        by_class()(**arguments)


def test_networks_without_classes_or_null_class():
    with pytest.raises(ValueError, match="num_class_embeds"):
        ClassConditionalSDEPipeline(unet(), VPSDEScheduler())
    with pytest.raises(ValueError, match="null_class"):
        by_class(null_class=4)
    with pytest.raises(ValueError, match="id2label"):
        by_class(id2label={7: "horse"})
    pipe = by_class(null_class=None)
    assert len(pipe([0], num_inference_steps=2).images) == 1
    with pytest.raises(ValueError, match="null class"):
        pipe([0], guidance_scale=2.0)


# ---------------------------------------------------------------------- files


def test_saved_and_loaded(tmp_path, caplog):
    pipe = by_class()
    expected = pipe(["dog"], guidance_scale=2.0, generator=seeded(), **RUN).images
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["null_class"] == 3
    diffusers.utils.logging.enable_propagation()
    loaded = quiet(ClassConditionalSDEPipeline.from_pretrained(tmp_path))
    diffusers.utils.logging.disable_propagation()
    assert "id2label" not in caplog.text
    assert loaded.labels == {"cat": 0, "dog": 1, "bird": 2} and loaded.config.null_class == 3
    assert torch.equal(loaded(["dog"], guidance_scale=2.0, generator=seeded(), **RUN).images, expected)


@pytest.mark.parametrize("cls", [InpaintSDEPipeline, RestorationSDEPipeline])
def test_an_unconditional_pipeline_can_be_loaded_for_conditional_use(tmp_path, cls):
    quiet(SDEPipeline(unet(), VESDEScheduler(), data_min=0.0)).save_pretrained(tmp_path)
    pipe = cls.from_pretrained(tmp_path)
    assert type(pipe) is cls and pipe.config.data_min == 0.0 and isinstance(pipe.scheduler, VESDEScheduler)
    shared = cls.from_pipe(pipe)
    assert shared.unet is pipe.unet


# ---------------------------------------------------------------------- the adaptive ODE of the posterior


def test_posterior_by_the_adaptive_ode():
    """The exact network's posterior flow, every image with steps of its own, against the closed form."""
    network = ExactUNet()
    network.data = GaussianMixture.gaussian([0.3, -0.2, 0.5, 0.1], COVARIANCE)
    network.scheduler = SCHEDULERS["vp"]()
    pipe = quiet(RestorationSDEPipeline(network, network.scheduler))
    operator, y, noise_std = Downsampling(2, (1, 2, 2)), torch.tensor([[[[0.6]]]]), 0.1
    run = {"method": "ode", "rtol": 1e-3, "atol": 1e-3, "output_type": "latent", "posterior_options": {"iterations": 2}}
    out = pipe(y, operator, noise_std, num_samples=400, generator=seeded(), **run).images
    truth, _ = closed_form(network.data, operator.matrix(), y.flatten().double(), noise_std)
    measured = errors(out.flatten(1), truth)
    # 400 exact samples: 0.1 +- 0.035 and 0.17 +- 0.05.
    assert measured["mean"] < 0.25 and measured["covariance"] < 0.4, measured
    assert pipe.calls.shape == (400,)


@pytest.mark.parametrize("method", ["ode", "sde"])
def test_adaptive_steps_that_do_not_end_say_what_to_do(monkeypatch, method):
    monkeypatch.setattr(ProbabilityFlow, "options", lambda flow, rtol, atol: ODEOptions(rtol, atol, max_calls=5))
    monkeypatch.setattr(runs, "SDEOptions", functools.partial(SDEOptions, max_calls=5))
    pipe = inpainter(cls=RestorationSDEPipeline)
    operator = Downsampling(2, pipe.sample_shape)
    with pytest.raises(RuntimeError, match="max_calls.*rtol=0.01 and atol=0.02, or the scheduler's own"):
        pipe(picture()[..., ::2, ::2], operator, posterior="pigdm", method=method, rtol=0.01, atol=0.02)


def test_inpainting_by_the_adaptive_ode_gives_every_image_its_own_mask():
    pipe, images = inpainter(), picture(3)
    masks = (torch.rand(3, 1, SIZE, SIZE, generator=seeded()) < 0.5).float()
    run = {"posterior": "mmps", "method": "ode", "rtol": 0.5, "atol": 0.5, "posterior_options": {"iterations": 1}}
    run["output_type"] = "latent"
    together = pipe(images, masks, generator=[seeded(i) for i in range(3)], **run).images
    assert torch.equal(together[masks == 0], images[masks == 0])
    alone = pipe(images[1:2], masks[1:2], generator=[seeded(1)], **run).images
    torch.testing.assert_close(alone[0], together[1], rtol=1e-2, atol=1e-2 * float(together.abs().max()))
    with pytest.raises(ValueError, match="'ode' needs one of the posteriors dps"):
        pipe(images, masks, posterior="repaint", method="ode")

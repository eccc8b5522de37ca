"""What all pipelines' calls have in common: how many images, which arguments, and answers to mistakes."""

import inspect
import logging
from typing import Literal, get_args, get_origin

import pytest
import torch
from exact_networks import quiet, seeded
from hub_models import tiny_pipeline
from tiny_networks import tiny_unet
from tiny_parts import HAS_TRANSFORMERS

import diffusers_sde
from diffusers_sde import SDEPipeline, VESDEScheduler, VPSDEScheduler
from diffusers_sde.guidance import Downsampling
from diffusers_sde.pipelines import (
    PIPELINES,
    ClassConditionalSDEPipeline,
    InpaintSDEPipeline,
    RestorationSDEPipeline,
    TextSDEPipeline,
    probability_flow,
)
from diffusers_sde.sampling.predictors import PREDICTORS
from diffusers_sde.schedulers.arguments import SAMPLER_ARGUMENTS

SHORT = {"num_inference_steps": 2, "output_type": "latent"}
IMAGE, MASK = torch.zeros(2, 1, 8, 8), torch.ones(8, 8)


def make(cls=SDEPipeline, classes=None, **options):
    network = tiny_unet(num_class_embeds=classes) if classes else tiny_unet()
    return quiet(cls(network, VPSDEScheduler(), **options))


def by_class(null_class=4):
    return make(ClassConditionalSDEPipeline, 5, null_class=null_class, id2label={i: f"word {i}" for i in range(4)})


def inputs_of(pipe):
    if isinstance(pipe, InpaintSDEPipeline):
        return {"image": IMAGE, "mask_image": MASK}
    if isinstance(pipe, RestorationSDEPipeline):
        return {"measurement": torch.zeros(2, 1, 4, 4), "operator": Downsampling(2, (1, 8, 8)), "noise_std": 0.1}
    return {}


def all_pipelines():
    special = {ClassConditionalSDEPipeline: by_class, TextSDEPipeline: lambda: tiny_pipeline("text")}
    classes = [cls for cls in PIPELINES.values() if HAS_TRANSFORMERS or cls is not TextSDEPipeline]
    return [special[cls]() if cls in special else make(cls) for cls in classes]


@pytest.mark.parametrize("pipe", all_pipelines(), ids=lambda pipe: type(pipe).__name__)
def test_every_pipeline_takes_a_batch_size(pipe):
    images = pipe(batch_size=4, generator=seeded(), **inputs_of(pipe), **SHORT).images
    assert images.shape == (4, 1, 8, 8)
    again = pipe(batch_size=4, generator=seeded(), **inputs_of(pipe), **SHORT).images
    assert torch.equal(images, again)
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        pipe(batch_size=0, **inputs_of(pipe), **SHORT)


@pytest.mark.parametrize("cls", [InpaintSDEPipeline, RestorationSDEPipeline])
def test_a_batch_is_shared_evenly_by_the_inputs(cls):
    pipe = make(cls)
    of_each = pipe(num_samples=2, generator=seeded(), **inputs_of(pipe), **SHORT).images
    assert torch.equal(of_each, pipe(batch_size=4, generator=seeded(), **inputs_of(pipe), **SHORT).images)
    for wrong in ({"batch_size": 3}, {"batch_size": 4, "num_samples": 3}):
        with pytest.raises(ValueError, match="batch_size must be num_samples for each"):
            pipe(**wrong, **inputs_of(pipe), **SHORT)


# ---------------------------------------------------------------------- classes that nobody names


@pytest.mark.parametrize("several", [False, True])
def test_random_classes_come_from_the_generator(several):
    pipe, count = by_class(), 200

    def generators():
        return [seeded(i) for i in range(count)] if several else seeded(3)

    drawn = pipe(batch_size=count, generator=generators(), **SHORT).images
    classes = pipe.drawn_classes
    # Each of 4 classes has 50 of 200 images, with a standard deviation of 6.1: five of them are a false alarm in 10^6.
    counts = torch.bincount(classes, minlength=5)
    assert counts[4] == 0 and bool(((counts[:4] - 50).abs() < 31).all())
    # The same noise as with these labels given: what is drawn for classes is drawn from elsewhere.
    assert torch.equal(drawn, pipe(class_labels=classes, generator=generators(), **SHORT).images)


def test_an_image_has_the_class_of_its_generator_in_any_batch():
    pipe = by_class()
    pipe(batch_size=6, generator=[seeded(i) for i in range(6)], **SHORT)
    together = pipe.drawn_classes.tolist()
    apart = []
    for i in range(6):
        pipe(generator=[seeded(i)], **SHORT)
        apart += pipe.drawn_classes.tolist()
    assert together == apart and len(set(together)) > 1


def test_no_class_is_drawn_where_none_counts():
    pipe = by_class()
    drawn = pipe(batch_size=3, guidance_scale=0, generator=seeded(), **SHORT).images
    assert pipe.drawn_classes.tolist() == [4, 4, 4]
    plain = make(classes=5, null_class=4)
    torch.testing.assert_close(drawn, plain(3, generator=seeded(), **SHORT).images, rtol=1e-4, atol=1e-4)


def test_one_label_serves_a_batch():
    pipe = by_class()
    many = pipe(class_labels="word 2", batch_size=3, generator=seeded(), **SHORT).images
    assert torch.equal(many, pipe(class_labels=[2, 2, 2], generator=seeded(), **SHORT).images)
    with pytest.raises(ValueError, match="class_labels must be one, or one for each of 3 images, got 2"):
        pipe(class_labels=[1, 2], batch_size=3, **SHORT)
    with pytest.raises(ValueError, match="batch_size must be that of latents, 2, or None, got 3"):
        pipe(latents=torch.zeros(2, 1, 8, 8), batch_size=3, **SHORT)


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("pipe", all_pipelines(), ids=lambda pipe: type(pipe).__name__)
def test_an_unknown_argument_is_answered_with_the_near_one(pipe):
    for wrong, near in {"num_inferense_steps": "num_inference_steps", "num_images_per_prompt": "batch_size"}.items():
        message = f"{type(pipe).__name__} takes no argument '{wrong}' .did you mean '{near}'"
        with pytest.raises(TypeError, match=message):
            pipe(**inputs_of(pipe), **{wrong: 2})
    assert list(inspect.signature(type(pipe).__call__).parameters)[0] == "self"
    assert "kwargs" not in inspect.signature(type(pipe).__call__).parameters


@pytest.mark.parametrize("pipe", all_pipelines(), ids=lambda pipe: type(pipe).__name__)
def test_tolerances_need_adaptive_steps(pipe):
    for name in ("rtol", "atol"):
        with pytest.raises(ValueError, match=f"{name} must be None for method 'scheduler'"):
            pipe(**inputs_of(pipe), **SHORT, **{name: 0.1})


def test_tolerances_left_out_are_a_hundredth():
    pipe = make()
    left_out = pipe(2, generator=seeded(), output_type="latent", method="ode").images
    given = pipe(2, generator=seeded(), output_type="latent", method="ode", rtol=1e-2, atol=1e-2).images
    assert torch.equal(left_out, given)


def test_words_in_place_of_numbers():
    with pytest.raises(ValueError, match="got 'a cat': SDEPipeline draws images without a prompt"):
        make()("a cat")
    with pytest.raises(ValueError, match="class_labels holds 'a cat', but the names are word 0, word 1"):
        by_class()("a cat")


@pytest.mark.parametrize("pipe", all_pipelines(), ids=lambda pipe: type(pipe).__name__)
def test_a_list_of_too_few_generators(pipe):
    with pytest.raises(ValueError, match="generator is a list of 2, but there are 4 samples"):
        pipe(batch_size=4, generator=[seeded(0), seeded(1)], **inputs_of(pipe), **SHORT)


@pytest.mark.parametrize("images, message", [((2, 3, 8, 8), "1 channels"), ((2, 1, 7, 8), "multiples of 2")])
def test_images_of_a_wrong_size(images, message):
    for call in (make().encode, make().bits_per_dim):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(images, dtype=torch.uint8))


def test_the_cost_of_the_flow_is_logged(caplog):
    pipe = make()
    with caplog.at_level(logging.INFO, probability_flow.__name__):
        codes = pipe.encode(IMAGE, rtol=0.1, atol=0.1)
        pipe.decode(codes, rtol=0.1, atol=0.1)
        result = pipe.bits_per_dim(IMAGE.to(torch.uint8), rtol=0.1, atol=0.1, importance_samples=2, generator=seeded())
    lines = [record.getMessage() for record in caplog.records if record.name == probability_flow.__name__]
    assert [line.split(":")[0] for line in lines] == ["encode", "decode", "bits/dim"]
    total = int(result.calls.sum())
    assert lines[2] == f"bits/dim: 4 samples, {total / 4:.0f} network calls each, {total} together."


# ---------------------------------------------------------------------- in an editor


def test_a_probability_flow_is_short_in_words():
    flow = probability_flow.ProbabilityFlow(make())  # whose SDE is a table of a thousand numbers
    assert repr(flow) == "ProbabilityFlow(UNet2DModel, DiscreteVPSDE, data in [-1, 1], t_min=0.001)"
    ve = probability_flow.ProbabilityFlow(quiet(SDEPipeline(tiny_unet(), VESDEScheduler())))
    assert repr(ve) == f"ProbabilityFlow(UNet2DModel, {ve.sde}, data in [-1, 1], t_min={ve.t_min:g})"
    assert "UNet2DModel, guided" in repr(by_class().probability_flow())
    assert "<th>network</th><td>UNet2DModel</td>" in flow._repr_html_()


def test_the_package_lists_what_is_public():
    listed = dir(diffusers_sde)
    assert set(diffusers_sde.__all__) <= set(listed)
    assert not {"sys", "Any", "register_with_diffusers", "own_index"} & set(listed)
    assert all(hasattr(diffusers_sde, name) for name in listed)


def test_choices_are_in_the_signature():
    hint = inspect.signature(VPSDEScheduler.__init__).parameters["predictor"].annotation
    assert get_args(hint) == tuple(PREDICTORS)
    for argument in SAMPLER_ARGUMENTS:
        kinds = [argument.type, *get_args(argument.type)]  # words alone, or words beside other types
        words = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
        for word in words:
            assert argument.check(argument.name, word) == word
        assert not words or argument.default in words

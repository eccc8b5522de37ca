"""Rollouts and their replay: the ratio of probabilities is exactly 1 as long as the weights are the same."""

import math

import diffusers
import pytest
import torch
from hub_models import tiny_pipeline
from tiny_networks import tiny_unet
from tiny_parts import HAS_TRANSFORMERS

from diffusers_sde import (
    ClassConditionalSDEPipeline,
    FlowSDEScheduler,
    SDEPipeline,
    SubVPSDEScheduler,
    VESDEScheduler,
    VPSDEScheduler,
    collect_rollout,
    rollout_model,
)

LEVELS, IMAGES = 5, 3


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def silent(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator():
    return torch.Generator().manual_seed(0)


def unconditional(**scheduler):
    return silent(SDEPipeline(tiny_unet(1.0), FlowSDEScheduler(**{"policy": "exact"} | scheduler)))


def by_class(scheduler=None):
    unet = tiny_unet(1.0, num_class_embeds=4)
    return silent(ClassConditionalSDEPipeline(unet, scheduler or VPSDEScheduler(policy="exact"), null_class=3))


def by_caption():
    pipe = tiny_pipeline("pixart")
    pipe.scheduler = VPSDEScheduler(policy="exact")
    return pipe


CASES = {
    "flow": (unconditional, {"batch_size": IMAGES}),
    "flow_grpo": (lambda: unconditional(policy="flow_grpo"), {"batch_size": IMAGES}),
    "window": (lambda: unconditional(stochastic_indices=[1, 3]), {"batch_size": IMAGES}),
    "corrector": (lambda: unconditional(corrector="ornstein_uhlenbeck", snr=0.3), {"batch_size": IMAGES}),
    "ve, preconditioned": (
        lambda: silent(SDEPipeline(tiny_unet(1.0), VESDEScheduler(policy="exact", prediction_type="edm"))),
        {"batch_size": IMAGES},
    ),
    "sub_vp, discrete": (
        lambda: silent(SDEPipeline(tiny_unet(1.0), SubVPSDEScheduler(policy="ddpo", time_conditioning="discrete"))),
        {"batch_size": IMAGES},
    ),
    "classes": (by_class, {"class_labels": [0, 2, 1]}),
    "guidance": (by_class, {"class_labels": [0, 2, 1], "guidance_scale": 2.5}),
    "guided ve": (
        lambda: by_class(VESDEScheduler(policy="flow_cps", prediction_type="edm")),
        {"class_labels": [1, 1, 0], "guidance_scale": 2.5, "guidance_interval": (0.5, 4.0)},
    ),
}
if HAS_TRANSFORMERS:
    CASES["captions"] = (
        by_caption,
        {"prompt": ["a cab", "a lead", ""], "guidance_scale": 2.5, "negative_prompt": "cab"},
    )
    CASES["no prompt"] = (by_caption, {"batch_size": IMAGES})


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_the_ratio_on_replay_is_exactly_one(name, storage):
    make, arguments = CASES[name]
    pipe = make()
    rollout = collect_rollout(pipe, storage, **arguments, num_inference_steps=LEVELS, generator=generator())
    model = rollout_model(pipe, rollout)
    pipe.scheduler.set_timesteps(9)  # a rollout does not depend on what the pipeline does next
    assert rollout.log_probs.shape == (len(rollout), IMAGES) and rollout.log_probs.isfinite().all()
    assert all(x.dtype == storage for x in rollout.x_s)
    for k in range(len(rollout)):
        replayed = rollout.replay(model, k)
        assert torch.equal((replayed - rollout.log_probs[k]).exp(), torch.ones(IMAGES))
        replayed.sum().backward()
    assert sum(float(p.grad.abs().sum()) for p in pipe.unet.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("name", CASES)
def test_each_sample_can_be_replayed_at_a_step_of_its_own(name):
    make, arguments = CASES[name]
    pipe = make()
    rollout = collect_rollout(pipe, torch.bfloat16, **arguments, num_inference_steps=LEVELS, generator=generator())
    numbers, samples = torch.tensor([1, 0, 1]), torch.tensor([2, 0, 1])
    replayed = rollout.replay(rollout_model(pipe, rollout), numbers, samples)
    # Matrix products of other batches may round otherwise: a few units in the last place of the network's output.
    torch.testing.assert_close(replayed, rollout.log_probs[numbers, samples], rtol=2e-6, atol=2e-6)


def test_a_rollout_is_the_sample_of_the_pipeline_and_scores_its_own_steps():
    pipe = unconditional()
    arguments = {"batch_size": IMAGES, "num_inference_steps": LEVELS, "output_type": "latent"}
    plain = pipe(**arguments, generator=generator()).images
    rollout = collect_rollout(pipe, **arguments, generator=generator(), reduction="sum")
    assert torch.equal(rollout.output.images, plain)
    assert rollout.indices == (0, 1, 2, 3) and rollout.x_t[1] is rollout.x_s[0]
    assert "step" not in vars(pipe.scheduler)
    # The density is typed in for a single step: N(x_s; mean, std^2) with the coefficients of the row.
    row, k = rollout.scheduler.rows[2], 2
    with torch.no_grad():
        output = pipe.unet(rollout.x_t[k], rollout.scheduler.timesteps[k], return_dict=False)[0]
    mean = row.x * rollout.x_t[k] + row.model * output
    law = torch.distributions.Normal(mean.double(), row.noise)
    by_hand = law.log_prob(rollout.x_s[k].double()).flatten(1).sum(1)
    torch.testing.assert_close(rollout.log_probs[k].double(), by_hand, rtol=1e-5, atol=0)


def test_states_are_rounded_before_sampling_goes_on():
    """The image is what follows from the stored states, not from those before rounding."""
    pipe = unconditional()
    arguments = {"batch_size": 2, "num_inference_steps": LEVELS, "output_type": "latent"}
    rollout = collect_rollout(pipe, torch.bfloat16, **arguments, generator=generator())
    last = rollout.x_s[-1].float()
    with torch.no_grad():
        output = pipe.unet(last, rollout.scheduler.timesteps[-1], return_dict=False)[0]
    row = rollout.scheduler.rows[-1]
    end = (row.x * last + row.model * output).bfloat16().float()
    torch.testing.assert_close(rollout.output.images, end, rtol=1e-2, atol=1e-3)
    assert rollout.x_t[0].dtype == torch.float32  # the network has seen the start as it was drawn


def test_a_stock_pipeline():
    scheduler = VPSDEScheduler.from_config(diffusers.DDPMScheduler(clip_sample=True).config, policy="ddpo")
    pipe = silent(diffusers.DDPMPipeline(tiny_unet(1.0), scheduler))
    for storage in (torch.float32, torch.bfloat16):
        rollout = collect_rollout(pipe, storage, batch_size=2, num_inference_steps=4, generator=generator())
        assert len(rollout.output.images) == 2
        for k in range(len(rollout)):
            replayed = rollout.replay(lambda steps: pipe.unet(steps.x_t, steps.timestep).sample, k)
            assert torch.equal(replayed, rollout.log_probs[k])
    with pytest.raises(ValueError, match="calls the network as that pipeline does"):
        rollout_model(pipe, rollout)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_a_stock_pipeline_of_latents_with_guidance(tmp_path, storage):
    pytest.importorskip("transformers")
    from tiny_parts import conditional_unet, tiny_text, tiny_vae

    text = tiny_text(tmp_path)
    scheduler = VPSDEScheduler(policy="exact", beta_schedule="scaled_linear", steps_offset=1)
    pipe = silent(
        diffusers.StableDiffusionPipeline(
            tiny_vae(),
            text.encoder,
            text.tokenizer,
            conditional_unet(cross_attention_dim=16),
            scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )
    arguments = {"prompt": ["a", "b"], "guidance_scale": 3.0, "height": 8, "width": 8, "output_type": "latent"}
    rollout = collect_rollout(pipe, storage, **arguments, num_inference_steps=4, generator=generator())
    prompts = pipe.encode_prompt(["a", "b"], "cpu", 1, True)
    prompts = torch.cat([prompts[1], prompts[0]]).detach()

    def model(steps):
        both = pipe.unet(torch.cat([steps.x_t] * 2), steps.timestep[0], encoder_hidden_states=prompts).sample
        empty, prompted = both.chunk(2)
        return empty + 3.0 * (prompted - empty)

    assert len(rollout) == 3
    for k in range(3):
        assert torch.equal((rollout.replay(model, k) - rollout.log_probs[k]).exp(), torch.ones(2))


def test_the_gradient_is_that_of_the_density():
    """d log p / d output = (x_s - mean) model / std^2, typed in; the mean over the entries divides by their number."""
    pipe = unconditional()
    rollout = collect_rollout(pipe, batch_size=2, num_inference_steps=LEVELS, generator=generator())
    steps = rollout.steps([2, 0], [0, 1])
    output = torch.randn(2, 1, 8, 8, requires_grad=True)
    law = rollout.transition(steps, output)
    law.log_prob(steps.x_s, "mean").sum().backward()
    for k, number in enumerate((2, 0)):
        row = rollout.scheduler.rows[number]
        mean = row.x * steps.x_t[k] + row.model * output[k].detach()
        wanted = (steps.x_s[k] - mean) * row.model / row.noise**2 / math.prod(mean.shape)
        torch.testing.assert_close(output.grad[k], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (VPSDEScheduler(), "look back on earlier estimates.*policy='exact'"),
        (VPSDEScheduler(probability_flow=True), "no step with a density"),
        (VPSDEScheduler(predictor="ancestral", corrector="langevin", snr=0.1, stochasticity=0.0), "no step with"),
        (diffusers.DDPMScheduler(), "must be one of this package's, got DDPMScheduler"),
    ],
)
def test_samplers_without_a_density_are_refused(scheduler, words):
    pipe = silent(SDEPipeline(tiny_unet(), scheduler))
    with pytest.raises(ValueError, match=words):
        collect_rollout(pipe, batch_size=1, num_inference_steps=LEVELS)
    assert "step" not in vars(pipe.scheduler)
    pipe(batch_size=1, num_inference_steps=2)


def test_mistakes_are_named():
    pipe = unconditional()
    with pytest.raises(ValueError, match="storage must be one of"):
        collect_rollout(pipe, torch.int8, batch_size=1)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum"):
        collect_rollout(pipe, reduction="none", batch_size=1)
    with pytest.raises(TypeError, match="batch_sise"):
        collect_rollout(pipe, batch_sise=1)
    rollout = collect_rollout(pipe, batch_size=2, num_inference_steps=LEVELS)
    for numbers, samples in ((4, None), ([0, 1, 2], None), (0, [2]), (-1, None), (0.5, None), ([], [])):
        with pytest.raises(ValueError, match="must be integers below 4, the steps, and 2, the samples"):
            rollout.steps(numbers, samples)

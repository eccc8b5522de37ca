"""Generation by caption: what guidance adds up, what padding hides, and which prompts go with which images."""

import diffusers
import pytest
import torch
from hub_models import tiny_pipeline
from tiny_parts import conditional_unet, pixart, tiny_text, tiny_vae

from diffusers_sde import TextSDEPipeline, VPSDEScheduler
from diffusers_sde.networks.denoisers import network_denoiser

SHORT = {"num_inference_steps": 3, "output_type": "latent"}


@pytest.fixture(scope="module", params=["text", "pixart"])
def pipe(request):
    return tiny_pipeline(request.param)


def noise(count, seed=0):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def estimate(pipe, x, t, captions):
    """x0_hat of the network, with the text encoder called as transformers documents it."""
    tokens = pipe.tokenizer(captions, padding="max_length", max_length=8, truncation=True, return_tensors="pt")
    states = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    scheduler = pipe.scheduler
    arguments = {"encoder_hidden_states": states, "encoder_attention_mask": tokens.attention_mask.bool()}
    path = (scheduler.sde, scheduler.parametrization, scheduler.conditioning)
    # A plain function is called with what it is told by name, and all of diffusers' networks know the timestep so.
    return network_denoiser(lambda x, t, **kwargs: pipe.unet(x, timestep=t, **kwargs), *path, **arguments)(x, t)


@torch.no_grad()
@pytest.mark.parametrize("negative", [None, "a bad", ["a bad", "a big"]])
def test_guidance_adds_the_difference_of_two_captions(pipe, negative):
    x, t, image = noise(3), torch.tensor(0.4), torch.tensor([1, 0, 1])
    prompts = ["a cab", "a lead"]
    others = [negative] * 2 if isinstance(negative, str) else negative or ["", ""]
    conditional = estimate(pipe, x, t, [prompts[i] for i in image])
    null = estimate(pipe, x, t, [others[i] for i in image])
    guided = pipe.denoiser(prompts, 3.0, negative)(x, t, image=image)
    torch.testing.assert_close(guided, null + 3.0 * (conditional - null), rtol=1e-4, atol=1e-4)
    assert (guided - conditional).abs().max() > 1e-3
    torch.testing.assert_close(pipe.denoiser(prompts)(x, t, image=image), conditional, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_is_hidden_from_the_network(tmp_path, pipe):
    """T5 hides it from itself, so that the network's output depends on the caption alone."""
    text, unet = tiny_text(tmp_path), pipe.unet
    short, long = (
        TextSDEPipeline(unet, VPSDEScheduler(), text.t5, text.t5_tokenizer, max_caption_length=length)
        for length in (10, 24)
    )
    x, t, image = noise(2), torch.tensor(0.5), torch.arange(2)
    outputs = [each.denoiser(["a cab", "lead"])(x, t, image=image) for each in (short, long)]
    assert short.embed("a cab").states.shape == (1, 10, 16) and int(short.embed("a cab").mask.sum()) < 10
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_an_image_has_its_own_prompt_and_generator(pipe):
    prompts, generators = ["a cab", "a lead", ""], [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    together = pipe(prompts, guidance_scale=2.0, generator=generators, **SHORT).images
    for number, (prompt, seed) in enumerate(zip(prompts, (3, 4, 5), strict=True)):
        generator = [torch.Generator().manual_seed(seed)]
        alone = pipe(prompt, guidance_scale=2.0, generator=generator, **SHORT).images
        torch.testing.assert_close(alone[0], together[number], rtol=1e-4, atol=1e-4)
    repeated = pipe("a cab", batch_size=2, latents=noise(1).expand(2, -1, -1, -1), generator=generators[:2], **SHORT)
    assert repeated.images.shape == (2, 1, 8, 8)


def test_no_prompt_is_the_empty_one(pipe):
    drawn = [
        pipe(*prompt, batch_size=2, generator=torch.manual_seed(0), **SHORT).images
        for prompt in ((), ("",), ("a cab",))
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    flows = [pipe.log_prob(noise(1), rtol=1e-2, atol=1e-2, generator=torch.manual_seed(0)).value]
    flow = pipe.probability_flow("")
    options = {"options": flow.options(1e-2, 1e-2), "generator": torch.manual_seed(0)}
    flows.append(flow.log_prob(noise(1), conditioning={"image": torch.arange(1)}, **options).value)
    torch.testing.assert_close(*flows, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 3}, "prompt must be a string or a list of strings, at least one, got 3"),
        ({"prompt": []}, "prompt must be a string or a list of strings"),
        ({"prompt": ["a", "b"], "batch_size": 3}, "prompt must be one, or one for each of 3 images, got 2"),
        ({"prompt": "a", "negative_prompt": "b"}, "negative_prompt must be None for guidance_scale 1"),
        ({"prompt": "a", "batch_size": 2, "latents": noise(1)}, "batch_size must be that of latents, 1"),
    ],
)
def test_calls_that_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments, **SHORT)


def test_parts_that_do_not_fit_are_refused(pipe):
    unet = conditional_unet(cross_attention_dim=8, in_channels=1, out_channels=1)
    with pytest.raises(ValueError, match="unet takes embeddings of width 8, but text_encoder returns .* width 16"):
        TextSDEPipeline(unet, pipe.scheduler, pipe.text_encoder, pipe.tokenizer)
    with pytest.raises(ValueError, match="this PixArtTransformer2DModel also needs added_cond_kwargs"):
        TextSDEPipeline(pixart(sample_size=128), pipe.scheduler, pipe.text_encoder, pipe.tokenizer)
    with pytest.raises(ValueError, match="text_encoder must be a text encoder of transformers"):
        TextSDEPipeline(pipe.unet, pipe.scheduler, torch.nn.Linear(1, 1), pipe.tokenizer)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_parts_of_stable_diffusion_draw_what_they_draw_in_their_own_pipeline(tmp_path, scale):
    """Its networks have learnt to attend to the padding of captions; ``shows_padding`` lets them."""
    text, vae = tiny_text(tmp_path), tiny_vae()
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    unet = conditional_unet(cross_attention_dim=16)
    config = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False).config
    scheduler = VPSDEScheduler.from_config(config, probability_flow=True)
    stock = diffusers.StableDiffusionPipeline(vae, text.encoder, text.tokenizer, unet, scheduler, **nothing)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = {}
    for shows_padding in (True, False):
        own = VPSDEScheduler.from_config(scheduler.config)
        parts = {"vae": vae, "max_caption_length": 8, "shows_padding": shows_padding}
        ours = TextSDEPipeline(unet, own, text.encoder, text.tokenizer, **parts)
        ours.set_progress_bar_config(disable=True)
        drawn[shows_padding] = ours("a cab", guidance_scale=scale, latents=x, **SHORT).images
    stock.set_progress_bar_config(disable=True)
    expected = stock("a cab", guidance_scale=scale, latents=x, **SHORT).images
    torch.testing.assert_close(drawn[True], expected, rtol=1e-4, atol=1e-4)
    assert (drawn[False] - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match="shows_padding must be True or False, got 1"):
        TextSDEPipeline(unet, scheduler, text.encoder, text.tokenizer, shows_padding=1)

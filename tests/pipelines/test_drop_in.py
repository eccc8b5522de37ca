"""Pipelines nobody here wrote, unchanged, with our scheduler swapped in.

Every model is a real class with a handful of parameters, built offline; nothing is mocked.
"""

from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_sde import FlowSDEScheduler, VPSDEScheduler, make_plan, sample

pytest.importorskip("transformers")
from tiny_parts import (
    conditional_unet,
    flux_transformer,
    sd3_transformer,
    sdxl_components,
    seeded,
    tiny_text,
    tiny_vae,
)

N = 4  # noise levels of most runs
OWN_GRID = {"time_grid": None}  # that of the stock config, on which stock and reference loops run
PC = {**OWN_GRID, "predictor": "ancestral", "corrector": "langevin", "snr": 0.1}
TABLE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


# ---------------------------------------------------------------------- tiny real models


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # These models are too small to share among threads: on a busy machine the waiting costs fifty times the work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return tiny_text(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def vae():
    return tiny_vae()


@pytest.fixture(scope="session")
def unet():
    return seeded(
        lambda: diffusers.UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            norm_num_groups=4,
        )
    )


def silent(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def stable_diffusion_parts(text, vae):
    return {
        "vae": vae,
        "text_encoder": text.encoder,
        "tokenizer": text.tokenizer,
        "unet": conditional_unet(cross_attention_dim=16),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@pytest.fixture
def sd(stable_diffusion_parts):
    pipe = diffusers.StableDiffusionPipeline(**stable_diffusion_parts, scheduler=diffusers.PNDMScheduler(**PNDM))
    pipe.scheduler = VPSDEScheduler.from_config(pipe.scheduler.config, **PC)
    return silent(pipe)


PNDM = {k: v for k, v in TABLE.items() if k != "clip_sample"} | {"skip_prk_steps": True}


def sd_pipeline(cls, parts, **swap):
    pipe = cls(**parts, scheduler=diffusers.DDIMScheduler(**TABLE))
    pipe.scheduler = VPSDEScheduler.from_config(pipe.scheduler.config, **swap)
    return silent(pipe)


@pytest.fixture(scope="session")
def sdxl_parts(text, vae):
    return {**sdxl_components(text, vae), "add_watermarker": False}


@pytest.fixture(scope="session")
def sd3(text, vae):
    return silent(
        diffusers.StableDiffusion3Pipeline(
            transformer=sd3_transformer(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=text.encoder_projected,
            tokenizer=text.tokenizer,
            text_encoder_2=text.encoder_projected,
            tokenizer_2=text.tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    )


@pytest.fixture(scope="session")
def flux(text, vae):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return silent(
        diffusers.FluxPipeline(
            transformer=flux_transformer(),
            scheduler=scheduler,
            vae=vae,
            text_encoder=text.encoder,
            tokenizer=text.tokenizer,
            text_encoder_2=text.t5,
            tokenizer_2=text.t5_tokenizer,
        )
    )


# ---------------------------------------------------------------------- watching and repeating a run


class Watch:
    """Records what the network is called with, and the generator's state at its first call."""

    def __init__(self, network, generator=None):
        self.timesteps, self.inputs, self.state = [], [], None
        self._generator = generator
        self._handle = network.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module, arguments, keywords):
        if not self.timesteps:
            self.state = torch.get_rng_state() if self._generator is None else self._generator.get_state()
        x = arguments[0] if arguments else keywords.get("hidden_states", keywords.get("sample"))
        t = arguments[1] if len(arguments) > 1 else keywords["timestep"]
        self.inputs.append(x.clone())
        self.timesteps.append(float(torch.as_tensor(t).flatten()[0]))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._handle.remove()

    def replay(self):
        """A generator that continues as the pipeline's did."""
        return torch.Generator().set_state(self.state)


def table_time(timesteps):
    return (torch.as_tensor(timesteps, dtype=torch.float64) + 1.0) / 1000.0


def reference(scheduler, network, x, levels, generator):
    """The reference loop over these levels of a DDPM table; ``network(x, timestep)`` returns the raw output."""
    config = scheduler.config
    plan = make_plan(
        scheduler.sde,
        table_time(levels),
        predictor=config.predictor,
        corrector=config.corrector,
        correct_steps=config.correct_steps,
        snr=config.snr,
        stochasticity=scheduler.stochasticity,
        final_time=1e-3 if config.final_sigmas_type == "sigma_min" else None,
    ).fold(scheduler.parametrization, scheduler.sde)
    return sample(plan, lambda x, t: network(x, (t * 1000 - 1).round().long()), x, generator)


def pc_by_hand(eps: object, x: Tensor, levels: list[int], alphas_cumprod: Tensor, final: float, snr, generator):
    """Algorithm 5 of the paper with DDPM's posterior as predictor, from its formulas alone."""
    table = [float(alphas_cumprod[t]) for t in levels] + [final]
    for t, a, b in zip(levels, table[:-1], table[1:], strict=True):
        score = -eps(x, t) / (1 - a) ** 0.5
        z = torch.randn(x.shape, generator=generator)
        norms = [v.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for v in (z, score)]
        ratio = a / b if t != levels[-1] else a  # the last level counts its step to the data itself
        step = 2 * ratio * (snr * norms[0] / norms[1]) ** 2
        x = x + step * score + (2 * step) ** 0.5 * z
        noise = eps(x, t)
        x0 = (x - (1 - a) ** 0.5 * noise) / a**0.5
        if t == levels[-1]:
            return b**0.5 * x0 + (1 - b) ** 0.5 * noise
        beta = 1 - a / b
        mean = (b**0.5 * beta * x0 + (a / b) ** 0.5 * (1 - b) * x) / (1 - a)
        x = mean + (beta * (1 - b) / (1 - a)) ** 0.5 * torch.randn(x.shape, generator=generator)


# ---------------------------------------------------------------------- unconditional pipelines


@pytest.mark.parametrize(
    "swap",
    [PC, {**OWN_GRID, "predictor": "reverse_diffusion"}, {**OWN_GRID, "probability_flow": True, "solver_order": 2}],
)
def test_ddpm_pipeline(unet, swap):
    pipe = silent(diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(clip_sample=False)))
    pipe.scheduler = VPSDEScheduler.from_config(pipe.scheduler.config, **swap)
    generator = torch.Generator().manual_seed(1)
    with Watch(unet, generator) as watch, torch.no_grad():
        images = pipe(batch_size=2, num_inference_steps=N, generator=generator, output_type="np").images
        if "solver_order" in swap:
            assert watch.timesteps == [750, 500, 250, 0]
            return
        levels = [750, 500, 250, 0]
        assert watch.timesteps == list(np.repeat(levels, pipe.scheduler.order))
        x = reference(pipe.scheduler, lambda x, t: unet(x, t).sample, watch.inputs[0], levels, watch.replay())
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(images, expected)


def test_ddim_pipeline_does_not_turn_the_sde_into_an_ode(unet):
    pipe = silent(diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(clip_sample=False)))
    swap = VPSDEScheduler.from_config(pipe.scheduler.config, predictor="ancestral", **OWN_GRID)
    pipe.scheduler = swap

    def images(seed, **arguments):
        generator = torch.Generator().manual_seed(seed)
        return pipe(num_inference_steps=N, generator=generator, output_type="np", **arguments).images

    with Watch(unet, generator := torch.Generator().manual_seed(1)) as watch, torch.no_grad():
        got = pipe(num_inference_steps=N, generator=generator, output_type="np").images
        levels = [750, 500, 250, 0]
        x = reference(swap, lambda x, t: unet(x, t).sample, watch.inputs[0], levels, watch.replay())
    np.testing.assert_array_equal(got, (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(got, images(1, eta=0.0))
    pipe.scheduler = VPSDEScheduler.from_config(swap.config, probability_flow=True)
    assert np.abs(images(1) - got).max() > 1e-3  # the ODE would have been another image
    pipe.scheduler = swap
    with pytest.raises(ValueError, match="stochasticity"):
        images(1, eta=0.5)
    with pytest.raises(ValueError, match="clip_sample"):
        images(1, use_clipped_model_output=True)


def test_ddim_pipeline_rewrites_a_scheduler_passed_at_construction(unet):
    # diffusers' doing; the constants at least survive, and ours come back.
    ours = VPSDEScheduler(beta_start=0.001, beta_end=0.01, corrector="langevin")
    pipe = diffusers.DDIMPipeline(unet, ours)
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
    torch.testing.assert_close(pipe.scheduler.betas, ours.betas)
    again = VPSDEScheduler.from_config(pipe.scheduler.config)
    assert again.config.corrector == "langevin"


def test_ldm_pipeline(unet):
    vqvae = seeded(
        lambda: diffusers.VQModel(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=3,
            num_vq_embeddings=16,
        )
    )
    pipe = silent(diffusers.LDMPipeline(vqvae, unet, diffusers.DDIMScheduler(**TABLE)))
    pipe.scheduler = VPSDEScheduler.from_config(pipe.scheduler.config, **PC)
    with Watch(unet) as watch, torch.no_grad():
        # This pipeline hands no generator to step: only the global seed makes it reproducible.
        torch.manual_seed(7)
        image = pipe(num_inference_steps=N, output_type="np").images
        levels = [751, 501, 251, 1]
        assert watch.timesteps == list(np.repeat(levels, 2))
        x = reference(pipe.scheduler, lambda x, t: unet(x, t).sample, watch.inputs[0], levels, watch.replay())
        expected = (vqvae.decode(x / vqvae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    np.testing.assert_array_equal(image, expected.permute(0, 2, 3, 1).numpy())
    torch.manual_seed(7)
    np.testing.assert_array_equal(pipe(num_inference_steps=N, output_type="np").images, image)


# ---------------------------------------------------------------------- Stable Diffusion


def guided(pipe, prompt, scale, batch=1):
    """The guided noise estimate as Stable Diffusion forms it."""
    embeddings, negative = pipe.encode_prompt(prompt, "cpu", 1, True)
    embeddings = torch.cat([negative.repeat(batch, 1, 1), embeddings.repeat(batch, 1, 1)])

    def eps(x, t):
        t = torch.as_tensor(t)
        output = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=embeddings, return_dict=False)[0]
        unconditional, conditional = output.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return eps


@torch.no_grad()
def test_stable_diffusion_pc_equals_a_hand_written_loop(sd):
    generator = torch.Generator().manual_seed(2)
    with Watch(sd.unet) as watch:
        latents = sd(
            "a cab", height=16, width=16, num_inference_steps=5, guidance_scale=3.0, generator=generator,
            output_type="latent",
        ).images  # fmt: skip
    levels = [801, 601, 401, 201, 1]
    assert watch.timesteps == list(np.repeat(levels, 2))
    eps = guided(sd, "a cab", 3.0)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    state = generator.get_state()
    expected = reference(sd.scheduler, eps, x, levels, generator)
    assert torch.equal(latents, expected)
    # And from the paper's formulas, to round-off.
    generator.set_state(state)
    table = torch.tensor(sd.scheduler.sde.alphas_cumprod, dtype=torch.float64)
    by_hand = pc_by_hand(eps, x, levels, table, float(table[0]), 0.1, generator)
    torch.testing.assert_close(latents, by_hand, rtol=1e-4, atol=1e-4)


def test_stable_diffusion_progress_callbacks_and_counts(sd):
    calls, shown = [], []

    class Bar:
        def __init__(self, total):
            shown.append(total)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, n=1):
            shown.append(n)

    sd.progress_bar = lambda iterable=None, total=None: Bar(total)
    sd(
        "a", height=16, width=16, num_inference_steps=3, output_type="latent",
        callback_on_step_end=lambda pipe, i, t, tensors: calls.append((i, int(t))) or {},
    )  # fmt: skip
    assert shown == [3, 1, 1, 1]  # one tick per noise level
    assert calls == [(0, 667), (1, 667), (2, 334), (3, 334), (4, 1), (5, 1)]  # one callback per model call
    assert sd.num_timesteps == 6


@torch.no_grad()
def test_stable_diffusion_respects_what_a_callback_returns(sd):
    # Nothing is kept between the calls of a level, so an edit after a corrector call is what the predictor continues.
    marker = torch.full((1, 4, 8, 8), 0.25)
    with Watch(sd.unet) as watch:
        sd(
            "a", height=16, width=16, num_inference_steps=3, guidance_scale=1.0, output_type="latent",
            callback_on_step_end=lambda pipe, i, t, tensors: {"latents": marker} if i == 2 else {},
        )  # fmt: skip
    assert torch.equal(watch.inputs[3], marker)

    # Also on the last call: what is returned is the result.
    latents = sd(
        "a", height=16, width=16, num_inference_steps=2, output_type="latent",
        callback_on_step_end=lambda pipe, i, t, tensors: {"latents": marker} if i == 3 else {},
    ).images  # fmt: skip
    assert torch.equal(latents, marker)


def test_stable_diffusion_generator_lists_make_images_independent_of_the_batch(sd):
    def latents(prompts, seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return sd(
            prompts, height=16, width=16, num_inference_steps=3, generator=generators, output_type="latent"
        ).images

    pair = latents(["a cab", "bad"], [5, 6])
    # Not bit for bit: convolutions of another batch size round differently.
    torch.testing.assert_close(latents(["bad"], [6]), pair[1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents(["bad", "a cab"], [6, 5]).flip(0), pair, rtol=1e-4, atol=1e-4)
    assert torch.equal(latents(["a cab", "bad"], [5, 6]), pair)
    assert not torch.allclose(latents(["a cab", "bad"], [5, 7])[1], pair[1], atol=1e-2)


def test_stable_diffusion_eta(sd):
    def latents(**arguments):
        generator = torch.Generator().manual_seed(2)
        return sd(
            "a", height=16, width=16, num_inference_steps=3, generator=generator, output_type="latent", **arguments
        ).images

    assert torch.equal(latents(), latents(eta=0.0))
    with pytest.raises(ValueError, match="stochasticity"):
        latents(eta=1.0)


def test_stable_diffusion_custom_timesteps_and_sigmas(sd):
    with Watch(sd.unet) as watch:
        sd("a", height=16, width=16, timesteps=[999, 700, 300, 50], output_type="latent")
    assert watch.timesteps == list(np.repeat([999, 700, 300, 50], 2))
    with Watch(sd.unet) as watch:
        sd("a", height=16, width=16, sigmas=[14.0, 3.0, 0.5, 0.0], output_type="latent")
    table = np.array(sd.scheduler.sde.alphas_cumprod)
    ratio = np.sqrt((1 - table) / table)
    expected = np.interp(np.log([14.0, 3.0, 0.5]), np.log(ratio), np.arange(1000))
    np.testing.assert_allclose(watch.timesteps[::2], expected, rtol=1e-4)


def test_stable_diffusion_in_half_precision(stable_diffusion_parts):
    pipe = sd_pipeline(diffusers.StableDiffusionPipeline, stable_diffusion_parts, **PC)
    try:
        pipe.to(torch.bfloat16)
        with Watch(pipe.unet) as watch:
            latents = pipe("a", height=16, width=16, num_inference_steps=5, output_type="latent").images
        assert latents.dtype == torch.bfloat16
        assert torch.isfinite(latents).all()
        assert watch.timesteps == list(np.repeat([801, 601, 401, 201, 1], 2))
    finally:
        pipe.to(torch.float32)


@pytest.mark.parametrize(("strength", "levels"), [(0.3, 1), (0.6, 3), (1.0, 5)])
@torch.no_grad()
def test_image_to_image_starts_at_a_level(stable_diffusion_parts, strength, levels):
    pipe = sd_pipeline(diffusers.StableDiffusionImg2ImgPipeline, stable_diffusion_parts, **PC)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(4)
    with Watch(pipe.unet, generator) as watch:
        latents = pipe(
            "a cab", image, strength=strength, num_inference_steps=5, guidance_scale=3.0, generator=generator,
            output_type="latent",
        ).images  # fmt: skip
    timesteps = [801, 601, 401, 201, 1][5 - levels :]
    assert watch.timesteps == list(np.repeat(timesteps, 2))
    assert pipe.scheduler.begin_index == 2 * (5 - levels)
    start = watch.inputs[0][:1]
    expected = reference(pipe.scheduler, guided(pipe, "a cab", 3.0), start, timesteps, watch.replay())
    assert torch.equal(latents, expected)


@torch.no_grad()
def test_image_to_image_with_a_multistep_solver(stable_diffusion_parts):
    # There is no earlier estimate at the start in the middle: the first step must be of order 1.
    swap = {"probability_flow": True, "solver_order": 2, **OWN_GRID}
    pipe = sd_pipeline(diffusers.StableDiffusionImg2ImgPipeline, stable_diffusion_parts, **swap)
    with Watch(pipe.unet) as watch:
        latents = pipe(
            "a", torch.rand(1, 3, 16, 16), strength=0.6, num_inference_steps=5, output_type="latent"
        ).images  # fmt: skip
    start = watch.inputs[0][:1]
    scheduler = VPSDEScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(timesteps=[401, 201, 1])
    eps, x = guided(pipe, "a", 7.5), start
    for t in scheduler.timesteps:
        x = scheduler.step(eps(x, t), t, x).prev_sample
    torch.testing.assert_close(latents, x, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_inpainting_renoises_the_known_region_to_the_right_level(stable_diffusion_parts):
    pipe = sd_pipeline(diffusers.StableDiffusionInpaintPipeline, stable_diffusion_parts, **PC)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1.0
    seen = []

    def look(pipe, i, t, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    with Watch(pipe.unet) as watch:
        result = pipe(
            "a", image, mask_image=mask, height=16, width=16, strength=1.0, num_inference_steps=4,
            generator=torch.Generator().manual_seed(3), output_type="latent", callback_on_step_end=look,
        ).images  # fmt: skip
    assert watch.timesteps == list(np.repeat([751, 501, 251, 1], 2))
    known = result[..., :4]  # after the last call: the image's own latents
    noise = None
    alphas = pipe.scheduler.alphas_cumprod
    for i, x in enumerate(seen[:-1]):
        a = alphas[int(watch.timesteps[i + 1])]
        implied = (x[..., :4] - a.sqrt() * known) / (1 - a).sqrt()
        # The same noise at every call, so the level of the re-noised region is the one of the next call.
        noise = implied if noise is None else noise
        torch.testing.assert_close(implied, noise, rtol=1e-3, atol=2e-2)
    assert noise.std() == pytest.approx(1.0, abs=0.3)


# ---------------------------------------------------------------------- SDXL


@torch.no_grad()
def test_sdxl(sdxl_parts):
    scheduler = diffusers.EulerDiscreteScheduler(**{k: TABLE[k] for k in list(TABLE)[:3]}, timestep_spacing="leading")
    pipe = silent(diffusers.StableDiffusionXLPipeline(**sdxl_parts, scheduler=scheduler))
    pipe.scheduler = VPSDEScheduler.from_config(pipe.scheduler.config, **PC)

    def latents(seed):
        generator = torch.Generator().manual_seed(seed)
        with Watch(pipe.unet) as watch:
            result = pipe(
                "a cab", height=16, width=16, num_inference_steps=N, generator=generator, output_type="latent"
            ).images
        assert watch.timesteps == list(np.repeat([750, 500, 250, 0], 2))
        return result

    first = latents(1)
    assert torch.isfinite(first).all()
    assert torch.equal(first, latents(1))
    assert not torch.equal(first, latents(2))


def sdxl_image_to_image(parts, **swap):
    scheduler = diffusers.DDIMScheduler(**{**TABLE, "set_alpha_to_one": True})
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, scheduler=scheduler)
    pipe.scheduler = VPSDEScheduler.from_config(pipe.scheduler.config, **swap)
    return silent(pipe)


@torch.no_grad()
def test_sdxl_denoising_start_with_heun(sdxl_parts):
    # Laid out like diffusers' own Heun, so SDXL's rounding finds the start of a level: nothing is passed over.
    pipe = sdxl_image_to_image(sdxl_parts, predictor="heun", probability_flow=True, **OWN_GRID)
    latents, seen = torch.randn(1, 4, 8, 8), []
    with Watch(pipe.unet) as watch:
        result = pipe(
            "a", image=latents, denoising_start=0.5, num_inference_steps=5, guidance_scale=1.0, output_type="latent",
            callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors["latents"]) or {},
        ).images  # fmt: skip
    assert watch.timesteps == [601, 401, 401, 201, 201, 1, 1]
    assert not torch.equal(seen[0], latents)
    assert torch.isfinite(result).all()


@pytest.mark.parametrize(
    ("swap", "passed"),
    [
        (PC, 1),  # order 2: SDXL starts one call early, inside the level before
        ({**PC, "correct_steps": 2}, 0),  # order 3 is left alone
    ],
)
@torch.no_grad()
def test_sdxl_denoising_start(sdxl_parts, swap, passed):
    pipe = sdxl_image_to_image(sdxl_parts, **swap)
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    expected_timesteps = [601] * passed + np.repeat([401, 201, 1], pipe.scheduler.order).tolist()
    seen = []
    with Watch(pipe.unet, generator) as watch:
        result = pipe(
            "a cab", image=latents, denoising_start=0.5, num_inference_steps=5, guidance_scale=1.0,
            generator=generator, output_type="latent",
            callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors["latents"]) or {},
        ).images  # fmt: skip
    assert watch.timesteps == expected_timesteps
    if passed:
        assert torch.equal(seen[0], latents)  # that call changes nothing and draws nothing

    embeddings, _, pooled, _ = pipe.encode_prompt("a cab", do_classifier_free_guidance=False)
    time_ids = torch.tensor([[16, 16, 0, 0, 16, 16]], dtype=torch.float32)

    def eps(x, t):
        return pipe.unet(
            x, t, encoder_hidden_states=embeddings, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}
        ).sample

    expected = reference(pipe.scheduler, eps, latents, [401, 201, 1], watch.replay())
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- flow models


def flow_latents(pipe, seed=0, **arguments):
    # Neither pipeline hands its generator to step: the global seed it is.
    torch.manual_seed(seed)
    return pipe(
        "a cab", height=16, width=16, num_inference_steps=N, output_type="latent", max_sequence_length=8, **arguments
    ).images


FIRST_ORDER = {**OWN_GRID, "solver_order": 1, "solver_correction": False, "gaussian_std": 0.0}


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_flow_pipelines(name, request):
    pipe = request.getfixturevalue(name)
    stock = pipe.scheduler
    try:
        expected = flow_latents(pipe)
        pipe.scheduler = FlowSDEScheduler.from_config(stock.config, probability_flow=True, **FIRST_ORDER)
        torch.testing.assert_close(flow_latents(pipe), expected, rtol=1e-4, atol=1e-4)

        # The reverse SDE: another image, the same for the same seed.
        pipe.scheduler = FlowSDEScheduler.from_config(stock.config)
        with Watch(pipe.transformer) as watch:
            stochastic = flow_latents(pipe)
        assert len(watch.timesteps) == N
        assert torch.isfinite(stochastic).all()
        assert (stochastic - expected).abs().max() > 0.05
        assert torch.equal(flow_latents(pipe), stochastic)

        pipe.scheduler = FlowSDEScheduler.from_config(stock.config, corrector="langevin", snr=0.05)
        with Watch(pipe.transformer) as watch:
            corrected = flow_latents(pipe)
        assert torch.isfinite(corrected).all()
        assert len(watch.timesteps) == 2 * N
        assert watch.timesteps[::2] == watch.timesteps[1::2]
    finally:
        pipe.scheduler = stock


@torch.no_grad()
def test_sd3_predictor_corrector_is_the_reference_loop(sd3):
    stock = sd3.scheduler
    sd3.scheduler = scheduler = FlowSDEScheduler.from_config(
        stock.config, corrector="langevin", snr=0.05, stochasticity=1.0, **FIRST_ORDER
    )
    try:
        with Watch(sd3.transformer) as watch:
            latents = flow_latents(sd3, guidance_scale=1.0)
        embeddings, _, pooled, _ = sd3.encode_prompt(
            "a cab", None, None, do_classifier_free_guidance=False, max_sequence_length=8
        )
        grid = scheduler.timesteps.double() / 1000
        times = FlowSDEScheduler.from_config(stock.config, **OWN_GRID)
        times.set_timesteps(N)
        torch.testing.assert_close(times.timesteps.double() / 1000, grid[::2])
        plan = make_plan(scheduler.sde, grid[::2], corrector="langevin", snr=0.05).fold(
            scheduler.parametrization, scheduler.sde
        )

        def velocity(x, t):
            timestep = (t * 1000).float().expand(1)
            return sd3.transformer(
                hidden_states=x, timestep=timestep, encoder_hidden_states=embeddings, pooled_projections=pooled
            ).sample

        expected = sample(plan, velocity, watch.inputs[0], watch.replay())
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    finally:
        sd3.scheduler = stock


@pytest.mark.parametrize(
    ("swap", "calls"),
    [({}, 5), (PC, 10), ({**PC, "correct_steps": 2}, 15), ({"predictor": "heun", "probability_flow": True}, 10)],
    ids=["reverse SDE", "pc", "two corrections", "heun"],
)
@torch.no_grad()
def test_strength_in_a_pipeline_that_passes_sigmas(flux, swap, calls):
    """Image-to-image of Flux counts calls where it passes sigmas: the noise is that of the strength, at any order."""
    pipe = silent(diffusers.FluxImg2ImgPipeline(**flux.components))
    pipe.scheduler = FlowSDEScheduler.from_config(flux.scheduler.config, **swap)
    noised, bar = [], mock.MagicMock()
    add = pipe.scheduler.scale_noise
    pipe.scheduler.scale_noise = lambda x, t, noise: noised.append(float(t)) or add(x, t, noise)
    pipe.progress_bar = mock.MagicMock(return_value=bar)
    with Watch(pipe.transformer) as watch:
        latents = pipe(
            "a cab", image=torch.rand(1, 3, 16, 16), strength=0.5, num_inference_steps=10, height=16, width=16,
            output_type="latent", max_sequence_length=8,
        ).images  # fmt: skip
    assert torch.isfinite(latents).all()
    assert len(watch.timesteps) == calls
    assert pipe.progress_bar.call_args.kwargs["total"] == bar.__enter__().update.call_count == calls
    level = pipe.scheduler.rows[pipe.scheduler._first_row].t
    assert noised == [pytest.approx(1000 * level, rel=1e-5)]
    assert level == float(pipe.scheduler._level_times[5])  # of ten


def test_flux_in_bfloat16(flux):
    stock = flux.scheduler
    flux.scheduler = FlowSDEScheduler.from_config(stock.config, corrector="langevin", snr=0.05)
    try:
        flux.to(torch.bfloat16)
        latents = flow_latents(flux)
        assert latents.dtype == torch.bfloat16
        assert torch.isfinite(latents).all()
        assert flux.scheduler.step_index == 2 * N
    finally:
        flux.to(torch.float32)
        flux.scheduler = stock


# ---------------------------------------------------------------------- diffusion transformers


@torch.no_grad()
def test_pixart(text, vae):
    transformer = seeded(
        lambda: diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=16,
            sample_size=8,
            caption_channels=16,
            norm_num_groups=4,
            use_additional_conditions=False,
        )
    )
    pipe = silent(
        diffusers.PixArtAlphaPipeline(
            text.t5_tokenizer, text.t5, vae, transformer, diffusers.DPMSolverMultistepScheduler()
        )
    )
    pipe.scheduler = VPSDEScheduler.from_config(pipe.scheduler.config, **PC)

    def latents(n, **arguments):
        return pipe(
            "a cab", height=16, width=16, num_inference_steps=n, output_type="latent", use_resolution_binning=False,
            generator=torch.Generator().manual_seed(1), clean_caption=False, max_sequence_length=8, **arguments,
        ).images  # fmt: skip

    with Watch(transformer) as watch:
        result = latents(N)
    assert watch.timesteps == list(np.repeat([999, 749, 500, 250], 2))  # as DPM-Solver itself
    assert torch.isfinite(result).all()
    assert torch.equal(result, latents(N))

    # With one step PixArt takes the second item of the result, the denoised estimate.
    pipe.scheduler = VPSDEScheduler.from_config(pipe.scheduler.config, predictor="ancestral", corrector=None)
    with Watch(transformer) as watch:
        result = latents(1, guidance_scale=1.0)
    assert len(watch.timesteps) == 1
    embeddings, mask, *_ = pipe.encode_prompt(
        "a cab", do_classifier_free_guidance=False, max_sequence_length=8, clean_caption=False
    )
    x = watch.inputs[0]
    t = torch.tensor([int(watch.timesteps[0])])
    eps = transformer(x, embeddings, t, {"resolution": None, "aspect_ratio": None}, encoder_attention_mask=mask).sample
    a = pipe.scheduler.alphas_cumprod.double()[int(t)]
    expected = (x - (1 - a).sqrt() * eps[:, :4]) / a.sqrt()
    torch.testing.assert_close(result, expected.float(), rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_dit(vae):
    transformer = seeded(
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            sample_size=8,
            norm_num_groups=4,
        )
    )
    pipe = silent(diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(clip_sample=False)))
    pipe.scheduler = VPSDEScheduler.from_config(pipe.scheduler.config, **PC)

    def images():
        torch.manual_seed(3)  # DiT hands no generator to step
        return pipe([1, 7], guidance_scale=2.0, num_inference_steps=N, output_type="np").images

    with Watch(transformer) as watch:
        first = images()
    assert watch.timesteps == list(np.repeat([750, 500, 250, 0], 2))
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, images())

"""Modular pipelines of diffusers, run whole with tiny models: our schedulers in them, and what guiders make of them.

A guider counts network calls against ``num_inference_steps``. Where a scheduler makes two calls per level, guidance
ends after the first half and the next run fails; that is diffusers' own fault, and its Heun has it too. Tested here is
the way that works, and that ``diagnose`` tells it.
"""

import functools
import re

import diffusers
import pytest
import torch

import diffusers_sde
from diffusers_sde import FlowSDEScheduler, VPSDEScheduler, diagnose

transformers = pytest.importorskip("transformers")
from tiny_parts import flux_transformer, sd3_transformer, sdxl_components, seeded, tiny_text, tiny_vae  # noqa: E402

modular = pytest.importorskip("diffusers.modular_pipelines")

N = 4  # noise levels
FIRST_ORDER = {"solver_order": 1, "solver_correction": False, "gaussian_std": 0.0}
TWO_CALLS = {
    "langevin": {"corrector": "langevin", "snr": 0.05},
    "heun": {"predictor": "heun", "probability_flow": True},
}
GUIDED = ("sdxl", "sd3", "wan", "qwen")  # Flux has no guider
TAKE_LEVELS = ("sdxl", "sd3", "wan")  # Flux and Qwen-Image choose sigmas themselves


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_text(tmp_path_factory.mktemp("tokenizer"))


def sdxl(text):
    parts = sdxl_components(text, tiny_vae())
    return modular.StableDiffusionXLAutoBlocks(), parts, diffusers.EulerDiscreteScheduler()


def sd3(text):
    clip = {"text_encoder": text.encoder_projected, "tokenizer": text.tokenizer}
    parts = {**clip, **{f"{key}_2": part for key, part in clip.items()}}
    parts |= {"vae": tiny_vae(), "transformer": sd3_transformer()}
    return modular.StableDiffusion3AutoBlocks(), parts, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def flux(text):
    parts = {
        "text_encoder": text.encoder,
        "tokenizer": text.tokenizer,
        "text_encoder_2": text.t5,
        "tokenizer_2": text.t5_tokenizer,
        "vae": tiny_vae(),
        "transformer": flux_transformer(),
    }
    return modular.FluxAutoBlocks(), parts, diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def wan(text):
    umt5 = transformers.UMT5Config(
        vocab_size=len(text.t5_tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    parts = {
        "text_encoder": seeded(lambda: transformers.UMT5EncoderModel(umt5)),
        "tokenizer": text.t5_tokenizer,
        "vae": seeded(
            lambda: diffusers.AutoencoderKLWan(
                base_dim=3,
                z_dim=16,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True, True],
            )
        ),
        "transformer": seeded(
            lambda: diffusers.WanTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                text_dim=16,
                freq_dim=16,
                ffn_dim=16,
                num_layers=1,
                rope_max_seq_len=32,
            )
        ),
    }
    return modular.WanBlocks(), parts, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def qwen(text):
    language = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        "vocab_size": 64,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    tokens = {"image_token_id": 5, "vision_start_token_id": 3, "vision_end_token_id": 4, "video_token_id": 6}
    config = transformers.Qwen2_5_VLConfig(text_config=language, vision_config=vision, **tokens)
    parts = {
        "text_encoder": seeded(lambda: transformers.Qwen2_5_VLForConditionalGeneration(config)),
        "tokenizer": text.t5_tokenizer,
        "vae": seeded(
            lambda: diffusers.AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True, True],
                latents_mean=[0.0] * 4,
                latents_std=[1.0] * 4,
            )
        ),
        "transformer": seeded(
            lambda: diffusers.QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                axes_dims_rope=(8, 4, 4),
            )
        ),
    }
    return modular.QwenImageAutoBlocks(), parts, diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


BUILD = {"sdxl": sdxl, "sd3": sd3, "flux": flux, "wan": wan, "qwen": qwen}


@pytest.fixture
def pipeline(text, monkeypatch):
    def build(name):
        if name == "wan":  # it cleans prompts with a library that need not be installed
            encoders = pytest.importorskip("diffusers.modular_pipelines.wan.encoders")
            monkeypatch.setattr(encoders, "basic_clean", str.strip)
        blocks, parts, scheduler = BUILD[name](text)
        pipe = blocks.init_pipeline()
        pipe.update_components(**parts, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


def ours(stock, **arguments):
    """Our scheduler for the pipeline's own."""
    cls = VPSDEScheduler if isinstance(stock, diffusers.EulerDiscreteScheduler) else FlowSDEScheduler
    return cls.from_config(stock.config, **arguments)


class Run:
    """One run of the whole pipeline: its output, and the network calls before each step of the scheduler."""

    def __init__(self, pipe, **levels):
        network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        self.per_step, calls = [], []
        scheduler, step = pipe.scheduler, pipe.scheduler.step

        @functools.wraps(step)
        def counted(*args, **kwargs):
            self.per_step.append(len(calls) - sum(self.per_step))
            return step(*args, **kwargs)

        scheduler.step = counted
        handle = network.register_forward_pre_hook(lambda *_: calls.append(1))
        torch.manual_seed(7)  # the pipelines of flows pass no generator to the scheduler
        arguments = {"num_inference_steps": N, **levels}
        if "unet" not in pipe.components:
            arguments["max_sequence_length"] = 8
        if type(pipe).__name__.startswith("Wan"):
            arguments["num_frames"] = 5
        try:
            self.output = pipe(
                prompt="a cab",
                height=16,
                width=16,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
                output="videos" if "num_frames" in arguments else "images",
                **arguments,
            )
        finally:
            handle.remove()
            del scheduler.step


@pytest.mark.parametrize("name", BUILD)
def test_samplers_of_one_call_per_level_run_like_stock(name, pipeline):
    pipe = pipeline(name)
    stock, calls = pipe.scheduler, 2 if name in GUIDED else 1
    expected = Run(pipe)
    assert expected.per_step == [calls] * N
    pipe.update_components(scheduler=ours(stock, probability_flow=True, time_grid=None if name == "sdxl" else "uniform",
                                          **FIRST_ORDER))  # fmt: skip
    first_order = Run(pipe)
    torch.testing.assert_close(first_order.output, expected.output, rtol=1e-3, atol=1e-3)
    for arguments in ({}, {"predictor": "ancestral"}, {"probability_flow": True}):
        pipe.update_components(scheduler=ours(stock, **arguments))
        once, again = Run(pipe), Run(pipe)
        assert once.per_step == again.per_step == [calls] * N
        assert bool(torch.isfinite(once.output).all())
        assert torch.equal(once.output, again.output)


def levels_of(pipe, warning):
    """What the warning of ``diagnose`` says to pass, executed as a reader would."""
    if "sigmas=" in warning:
        return {"sigmas": eval(re.search(r"sigmas=(\[.*?\])", warning)[1], {"n": N})}
    first, then = re.search(
        r": (pipe\.scheduler\.set_timesteps\(n\)), then timesteps=(\S+tolist\(\))", warning
    ).groups()
    eval(first, {"pipe": pipe, "n": N})
    return {"timesteps": eval(then, {"pipe": pipe})}


def guider_warning(pipe):
    return next((w for w in diagnose(pipe).warnings if "guider" in w), None)


@pytest.mark.parametrize("sampler", TWO_CALLS)
@pytest.mark.parametrize("name", TAKE_LEVELS)
def test_two_calls_per_level_are_guided_where_the_levels_are_passed(name, sampler, pipeline):
    pipe = pipeline(name)
    assert guider_warning(pipe) is None
    pipe.update_components(scheduler=ours(pipe.scheduler, **TWO_CALLS[sampler]))
    warning = guider_warning(pipe)
    levels = levels_of(pipe, warning)
    assert len(next(iter(levels.values()))) == N
    calls = 2 * N if sampler == "langevin" else 2 * N - 1
    outputs = []
    for _ in range(3):  # the guider of one run is the guider of the next
        run = Run(pipe, num_inference_steps=None, **levels)
        assert run.per_step == [2] * calls
        outputs.append(run.output)
    assert bool(torch.isfinite(outputs[0]).all())
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("sampler", TWO_CALLS)
@pytest.mark.parametrize("name", [name for name in BUILD if name not in TAKE_LEVELS])
def test_pipelines_that_choose_sigmas_count_calls(name, sampler, pipeline):
    pipe = pipeline(name)
    pipe.update_components(scheduler=ours(pipe.scheduler, **TWO_CALLS[sampler]))
    calls = 2 * N if sampler == "langevin" else 2 * N - 1
    for _ in range(2):
        assert Run(pipe).per_step == [2 if name in GUIDED else 1] * calls


def test_a_guider_that_has_lost_count_is_renewed_as_the_warning_says(pipeline):
    # If diffusers mends its count, the first run is guided to the end, and the warning can go.
    pipe = pipeline("wan")
    pipe.update_components(scheduler=ours(pipe.scheduler, **TWO_CALLS["langevin"]))
    assert Run(pipe).per_step == [2] * N + [1] * N
    with pytest.raises(Exception, match="negative_prompt_embeds"):
        Run(pipe)
    warning = guider_warning(pipe)
    exec(re.search(r"pipe\.update_components\(guider=\S+?\(\)\)", warning)[0], {"pipe": pipe})
    assert Run(pipe, num_inference_steps=None, **levels_of(pipe, warning)).per_step == [2] * 2 * N


@pytest.mark.parametrize("name", BUILD)
def test_diagnose_knows_modular_pipelines(name, pipeline):
    pipe = pipeline(name)
    diagnosis = diagnose(pipe)
    assert diagnosis.family == ("vp" if name == "sdxl" else "flow")
    assert diagnosis.network is not None
    assert diagnosis.data == "latents of an autoencoder"
    assert bool(guider_warning(pipe)) is False
    assert any("torch.manual_seed" in w for w in diagnosis.warnings) == (name != "sdxl")
    for line in diagnosis.suggestions:
        assert line.startswith("pipe.update_components(scheduler=")
        namespace = {key: getattr(diffusers_sde, key) for key in diffusers_sde.__all__} | {"pipe": pipe}
        exec(line, namespace)
        calls = N * pipe.scheduler.order  # which is 1 once a pipeline has passed levels of its own
        assert Run(pipe).per_step == [2 if name in GUIDED else 1] * calls
        assert guider_warning(pipe) is None
    assert "corrector" not in diagnosis.suggestions[0] and "predictor" not in diagnosis.suggestions[0]


def test_diagnose_warns_of_the_stock_heun_too(pipeline):
    pipe = pipeline("sd3")
    pipe.update_components(scheduler=diffusers.FlowMatchHeunDiscreteScheduler())
    assert guider_warning(pipe) is not None

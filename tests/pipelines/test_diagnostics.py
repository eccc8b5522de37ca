"""What the swap advisor says, and that what it suggests runs."""

import diffusers
import pytest
import torch

import diffusers_sde
from diffusers_sde import FlowSDEScheduler, SDEPipeline, SubVPSDEScheduler, VESDEScheduler, VPSDEScheduler
from diffusers_sde.pipelines.diagnostics import diagnose


def unet(**arguments):
    return diffusers.UNet2DModel(
        **{
            "sample_size": 8,
            "layers_per_block": 1,
            "block_out_channels": (4, 4),
            "down_block_types": ("DownBlock2D",) * 2,
            "up_block_types": ("UpBlock2D",) * 2,
            "norm_num_groups": 2,
            "attention_head_dim": 2,
            **arguments,
        }
    ).eval()


def latent_pipeline(scheduler, network=None):
    vqvae = diffusers.VQModel(block_out_channels=(4,), norm_num_groups=2, num_vq_embeddings=4)
    return diffusers.LDMPipeline(vqvae, network or unet(), scheduler)


def transformer_pipeline(scheduler):
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, out_channels=8, num_layers=1, sample_size=8, norm_num_groups=4
    )
    return diffusers.DiTPipeline(transformer, vae, scheduler)


def warned(pipe, *words):
    """The one warning that holds all the words."""
    hits = [w for w in diagnose(pipe).warnings if all(word in w for word in words)]
    assert len(hits) <= 1, hits
    return bool(hits)


def follow(pipe, line):
    """Execute a suggestion as a user would paste it."""
    namespace = {name: getattr(diffusers_sde, name) for name in diffusers_sde.__all__} | {"pipe": pipe}
    exec(line, namespace)
    return namespace["pipe"]


def test_a_sound_pipeline():
    pipe = diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler())
    diagnosis = diagnose(pipe)
    assert diagnosis.family == "vp"
    assert diagnosis.prediction_type == "epsilon"
    assert diagnosis.warnings == []
    text = str(diagnosis)
    for words in (
        "DDPMPipeline with DDPMScheduler",
        "UNet2DModel, a variance-preserving",
        "the noise (epsilon)",
        "the index of a table of 1000 timesteps",
        "images, in [-1, 1]",
        "VPSDEScheduler.from_config(pipe.scheduler.config)",
        "nothing suspicious",
    ):
        assert words in text
    assert set(diagnosis.reasons) == {"VESDEScheduler", "FlowSDEScheduler", "SubVPSDEScheduler"}


@pytest.mark.parametrize(
    ("scheduler", "family", "fitting"),
    [
        (diffusers.DDIMScheduler(), "vp", "VPSDEScheduler"),
        (diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"), "vp", "VPSDEScheduler"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "flow", "FlowSDEScheduler"),
        (diffusers.EDMEulerScheduler(), "edm", "VESDEScheduler"),
        (diffusers.ScoreSdeVeScheduler(), "ve", "VESDEScheduler"),
        (VPSDEScheduler(continuous=True), "vp", "VPSDEScheduler"),
        (SubVPSDEScheduler(), "sub_vp", "SubVPSDEScheduler"),
        (VESDEScheduler(sigma_max=20.0), "ve", "VESDEScheduler"),
        (FlowSDEScheduler(shift=2.0), "flow", "FlowSDEScheduler"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, diffusers.SchedulerMixin) else str(v),
)
def test_every_suggestion_runs(scheduler, family, fitting):
    embedding = {"time_embedding_type": "fourier"} if family == "ve" else {}
    for index in range(3):
        pipe = diffusers.DDPMPipeline(unet(**embedding), scheduler)
        diagnosis = diagnose(pipe)
        assert diagnosis.family == family
        if index >= len(diagnosis.suggestions):
            continue
        swapped = follow(pipe, diagnosis.suggestions[index])
        assert type(swapped.scheduler).__name__ == fitting
        assert swapped.scheduler.config.prediction_type == diagnosis.prediction_type
        swapped.set_progress_bar_config(disable=True)
        with torch.no_grad():
            assert swapped(num_inference_steps=3, output_type="np").images.shape == (1, 8, 8, 3)


def test_ve_in_a_ddpm_pipeline():
    pipe = diffusers.DDPMPipeline(unet(time_embedding_type="fourier"), VESDEScheduler(sigma_max=50.0))
    assert warned(pipe, "init_noise_sigma = 50", "SDEPipeline")
    assert all("SDEPipeline(pipe.unet" in line for line in diagnose(pipe).suggestions)
    assert not warned(SDEPipeline(pipe.unet, pipe.scheduler, data_min=0.0), "init_noise_sigma")


def test_preconditioned_models_need_scaled_inputs_too():
    scheduler = VPSDEScheduler(prediction_type="edm")
    assert scheduler.init_noise_sigma == 1.0
    assert warned(diffusers.DDPMPipeline(unet(), scheduler), "scale_model_input")


def test_a_pipeline_that_replaces_schedulers():
    assert warned(diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler()), "DDIMPipeline converts")
    assert not warned(diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()), "converts")


def test_the_score_sde_pipeline():
    network = unet(time_embedding_type="fourier")
    pipe = diffusers.ScoreSdeVePipeline(network, diffusers.ScoreSdeVeScheduler(sigma_max=50.0))
    diagnosis = diagnose(pipe)
    assert diagnosis.data == "images in [0, 1]"
    assert diagnosis.conditioning == "the noise level sigma"
    assert warned(pipe, "step_pred")
    for line in diagnosis.suggestions:
        swapped = follow(pipe, line)
        assert isinstance(swapped, SDEPipeline)
        assert swapped.config.data_min == 0.0
    assert follow(pipe, diagnosis.suggestions[0]).scheduler.config.langevin_norm == "batch"


def test_clipping_latents():
    pipe = latent_pipeline(diffusers.DDIMScheduler(clip_sample=True))
    assert warned(pipe, "latents are not bounded")
    assert diagnose(pipe).data == "latents of an autoencoder"
    for line in diagnose(pipe).suggestions:
        assert not follow(pipe, line).scheduler.config.clip_sample
    assert not warned(latent_pipeline(diffusers.DDIMScheduler(clip_sample=False)), "bounded")
    assert not warned(diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(clip_sample=True)), "bounded")


def test_thresholding_latents():
    pipe = latent_pipeline(diffusers.DDIMScheduler(clip_sample=False, thresholding=True))
    assert warned(pipe, "latents are not bounded")
    assert not follow(pipe, diagnose(pipe).suggestions[0]).scheduler.config.thresholding


def test_a_bound_of_pixels_on_latents():
    pipe = latent_pipeline(diffusers.DDIMScheduler(clip_sample=False))
    config = pipe.scheduler.config
    pipe.scheduler = VPSDEScheduler.from_config(config, bound_above_sigma=1.0)
    assert warned(pipe, "data_range")
    pipe.scheduler = VPSDEScheduler.from_config(config, bound_above_sigma=1.0, data_range=[-4.0, 4.0])
    assert not warned(pipe, "data_range")
    assert not warned(diffusers.DDPMPipeline(unet(), VPSDEScheduler(bound_above_sigma=1.0)), "data_range")


def test_pixels_that_nothing_bounds():
    """A config cannot say that the data are pixels, so that a swap alone does not bound them; the pipeline can."""
    pipe = diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(clip_sample=False))
    assert warned(pipe, "nothing bounds it")
    for line in diagnose(pipe).suggestions:
        config = follow(pipe, line).scheduler.config
        assert (config.bound_above_sigma, config.data_range) == (1.0, [-1.0, 1.0])
        assert not warned(pipe, "nothing bounds it")
        pipe.scheduler = diffusers.DDPMScheduler(clip_sample=False)
    for sound in (
        diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()),
        diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(clip_sample=False, prediction_type="v_prediction")),
        latent_pipeline(diffusers.DDIMScheduler(clip_sample=False)),
    ):
        assert not warned(sound, "nothing bounds it")


def test_steps_offset():
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    assert warned(latent_pipeline(scheduler), "steps_offset=1")
    offset = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    assert not warned(latent_pipeline(offset), "steps_offset")


def test_a_fourier_network_wants_sigma_and_returns_the_score():
    network = unet(time_embedding_type="fourier")
    pipe = SDEPipeline(network, VPSDEScheduler())
    assert warned(pipe, "Fourier", "time_conditioning='sigma'")
    assert warned(pipe, "Fourier", "prediction_type='score'")
    sound = SDEPipeline(network, VESDEScheduler())
    assert not warned(sound, "Fourier")


def test_a_positional_network_wants_large_timesteps():
    for scheduler in (
        VESDEScheduler(),
        VESDEScheduler(time_conditioning="log_sigma"),
        VPSDEScheduler(time_conditioning="sigma"),
        FlowSDEScheduler(num_train_timesteps=2),
    ):
        assert warned(SDEPipeline(unet(), scheduler), "positional")
    for scheduler in (VPSDEScheduler(), VESDEScheduler(time_conditioning="continuous"), FlowSDEScheduler()):
        assert not warned(SDEPipeline(unet(), scheduler), "positional")


def test_a_learned_variance_that_nobody_takes_off():
    pipe = diffusers.DDPMPipeline(unet(in_channels=3, out_channels=6), diffusers.DDPMScheduler())
    assert warned(pipe, "variance_type='learned_range'")
    swapped = follow(pipe, diagnose(pipe).suggestions[0])
    assert swapped.scheduler.config.variance_type == "learned_range"
    assert not warned(swapped, "learned_range")
    # DiT and PixArt take it off themselves.
    assert not warned(transformer_pipeline(diffusers.DDIMScheduler(clip_sample=False)), "learned_range")


def test_a_flow_scheduler_on_a_unet():
    pipe = diffusers.DDPMPipeline(unet(), diffusers.FlowMatchEulerDiscreteScheduler())
    assert warned(pipe, "eps - x0")


def test_zero_terminal_snr():
    epsilon = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert warned(diffusers.DDPMPipeline(unet(), epsilon), "v_prediction")
    leading = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert warned(diffusers.DDPMPipeline(unet(), leading), "trailing")


def test_pipelines_that_keep_the_generator_to_themselves():
    assert warned(latent_pipeline(diffusers.DDIMScheduler(clip_sample=False)), "torch.manual_seed")
    assert warned(transformer_pipeline(diffusers.DDIMScheduler(clip_sample=False)), "torch.manual_seed")
    for pipe in (
        diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()),
        SDEPipeline(unet(), VPSDEScheduler()),
    ):
        assert not warned(pipe, "torch.manual_seed")


def test_a_network_that_no_class_fits():
    pipe = diffusers.DDPMPipeline(unet(), diffusers.CMStochasticIterativeScheduler())
    diagnosis = diagnose(pipe)
    assert diagnosis.suggestions == []
    assert len(diagnosis.reasons) == 4
    assert "consistency model" in str(diagnosis)


def test_it_changes_nothing():
    pipe = diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler())
    scheduler, config = pipe.scheduler, dict(pipe.scheduler.config)
    diagnose(pipe)
    assert pipe.scheduler is scheduler
    assert dict(scheduler.config) == config


def test_what_is_no_pipeline():
    with pytest.raises(ValueError, match="a pipeline with a scheduler, got UNet2DModel"):
        diagnose(unet())


@pytest.mark.parametrize(
    ("scheduler", "cls"),
    [
        (diffusers.DDIMScheduler(), "VPSDEScheduler"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "FlowSDEScheduler"),
        (diffusers.EDMEulerScheduler(), "VESDEScheduler"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_the_first_suggestion_sets_nothing(scheduler, cls):
    pipe = SDEPipeline(unet(), scheduler)
    first, *others = diagnose(pipe).suggestions
    assert first == f"pipe.scheduler = {cls}.from_config(pipe.scheduler.config)"
    assert all("=" in line.split("config(")[1] for line in others)


def test_a_flow_map_is_known_by_its_class():
    # Its config in memory is that of a flow scheduler.
    diagnosis = diagnose(diffusers.DDPMPipeline(unet(), diffusers.FlowMapEulerDiscreteScheduler()))
    assert diagnosis.suggestions == []
    assert "flow map" in str(diagnosis)


def test_the_latent_upscaler_is_for_variance_exploding_samplers():
    class StableDiffusionLatentUpscalePipeline(diffusers.DDPMPipeline):
        pass

    pipe = StableDiffusionLatentUpscalePipeline(unet(), diffusers.EulerDiscreteScheduler())
    assert warned(pipe, "variance-exploding samplers", "leave its scheduler")

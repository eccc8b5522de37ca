"""Training on the latents of an autoencoder, which is saved with the pipeline and decodes what it draws."""

import json

import diffusers
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderTiny, VQModel
from shades import TINY
from tiny_networks import tiny_unet
from tiny_parts import seeded, tiny_vae

from diffusers_sde import SDEPipeline, VPSDEScheduler
from diffusers_sde.evaluation import EvaluationConfig, evaluate
from diffusers_sde.evaluation.report import markdown_table
from diffusers_sde.evaluation.samplers import ImageSampler, Sampler
from diffusers_sde.images.loading import load_digits
from diffusers_sde.metrics import PixelFeatures, SampleQuality
from diffusers_sde.pipelines.encoders import Latents, PixelRange, latents_of
from diffusers_sde.training import Trainer, TrainingConfig, train
from diffusers_sde.training.checkpoints import clear_run


@pytest.fixture
def vae(tmp_path):
    """A folder with an autoencoder that makes 4 channels of half the side, and whose latents are not centred."""
    network = tiny_vae()
    with torch.no_grad():
        network.quant_conv.bias.add_(0.7)
    network.save_pretrained(tmp_path / "vae")
    return str(tmp_path / "vae")


def tiny(output_dir, vae, **options):
    given = {"vae": vae, "channels": 3, "max_train_steps": 2, "block_out_channels": (8, 8), "class_conditional": False}
    return TrainingConfig(output_dir=str(output_dir), **(TINY | given | options))


def digits(count=40):
    return load_digits().select(range(count))


def bytes_of(count, side=8):
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_the_scale_of_a_config_is_that_of_stock_pipelines():
    """diffusers scales by latents = (z - shift_factor) scaling_factor; images are in [-1, 1]."""
    vae = tiny_vae()
    vae.register_to_config(scaling_factor=0.4, shift_factor=0.3)
    images, encoder = bytes_of(5), latents_of(vae, None, None)
    with torch.no_grad():
        z = vae.encode(images / 127.5 - 1.0).latent_dist.mean
        torch.testing.assert_close(encoder.encode(images), (z - 0.3) * 0.4, rtol=1e-4, atol=1e-5)
        decoded = vae.decode(encoder.encode(images) / 0.4 + 0.3).sample
    torch.testing.assert_close(encoder.decode(encoder.encode(images)), (0.5 + decoded / 2).clamp(0, 1))
    assert encoder.image_shape((4, 6, 5)) == (3, 12, 10)
    assert PixelRange(0.0, 1.0).encode(images).max() == images.max() / 255


def test_chunks_do_not_show():
    vae, images = tiny_vae(), bytes_of(5)
    whole, parts = (Latents(vae, (0.1,) * 4, (2.0,) * 4, chunk) for chunk in (5, 2))
    torch.testing.assert_close(parts.encode(images), whole.encode(images), rtol=1e-4, atol=1e-5)
    x = whole.encode(images)
    torch.testing.assert_close(parts.decode(x), whole.decode(x), rtol=1e-4, atol=1e-5)


def test_measured_latents_have_unit_scale_in_every_channel(tmp_path, vae):
    trainer = Trainer(tiny(tmp_path / "out", vae), digits())
    images = trainer.source.spread(40)[0]
    noise = torch.randn(60, 40, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    x0 = torch.stack([trainer._x0({"images": images, "latent_noise": each}) for each in noise])
    assert images.shape == (40, 3, 8, 8) and x0.shape == (60, 40, 4, 4, 4)
    # 38400 numbers a channel: the mean of unit noise is off by more with probability 1e-4, its deviation with less.
    torch.testing.assert_close(x0.mean((0, 1, 3, 4)), torch.zeros(4), rtol=0, atol=2e-2)
    torch.testing.assert_close(x0.std((0, 1, 3, 4), correction=0), torch.ones(4), rtol=0, atol=2e-2)
    modes = Trainer(tiny(tmp_path / "out", vae, latent_sampling="mode"), digits())
    x0 = modes._x0({"images": images})
    torch.testing.assert_close(x0.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=2e-3)
    torch.testing.assert_close(x0.std((0, 2, 3), correction=0), torch.ones(4), rtol=0, atol=2e-3)
    scaled = Trainer(tiny(tmp_path / "out", vae, latent_scaling="config", latent_sampling="mode"), digits())
    network = diffusers.AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        z = network.encode(images / 127.5 - 1.0).latent_dist.mean
    torch.testing.assert_close(scaled._x0({"images": images}), 0.5 * z, rtol=1e-4, atol=1e-5)


def test_the_data_are_measured_as_latents(tmp_path, vae):
    trainer = Trainer(tiny(tmp_path / "out", vae, sde="ve", latent_sampling="mode"), digits())
    x0 = trainer._x0({"images": trainer.source.spread(40)[0]}).flatten(1)
    assert trainer.scheduler.config.sigma_data == pytest.approx(float(x0.std()), rel=1e-2)
    assert trainer.scheduler.config.sigma_max == pytest.approx(float(torch.cdist(x0, x0).max()), rel=1e-2)
    assert trainer.scheduler.config.bound_above_sigma is None, "the range of latents is not known"
    assert trainer.scheduler.config.data_std is None, "on trained networks it was no better"


@pytest.mark.parametrize("options", [{}, {"class_conditional": True, "model_type": "dit", "patch_size": 2}])
def test_it_trains_saves_loads_decodes_and_resumes(tmp_path, vae, options):
    if options:
        options = {**options, "model_config_name_or_path": None}
        sizes = {"block_out_channels": None, "layers_per_block": 2}
        options |= sizes
    out = tmp_path / "out"
    trained = train(tiny(out, vae, checkpointing_steps=2, **options), digits())
    pipe = diffusers.DiffusionPipeline.from_pretrained(out)
    own = diffusers.AutoencoderKL.from_pretrained(vae).state_dict()
    assert all(torch.equal(value, own[name]) for name, value in pipe.vae.state_dict().items())
    assert pipe.config.latents_mean == trained.config.latents_mean and pipe.config.latents_std != [2.0] * 4
    assert (pipe.sample_shape, pipe.image_shape) == ((4, 4, 4), (3, 8, 8))
    for each in (pipe, trained):
        each.set_progress_bar_config(disable=True)
    labels = {"class_labels": [1, 2]} if options else {"batch_size": 2}
    drawn = {
        kind: pipe(**labels, num_inference_steps=3, generator=torch.manual_seed(0), output_type=kind).images
        for kind in ("latent", "pt")
    }
    mean, std = (torch.tensor(pipe.config[name]).reshape(4, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        decoded = pipe.vae.decode(drawn["latent"] * std + mean).sample
    torch.testing.assert_close(drawn["pt"], (0.5 + decoded / 2).clamp(0, 1), rtol=1e-4, atol=1e-5)
    again = trained(**labels, num_inference_steps=3, generator=torch.manual_seed(0), output_type="pt").images
    torch.testing.assert_close(again, drawn["pt"], rtol=1e-4, atol=1e-5)
    batch = next(iter(ImageSampler(pipe, Sampler("few", {"num_inference_steps": 2}))([0, 1])))
    assert batch[1].shape == (2, 3, 8, 8) and batch[1].dtype == torch.uint8
    resumed = Trainer(
        tiny(out, vae, checkpointing_steps=2, **options, **{"resume_from_checkpoint": "latest"}), digits()
    )
    assert resumed.step == 2
    other = tmp_path / "other"
    network = diffusers.AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        network.decoder.conv_out.bias.add_(0.1)  # the scale of the latents does not tell
    network.save_pretrained(other)
    with pytest.raises(ValueError, match="resume_from_checkpoint: the checkpoint was trained with vae="):
        Trainer(tiny(out, str(other), **options, resume_from_checkpoint="latest"), digits())
    clear_run(out)  # the autoencoder included
    assert not list(out.iterdir())


def test_a_stock_pipeline_draws_from_a_transformer_trained_here_and_is_trained_on(tmp_path, vae):
    """A stock DiTPipeline has the scale of the autoencoder's config, and adds no shift."""
    sizes = {"block_out_channels": None, "layers_per_block": 2, "class_conditional": True}
    options = {"model_type": "dit", "patch_size": 2, "latent_scaling": "config", "sde": "vp", **sizes}
    pipe = train(tiny(tmp_path / "ours", vae, **options), digits())
    stock = diffusers.DiTPipeline(pipe.unet, pipe.vae, pipe.scheduler)
    drawn = []
    for each, scale in ((pipe, {"guidance_scale": 1.0, "output_type": "pt"}), (stock, {"guidance_scale": 1.0})):
        each.set_progress_bar_config(disable=True)
        drawn.append(each([3], num_inference_steps=3, generator=torch.manual_seed(0), **{"output_type": "np"} | scale))
    ours, theirs = drawn[0].images, torch.from_numpy(drawn[1].images).permute(0, 3, 1, 2)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
    stock.save_pretrained(tmp_path / "stock")
    more = tiny(tmp_path / "more", vae, **sizes, latent_scaling="config", init_from=str(tmp_path / "stock"))
    trainer = Trainer(more, digits())
    own = stock.transformer.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in trainer.network.state_dict().items())
    again = trainer.run()
    assert again.image_shape == (3, 8, 8)


def test_what_is_measured_along_the_way_is_decoded(tmp_path, vae):
    config = tiny(tmp_path / "out", vae, eval_every=2, num_eval_images=8, eval_features="pixels", eval_batch_size=4)
    trainer = Trainer(config, digits())
    logged = []
    trainer.accelerator.log = lambda values, step: logged.append(values)
    pipe = trainer.run()
    found = next(values for values in logged if "eval/FD-pixels" in values)
    batches = list(ImageSampler(pipe, Sampler("few", {"num_inference_steps": 2}), 0)(list(range(8))))
    assert batches[0][1].shape[1:] == (3, 8, 8)
    images, reference = torch.cat([batch[1] for batch in batches]), trainer.source.spread(40)[0]
    expected = SampleQuality(reference, PixelFeatures())(images)["FD-pixels"]
    assert found["eval/FD-pixels"] == pytest.approx(expected, rel=1e-2)


def test_an_evaluation_decodes_and_names_the_density_of_latents(tmp_path, vae):
    trained = train(tiny(tmp_path / "out", vae, prediction_type="v_prediction"), digits())
    for parameter in trained.unet.parameters():
        parameter.data.zero_()  # the network of unit Gaussian latents, whose probability flow is easy
    trained.save_pretrained(tmp_path / "out")
    loose = {"rtol": 0.1, "atol": 0.1, "num_images": 3}
    config = EvaluationConfig(
        model=str(tmp_path / "out"),
        dataset_name="digits",
        num_samples=8,
        num_reference=40,
        bpd=True,
        features="pixels",
        sampler=("few: num_inference_steps=2",),
        **loose,
    )
    report = evaluate(config)
    assert "bits_per_dim" not in report and len(report["latent_bits_per_dim"]["per_image"]) == 3
    assert report["samplers"][0]["metrics"]["FD-pixels"] > 0
    text = markdown_table(report)
    assert "bits per latent dimension" in text and "no number of bits per pixel" in text and "bits/dim" not in text


def test_a_density_is_one_of_latents(tmp_path, vae):
    pipe = train(tiny(tmp_path / "out", vae), digits())
    pipe.set_progress_bar_config(disable=True)
    x = torch.zeros(2, 4, 4, 4)
    assert torch.isfinite(pipe.log_prob(x, rtol=1e-1, atol=1e-1, generator=torch.manual_seed(0)).value).all()
    with pytest.raises(ValueError, match="no bits per dimension of images"):
        pipe.bits_per_dim(bytes_of(2))


def stand_in(kind):
    """An autoencoder of a class, with a handful of parameters, and its latents of images in [-1, 1]."""
    if kind == "tiny":
        sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
        network = seeded(lambda: AutoencoderTiny(latent_channels=4, **sizes, **blocks))
        return network, lambda x: network.encode(x).latents
    if kind == "dc":
        network = seeded(
            lambda: AutoencoderDC(
                latent_channels=8,
                attention_head_dim=4,
                **{f"{part}_block_types": "ResBlock" for part in ("encoder", "decoder")},
                **{f"{part}_block_out_channels": (8, 16) for part in ("encoder", "decoder")},
                **{f"{part}_layers_per_block": (1, 1) for part in ("encoder", "decoder")},
                **{f"{part}_qkv_multiscales": ((), ()) for part in ("encoder", "decoder")},
                scaling_factor=0.41,
            )
        )
        return network, lambda x: network.encode(x).latent
    network = seeded(
        lambda: VQModel(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            vq_embed_dim=3,
            num_vq_embeddings=16,
        )
    )
    return network, lambda x: network.encode(x).latents


@pytest.mark.parametrize("kind", ["tiny", "dc", "vq"])
def test_other_autoencoders_and_those_of_a_pipeline_are_taken(tmp_path, kind):
    network, latents = stand_in(kind)
    network.save_pretrained(tmp_path / "pipeline" / "vae")
    out = tmp_path / "out"
    trainer = Trainer(tiny(out, str(tmp_path / "pipeline"), class_conditional=False), digits())
    images = trainer.source.spread(8)[0]
    x0 = trainer._x0({"images": images})
    encoder = trainer.source.encoder
    mean, std = (torch.tensor(each).reshape(-1, 1, 1) for each in (encoder.mean, encoder.std))
    with torch.no_grad():
        torch.testing.assert_close(x0, (latents(images / 127.5 - 1.0) - mean) / std)
        decoded = network.decode(latents(images / 127.5 - 1.0)).sample
    torch.testing.assert_close(encoder.decode(x0), (0.5 + decoded / 2).clamp(0, 1), rtol=1e-3, atol=1e-4)
    assert encoder.image_shape(tuple(x0.shape[1:])) == (3, 8, 8)
    trainer.run()
    pipe = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(pipe.vae) is type(network)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=2, output_type="pt").images.shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 1}, "takes images of 3 channels, the images have 1: pass channels=3"),
        ({"resolution": 7}, "resolution must be a multiple of 2 for vae"),
        ({"data_min": 0.0}, r"data_min must be -1 with vae, whose images lie in \[-1, 1\], got 0.0"),
        ({"vae": "/nowhere"}, "vae '/nowhere' cannot be loaded"),
        ({"vae": None, "latent_scaling": "config"}, "latent_scaling 'config' has no effect without vae"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, vae, options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(tiny(tmp_path / "out", options.pop("vae", vae), **options), digits())


def test_pipelines_say_what_they_need():
    vae, latent_unet, scheduler = tiny_vae(), tiny_unet(), VPSDEScheduler()
    with pytest.raises(ValueError, match="vae has 4 channels of latents, the network 1"):
        SDEPipeline(latent_unet, scheduler, vae=vae)
    with pytest.raises(ValueError, match="latents_mean and latents_std must be None without a vae"):
        SDEPipeline(latent_unet, scheduler, latents_std=[1.0])
    with pytest.raises(ValueError, match="vae must be an autoencoder of diffusers"):
        latents_of(latent_unet, None, None)
    with pytest.raises(ValueError, match="latents_std must hold one number for each of the vae's 4 channels"):
        latents_of(vae, None, [1.0])
    with pytest.raises(ValueError, match=r"latents_std\[3\] must be"):
        latents_of(vae, None, [1.0, 1.0, 1.0, 0.0])


def test_a_pipeline_on_pixels_is_saved_as_before(tmp_path):
    """Versions that know no autoencoder would refuse an index that names one."""
    SDEPipeline(tiny_unet(), VPSDEScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert not {"vae", "latents_mean", "latents_std"} & set(index)
    assert SDEPipeline.from_pretrained(tmp_path).vae is None

"""Pipelines whose network works on the latents of an autoencoder: all four, in pixels and in latents."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from PIL import Image
from tiny_networks import tiny_unet
from tiny_parts import seeded, tiny_vae

from diffusers_sde import (
    ClassConditionalSDEPipeline,
    InpaintSDEPipeline,
    RestorationSDEPipeline,
    SDEPipeline,
    VPSDEScheduler,
)
from diffusers_sde.evaluation import EvaluationConfig
from diffusers_sde.evaluation.codes import draw_codes
from diffusers_sde.guidance import Downsampling, Mask
from diffusers_sde.pipelines.encoders import LatentPreview
from diffusers_sde.pipelines.probability_flow import ProbabilityFlow

MOMENTS = {"latents_mean": [0.1, 0.0, -0.2, 0.3], "latents_std": [0.5, 1.0, 0.8, 1.2]}


def unet(**options):
    return seeded(
        lambda: diffusers.UNet2DModel(
            sample_size=4,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            **options,
        )
    )


class PatchAutoencoder(diffusers.ModelMixin, diffusers.ConfigMixin):
    """Each square of 2 x 2 pixels is a linear function of the four latents of its place, and these of it."""

    @diffusers.configuration_utils.register_to_config
    def __init__(self, in_channels=3, latent_channels=4, block_out_channels=(1, 1)):
        super().__init__()
        weight = torch.linalg.qr(torch.randn(12, 4, generator=torch.Generator().manual_seed(0))).Q
        self.weight = torch.nn.Parameter(weight)

    def encode(self, x):
        squares = torch.nn.functional.pixel_unshuffle(x, 2)
        return SimpleNamespace(latents=torch.einsum("oc,bohw->bchw", self.weight, squares))

    def decode(self, z):
        squares = torch.einsum("oc,bchw->bohw", self.weight, z)
        return SimpleNamespace(sample=torch.nn.functional.pixel_shuffle(squares, 2))


def pipeline(kind, **options):
    vae = options.pop("vae", None) or tiny_vae()
    pipe = kind(unet(**options.pop("network", {})), VPSDEScheduler(), vae=vae, **MOMENTS, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def of_gaussian_data(kind, **options):
    """A pipeline whose network predicts the velocity 0, which is right for unit Gaussian latents."""
    pipe = pipeline(kind, **options)
    for parameter in pipe.unet.parameters():
        parameter.data.zero_()
    pipe.scheduler = VPSDEScheduler(prediction_type="v_prediction")
    return pipe


def images(count=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)


def test_classes_are_guided_and_decoded(tmp_path):
    pipe = pipeline(ClassConditionalSDEPipeline, network={"num_class_embeds": 4}, null_class=3)
    options = {"class_labels": [0, 2], "guidance_scale": 2.0, "num_inference_steps": 3}
    drawn = [pipe(**options, generator=torch.manual_seed(0), output_type=kind).images for kind in ("latent", "pt")]
    assert [tuple(each.shape) for each in drawn] == [(2, 4, 4, 4), (2, 3, 8, 8)]
    torch.testing.assert_close(pipe.encoder.decode(drawn[0]), drawn[1])
    pipe.save_pretrained(tmp_path)
    again = ClassConditionalSDEPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    same = again(**options, generator=torch.manual_seed(0), output_type="pt").images
    torch.testing.assert_close(same, drawn[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["ode", "sde"])
def test_adaptive_steps_end_in_images(method):
    drawn = pipeline(SDEPipeline)(
        batch_size=2, method=method, rtol=0.1, atol=0.1, generator=torch.manual_seed(0), output_type="pt"
    ).images
    assert drawn.shape == (2, 3, 8, 8) and torch.isfinite(drawn).all()


@pytest.mark.parametrize("posterior", ["dps", "psld", "pigdm", "mmps", "smc"])
def test_restoration_looks_through_the_decoder(posterior):
    pipe = of_gaussian_data(RestorationSDEPipeline, vae=PatchAutoencoder().eval())
    operator = Downsampling(2, pipe.image_shape)
    x0 = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    y = operator.apply(pipe.encoder.decoded(x0)).detach()
    options = {"posterior": posterior, "noise_std": 0.05, "num_inference_steps": 10, "output_type": "latent"}
    options["posterior_options"] = {"chunk_size": 1} | ({"particles": 2} if posterior == "smc" else {})
    drawn = pipe(y, operator, generator=torch.manual_seed(0), **options).images
    free = SDEPipeline(**pipe.components, **MOMENTS)
    free.set_progress_bar_config(disable=True)
    unguided = free(2, 10, torch.manual_seed(0), output_type="latent").images
    off = [float((y - operator.apply(pipe.encoder.decoded(x))).detach().norm()) for x in (drawn, unguided)]
    assert drawn.shape == (2, 4, 4, 4)
    assert off[0] < (0.7 if posterior in ("dps", "psld") else 0.5) * off[1], off


def test_restoration_runs_through_a_real_decoder():
    """Its attention has kernels without the derivatives that some methods need; it is called in parts."""
    pipe = pipeline(RestorationSDEPipeline)
    operator, y = Downsampling(2, pipe.image_shape), torch.zeros(2, 3, 4, 4)
    drawn = [
        pipe(
            y,
            operator,
            noise_std=0.3,
            posterior="mmps",
            num_inference_steps=2,
            generator=torch.manual_seed(0),
            posterior_options={"chunk_size": chunk, "iterations": 2},
            output_type="latent",
        ).images
        for chunk in (None, 1)
    ]
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-3)


def test_restoration_in_latents_needs_no_decoder():
    pipe = of_gaussian_data(RestorationSDEPipeline)
    operator = Mask(torch.arange(64).reshape(1, 4, 4, 4) % 2 == 0, (4, 4, 4))
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    drawn = pipe(z, operator, posterior="pigdm", num_inference_steps=20, output_type="latent").images
    known = operator.apply(torch.ones_like(z)).bool()
    torch.testing.assert_close(drawn[known], z[known], rtol=0, atol=0.05)


@pytest.mark.parametrize("options", [{"posterior": "dps"}, {"space": "latents"}, {"posterior": "replacement"}])
def test_holes_are_filled_and_known_pixels_kept(options):
    pipe, image = pipeline(InpaintSDEPipeline), images()
    hole = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    hole[..., 3:7, 2:6] = True
    run = {"num_inference_steps": 4, "output_type": "pt", **options}
    drawn = pipe(image, hole, generator=torch.manual_seed(0), **run).images
    known = ~hole.expand_as(drawn)
    torch.testing.assert_close(drawn[known], (image / 255.0)[known])
    other = pipe(image, hole, generator=torch.manual_seed(1), **run).images
    assert (drawn - other)[~known].abs().max() > 1e-4
    assert pipe(image, hole, num_samples=2, **run | {"output_type": "latent"}).images.shape == (4, 4, 4, 4)


def test_an_exact_measurement_is_solved_to_the_error_of_a_decoder():
    """Without that error the system of this image, which no latent decodes to, would be singular."""
    pipe, image = of_gaussian_data(InpaintSDEPipeline, vae=PatchAutoencoder().eval()), images(1)
    hole = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    hole[..., 4:, :] = True
    options = {"num_inference_steps": 20, "output_type": "latent", "generator": torch.manual_seed(0)}
    x = pipe(image, hole, **options).images
    pixels = torch.nn.functional.pixel_unshuffle(image / 127.5 - 1.0, 2)
    best = torch.einsum("oc,bohw->bchw", pipe.vae.weight, pixels)  # of a decoder with orthonormal columns
    mean, std = (torch.tensor(each).reshape(4, 1, 1) for each in MOMENTS.values())
    # The posterior of a unit Gaussian: the variance of x is 1 / (1 + std^2 / 0.05^2), its mean the rest of the way.
    expected = ((best - mean) / std / (1.0 + 0.05**2 / std**2))[..., :2, :]
    spread = (1.0 / (1.0 + std**2 / 0.05**2)).sqrt()
    assert ((x[..., :2, :] - expected).detach() / spread).abs().max() < 5.0


def test_only_latents_of_known_pixels_are_known():
    pipe, image = pipeline(InpaintSDEPipeline), images(1)
    hole = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    hole[..., 2:5, 2] = True  # pixels of the second and third row of latents, second column
    drawn = pipe(image, hole, "replacement", num_inference_steps=3, output_type="latent").images
    filled = torch.where(hole, 0.0, image / 127.5 - 1.0)
    expected = pipe.encoder.encoded(filled).detach()
    free = torch.zeros(4, 4, dtype=torch.bool)
    free[1:3, 1] = True
    torch.testing.assert_close(drawn[..., ~free], expected[..., ~free])
    assert (drawn - expected)[..., free].abs().max() > 1e-3


def test_images_are_encoded_for_the_flow():
    """Unit Gaussian latents do not move along the flow of a variance-preserving SDE: they are their own codes."""
    pipe, image = of_gaussian_data(SDEPipeline), images()
    latents = pipe.encoder.encode(image)
    codes = pipe.encode(image)
    torch.testing.assert_close(codes, latents, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(codes, pipe.encode(latents))
    decoded = pipe.decode(codes, output_type="pt")
    torch.testing.assert_close(decoded, pipe.encoder.decode(latents), rtol=1e-3, atol=1e-3)
    (strip,) = pipe.interpolate(image[:1], image[1:], num=3, output_type="pt")
    assert strip.shape == (3, 3, 8, 8)
    torch.testing.assert_close(strip[[0, 2]], pipe.encoder.decode(latents), rtol=1e-2, atol=1e-2)


def test_a_density_is_one_of_latents_and_says_so():
    """The density is a Gaussian in closed form, in the scale in which the network sees latents."""
    pipe, image = of_gaussian_data(SDEPipeline), images()
    options = {"rtol": 1e-4, "atol": 1e-4, "generator": torch.manual_seed(0)}
    latents = pipe.encoder.encode(image)
    log2p = torch.distributions.Normal(0.0, 1.0).log_prob(latents) / torch.log(torch.tensor(2.0))
    found = pipe.latent_bits_per_dim(image, **options)
    torch.testing.assert_close(found, -log2p.flatten(1).mean(1), rtol=1e-3, atol=1e-3, check_dtype=False)
    torch.testing.assert_close(
        found, pipe.latent_bits_per_dim(latents, **options | {"generator": torch.manual_seed(0)})
    )
    with pytest.raises(ValueError, match="no bits per dimension of images"):
        pipe.bits_per_dim(image)
    pixels = SDEPipeline(tiny_unet(), VPSDEScheduler())
    with pytest.raises(ValueError, match="models pixels: it has bits_per_dim"):
        pixels.latent_bits_per_dim(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="images must have sides that are multiples of 2"):
        pipe.encode(torch.zeros(1, 3, 8, 7, dtype=torch.uint8))


def test_codes_of_images_are_drawn(tmp_path):
    """The picture of an evaluation shows images and what is decoded of interpolated codes."""
    pipe, levels = of_gaussian_data(SDEPipeline), images(4)
    flow = ProbabilityFlow(pipe)
    torch.testing.assert_close(flow.data_of(levels), pipe.encoder.encode(levels))
    torch.testing.assert_close(flow.images_of(flow.data_of(levels)), pipe.encoder.decode(pipe.encoder.encode(levels)))
    path = tmp_path / "codes.png"
    config = EvaluationConfig(model="none", figure=str(path), num_samples=0)
    assert draw_codes(config, flow, levels) < 1e-2, "latents come back from their codes"
    assert Image.open(path).size == ((9 + 2) * 10 * 8, 2 * 10 * 8)


def test_previews_are_exact_for_a_decoder_that_is_linear():
    pipe = pipeline(SDEPipeline)
    x = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    weight = 0.05 * torch.randn(3, 4, generator=torch.Generator().manual_seed(1))

    class Colours:
        def decode(self, x):
            small = torch.einsum("oc,bchw->bohw", weight, x) + torch.tensor([0.4, 0.5, 0.6]).reshape(3, 1, 1)
            return small.repeat_interleave(2, -1).repeat_interleave(2, -2)

    preview = LatentPreview.fit(Colours(), x)
    torch.testing.assert_close(preview(x), Colours().decode(x)[..., ::2, ::2], rtol=1e-3, atol=1e-3)
    seen = []
    show = pipe.previewer(x)
    pipe(1, 3, callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(show(kwargs["latents"])) or {})
    assert len(seen) == 3 and seen[0].shape == (1, 3, 4, 4)
    with pytest.raises(ValueError, match="previewer needs a pipeline with a vae"):
        SDEPipeline(tiny_unet(), VPSDEScheduler()).previewer(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "colours"}, "space must be one of pixels, latents"),
        ({"space": "pixels", "posterior": "repaint"}, "space must be 'latents' for posterior 'repaint'"),
        ({"image": torch.zeros(1, 3, 8, 7, dtype=torch.uint8)}, "image must be for images .3, H, W. whose sides are"),
        ({"image": torch.zeros(1, 4, 8, 8, dtype=torch.uint8)}, "image must be for images .3, H, W. whose sides are"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    given = {"image": images(1), "mask_image": torch.zeros(1, 1, 8, 8, dtype=torch.bool), **options}
    with pytest.raises(ValueError, match=message):
        pipeline(InpaintSDEPipeline)(**given)


def test_pixels_have_no_latents():
    pipe = InpaintSDEPipeline(tiny_unet(), VPSDEScheduler())
    with pytest.raises(ValueError, match="space 'latents' needs a pipeline with a vae"):
        pipe(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(8, 8), space="latents")

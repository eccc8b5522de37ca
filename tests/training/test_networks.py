"""Networks of other kinds than UNet2DModel: they are built, trained, saved, and run in the pipelines."""

import importlib.util
import json
import math
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DModel
from shades import TINY
from tiny_parts import conditional_unet, pixart, sd3_transformer, seeded, tiny_vae

from diffusers_sde import NCSNpp, SDEPipeline, VPSDEScheduler
from diffusers_sde.basics.networks import denoises_images, traits_of
from diffusers_sde.images.loading import load_digits
from diffusers_sde.networks.ncsnpp import PRESETS
from diffusers_sde.pipelines import ClassConditionalSDEPipeline
from diffusers_sde.training import Trainer, TrainingConfig, train
from diffusers_sde.training.checkpoints import clear_run
from diffusers_sde.training.networks import build_network
from diffusers_sde.training.recipes import RECIPES

PLAIN = {name: value for name, value in TINY.items() if name not in ("block_out_channels", "layers_per_block")}
SMALL_UNET = {"block_out_channels": (8, 8), "layers_per_block": 1, "attention_resolutions": (4,)}


def tiny(output_dir, **options):
    return TrainingConfig(output_dir=str(output_dir), **(PLAIN | {"max_train_steps": 2} | options))


@pytest.fixture(autouse=True)
def _small_transformers(monkeypatch):
    """The small size of the registry is that of a demonstration; tests need less."""
    monkeypatch.setattr("diffusers_sde.training.transformers.SMALL", (2, 32, 2))


def digits(count=60):
    return load_digits().select(range(count))


def images_of(resolution, channels):
    return SimpleNamespace(resolution=resolution, channels=channels)


def tiny_dit(**options):
    return seeded(
        lambda: DiTTransformer2DModel(
            **(
                {
                    "num_attention_heads": 2,
                    "attention_head_dim": 8,
                    "in_channels": 1,
                    "out_channels": 1,
                    "num_layers": 2,
                    "sample_size": 8,
                    "num_embeds_ada_norm": 10,
                }
                | options
            )
        )
    )


@pytest.mark.parametrize(("kind", "class_conditional"), [("dit", False), ("dit", True), ("pixart", False)])
def test_a_transformer_is_trained_saved_loaded_and_runs_everywhere(tmp_path, kind, class_conditional):
    trained = train(tiny(tmp_path, model_type=kind, class_conditional=class_conditional), digits())
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    network_class = DiTTransformer2DModel if kind == "dit" else PixArtTransformer2DModel
    assert isinstance(pipe.unet, network_class) and pipe.unet.config.patch_size == 2
    kind = ClassConditionalSDEPipeline if class_conditional else SDEPipeline
    labels = {"class_labels": [3, 5]} if class_conditional else {"batch_size": 2}
    assert type(pipe) is kind and type(trained) is kind
    if class_conditional:
        assert pipe.unet.config.num_embeds_ada_norm == pipe.config.null_class == 10
        labels["guidance_scale"] = 2.0
    for method in ("scheduler", "ode"):
        with torch.no_grad():
            draw = [
                each(**labels, num_inference_steps=3, generator=torch.manual_seed(0), output_type="pt", method=method)
                for each in (pipe, trained)
            ]
        torch.testing.assert_close(draw[0].images, draw[1].images)
        assert draw[0].images.shape == (2, 1, 8, 8)
    values = pipe.log_prob(draw[0].images, rtol=1e-1, atol=1e-1, generator=torch.manual_seed(0)).value
    assert torch.isfinite(values).all()


def test_a_network_without_classes_is_fed_its_only_label(tmp_path):
    """diffusers' transformer always takes a label. Here it has a single one, and no row of its table is idle."""
    trainer = Trainer(tiny(tmp_path, model_type="dit", class_conditional=False), digits())
    tables = [m for m in trainer.network.modules() if isinstance(m, torch.nn.Embedding)]
    assert {len(table.weight) for table in tables} == {1}
    pipe = SDEPipeline(trainer.network, trainer.scheduler)
    assert pipe.unconditional(3)["class_labels"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="null_class must be None for a network without classes"):
        SDEPipeline(trainer.network, trainer.scheduler, null_class=0)


def test_a_transformer_with_classes_is_unconditional_by_its_null_class():
    dit, scheduler = tiny_dit(), VPSDEScheduler()
    with pytest.raises(ValueError, match="unet knows classes and has no null_class.*which is 10 where"):
        SDEPipeline(dit, scheduler)(num_inference_steps=2)
    pipe = SDEPipeline(dit, scheduler, null_class=10)
    pipe.set_progress_bar_config(disable=True)
    drawn = [
        p(num_inference_steps=3, generator=torch.manual_seed(0), output_type="pt", **arguments).images
        for p, arguments in (
            (pipe, {}),
            (ClassConditionalSDEPipeline(dit, scheduler, null_class=10), {"class_labels": [4], "guidance_scale": 0.0}),
        )
    ]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"must have sides \(8, 8\), those of the transformer"):
        pipe(latents=torch.zeros(1, 1, 12, 12), num_inference_steps=2)


def test_labels_are_hidden_by_the_run_and_not_by_the_blocks(tmp_path):
    """diffusers' blocks hide a tenth of the labels in training mode, each others, by the global generator."""
    trainer = Trainer(tiny(tmp_path, model_type="dit", label_dropout=0.0), digits())
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    x, t = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((64,), 500.0)
    labels, network = torch.arange(64) % 10, trainer.network
    with torch.no_grad():
        given, kept = (network.train(mode)(x, t, labels).sample for mode in (True, False))
    assert torch.equal(given, kept)
    assert traits_of(network).num_classes == 10  # and no eleventh, which nobody would train
    stock = tiny_dit().train()
    stock.load_state_dict({k: 0.3 * torch.randn_like(v) for k, v in stock.state_dict().items()})
    with torch.no_grad():
        assert not torch.equal(stock(x, t, labels).sample, stock.eval()(x, t, labels).sample)


def test_a_new_transformer_begins_as_the_paper_says(tmp_path):
    """adaLN-Zero: whatever the input, the output is zero, and so is what the blocks add to it."""
    network = Trainer(tiny(tmp_path, model_type="dit"), digits()).network
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = []
    hooks = [
        block.register_forward_hook(lambda module, given, returned: seen.append((given[0], returned)))
        for block in network.transformer_blocks
    ]
    with torch.no_grad():
        output = network(x, torch.tensor([1.0, 900.0]), torch.tensor([0, 10])).sample
    assert len(hooks) == len(seen) and all(torch.equal(*pair) for pair in seen)
    assert torch.equal(output, torch.zeros_like(x))


def test_gradients_are_those_without_checkpointing(tmp_path):
    batches, gradients = None, {}
    for kind, more in (
        ("dit", {}),
        ("pixart", {"class_conditional": False}),
        ("unet", SMALL_UNET),
        ("ncsnpp", SMALL_UNET),
    ):
        for checkpointing in (False, True):
            options = {"model_type": kind, "gradient_checkpointing": checkpointing, **more}
            trainer = Trainer(tiny(tmp_path, **options), digits())
            trainer.model = trainer.network.train()
            batches = trainer.source.samples(0, False).__getitems__(range(4))
            trainer.loss(batches).mean().backward()
            assert trainer.network.is_gradient_checkpointing == checkpointing
            gradients[checkpointing] = [p.grad for p in trainer.network.parameters()]
        for plain, recomputed in zip(gradients[False], gradients[True], strict=True):
            assert (plain is None) == (recomputed is None)
            assert plain is None or torch.equal(plain, recomputed)


def test_sizes_of_the_transformer_are_those_of_its_paper():
    """Millions of parameters of DiT (Peebles & Xie 2023, Table 4), where each block has no embedding of its own."""
    for size, millions in (("S", 33), ("B", 130), ("L", 458), ("XL", 675)):
        options = SimpleNamespace(
            model_type="dit", model_size=size, patch_size=None, dropout=None, model_config_name_or_path=None
        )
        with torch.device("meta"):
            network = build_network(options, images_of(32, 4), 1001)
        assert network.config.patch_size == 2 and network.config.out_channels == 4
        embeddings = sum(p.numel() for p in network.transformer_blocks[0].norm1.emb.parameters())
        count = sum(p.numel() for p in network.parameters()) - (len(network.transformer_blocks) - 1) * embeddings
        assert count / 1e6 == pytest.approx(millions, abs=0.02 * millions)


def test_the_transformer_for_captions_is_that_of_its_paper():
    """0.6 billion weights (Chen et al. 2024, Table 2): those of diffusers' default config, by name and shape."""
    options = SimpleNamespace(
        model_type="pixart", model_size="XL", patch_size=None, dropout=None, model_config_name_or_path=None
    )
    with torch.device("meta"):
        network = build_network(options, images_of(128, 4), None, 4096)
        stock = PixArtTransformer2DModel(caption_channels=4096, out_channels=4, use_additional_conditions=False)
        alone = build_network(options, images_of(32, 4), None)
    # The default patches of images of 128 pixels are larger, those of the paper are of side 2.
    assert network.config.patch_size == 4 and alone.config.patch_size == 2
    patches = ("pos_embed.proj.weight", "proj_out.weight", "proj_out.bias")
    shapes, expected = (
        {name: tuple(p.shape) for name, p in each.named_parameters() if name not in patches}
        for each in (network, stock)
    )
    assert shapes == expected
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(0.61, abs=0.01)
    assert traits_of(network).caption_width == 4096 and traits_of(alone).caption_width is None
    assert not any("attn2" in name or "caption" in name for name, _ in alone.named_parameters())


@pytest.mark.parametrize("width", [None, 16])
def test_the_blocks_of_a_new_transformer_do_nothing(width):
    """adaLN-Zero (Peebles & Xie 2023, section 3.2): every block is the identity, and the output is zero."""
    options = SimpleNamespace(
        model_type="pixart", model_size=None, patch_size=4, dropout=None, model_config_name_or_path=None
    )
    network, seen = build_network(options, images_of(8, 3), None, width), []
    for block in network.transformer_blocks:
        block.register_forward_hook(lambda module, given, returned: seen.append((given[0], returned)))
    told = {} if width is None else {"encoder_hidden_states": torch.randn(2, 5, width)}
    output = network(torch.randn(2, 3, 8, 8), timestep=torch.tensor([3.5, 900.0]), **told).sample
    assert len(seen) == 2 and all(torch.equal(*pair) for pair in seen)
    assert output.shape == (2, 3, 8, 8) and not output.any()
    network.proj_out.weight.data.normal_()
    again = network(torch.randn(2, 3, 8, 8), timestep=torch.tensor([3.5, 900.0]), **told).sample
    again.square().sum().backward()
    # What is zero has to learn.
    grown = [name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()]
    assert {"scale_shift_table", "adaln_single.linear.weight"} < set(grown)


def test_which_networks_denoise_images_without_more():
    assert denoises_images(tiny_dit()) and denoises_images(pixart(cross_attention_dim=None, caption_channels=None))
    for network in (pixart(), sd3_transformer(), conditional_unet(cross_attention_dim=16)):
        assert not denoises_images(network)


@pytest.mark.parametrize(("resolution", "patch"), [(7, 1), (8, 2), (64, 2), (128, 4), (256, 8)])
def test_patches_suit_the_images(resolution, patch):
    options = SimpleNamespace(
        model_type="dit", model_size=None, patch_size=None, dropout=None, model_config_name_or_path=None
    )
    with torch.device("meta"):
        assert build_network(options, images_of(resolution, 3), None).config.patch_size == patch


@pytest.mark.parametrize(
    ("options", "prediction", "conditioning", "expected"),
    [
        ({"model_type": "ncsnpp", "sde": "ve"}, "score", "sigma", {"scale_by_sigma": True}),
        ({"model_type": "ncsnpp", "sde": "ve", "prediction_type": "edm"}, "edm", "sigma", {"scale_by_sigma": False}),
        ({"model_type": "ncsnpp", "sde": "vp"}, "epsilon", "continuous", {"time_embedding_type": "positional"}),
        ({"model_type": "ddpmpp", "sde": "flow"}, "flow_prediction", "continuous", {"fir_kernel": None}),
    ],
)
def test_networks_of_the_paper_train_save_load_and_sample(tmp_path, options, prediction, conditioning, expected):
    train(tiny(tmp_path, **options, **SMALL_UNET), digits())
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    config, network = pipe.scheduler.config, pipe.unet
    assert isinstance(network, NCSNpp) and {name: network.config[name] for name in expected} == expected
    assert (config.prediction_type, config.time_conditioning) == (prediction, conditioning)
    pipe.set_progress_bar_config(disable=True)
    images = pipe([1, 2], num_inference_steps=3, guidance_scale=2.0, output_type="pt").images
    assert images.shape == (2, 1, 8, 8) and torch.isfinite(images).all()
    clear_run(tmp_path)  # the code of the network included
    assert not list(tmp_path.iterdir())


def test_recipes_name_the_networks_of_the_paper():
    """The presets, which are held to the official networks, are built as they are, and fit what is trained."""
    for name in RECIPES:
        config = TrainingConfig.from_recipe(name)
        with torch.device("meta"):
            network = build_network(config, images_of(32, 3), None)
        preset = PRESETS[config.model_preset]
        assert all(network.config[key] == value for key, value in preset.items()), name
        assert traits_of(network).prediction_type in (None, config.prediction_type)
        assert traits_of(network).time_conditioning in (None, config.time_conditioning)
    plain = TrainingConfig.from_recipe("paper_ve_continuous", model_type="unet")
    assert (plain.block_out_channels, plain.time_embedding_type) == ((128, 256, 256, 256), "fourier")
    assert TrainingConfig.from_recipe("paper_vp", model_type="dit").model_preset is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "dit", "patch_size": 3}, "patch_size must divide the side of the images, 8, got 3"),
        ({"model_type": "unet", "patch_size": 2}, "patch_size is for model_type dit or pixart, got model_type='unet'"),
        (
            {"model_type": "dit", "layers_per_block": 1},
            "layers_per_block is for model_type unet or unet_condition or ncsnpp or ddpmpp",
        ),
        ({"model_size": "S"}, "model_size is for model_type dit"),
        ({"model_type": "ncsnpp", "model_preset": "ve/cifar10"}, "model_preset must be one of ve/cifar10_ncsnpp_con"),
        (
            {"model_type": "ncsnpp", "model_preset": "ve/cifar10_ncsnpp", "layers_per_block": 1},
            "layers_per_block cannot be set beside model_preset",
        ),
        ({"model_type": "ncsnpp", "model_preset": "ve/cifar10_ncsnpp"}, "is for images of side 32.*pass resolution=32"),
        (
            {"model_type": "ncsnpp", "model_preset": "ve/cifar10_ncsnpp", "resolution": 32},
            r"is for images in \[0, 1\]: pass data_min=0",
        ),
        (
            {"model_type": "ncsnpp", "sde": "ve", "time_conditioning": "continuous", **SMALL_UNET},
            "time_conditioning must be 'sigma' for this network by its form, got 'continuous'",
        ),
        ({"init_from": "nowhere", "model_type": "dit"}, "model_type cannot be set beside init_from"),
        ({"init_from": "nowhere", "dropout": 0.1}, "dropout cannot be set beside init_from"),
        ({"init_from": "/nowhere"}, "init_from '/nowhere' cannot be loaded"),
        ({"time_shift": 2.0, "discrete": True}, "time_shift and time_shift_base_resolution need continuous times"),
        ({"time_shift": 0.0}, "time_shift must be a finite number greater than 0"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(tiny(tmp_path, **options), digits())


def test_8bit_adam_is_refused_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, found=importlib.util.find_spec: None if name == "bitsandbytes" else found(name),
    )
    with pytest.raises(ValueError, match="use_8bit_adam needs bitsandbytes"):
        Trainer(tiny(tmp_path, use_8bit_adam=True), digits())


# ------------------------------------------------------------------ configs and weights that are given


def test_a_stock_transformer_with_learned_variance_is_trained_on(tmp_path, caplog):
    """Its weights are those that training starts from, and its variance is dropped wherever it is run."""
    dit = tiny_dit(out_channels=2, in_channels=1)
    stock = diffusers.DiTPipeline(dit, tiny_vae(), diffusers.DDIMScheduler(prediction_type="v_prediction"))
    stock.save_pretrained(tmp_path / "stock")
    options = {"init_from": str(tmp_path / "stock"), "max_train_steps": 1, "use_ema": False}
    trainer = Trainer(tiny(tmp_path / "out", **options), digits())
    assert "prediction_type 'v_prediction' -> 'epsilon'" in caplog.text
    weights = trainer.network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in dit.state_dict().items())
    # The loss by hand, with the first half of the output.
    batch = trainer.source.samples(0, False).__getitems__(range(8))
    trainer.model = trainer.network.eval()
    with torch.no_grad():
        x0, eps, t = trainer._inputs(batch)
        alpha, sigma = (each.float().reshape(-1, 1, 1, 1) for each in (trainer.sde.alpha(t), trainer.sde.sigma(t)))
        labels = torch.where(batch["label_draw"] < 0.1, 10, batch["labels"])
        output = dit(alpha * x0 + sigma * eps, 1000 * t.float(), labels).sample[:, :1]
        torch.testing.assert_close(trainer.loss(batch), (output - eps).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)
    trainer.run()
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.variance_type == "learned_range" and pipe.unet.config.out_channels == 2
    arguments = {"num_inference_steps": 3, "output_type": "latent"}
    drawn = [
        p(generator=torch.manual_seed(0), **arguments, **labels).images
        for p, labels in (
            (pipe, {"class_labels": [4], "guidance_scale": 0.0}),
            (SDEPipeline(pipe.unet, pipe.scheduler, null_class=10), {}),
        )
    ]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-3, atol=1e-3)


class FirstHalf(torch.nn.Module):
    """A network without the variance that it also returns, told the null class."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, timestep):
        return self.network(x, timestep, torch.full((len(x),), 10)).sample[:, :1]


def test_a_network_that_also_returns_a_variance_has_a_density():
    dit, scheduler = tiny_dit(out_channels=2), VPSDEScheduler(prediction_type="v_prediction")
    x = 0.5 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    values = []
    for pipe in (
        SDEPipeline(dit, scheduler, null_class=10),
        SDEPipeline(FirstHalf(dit), scheduler, sample_shape=(1, 8, 8)),
    ):
        pipe.set_progress_bar_config(disable=True)
        values.append(pipe.log_prob(x, rtol=1e-2, atol=1e-2, generator=torch.Generator().manual_seed(1)).value)
    torch.testing.assert_close(*values)


def test_a_stock_pipeline_loads_a_transformer_that_was_trained_here(tmp_path):
    """A stock DiTPipeline decodes by its autoencoder, so that pixels do not fit it; its network takes them."""
    train(tiny(tmp_path, model_type="dit"), digits())
    dit = DiTTransformer2DModel.from_pretrained(tmp_path, subfolder="unet")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    ours = pipe([3], num_inference_steps=3, generator=torch.manual_seed(0), output_type="latent")
    seen = []
    decoder = SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0), decode=lambda z: seen.append(z) or z)
    stock = diffusers.DiTPipeline(dit, tiny_vae(), pipe.scheduler)
    stock.set_progress_bar_config(disable=True)
    decoder.decode = lambda z: SimpleNamespace(sample=seen.append(z) or z)
    object.__setattr__(stock, "vae", decoder)
    stock([3], guidance_scale=1.0, num_inference_steps=3, generator=torch.manual_seed(0), output_type="pt")
    torch.testing.assert_close(seen[0], ours.images, rtol=1e-4, atol=1e-4)


def test_a_saved_pipeline_goes_on_with_other_data(tmp_path):
    config = tiny(tmp_path / "a", model_type="dit", seed=3)
    first = train(config, digits())
    options = {"init_from": str(tmp_path / "a"), "seed": 4}
    options["checkpointing_steps"] = 2
    other = load_digits().select(range(100, 200))
    second = Trainer(tiny(tmp_path / "b", **options), other)
    weights = first.unet.state_dict()
    assert all(torch.equal(value.cpu(), weights[name].cpu()) for name, value in second.network.state_dict().items())
    second.run()
    resumed = Trainer(
        tiny(tmp_path / "b", **(options | {"max_train_steps": 3, "resume_from_checkpoint": "latest"})), other
    )
    assert resumed.step == 2
    resumed.run()


def test_saved_networks_that_do_not_fit_are_refused(tmp_path):
    UNet2DModel(**unet_arguments(num_class_embeds=11)).save_pretrained(tmp_path / "unet")
    tiny_dit().save_pretrained(tmp_path / "dit")
    NCSNpp(8, 1, (8, 8), 1, (8,), num_class_embeds=11).save_pretrained(tmp_path / "ncsnpp")
    grey = digits()
    Trainer(tiny(tmp_path / "out", init_from=str(tmp_path / "unet")), grey)
    for folder, options, message in (
        ("unet", {"label_dropout": 0.0}, "has a network of 11 classes, this run one of 10 classes"),
        ("dit", {"class_conditional": False}, "has a network of 11 classes, this run one of no classes"),
        ("dit", {"channels": 3}, "has in_channels=1, but the images have 3 channels"),
        ("dit", {"resolution": 9}, "has patches of side 2, but the resolution 9 is no multiple of 2"),
        ("unet", {"resolution": 9}, "halves the image 1 times, but the resolution 9"),
        ("ncsnpp", {"resolution": 16}, "does not fit images of side 16: its .*attention.* has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(tiny(tmp_path / "out", init_from=str(tmp_path / folder), **options), grey)


def unet_arguments(**options):
    return {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        **options,
    }


@pytest.mark.parametrize(
    ("kind", "make"),
    [("dit", lambda: tiny_dit()), ("ncsnpp", lambda: NCSNpp(8, 1, (8, 8), 1, ()))],
)
def test_configs_of_other_kinds_are_taken(tmp_path, kind, make):
    make().save_config(tmp_path / "config")
    config = json.loads((tmp_path / "config" / "config.json").read_text())
    options = {"model_type": kind, "model_config_name_or_path": str(tmp_path / "config"), "data_min": 0.0, "sde": "ve"}
    network = Trainer(tiny(tmp_path / "out", **options), digits()).network
    labels = {"num_class_embeds", "num_embeds_ada_norm"}
    assert all(network.config[name] == value for name, value in config.items() if name not in labels)
    assert traits_of(network).num_classes == 11
    (tmp_path / "config" / "config.json").write_text(json.dumps(config | {"in_channels": "x"}))
    with pytest.raises(ValueError, match="is no config of a"):
        Trainer(tiny(tmp_path / "out", **options), digits())


# ------------------------------------------------------------------ times


def test_times_shift_with_the_resolution(tmp_path):
    """Esser et al. 2024, equation 23: the shift is the root of the ratio of pixels."""
    options = {"sde": "flow", "time_sampling": "logit_normal", "logit_normal_mean": 0.5, "logit_normal_std": 0.1}
    plain, shifted = (
        Trainer(tiny(tmp_path, **options, **more, **SMALL_UNET), digits())
        for more in ({}, {"time_shift": 1.5, "time_shift_base_resolution": 4})
    )
    u = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    t, s = plain._times(u), shifted._times(u)
    assert float(t[1]) == pytest.approx(1 / (1 + math.exp(-0.5)), rel=1e-6)
    torch.testing.assert_close(s / (1 - s), 1.5 * math.sqrt(64 / 16) * t / (1 - t))
    same, other = plain._identity(), shifted._identity()
    assert {name for name in same if same[name] != other[name]} == {"time_shift"} and other["time_shift"] == 3.0


def test_a_transformer_learns(tmp_path, shades):
    """Two shades by class: what a transformer is told and fed has to reach its output."""
    options = {"learning_rate": 2e-3, "max_train_steps": 150, "ema_max_decay": 0.95, "sde": "flow"}
    pipe = train(tiny(tmp_path, model_type="dit", **options), shades)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        ["dark", "light"] * 8, num_inference_steps=20, generator=torch.manual_seed(0), output_type="np"
    ).images
    means = np.mean(images, axis=(1, 2, 3))
    assert means[::2].max() < 0.45 < 0.55 < means[1::2].min(), means

"""Training on captions: the network is told their embeddings, now and then that of the empty one, and learns them."""

import dataclasses
import functools
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file
from shades import TINY
from tiny_parts import conditional_unet, pixart, tiny_text, tiny_vae

from diffusers_sde import TextSDEPipeline
from diffusers_sde.images.loading import load_digits
from diffusers_sde.images.samples import batches
from diffusers_sde.training import Trainer, TrainingConfig, captions, row_cache, train
from diffusers_sde.training.checkpoints import clear_run
from diffusers_sde.training.policy_configuration import PolicyTrainingConfig
from diffusers_sde.training.rl import PolicyTrainer

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with a random text encoder of CLIP, and its tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    text = tiny_text(tmp_path_factory.mktemp("vocabulary"))
    text.tokenizer.save_pretrained(folder)
    text.encoder.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def captioned():
    digits = load_digits().select(range(40))
    return digits.add_column("text", [f"a {NAMES[label]}" for label in digits["label"]])


@pytest.fixture(autouse=True)
def _small_transformers(monkeypatch):
    """The small size of the registry is that of a demonstration; tests need less."""
    monkeypatch.setattr("diffusers_sde.training.transformers.SMALL", (2, 32, 2))


PIXART = {"model_type": "pixart", "block_out_channels": None, "layers_per_block": 2, "patch_size": 4}
STARTED = PIXART | {"model_type": "unet", "patch_size": None, "text_encoder": None}  # from what init_from names


def tiny(folder, encoder, **options):
    given = {"class_conditional": False, "model_type": "unet_condition", "caption_column": "text", "max_train_steps": 2}
    given |= {"text_encoder": encoder, "caption_cache_dir": str(folder / "cache"), "mixed_precision": "no"}
    return TrainingConfig(output_dir=str(folder / "out"), **(TINY | given | options))


def expected(encoder, texts, length=8):
    """Embeddings by transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    model = transformers.CLIPTextModel.from_pretrained(encoder)
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        states = model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return states, tokens.attention_mask.bool()


def told(trainer, batch):
    """What the network is told beside images and timesteps."""
    trainer.model, fed = trainer.network, []
    hook = trainer.network.register_forward_pre_hook(
        lambda module, arguments, keywords: fed.append(keywords), with_kwargs=True
    )
    with torch.no_grad():
        trainer.loss(batch)
    hook.remove()
    return fed[0]


@pytest.mark.parametrize("network", [{}, PIXART])
def test_captions_mean_something_and_come_back(tmp_path, encoder, shades, network):
    """Classes by name are captions too; after training, "dark" draws dark pictures and "light" light ones."""
    options = {"sde": "flow", "max_train_steps": 200, "learning_rate": 3e-3, "ema_max_decay": 0.95, "sample_every": 200}
    trained = train(tiny(tmp_path, encoder, caption_column="label", **options, **network), shades)
    assert (tmp_path / "out" / "samples" / "step-0000200.png").exists()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe) is TextSDEPipeline and pipe.config.null_caption == "" and pipe.config.max_caption_length == 8
    drawn = []
    for pipeline in (trained, pipe):
        pipeline.set_progress_bar_config(disable=True)
        drawn.append(
            pipeline(
                ["dark", "light"] * 8,
                num_inference_steps=20,
                guidance_scale=1.5,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            ).images
        )
        means = drawn[-1].mean((1, 2, 3))
        assert float(means[::2].max()) < 0.45 < 0.55 < float(means[1::2].min()), means
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-4, atol=1e-5)


def test_the_network_is_told_the_embeddings_of_its_captions(tmp_path, encoder, captioned, monkeypatch):
    monkeypatch.setattr(row_cache, "SHARD_BYTES", 3 * 8 * (16 * 4 + 1))  # three captions in a file
    trainer = Trainer(tiny(tmp_path, encoder, caption_dropout=0.3), captioned)
    trainer._begin()
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == 4
    batch = trainer.source.samples(0, False, 1).__getitems__(range(400))
    fed = told(trainer, batch)
    hidden = batch["label_draw"] < 0.3
    assert abs(float(hidden.float().mean()) - 0.3) < 0.12  # five standard errors
    source = captioned["text"]
    order = trainer.source.order(0, range(400))
    texts = ["" if empty else source[index] for index, empty in zip(order, hidden.tolist(), strict=True)]
    states, mask = expected(encoder, texts)
    torch.testing.assert_close(fed["encoder_hidden_states"], states, rtol=1e-4, atol=1e-5)
    assert torch.equal(fed["encoder_attention_mask"], mask)


def test_without_dropout_there_is_no_null_caption(tmp_path, encoder, captioned):
    pipe = train(tiny(tmp_path, encoder, caption_dropout=0.0, max_train_steps=1), captioned)
    assert pipe.config.null_caption is None
    with pytest.raises(ValueError, match="guidance_scale must be 1 for a network without a null caption, got 2.0"):
        pipe("a three", guidance_scale=2.0)
    with pytest.raises(ValueError, match="null_caption is None"):
        pipe(batch_size=2)


def test_a_resumed_run_is_the_same_and_embeds_nothing_again(tmp_path, encoder, captioned, monkeypatch):
    options = PIXART | {"checkpointing_steps": 2, "max_train_steps": 4}
    whole = train(tiny(tmp_path, encoder, **options), captioned)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    (cache,) = (tmp_path / "cache").glob("*/*.safetensors")
    assert set(load_file(cache)) == {"states", "mask"} and len(load_file(cache)["mask"]) == 10 + 1
    monkeypatch.setattr(captions.CaptionCache, "_compute", None)  # whoever embeds again fails
    again = Trainer(tiny(tmp_path, encoder, **options, resume_from_checkpoint="latest"), captioned)
    assert again.step == 2
    weights = again.run().unet.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in whole.unet.state_dict().items())
    renamed = captioned.remove_columns("text").add_column("text", [f"the {text}" for text in captioned["text"]])
    for data, changed, name in ((renamed, {}, "captions"), (captioned, {"caption_dropout": 0.2}, "caption_dropout")):
        with pytest.raises(ValueError, match=f"resume_from_checkpoint: the checkpoint was trained with {name}="):
            Trainer(tiny(tmp_path, encoder, **options, **changed, resume_from_checkpoint="latest"), data)
    clear_run(tmp_path / "out")  # text encoder and tokenizer included
    assert not list((tmp_path / "out").iterdir())


def test_an_encoder_may_come_from_a_pipeline(tmp_path, encoder, captioned):
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(encoder, tmp_path / "pipe" / part)
    trainer = Trainer(
        tiny(tmp_path, str(tmp_path / "pipe"), text_encoder_dtype="bf16", max_caption_length=5), captioned
    )
    trainer._begin()
    assert trainer._captions.cache.read(torch.tensor([0])).states.dtype == torch.bfloat16
    fed = told(trainer, trainer.source.samples(0, False, 1).__getitems__(range(20)))
    order = trainer.source.order(0, range(20))
    states, _ = expected(encoder, [captioned["text"][index] for index in order], length=5)
    kept = [i for i in range(20) if fed["encoder_attention_mask"][i].sum() > 2]  # the empty caption has two tokens
    assert len(kept) > 10
    # Numbers of bf16 have 8 bits, and those of a layer norm are of the order of 1.
    torch.testing.assert_close(fed["encoder_hidden_states"][kept], states[kept], rtol=5e-2, atol=5e-2)


def test_a_given_config_must_fit_the_captions(tmp_path, encoder, captioned):
    options = {"block_out_channels": None, "layers_per_block": 2, "model_config_name_or_path": str(tmp_path / "config")}
    network = conditional_unet(cross_attention_dim=16, in_channels=1, out_channels=1)
    network.save_config(tmp_path / "config")
    built = Trainer(tiny(tmp_path, encoder, **options), captioned).network
    assert {n: tuple(w.shape) for n, w in built.named_parameters()} == {
        n: tuple(w.shape) for n, w in network.named_parameters()
    }
    conditional_unet(cross_attention_dim=8, in_channels=1, out_channels=1).save_config(tmp_path / "config")
    with pytest.raises(ValueError, match="captions of width 8, this run has embeddings of captions of width 16"):
        Trainer(tiny(tmp_path, encoder, **options), captioned)


@pytest.mark.parametrize("network", [{"block_out_channels": (8, 8)}, PIXART | {"patch_size": 2}])
def test_captions_go_with_latents(tmp_path, encoder, captioned, network):
    tiny_vae().save_pretrained(tmp_path / "vae")
    options = {"vae": str(tmp_path / "vae"), "channels": 3, "cache_latents": True, "gradient_checkpointing": True}
    train(tiny(tmp_path, encoder, **options, **network, latent_cache_dir=str(tmp_path / "latents")), captioned)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is TextSDEPipeline and isinstance(pipe.vae, AutoencoderKL)
    images = pipe(["a three", "a six"], guidance_scale=2.0, num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_encoder": None}, "caption_column 'text' needs text_encoder, which embeds"),
        ({"caption_column": None}, "text_encoder '.*' has no effect without caption_column"),
        ({"model_type": "unet"}, "caption_column needs a model_type of unet_condition or pixart, got 'unet'"),
        (
            {"caption_column": None, "text_encoder": None, "caption_cache_dir": None},
            "'unet_condition' needs caption_col",
        ),
        ({"class_conditional": True}, "class_conditional cannot be set beside caption_column"),
    ],
)
def test_options_that_do_not_fit_together(tmp_path, encoder, options, message):
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path, encoder, **options)


def test_data_that_do_not_fit(tmp_path, encoder, captioned):
    with pytest.raises(ValueError, match="caption_column must be one of image, label, text, got 'words'"):
        Trainer(tiny(tmp_path, encoder, caption_column="words"), captioned)
    texts = ["a three", None] * 20
    broken = captioned.remove_columns("text").add_column("text", texts)
    with pytest.raises(ValueError, match="must hold one text for each image, that of image 1 is None"):
        Trainer(tiny(tmp_path, encoder), broken)
    with pytest.raises(ValueError, match="max_caption_length must be at most 8 for this text encoder, got 9"):
        Trainer(tiny(tmp_path, encoder, max_caption_length=9), captioned)
    with pytest.raises(ValueError, match="text_encoder '.*' cannot be loaded"):
        Trainer(tiny(tmp_path, str(tmp_path)), captioned)


# ------------------------------------------------------------------ streams


def test_captions_of_a_stream_are_embedded_on_the_way(tmp_path, encoder, captioned):
    """The network is told what transformers makes of the captions of the images that it sees."""
    options = {"streaming": True, "caption_dropout": 0.3, "shuffle_buffer": 0, "dataloader_num_workers": 1}
    trainer = Trainer(tiny(tmp_path, encoder, **options, **PIXART), captioned)
    batch = next(batches(trainer.source.samples(0, False), 0, 30, num_workers=1))
    fed, hidden = told(trainer, batch), (batch["label_draw"] < 0.3).tolist()
    texts = ["" if empty else text for text, empty in zip(captioned["text"][:30], hidden, strict=True)]
    assert 2 < sum(hidden) < 20
    states, mask = expected(encoder, texts)
    torch.testing.assert_close(fed["encoder_hidden_states"], states, rtol=1e-4, atol=1e-5)
    assert torch.equal(fed["encoder_attention_mask"], mask)
    assert not (tmp_path / "cache").exists()


def test_a_stream_with_captions_is_resumed_bit_for_bit(tmp_path, encoder, captioned, caplog):
    options = PIXART | {"streaming": True, "checkpointing_steps": 2, "max_train_steps": 4, "sample_every": 4}
    caplog.set_level("INFO")
    whole = train(tiny(tmp_path, encoder, **options), captioned)
    assert "8x8 pixels, captions, 10 different ones of the first 40 images." in caplog.text
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    again = Trainer(tiny(tmp_path, encoder, **options, resume_from_checkpoint="latest"), captioned)
    assert again.step == 2
    weights = again.run().unet.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in whole.unet.state_dict().items())
    names = captioned.remove_columns("text").rename_column("label", "text")  # captions by the names of classes
    with pytest.raises(ValueError, match="resume_from_checkpoint: the checkpoint was trained with captions="):
        Trainer(tiny(tmp_path, encoder, **options, resume_from_checkpoint="latest"), names)
    broken = captioned.remove_columns("text").add_column("text", ["a three", None] * 20)
    with pytest.raises(ValueError, match="must hold one text for each image, the data hold None"):
        Trainer(tiny(tmp_path / "b", encoder, **options), broken)


# ------------------------------------------------------------------ models that training starts from


@pytest.fixture(scope="module")
def saved(tmp_path_factory, encoder, captioned):
    """A trained pipeline that is told five tokens of each caption."""
    folder = tmp_path_factory.mktemp("saved")
    train(tiny(folder, encoder, max_caption_length=5, **PIXART), captioned)
    return str(folder / "out")


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 2}])
def test_a_saved_pipeline_goes_on_with_other_captions(tmp_path, encoder, saved, captioned, lora):
    other = captioned.remove_columns("text").add_column("text", [f"the {text}" for text in captioned["text"]])
    config = tiny(tmp_path, None, init_from=saved, learning_rate=1e-2, use_ema=False, **STARTED, **lora)
    trainer = Trainer(config, other)
    before = TextSDEPipeline.from_pretrained(saved)
    own = trainer.network.state_dict()
    weights = {name.replace(".base_layer", ""): value for name, value in own.items() if "lora_" not in name}
    assert all(torch.equal(value, weights[name]) for name, value in before.unet.state_dict().items())
    trainer._begin()
    fed = told(trainer, trainer.source.samples(0, False).__getitems__(range(20)))
    order = trainer.source.order(0, range(20))
    states, _ = expected(encoder, [other["text"][index] for index in order], length=5)
    kept = fed["encoder_attention_mask"].sum(1) > 2  # the empty caption has two tokens
    torch.testing.assert_close(fed["encoder_hidden_states"][kept], states[kept], rtol=1e-4, atol=1e-5)
    Trainer(config, other).run()
    after = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(after) is TextSDEPipeline and after.config.max_caption_length == 5
    frozen = after.text_encoder.state_dict()
    assert all(torch.equal(value, frozen[name]) for name, value in before.text_encoder.state_dict().items())
    changed = after.unet.state_dict()
    assert any(not torch.equal(value, changed[name]) for name, value in before.unet.state_dict().items())
    assert (tmp_path / "out" / "adapter").exists() is bool(lora)


def test_what_does_not_fit_a_saved_pipeline_is_refused(tmp_path, encoder, saved, captioned):
    text = tiny_text(tmp_path)
    text.tokenizer.save_pretrained(tmp_path / "t5")
    with torch.no_grad():
        text.encoder.final_layer_norm.weight.mul_(2.0)  # of modules by this name CLIP has one
    text.encoder.save_pretrained(tmp_path / "t5")
    options = STARTED | {"init_from": saved}
    Trainer(tiny(tmp_path, encoder, **(options | {"text_encoder": encoder})), captioned)
    for changed, message in (
        ({"text_encoder": str(tmp_path / "t5")}, "text_encoder '.*t5' is another one than that of init_from"),
        (
            {"caption_column": None, "caption_cache_dir": None},
            "is told embeddings .* of width 16, this run has no capt",
        ),
        ({"init_from": str(Path(saved) / "unet")}, "needs text_encoder: what init_from names brings none"),
        ({"model_type": "pixart"}, "model_type cannot be set beside init_from"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(tiny(tmp_path, encoder, **(options | changed)), captioned)
    network_alone = options | {"init_from": str(Path(saved) / "unet"), "text_encoder": encoder}
    assert Trainer(tiny(tmp_path, encoder, **network_alone), captioned)._captions.encoder.max_length == 8


def stock_pipelines(folder):
    """Stable Diffusion and PixArt, each with its text encoder."""
    text, vae = tiny_text(folder), tiny_vae()
    unet = conditional_unet(cross_attention_dim=16)
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    yield StableDiffusionPipeline(
        vae, text.encoder, text.tokenizer, unet, DDIMScheduler(steps_offset=1, clip_sample=False), **nothing
    )
    transformer = pixart(in_channels=4, out_channels=8, patch_size=2)
    yield PixArtSigmaPipeline(text.t5_tokenizer, text.t5, vae, transformer, DPMSolverMultistepScheduler())


@pytest.mark.parametrize("number", [0, 1])
def test_stock_pipelines_go_on_as_they_were_trained(tmp_path, captioned, number):
    """The network is told what the stock pipeline tells it, its padding or its mask included."""
    stock = list(stock_pipelines(tmp_path))[number]
    stock.save_pretrained(tmp_path / "stock")
    texts = ["a cab", "a lead"] * 20
    data = captioned.remove_columns("text").add_column("text", texts)
    path = str(tmp_path / "stock")
    options = STARTED | {"init_from": path, "vae": path, "latent_scaling": "config", "channels": 3, "resolution": 16}
    trainer = Trainer(tiny(tmp_path, None, **options, caption_dropout=0.0), data)
    network = stock.unet if number == 0 else stock.transformer
    own = trainer.network.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in network.state_dict().items())
    trainer._begin()
    fed = told(trainer, trainer.source.samples(0, False, 1).__getitems__(range(4)))
    prompts = [texts[index] for index in trainer.source._images.order(0, range(4))]
    if number == 0:
        states, _ = stock.encode_prompt(prompts, "cpu", 1, False)
        assert fed["encoder_attention_mask"].all() and states.shape[1] == 8
    else:
        states, mask, *_ = stock.encode_prompt(prompts, False)
        assert torch.equal(fed["encoder_attention_mask"], mask.bool()) and states.shape[1] == 300
    torch.testing.assert_close(fed["encoder_hidden_states"], states, rtol=1e-4, atol=1e-5)
    pipe = trainer._pipeline(trainer.network)
    assert torch.equal(pipe.embed(prompts).states, fed["encoder_hidden_states"])
    assert pipe.scheduler.config.variance_type == ("learned_range" if number else "fixed_small")


# ------------------------------------------------------------------ evaluation


def test_samples_are_evaluated_by_the_captions_of_the_data(tmp_path, encoder, captioned, monkeypatch):
    """In their proportion; the empty caption is not among them, and need not have been trained."""
    data = captioned.remove_columns("text").add_column("text", ["a three"] * 30 + ["a six"] * 10)
    options = {"eval_every": 1, "num_eval_images": 8, "eval_features": "pixels", "caption_dropout": 0.0}
    trainer, asked = Trainer(tiny(tmp_path, encoder, max_train_steps=1, **options, **PIXART), data), []
    call = TextSDEPipeline.__call__

    @functools.wraps(call)
    def recorded(self, prompt, **arguments):
        asked.extend(prompt)
        return call(self, prompt, **arguments)

    monkeypatch.setattr(TextSDEPipeline, "__call__", recorded)
    trainer.run()
    assert asked == ["a three"] * 6 + ["a six"] * 2


# ------------------------------------------------------------------ rewards


def bright_threes(images, prompts):
    """A reward of the tests, which sees what was asked for."""
    return [
        float(image.mean()) * (1.0 if "three" in prompt else -1.0)
        for image, prompt in zip(images, prompts, strict=True)
    ]


POLICY = {"reward": "test_captions:bright_threes", "group_size": 4, "num_inference_steps": 3, "max_train_steps": 2}
POLICY |= {"sample_every": 2, "num_sample_images": 4, "logger": "none", "mixed_precision": "no", "guidance_scale": 2.0}
POLICY |= {"prompts": ("a three", "a six"), "checkpointing_steps": 1, "learning_rate": 1e-2}


@pytest.mark.parametrize("method", [{"kl_weight": 0.1}, {"method": "nft", "kl_weight": 0.1}])
def test_a_model_on_captions_learns_from_rewards(tmp_path, saved, method):
    """Groups are of one prompt each; the reward is told the prompts; a resumed run is the whole run."""
    config = PolicyTrainingConfig(model=saved, output_dir=str(tmp_path / "run"), **POLICY, **method)
    run = PolicyTrainer(config)
    assert run._labels(range(8)) == [0] * 4 + [1] * 4
    pipe = run._pipeline(run.network, run._policy())
    images = pipe(["a three", "a six"], num_inference_steps=2, output_type="pt").images
    own = images.mean((1, 2, 3)) * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(run.reward(images, torch.tensor([0, 1])), own)
    assert run.path_kl(run.network)[0] == 0.0  # of the network that it starts from to itself
    whole = run.run().unet.state_dict()
    before = TextSDEPipeline.from_pretrained(saved).unet.state_dict()
    assert any(not torch.equal(value, whole[name]) for name, value in before.items())
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    again = PolicyTrainer(dataclasses.replace(config, resume_from_checkpoint="latest"))
    assert again.step == 1
    resumed = again.run().unet.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "run")) is TextSDEPipeline
    others = dataclasses.replace(config, resume_from_checkpoint="latest", prompts=("a three", "a one"))
    with pytest.raises(ValueError, match="the checkpoint was trained with prompts="):
        PolicyTrainer(others)


def test_rewards_of_captions_need_prompts(tmp_path, saved):
    with pytest.raises(ValueError, match="prompts are for a model that is told captions, and it needs them"):
        PolicyTrainer(PolicyTrainingConfig(model=saved, output_dir=str(tmp_path), **(POLICY | {"prompts": None})))

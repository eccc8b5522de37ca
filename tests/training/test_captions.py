"""Training on captions: the network is told their embeddings, now and then that of the empty one, and learns them."""

import shutil

import pytest
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file
from shades import TINY
from tiny_parts import conditional_unet, tiny_text, tiny_vae

from diffusers_sde import TextSDEPipeline
from diffusers_sde.images.loading import load_digits
from diffusers_sde.training import Trainer, TrainingConfig, captions, row_cache, train
from diffusers_sde.training.checkpoints import clear_run

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


def test_captions_mean_something_and_come_back(tmp_path, encoder, shades):
    """Classes by name are captions too; after training, "dark" draws dark pictures and "light" light ones."""
    options = {"sde": "flow", "max_train_steps": 200, "learning_rate": 3e-3, "ema_max_decay": 0.95, "sample_every": 200}
    trained = train(tiny(tmp_path, encoder, caption_column="label", **options), shades)
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
    options = {"checkpointing_steps": 2, "max_train_steps": 4}
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
    with pytest.raises(ValueError, match="of width 8, but those of text_encoder have 16"):
        Trainer(tiny(tmp_path, encoder, **options), captioned)


def test_captions_go_with_latents(tmp_path, encoder, captioned):
    tiny_vae().save_pretrained(tmp_path / "vae")
    options = {"vae": str(tmp_path / "vae"), "channels": 3, "block_out_channels": (8, 8), "cache_latents": True}
    train(tiny(tmp_path, encoder, **options, latent_cache_dir=str(tmp_path / "latents")), captioned)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is TextSDEPipeline and isinstance(pipe.vae, AutoencoderKL)
    images = pipe(["a three", "a six"], guidance_scale=2.0, num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_encoder": None}, "caption_column 'text' needs text_encoder"),
        ({"caption_column": None}, "text_encoder '.*' has no effect without caption_column"),
        ({"model_type": "unet"}, "caption_column needs a model_type of unet_condition"),
        ({"class_conditional": True}, "class_conditional cannot be set beside caption_column"),
        ({"streaming": True}, "caption_column needs data that are not streamed"),
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
    with pytest.raises(ValueError, match="max_caption_length must be at most 8 for text_encoder"):
        Trainer(tiny(tmp_path, encoder, max_caption_length=9), captioned)
    with pytest.raises(ValueError, match="text_encoder '.*' cannot be loaded"):
        Trainer(tiny(tmp_path, str(tmp_path)), captioned)

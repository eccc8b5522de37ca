"""Parts of pipelines with a handful of parameters, built offline: real classes, nothing mocked."""

import importlib.util
import json
from types import SimpleNamespace

import diffusers
import torch

# A part of the tests runs with the lowest versions that are declared, and without transformers.
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
if HAS_TRANSFORMERS:
    import transformers


def seeded(make):
    """Build a module with weights that do not depend on what ran before, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def tiny_text(folder):
    """Tokenizers and text encoders of CLIP and T5; ``folder`` is for their vocabulary."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(c + "</w>" for c in letters[:12]), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    clip = transformers.CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=16,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
    )
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in letters)]
    t5 = transformers.T5Config(
        vocab_size=len(scores), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return SimpleNamespace(
        tokenizer=tokenizer,
        encoder=seeded(lambda: transformers.CLIPTextModel(clip)),
        encoder_projected=seeded(lambda: transformers.CLIPTextModelWithProjection(clip)),
        t5_tokenizer=transformers.T5Tokenizer(vocab=scores, extra_ids=0),
        t5=seeded(lambda: transformers.T5EncoderModel(t5)),
    )


def tiny_vae():
    return seeded(
        lambda: diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.5,
            shift_factor=0.0,
        )
    )


def conditional_unet(**arguments):
    return seeded(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            norm_num_groups=4,
            **arguments,
        )
    )


def pixart(**arguments):
    """A transformer for captions whose weights are nowhere zero, so that all it is told reaches its output."""
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "num_layers": 2, "patch_size": 4}
    sizes |= {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16}
    return seeded(lambda: diffusers.PixArtTransformer2DModel(**(sizes | arguments)))


def sdxl_components(text, vae):
    return {
        "vae": vae,
        "text_encoder": text.encoder,
        "text_encoder_2": text.encoder_projected,
        "tokenizer": text.tokenizer,
        "tokenizer_2": text.tokenizer,
        "unet": conditional_unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
    }


def sd3_transformer():
    return seeded(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
        )
    )


def flux_transformer():
    return seeded(
        lambda: diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        )
    )

"""Transformers on patches of images, built to be trained from scratch.

They are diffusers' ``DiTTransformer2DModel`` (Peebles & Xie 2023, arXiv:2212.09748) and ``PixArtTransformer2DModel``
(Chen et al. 2024, arXiv:2310.00426). Their embedding of timesteps is sinusoidal and takes fractions, so they are fed
what a ``UNet2DModel`` is fed: numbers up to about a thousand (``continuous``, ``discrete`` or ``score_sde`` time).

A DiT is told classes, and its last label stands for any. It always takes a label, so one that is trained without
classes has that label alone. A PixArt is told captions, to whose embeddings each block attends, or nothing: it is built
without that attention then. Its blocks share one embedding of the timestep, where each block of diffusers' DiT has its
own, so that it is the smaller one of two transformers without classes.
"""

from __future__ import annotations

from typing import Any

from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import nn

from ..images.samples import TrainingSource

# Layers, width and heads (Peebles & Xie 2023, Table 1).
SIZES: dict[str, tuple[int, int, int]] = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
SMALL = (4, 96, 4)  # for images of a side up to 16: in minutes on a CPU, larger ones see too few samples to learn more
MOST_PATCHES = 32  # along a side, where nothing else is asked for


def transformer_sizes(source: TrainingSource, size: str | None, patch_size: int | None) -> dict[str, Any]:
    """The arguments of a transformer; what it is told, and dropout, are left out.

    Args:
        source: The images.
        size: A name in ``SIZES``; None for one that suits the images.
        patch_size: Side of a patch; None for 2, or as much more as leaves ``MOST_PATCHES`` along a side.

    Raises:
        ValueError: The patches do not cover the images.
    """
    layers, width, heads = SIZES[size] if size is not None else SMALL if source.resolution <= 16 else SIZES["S"]
    if patch_size is None:
        patch_size = max(2 - source.resolution % 2, source.resolution // MOST_PATCHES)
    if source.resolution % patch_size:
        raise ValueError(
            f"patch_size must divide the side of the images, {source.resolution}, got {patch_size!r}: pass another "
            "one, or a resolution that is a multiple of it."
        )
    return {
        "sample_size": source.resolution,
        "patch_size": patch_size,
        "in_channels": source.channels,
        "out_channels": source.channels,
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
    }


def initialize_transformer(network: DiTTransformer2DModel | PixArtTransformer2DModel) -> None:
    """Give a transformer the initial weights of the DiT paper, which diffusers' constructors do not.

    Every block begins as the identity and the output as zero (adaLN-Zero, section 3.2), without which deep ones learn
    slowly. The attention to captions begins at zero too (Chen et al. 2024, section 2.3).
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patches = network.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
    nn.init.zeros_(patches.bias)
    if isinstance(network, DiTTransformer2DModel):
        embedders = [block.norm1.emb for block in network.transformer_blocks]
        zeros = [block.norm1.linear.weight for block in network.transformer_blocks]
        zeros += [network.proj_out_1.weight, network.proj_out_2.weight]
    else:
        embedders = [network.adaln_single.emb]
        zeros = [block.scale_shift_table for block in network.transformer_blocks]
        zeros += [block.attn2.to_out[0].weight for block in network.transformer_blocks if block.attn2 is not None]
        zeros += [network.adaln_single.linear.weight, network.scale_shift_table, network.proj_out.weight]
    for embedder in embedders:
        for layer in (embedder.timestep_embedder.linear_1, embedder.timestep_embedder.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        if hasattr(embedder, "class_embedder"):
            nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.02)
    for parameter in zeros:
        nn.init.zeros_(parameter)


def leave_labels(network: nn.Module) -> None:
    """Let a network take the labels that it is given, also while it is trained.

    In training mode each block of a ``DiTTransformer2DModel`` hides a tenth of them, every block others, by the global
    random generator. Here labels are hidden where samples are drawn, by ``label_dropout``.
    """
    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0

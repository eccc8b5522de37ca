"""The training settings of Song et al. 2021 (arXiv:2011.13456, appendices C, F and H) for CIFAR-10, by name.

A recipe is a set of options; what is given explicitly counts before it. The networks are the paper's, NCSN++ for VE and
DDPM++ for VP and sub-VP. With ``model_type="unet"`` it is a ``UNet2DModel`` in their widths and depth (channels 128,
256, 256, 256, four blocks a level, attention at 16x16), without their FIR resampling and BigGAN blocks, which diffusers
does not have. Losses are means over pixels, also for VE, where the official code sums them.
"""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "resolution": 32,
    "random_flip": True,
    "weighting": "paper",
    "stratified_times": False,
    "train_eps": 1e-5,
    "num_train_timesteps": 1000,
    "train_batch_size": 128,
    "max_train_steps": 1_300_000,
    "learning_rate": 2e-4,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 5000,
    "adam_beta1": 0.9,
    "adam_weight_decay": 0.0,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "mixed_precision": "no",
    # The official warm-up of the average, min(decay, (1 + n)/(10 + n)).
    "ema_inv_gamma": 9.0,
    "ema_power": 1.0,
    "checkpointing_steps": 10_000,
}
_VE = {**_COMMON, "sde": "ve", "data_min": 0.0, "sigma_min": 0.01, "sigma_max": 50.0, "ema_max_decay": 0.999}
_VP = {
    **_COMMON,
    "data_min": -1.0,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "sampling_eps": 1e-3,
    "ema_max_decay": 0.9999,
}

RECIPES: dict[str, dict[str, Any]] = {
    "paper_ve": {
        **_VE,
        "discrete": True,
        "prediction_type": "score",
        "time_conditioning": "sigma",
        "model_type": "ncsnpp",
        "model_preset": "ve/cifar10_ncsnpp",
    },
    "paper_ve_continuous": {
        **_VE,
        "prediction_type": "score",
        "time_conditioning": "sigma",
        "sampling_eps": 1e-5,
        "model_type": "ncsnpp",
        "model_preset": "ve/cifar10_ncsnpp_continuous",
    },
    "paper_vp": {
        **_VP,
        "sde": "vp",
        "discrete": True,
        "time_conditioning": "discrete",
        "sampling_eps": None,
        "model_type": "ddpmpp",
        "model_preset": "vp/cifar10_ddpmpp",
    },
    "paper_vp_continuous": {
        **_VP,
        "sde": "vp",
        "time_conditioning": "score_sde",
        "model_type": "ddpmpp",
        "model_preset": "vp/cifar10_ddpmpp_continuous",
    },
    "paper_sub_vp_continuous": {
        **_VP,
        "sde": "sub_vp",
        "time_conditioning": "score_sde",
        "model_type": "ddpmpp",
        "model_preset": "subvp/cifar10_ddpmpp_continuous",
    },
}
_UNET: dict[str, Any] = {
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 4,
    "attention_resolutions": (16,),
    "dropout": 0.1,
}
_FOR_UNET: dict[str, dict[str, Any]] = {
    # A UNet2DModel is not told the noise levels of a table, from which it could find the index of one.
    "paper_ve": {"prediction_type": "epsilon", "time_conditioning": "score_sde"},
    "paper_ve_continuous": {"time_embedding_type": "fourier"},
}


def recipe_settings(recipe: str, model_type: str | None = None) -> dict[str, Any]:
    """The options of a recipe, for its own network or for another one.

    Args:
        recipe: A name in ``RECIPES``.
        model_type: The kind of network that is asked for; None for the paper's.
    """
    settings = dict(RECIPES[recipe])
    if model_type in (None, settings["model_type"]):
        return settings
    settings = {name: value for name, value in settings.items() if name not in ("model_type", "model_preset")}
    return settings | (_UNET | _FOR_UNET.get(recipe, {}) if model_type == "unet" else {})

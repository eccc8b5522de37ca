"""The training settings of Song et al. 2021 (arXiv:2011.13456, appendices C, F and H) for CIFAR-10, by name.

A recipe is a set of options; what is given explicitly counts before it. Networks are ``UNet2DModel`` in the widths and
depth of NCSN++ and DDPM++ (channels 128, 256, 256, 256, four blocks a level, attention at 16x16), without their FIR
resampling and BigGAN blocks, which diffusers does not have. Losses are means over pixels, also for VE, where the
official code sums them.
"""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "resolution": 32,
    "random_flip": True,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 4,
    "attention_resolutions": (16,),
    "dropout": 0.1,
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
    "paper_ve": {**_VE, "discrete": True, "prediction_type": "epsilon", "time_conditioning": "score_sde"},
    "paper_ve_continuous": {
        **_VE,
        "prediction_type": "score",
        "time_conditioning": "sigma",
        "time_embedding_type": "fourier",
        "sampling_eps": 1e-5,
    },
    "paper_vp": {**_VP, "sde": "vp", "discrete": True, "time_conditioning": "discrete", "sampling_eps": None},
    "paper_vp_continuous": {**_VP, "sde": "vp", "time_conditioning": "score_sde"},
    "paper_sub_vp_continuous": {**_VP, "sde": "sub_vp", "time_conditioning": "score_sde"},
}

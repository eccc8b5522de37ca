"""Try the installed package where nothing else is: ``make test-wheel`` runs this on a wheel in an empty environment."""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DModel

import diffusers_sde


def main(forbidden: str) -> None:
    """Draw, measure, save and load with a tiny network.

    Args:
        forbidden: The folder of the sources, which must not be what is imported.
    """
    place = Path(diffusers_sde.__file__).resolve()
    if Path(forbidden).resolve() in place.parents:
        raise SystemExit(f"The sources are imported instead of what is installed: {place}")
    if version("diffusers-sde") != diffusers_sde.__version__:
        raise SystemExit(f"{version('diffusers-sde')} is installed, which says it is {diffusers_sde.__version__}.")
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    pipe: Any = diffusers_sde.SDEPipeline(unet.eval(), diffusers_sde.VPSDEScheduler(prediction_type="v_prediction"))
    pipe.set_progress_bar_config(disable=True)
    density = pipe.log_prob(torch.zeros(1, 1, 8, 8), rtol=1e-2, atol=1e-2)
    if not bool(density.value.isfinite().all()):
        raise SystemExit(f"The density is {density.value}.")
    images = []
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        for model in (pipe, DiffusionPipeline.from_pretrained(folder)):
            model.set_progress_bar_config(disable=True)
            images.append(model(num_inference_steps=5, generator=torch.manual_seed(0), output_type="pt").images)
    first, second = images
    if not torch.allclose(
        first, second, atol=1e-5
    ):  # weights at another place in memory may be added up in another order
        raise SystemExit("The pipeline draws another image after it was saved and loaded.")
    print(f"diffusers-sde {diffusers_sde.__version__} from {place.parent}: sampled, measured, saved, loaded.")


if __name__ == "__main__":
    main(sys.argv[1])

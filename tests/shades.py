"""Data of two shades with classes."""

import datasets
import numpy as np
import pytest
from PIL import Image

TINY = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "train_batch_size": 16,
    "sample_every": 0,
    "checkpointing_steps": 0,
    "num_inference_steps": 2,
    "num_sample_images": 3,
    "logger": "none",
    "class_conditional": True,
}


@pytest.fixture(scope="module")
def shades():
    """Class "dark" is dark pictures, class "light" is light ones."""
    shade = np.random.default_rng(0).integers(-20, 20, 40) + np.tile([50, 200], 20)
    images = [Image.fromarray(np.full((8, 8), s, np.uint8)) for s in shade]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    return datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 20}, features=features)

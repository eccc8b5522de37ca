"""Many images from a saved pipeline, by any sampler, divided among processes.

    from diffusers_sde.generation import SamplingConfig, generate
    generate(SamplingConfig(model="outputs/digits", num_images=1000, output_dir="outputs/images", corrector="langevin"))

It needs the extra ``training``: ``pip install diffusers-sde[training]``.
"""

from .cli import SamplingConfig, generate, main
from .samplers import ImageSampler, Sampler, as_sde_pipeline, draw_images, launched_processes, load_pipeline

__all__ = [
    "ImageSampler",
    "Sampler",
    "SamplingConfig",
    "as_sde_pipeline",
    "draw_images",
    "generate",
    "launched_processes",
    "load_pipeline",
    "main",
]

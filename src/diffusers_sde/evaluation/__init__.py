"""Many images by any sampler, and numbers about trained models.

    from diffusers_sde.evaluation import EvaluationConfig, evaluate
    report = evaluate(EvaluationConfig(model="outputs/demo", sampler=("pc: corrector=langevin, snr=0.1",)))

    from diffusers_sde.evaluation import SamplingConfig, generate
    generate(SamplingConfig(model="outputs/digits", num_images=1000, output_dir="outputs/images", corrector="langevin"))

It needs the extra ``training``: ``pip install diffusers-sde[training]``.
"""

from .configuration import EvaluationConfig
from .evaluate import evaluate
from .generate import generate
from .report import eval_results, markdown_table
from .samplers import ImageSampler, Sampler, as_sde_pipeline, draw_images, launched_processes, load_pipeline
from .sampling import SamplingConfig

__all__ = [
    "EvaluationConfig",
    "ImageSampler",
    "Sampler",
    "SamplingConfig",
    "as_sde_pipeline",
    "draw_images",
    "eval_results",
    "evaluate",
    "generate",
    "launched_processes",
    "load_pipeline",
    "markdown_table",
]

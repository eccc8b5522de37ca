"""Numbers about trained models.

    from diffusers_sde.evaluation import EvaluationConfig, evaluate
    report = evaluate(EvaluationConfig(model="outputs/demo", bpd=True))

Needs the extra ``training``: ``pip install diffusers-sde[training]``.
"""

from .evaluate import EvaluationConfig, evaluate, main

__all__ = ["EvaluationConfig", "evaluate", "main"]

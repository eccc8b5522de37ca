"""Numbers about trained models.

    from diffusers_sde.evaluation import EvaluationConfig, evaluate
    report = evaluate(EvaluationConfig(model="outputs/demo", sampler=("pc: corrector=langevin, snr=0.1",)))

It needs the extra ``training``: ``pip install diffusers-sde[training]``.
"""

from .cli import main, parse_args
from .configuration import EvaluationConfig
from .evaluate import evaluate
from .report import eval_results, markdown_table

__all__ = ["EvaluationConfig", "eval_results", "evaluate", "main", "markdown_table", "parse_args"]

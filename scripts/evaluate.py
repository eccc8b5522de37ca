"""Evaluate a trained model: ``accelerate launch scripts/evaluate.py --model outputs/demo --bpd``."""

from diffusers_sde.evaluation.cli import evaluate_main

if __name__ == "__main__":
    evaluate_main()

"""Evaluate a trained model: ``accelerate launch scripts/evaluate.py --model outputs/demo --bpd``."""

from diffusers_sde.evaluation.cli import main

if __name__ == "__main__":
    main()

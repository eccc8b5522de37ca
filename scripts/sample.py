"""Draw images from a trained model: ``accelerate launch scripts/sample.py --help``."""

from diffusers_sde.evaluation.cli import sample_main

if __name__ == "__main__":
    sample_main()

"""Train a classifier of noisy images for guidance: ``accelerate launch scripts/train_classifier.py --help``."""

from diffusers_sde.training.cli import classifier_main

if __name__ == "__main__":
    classifier_main()

"""Train a classifier of noisy images for guidance: ``accelerate launch scripts/train_classifier.py --help``."""

from diffusers_sde.training.classifier import main

if __name__ == "__main__":
    main()

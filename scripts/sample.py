"""Draw images from a trained model: ``accelerate launch scripts/sample.py --help``."""

from diffusers_sde.evaluation.generate import main

if __name__ == "__main__":
    main()

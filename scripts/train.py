"""Train a score model: ``accelerate launch scripts/train.py --help``."""

from diffusers_sde.training import main

if __name__ == "__main__":
    main()

"""Train an autoencoder for diffusion in its latents: ``accelerate launch scripts/train_autoencoder.py --help``."""

from diffusers_sde.training.cli import autoencoder_main

if __name__ == "__main__":
    autoencoder_main()

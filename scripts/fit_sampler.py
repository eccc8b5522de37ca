"""Fit a sampler to a trained pipeline: ``accelerate launch scripts/fit_sampler.py --help``."""

from diffusers_sde.training.fits import fit_main

if __name__ == "__main__":
    fit_main()

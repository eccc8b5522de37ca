"""Let a trained pipeline learn from rewards: ``accelerate launch scripts/train_rl.py --help``."""

from diffusers_sde.training.cli import policy_main

if __name__ == "__main__":
    policy_main()

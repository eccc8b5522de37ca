"""Publish a saved pipeline: ``python scripts/push_to_hub.py --model outputs/digits --hub_model_id user/digits``."""

from diffusers_sde.hub.cli import export_main

if __name__ == "__main__":
    export_main()

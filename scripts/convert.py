"""Convert a model saved by others: ``python scripts/convert.py --source user/name --output_dir outputs/converted``."""

from diffusers_sde.hub.cli import convert_main

if __name__ == "__main__":
    convert_main()

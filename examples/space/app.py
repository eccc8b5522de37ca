"""The page as a Hugging Face Space, with the models beside this file.

The variable MODELS names others, as in clothes=user/clothes.
"""

from pathlib import Path

from diffusers_sde.space.cli import space_main

space_main(Path(__file__).with_name("models"))

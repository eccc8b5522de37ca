"""The page as a Hugging Face Space. The variable MODELS holds its models, as in clothes=user/clothes."""

from diffusers_sde.space.cli import space_main

space_main()

"""``python -m diffusers_sde.commands`` is ``diffusers-sde``, also for ``accelerate launch -m``."""

from . import main

if __name__ == "__main__":
    main()

"""The version of this package; a file exported to the Hub states here the version it was made from."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("diffusers-sde")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

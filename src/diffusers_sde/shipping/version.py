"""The version of this package, stated here alone; a file exported to the Hub states the version it was made from."""

__version__ = "0.2.0.dev0"

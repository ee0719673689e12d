"""The command line `hf-attentiondrop`."""

from .main import main


__all__ = ["main"]

"""The command line: `hf-familial`."""

from .app import app, main


__all__ = ["app", "main"]

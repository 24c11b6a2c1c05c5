"""The command line: `hf-familial`."""

from . import members, scaling, scaling_choose, sweep
from .app import app, main


__all__ = ["app", "main", "members", "scaling", "scaling_choose", "sweep"]

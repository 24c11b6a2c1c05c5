"""The command line: `hf-familial`."""

from . import members, planning, scaling, sweep
from .app import app, main


__all__ = ["app", "main", "members", "planning", "scaling", "sweep"]

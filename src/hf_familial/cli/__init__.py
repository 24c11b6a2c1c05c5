"""The command line `hf-familial`."""

# isort: off
from . import members
from . import scaling, planning  # in this order, `--help` lists `fit` before `plan`
from . import sweep
from .app import app, main
# isort: on


__all__ = ["app", "main", "members", "planning", "scaling", "sweep"]

"""Scaling laws: every form on one core; numpy and scipy only."""

from .data import DroppedRow, Observations
from .errors import (
    BadRowsError,
    MissingColumnError,
    NoOptimumError,
    NotIdentifiedError,
    ScalingError,
    TooFewError,
    UnknownLawError,
)
from .fit import Refits, fit, refit
from .law import Law, Link, Outer
from .laws import LAWS, get_law
from .result import FarResiduals, Fit, FitStatus, LargestLosses, Settings
from .vocabulary import LOSS, Domain, Parameter, Published, Variable


__all__ = [
    "LAWS",
    "LOSS",
    "BadRowsError",
    "Domain",
    "DroppedRow",
    "FarResiduals",
    "Fit",
    "FitStatus",
    "LargestLosses",
    "Law",
    "Link",
    "MissingColumnError",
    "NoOptimumError",
    "NotIdentifiedError",
    "Observations",
    "Outer",
    "Parameter",
    "Published",
    "Refits",
    "ScalingError",
    "Settings",
    "TooFewError",
    "UnknownLawError",
    "Variable",
    "fit",
    "get_law",
    "refit",
]

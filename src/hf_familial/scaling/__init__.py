"""Scaling laws: every form on one core; numpy and scipy only."""

from .advise import advise
from .bias import parabola_bias
from .bootstrap import bootstrap
from .candidates import Candidate
from .compare import compare
from .data import DroppedRow, Observations
from .delta import Spread
from .envelope import envelope
from .errors import (
    BadRowsError,
    MissingColumnError,
    NoMinimumError,
    NoOptimumError,
    NotIdentifiedError,
    ScalingError,
    TooFewError,
    UnknownLawError,
)
from .fit import Refits, fit, refit
from .flop_models import HeadFlops, LifetimeFlops
from .intervals import Estimate, intervals, seed_noise
from .law import Law, Link, Outer
from .laws import LAWS, get_law
from .leverage import compute_leverage, loss_leverage
from .parabola import BiasWarning, parabolas
from .plan import Limits, plan
from .predict import DomainWarning, Known, predict
from .quantity import (
    Interval,
    Quantity,
    coefficient,
    granularity_compute,
    loss_at,
    optimal,
    size_exponent,
)
from .result import FarResiduals, Fit, FitStatus, LargestLosses, Settings
from .vocabulary import LOSS, Domain, Parameter, Published, Variable


__all__ = [
    "LAWS",
    "LOSS",
    "BadRowsError",
    "BiasWarning",
    "Candidate",
    "Domain",
    "DomainWarning",
    "DroppedRow",
    "Estimate",
    "FarResiduals",
    "Fit",
    "FitStatus",
    "HeadFlops",
    "Interval",
    "Known",
    "LargestLosses",
    "Law",
    "LifetimeFlops",
    "Limits",
    "Link",
    "MissingColumnError",
    "NoMinimumError",
    "NoOptimumError",
    "NotIdentifiedError",
    "Observations",
    "Outer",
    "Parameter",
    "Published",
    "Quantity",
    "Refits",
    "ScalingError",
    "Settings",
    "Spread",
    "TooFewError",
    "UnknownLawError",
    "Variable",
    "advise",
    "bootstrap",
    "coefficient",
    "compare",
    "compute_leverage",
    "envelope",
    "fit",
    "get_law",
    "granularity_compute",
    "intervals",
    "loss_at",
    "loss_leverage",
    "optimal",
    "parabola_bias",
    "parabolas",
    "plan",
    "predict",
    "refit",
    "seed_noise",
    "size_exponent",
]

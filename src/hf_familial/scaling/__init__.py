"""Scaling laws: every form on one core; numpy and scipy only."""

from ..errors import (
    BadRowsError,
    BiasWarning,
    DomainWarning,
    MissingColumnError,
    NoMinimumError,
    NoOptimumError,
    NotIdentifiedError,
    ScalingError,
    TooFewError,
    UnknownLawError,
)
from ._covariance import CoefficientCovariance
from .advice import advise
from .bias import parabola_bias
from .candidates import Candidate
from .comparison import compare
from .confidence import Estimate, intervals, seed_noise
from .data import DroppedRow, RunTable
from .fitting import Refits, fit, refit
from .flop_models import HeadFlops, LifetimeFlops
from .isoflop import envelope, parabolas
from .laws import LAWS, get_law
from .laws.law import LOSS, Domain, Law, Link, Outer, Parameter, Published, Variable
from .leverage import compute_leverage, loss_leverage
from .planning import Limits, plan
from .prediction import PublishedFit, predict
from .quantities import (
    DerivedQuantity,
    Interval,
    coefficient,
    granularity_compute,
    loss_at,
    optimal,
    size_exponent,
)
from .resampling import bootstrap
from .results import FarResiduals, Fit, FitStatus, LargestLosses, Settings


__all__ = [
    "LAWS",
    "LOSS",
    "BadRowsError",
    "BiasWarning",
    "Candidate",
    "CoefficientCovariance",
    "DerivedQuantity",
    "Domain",
    "DomainWarning",
    "DroppedRow",
    "Estimate",
    "FarResiduals",
    "Fit",
    "FitStatus",
    "HeadFlops",
    "Interval",
    "LargestLosses",
    "Law",
    "LifetimeFlops",
    "Limits",
    "Link",
    "MissingColumnError",
    "NoMinimumError",
    "NoOptimumError",
    "NotIdentifiedError",
    "Outer",
    "Parameter",
    "Published",
    "PublishedFit",
    "Refits",
    "RunTable",
    "ScalingError",
    "Settings",
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

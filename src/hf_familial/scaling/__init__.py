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
from .data.observations import DroppedRow, Observations
from .fitting.compare import compare
from .fitting.fit import Refits, fit, refit
from .fitting.result import FarResiduals, Fit, FitStatus, LargestLosses, Settings
from .laws.catalogue import LAWS, get_law
from .laws.law import Law, Link, Outer
from .laws.vocabulary import LOSS, Domain, Parameter, Published, Variable
from .optima.envelope import envelope
from .optima.flop_models import HeadFlops, LifetimeFlops
from .optima.parabola import parabolas
from .optima.quantity import (
    Interval,
    Quantity,
    coefficient,
    granularity_compute,
    loss_at,
    optimal,
    size_exponent,
)
from .planning.advise import advise
from .planning.candidates import Candidate
from .planning.leverage import compute_leverage, loss_leverage
from .planning.plan import Limits, plan
from .planning.predict import Known, predict
from .uncertainty.bias import parabola_bias
from .uncertainty.bootstrap import bootstrap
from .uncertainty.delta import Spread
from .uncertainty.intervals import Estimate, intervals, seed_noise


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

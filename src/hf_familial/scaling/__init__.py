"""Scaling laws: fit them to finished training runs, and plan new runs with them.

A scaling law predicts a loss L (nats per token) from the parameters N, the training tokens D and,
for a familial model, the number of exits G. C is the training compute in FLOPs per run. Fitted
values have confidence intervals.

These modules need numpy and scipy only. Reports also need matplotlib and jinja2. In Python, `import
hf_familial.scaling` first imports the package `hf_familial`. This loads torch and transformers,
which takes some seconds. The commands `hf-familial fit` and `hf-familial plan` skip that import.
"""

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
from .advice import Advice, advise
from .bias import parabola_bias
from .candidates import Candidate
from .comparison import Comparison, compare
from .confidence import Estimate, SeedNoise, intervals, seed_noise
from .data import DroppedRow, RunTable
from .fitting import Refits, fit, refit
from .flop_models import HeadFlops, LifetimeFlops
from .isoflop_optima import IsoFlop, envelope, parabolas
from .laws import LAWS, get_law
from .laws.law import LOSS, Domain, Law, Link, Outer, Parameter, Published, Variable
from .leverage import compute_leverage, loss_leverage
from .planning import Limits, Plan, plan
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
from .resampling import Bootstrap, bootstrap
from .results import FarResiduals, Fit, FitStatus, LargestLosses, Settings
from .simulation import isoflop_design, simulate
from .tables.load import ColumnChoice, LoadedRuns, load_runs


__all__ = [
    "LAWS",
    "LOSS",
    "Advice",
    "BadRowsError",
    "BiasWarning",
    "Bootstrap",
    "Candidate",
    "CoefficientCovariance",
    "ColumnChoice",
    "Comparison",
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
    "IsoFlop",
    "LargestLosses",
    "Law",
    "LifetimeFlops",
    "Limits",
    "Link",
    "LoadedRuns",
    "MissingColumnError",
    "NoMinimumError",
    "NoOptimumError",
    "NotIdentifiedError",
    "Outer",
    "Parameter",
    "Plan",
    "Published",
    "PublishedFit",
    "Refits",
    "RunTable",
    "ScalingError",
    "SeedNoise",
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
    "isoflop_design",
    "load_runs",
    "loss_at",
    "loss_leverage",
    "optimal",
    "parabola_bias",
    "parabolas",
    "plan",
    "predict",
    "refit",
    "seed_noise",
    "simulate",
    "size_exponent",
]

"""Evaluation: how good each exit is, and what it costs, in one pass over the data."""

from .calibration import expected_calibration_error
from .evaluator import evaluate_exits
from .modules import metric_path
from .results import ExitEvaluation, ExitRow


__all__ = [
    "ExitEvaluation",
    "ExitRow",
    "evaluate_exits",
    "expected_calibration_error",
    "metric_path",
]

"""Evaluation: the quality and cost of each exit, and thresholds for early exit."""

from ._plots import plot_exits, plot_trade_offs
from .calibration import expected_calibration_error
from .evaluator import evaluate_exits
from .modules import metric_path
from .relay_calibration import Calibration, TradeOff, calibrate
from .results import ExitEvaluation, ExitRow


__all__ = [
    "Calibration",
    "ExitEvaluation",
    "ExitRow",
    "TradeOff",
    "calibrate",
    "evaluate_exits",
    "expected_calibration_error",
    "metric_path",
    "plot_exits",
    "plot_trade_offs",
]

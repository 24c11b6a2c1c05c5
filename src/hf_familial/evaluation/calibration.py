"""Expected calibration error: the mean distance between a model's confidence and its accuracy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


class CalibrationBins:
    """Counts of predictions in confidence bins of equal width, updated batch by batch.

    Bin m of M contains the confidences in ((m - 1) / M, m / M].
    """

    def __init__(self, num_bins: int) -> None:
        if num_bins < 1:
            raise ValueError(f"`num_bins` must be 1 or more, got {num_bins}.")
        self.counts = np.zeros(num_bins)
        self.confidence = np.zeros(num_bins)
        self.correct = np.zeros(num_bins)
        self._inner_edges = np.linspace(0, 1, num_bins + 1)[1:-1]

    def add(self, confidences: ArrayLike, correct: ArrayLike) -> None:
        """Add predictions to the bins. Both arguments have the shape `(n,)`.

        `confidences` are between 0 and 1, and `correct` is true for right predictions.
        """
        confidences = np.asarray(confidences, dtype=np.float64)
        correct = np.asarray(correct, dtype=np.float64)
        if confidences.shape != correct.shape or confidences.ndim != 1:
            raise ValueError(
                "`confidences` and `correct` must have the same shape (n,), got shapes "
                f"{confidences.shape} and {correct.shape}."
            )
        outside = confidences[(confidences < 0) | (confidences > 1)]
        if outside.size:
            raise ValueError(f"`confidences` must be between 0 and 1, got {outside[0]}.")
        bins, num_bins = np.searchsorted(self._inner_edges, confidences), len(self.counts)
        self.counts += np.bincount(bins, minlength=num_bins)
        self.confidence += np.bincount(bins, weights=confidences, minlength=num_bins)
        self.correct += np.bincount(bins, weights=correct, minlength=num_bins)

    def error(self) -> float:
        """Return the mean distance between accuracy and confidence, over all predictions."""
        if not self.counts.sum():
            raise ValueError("a calibration error needs at least one prediction, got none.")
        # the weight n_m / n and the means over n_m predictions: the count n_m cancels
        return float(np.abs(self.correct - self.confidence).sum() / self.counts.sum())


def expected_calibration_error(
    confidences: ArrayLike, correct: ArrayLike, num_bins: int = 15
) -> float:
    """Return the expected calibration error of predictions.

    Args:
        confidences (`ArrayLike` of shape `(n,)`): The probability of each prediction, 0 to 1.
        correct (`ArrayLike` of shape `(n,)`): Whether each prediction was right, `bool`.
        num_bins (`int`, *optional*, defaults to 15): The number of bins, all of equal width.

    Returns:
        `float`: The error, from 0 (calibrated) to 1.

    Raises:
        ValueError: If there are no predictions, or if an argument is out of range.

    Example:
        >>> expected_calibration_error([0.9, 0.9, 0.6], [True, True, False], num_bins=2)
        0.13333333333333333

    Reference: Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599,
    equation 3.
    """
    bins = CalibrationBins(num_bins)
    bins.add(confidences, correct)
    return bins.error()

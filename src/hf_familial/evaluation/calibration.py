"""Expected calibration error: whether a model is right as often as it claims to be."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


class CalibrationBins:
    """Predictions sorted by their confidence into bins of equal width, a batch at a time.

    Bin m of M holds the confidences in ((m - 1) / M, m / M].
    """

    def __init__(self, num_bins: int) -> None:
        if num_bins < 1:
            raise ValueError(f"`num_bins` must be 1 or more, got {num_bins}.")
        self.counts = np.zeros(num_bins)
        self.confidence = np.zeros(num_bins)
        self.correct = np.zeros(num_bins)
        self._inner_edges = np.linspace(0, 1, num_bins + 1)[1:-1]

    def add(self, confidences: ArrayLike, correct: ArrayLike) -> None:
        """Sort predictions into the bins, by confidences from 0 to 1; both of shape `(n,)`."""
        confidences = np.asarray(confidences, dtype=np.float64)
        correct = np.asarray(correct, dtype=np.float64)
        if confidences.shape != correct.shape or confidences.ndim != 1:
            raise ValueError(
                "`confidences` and `correct` must be flat and of one length, got shapes "
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
        """Return the mean distance between accuracy and confidence, weighted by predictions."""
        if not self.counts.sum():
            raise ValueError("a calibration error needs at least one prediction, got none.")
        # weight n_m / n times |sum / n_m - sum / n_m|: the bin's own count cancels
        return float(np.abs(self.correct - self.confidence).sum() / self.counts.sum())


def expected_calibration_error(
    confidences: ArrayLike, correct: ArrayLike, num_bins: int = 15
) -> float:
    """Return the expected calibration error of predictions.

    Args:
        confidences (`ArrayLike` of shape `(n,)`): Probability of each prediction, 0 to 1.
        correct (`ArrayLike` of shape `(n,)`): Whether it was right, `bool`.
        num_bins (`int`, *optional*, defaults to 15): Bins of equal width.

    Returns:
        `float`: Between 0 (calibrated) and 1.

    Raises:
        ValueError: If there is no prediction, or an argument is out of its range.

    Example:
        >>> expected_calibration_error([0.9, 0.9, 0.6], [True, True, False], num_bins=2)
        0.13333333333333333

    Reference: Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599,
    equation 3.
    """
    bins = CalibrationBins(num_bins)
    bins.add(confidences, correct)
    return bins.error()

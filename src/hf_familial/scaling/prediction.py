"""Predictions of a law: the loss of a run, its interval, and whether the run is in its domain."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DomainWarning, NotIdentifiedError, ScalingError, TooFewError
from ._covariance import CoefficientCovariance
from .confidence import Estimate
from .laws.law import Law
from .quantities import DerivedQuantity, loss_at
from .results import Fit


NEAR = 1e-6  # relative distance at which an edge counts as reached


@dataclass(frozen=True)
class PublishedFit:
    """A law with coefficients that someone else fitted; no rows, so no intervals.

    Attributes:
        law ([`Law`]): The law.
        values (`Mapping[str, float]`): Its coefficients.
        origin (`str`): Where they were published; empty if they are given by hand.
    """

    law: Law
    values: Mapping[str, float]
    origin: str = ""

    @classmethod
    def published(cls, law: Law, label: str | None = None) -> PublishedFit:
        """Return published values of a law by label; the first without one."""
        label = label or next(iter(law.published), "")
        if label not in law.published:
            raise ScalingError(
                f"`{law.name}` has published values {list(law.published)}, not {label!r}."
            )
        return cls(law, law.published[label].values, law.published[label].source)

    def predict(self, **variables: Any) -> np.ndarray:
        """Return the loss at these coefficients; see `Law.predict`."""
        return self.law.predict(self.values, **variables)


Source = Fit | PublishedFit


class Estimator:
    """Values of quantities with the delta method's intervals, where there are rows for them.

    `notes` says why intervals are missing, and is filled in the course of its use.
    """

    def __init__(self, fit: Source, level: float) -> None:
        self.fit, self.level = fit, level
        self.notes: list[str] = []
        self.covariance: CoefficientCovariance | None = None
        if isinstance(fit, PublishedFit):
            self.notes.append(f"no intervals: the coefficients of `{fit.law.name}` are given.")
            return
        try:
            self.covariance = CoefficientCovariance.of(fit)
        except (TooFewError, NotIdentifiedError) as error:
            self.notes.append(f"no intervals: {error}")

    def __call__(self, quantity: DerivedQuantity) -> Estimate:
        """Return the quantity at the fitted coefficients."""
        values = {name: np.asarray(value, float) for name, value in self.fit.values.items()}
        value, interval = quantity.unscaled(float(quantity.scaled(values))), None
        if self.covariance is not None and math.isfinite(value):
            try:
                interval = self.covariance.interval(quantity, self.level)
            except NotIdentifiedError as error:
                self.notes.append(f"no interval: {error}")
        return Estimate(value, interval, quantity.unit)


def predict(fit: Source, level: float = 0.95, **variables: float) -> Estimate:
    """Predict the loss of a run, with its interval and a warning outside the law's domain.

    The interval is of the law's mean; a single run scatters around it by the seed noise.

    Args:
        fit ([`Fit`] or [`PublishedFit`]): The law and its coefficients.
        level (`float`): Confidence.
        variables: All variables of the law, numbers.

    Example:
        >>> predict(fit, N=1e9, D=2e10, G=4).interval
    """
    found = Estimator(fit, level)(loss_at(fit.law, **variables))
    warn_of(outside(fit, **variables))
    return found


def outside(fit: Source, **variables: float) -> tuple[str, ...]:
    """Return one sentence for each variable outside the rows of a fit, or a law's domain."""
    if isinstance(fit, PublishedFit):
        return fit.law.domain.outside(**variables)
    columns, asked = dict(fit.data.columns), dict(variables)
    if {"N", "D"} <= set(asked) & set(columns):
        # sizes and tokens may each be inside while their product is not
        columns["6ND"], asked["6ND"] = 6 * columns["N"] * columns["D"], 6 * asked["N"] * asked["D"]
    sentences = []
    for name in [name for name in asked if name in columns]:
        value, low, high = asked[name], float(columns[name].min()), float(columns[name].max())
        if value > high * (1 + NEAR):
            edge = f"{value / high:.3g} times the largest of the runs fitted, {high:.4g}"
        elif value < low * (1 - NEAR):
            edge = f"{value / low:.3g} of the smallest of the runs fitted, {low:.4g}"
        else:
            continue
        sentences.append(f"`{name}` = {value:.4g} is {edge}.")
    return tuple(sentences)


def warn_of(sentences: Iterable[str]) -> None:
    """Warn of what lies outside a law's domain, at the caller of the public function."""
    for sentence in sentences:
        warnings.warn(sentence, DomainWarning, stacklevel=3)

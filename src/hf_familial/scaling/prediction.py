"""What a law says of a run: the loss, how sure it is, and whether it may be asked."""

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
    """A law with coefficients that someone else fitted; no rows, so no intervals."""

    law: Law
    values: Mapping[str, float]
    origin: str = ""

    @classmethod
    def published(cls, law: Law, label: str | None = None) -> PublishedFit:
        """Published values of a law."""
        label = label or next(iter(law.published), "")
        if label not in law.published:
            raise ScalingError(
                f"`{law.name}` has published values {list(law.published)}, not {label!r}."
            )
        return cls(law, law.published[label].values, law.published[label].source)

    def predict(self, **variables: Any) -> np.ndarray:
        """The loss at these coefficients; see `Law.predict`."""
        return self.law.predict(self.values, **variables)


Source = Fit | PublishedFit


@dataclass
class Estimator:
    """Values of quantities with the delta method's intervals, where there are rows for them."""

    fit: Source
    level: float

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        self.spread: CoefficientCovariance | None = None
        if isinstance(self.fit, PublishedFit):
            self.notes.append(f"no intervals: the coefficients of `{self.fit.law.name}` are given.")
            return
        try:
            self.spread = CoefficientCovariance.of(self.fit)
        except (TooFewError, NotIdentifiedError) as refusal:
            self.notes.append(f"no intervals: {refusal}")

    def __call__(self, quantity: DerivedQuantity) -> Estimate:
        """The quantity at the fitted coefficients."""
        value = quantity.unscaled(float(quantity.scaled(_numbers(self.fit.values))))
        interval = None
        if self.spread is not None and math.isfinite(value):
            try:
                interval = self.spread.interval(quantity, self.level)
            except NotIdentifiedError as refusal:
                self.notes.append(f"no interval: {refusal}")
        return Estimate(value, interval, quantity.unit)


def _numbers(values: Mapping[str, float]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, float) for name, value in values.items()}


def predict(fit: Source, level: float = 0.95, **variables: float) -> Estimate:
    """The loss a law predicts, with its interval and a warning outside the law's domain.

    The interval is of the law's mean; a single run scatters around it by the seed noise.

    Args:
        fit ([`Fit`] or [`PublishedFit`]): The law and its coefficients.
        level (`float`, *optional*, defaults to 0.95): Confidence.
        variables: All variables of the law, numbers.

    Returns:
        [`Estimate`].

    Raises:
        MissingColumnError: If a variable is missing.
    """
    estimator = Estimator(fit, level)
    found = estimator(loss_at(fit.law, **variables))
    warn_of(outside(fit, **variables))
    return found


def outside(fit: Source, **variables: float) -> tuple[str, ...]:
    """Where variables leave the runs a law was fitted on, one sentence each."""
    if isinstance(fit, PublishedFit):
        return fit.law.domain.outside(**variables)
    columns = dict(fit.data.columns)
    asked = dict(variables)
    if {"N", "D"} <= set(asked) & set(columns):
        # sizes and tokens may each be inside while their product is not
        columns["6ND"], asked["6ND"] = 6 * columns["N"] * columns["D"], 6 * asked["N"] * asked["D"]
    sentences = []
    for name, value in asked.items():
        if name not in columns:
            continue
        low, high = float(np.min(columns[name])), float(np.max(columns[name]))
        if value > high * (1 + NEAR):
            sentences.append(
                f"`{name}` = {value:.4g} is {value / high:.3g} times the largest of the runs "
                f"fitted, {high:.4g}."
            )
        elif value < low * (1 - NEAR):
            sentences.append(
                f"`{name}` = {value:.4g} is {value / low:.3g} of the smallest of the runs "
                f"fitted, {low:.4g}."
            )
    return tuple(sentences)


def warn_of(sentences: Iterable[str]) -> None:
    """Warn of what lies outside a law's domain, at the caller of the public function."""
    for sentence in sentences:
        warnings.warn(sentence, DomainWarning, stacklevel=3)

"""Predictions of a law: the loss of a run, its interval, and warnings outside the law's domain."""

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
    """A law with known coefficients, for example from a paper. It has no rows and no intervals.

    Attributes:
        law ([`Law`]): The law.
        values (`Mapping[str, float]`): The coefficients by name.
        origin (`str`): The publication of the coefficients. Empty if you chose them yourself.

    Example:
        >>> PublishedFit.published(get_law("hoffmann")).predict(N=70e9, D=1.4e12)
    """

    law: Law
    values: Mapping[str, float]
    origin: str = ""

    @classmethod
    def published(cls, law: Law, label: str | None = None) -> PublishedFit:
        """Return a law with its published coefficients.

        Args:
            law ([`Law`]): The law.
            label (`str`, *optional*): A key of `law.published`. Default: the first one.
        """
        label = label or next(iter(law.published), "")
        if label not in law.published:
            raise ScalingError(
                f"`{law.name}` has published values {list(law.published)}, not {label!r}."
            )
        return cls(law, law.published[label].values, law.published[label].source)

    def predict(self, **variables: Any) -> np.ndarray:
        """Return the predicted loss, in nats per token. See `Law.predict`."""
        return self.law.predict(self.values, **variables)


Source = Fit | PublishedFit


class Estimator:
    """A function from a quantity to its value and, if the fit has rows, its delta-method interval.

    Calls add to `notes` the reasons why intervals are missing.
    """

    def __init__(self, fit: Source, level: float) -> None:
        self.fit, self.level = fit, level
        self.notes: list[str] = []
        self.covariance: CoefficientCovariance | None = None
        if isinstance(fit, PublishedFit):
            self.notes.append(
                f"The coefficients of `{fit.law.name}` are published values, so there are no "
                "intervals."
            )
            return
        try:
            self.covariance = CoefficientCovariance.of(fit)
        except (TooFewError, NotIdentifiedError) as error:
            self.notes.append(f"Intervals cannot be computed. {error}")

    def __call__(self, quantity: DerivedQuantity) -> Estimate:
        """Return the value of a quantity and its interval."""
        values = {name: np.asarray(value, float) for name, value in self.fit.values.items()}
        value, interval = quantity.unscaled(float(quantity.scaled(values))), None
        if self.covariance is not None and math.isfinite(value):
            try:
                interval = self.covariance.interval(quantity, self.level)
            except NotIdentifiedError as error:
                self.notes.append(f"The {quantity.name} has no interval. {error}")
        return Estimate(value, interval, quantity.unit)


def predict(fit: Source, level: float = 0.95, **variables: float) -> Estimate:
    """Predict the loss of a run, with a confidence interval if `fit` has rows.

    The interval is that of the mean loss. A single run differs from the mean by the seed noise. A
    `DomainWarning` is issued for each variable outside the runs that were fitted.

    Args:
        fit ([`Fit`] or [`PublishedFit`]): The law and its coefficients.
        level (`float`): Confidence level, between 0 and 1.
        variables: A number for each variable of the law, such as N, D and G.

    Returns:
        [`Estimate`]: The loss in nats per token.

    Example:
        >>> predict(fitted, N=1e9, D=2e10, G=4).interval  # fitted = fit("familial", runs)
    """
    found = Estimator(fit, level)(loss_at(fit.law, **variables))
    warn_of(outside(fit, **variables))
    return found


def outside(fit: Source, **variables: float) -> tuple[str, ...]:
    """Return one sentence for each variable that is outside the fitted rows or the law's domain."""
    if isinstance(fit, PublishedFit):
        return fit.law.domain.outside(**variables)
    columns, asked = dict(fit.data.columns), dict(variables)
    if {"N", "D"} <= set(asked) & set(columns):
        # N and D can both be in range while their product, the compute, is not
        columns["6ND"], asked["6ND"] = 6 * columns["N"] * columns["D"], 6 * asked["N"] * asked["D"]
    sentences = []
    for name in [name for name in asked if name in columns]:
        value, low, high = asked[name], float(columns[name].min()), float(columns[name].max())
        if value > high * (1 + NEAR):
            edge = f"{value / high:.3g} times the largest of the runs fitted ({high:.4g})"
        elif value < low * (1 - NEAR):
            edge = f"{value / low:.3g} times the smallest of the runs fitted ({low:.4g})"
        else:
            continue
        sentences.append(f"`{name}` = {value:.4g} is {edge}.")
    return tuple(sentences)


def warn_of(sentences: Iterable[str]) -> None:
    """Issue each sentence as a `DomainWarning` that points to the caller of the public function."""
    for sentence in sentences:
        warnings.warn(sentence, DomainWarning, stacklevel=3)

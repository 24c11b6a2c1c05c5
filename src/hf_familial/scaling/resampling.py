"""Bootstrap confidence intervals: resampled runs, or residuals with random signs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import ndtr, ndtri

from ..errors import NoOptimumError, ScalingError
from ._covariance import CoefficientCovariance
from .fitting import refit
from .quantities import DerivedQuantity, Interval, check_level
from .results import Fit


Kind = Literal["runs", "wild"]
Method = Literal["percentile", "bca"]

KINDS = ("runs", "wild")
METHODS = ("percentile", "bca")
CHUNK = 128  # replicates per random generator, so that the result does not depend on `workers`
ENOUGH = 0.9  # smallest share of replicates that must converge


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """The result of `bootstrap`: the coefficients of many refits to resampled rows.

    Attributes:
        fit ([`Fit`]): The original fit.
        values (`Mapping[str, np.ndarray]`): Coefficients of the converged replicates by name, each
            of shape (draws,).
        failed (`int`): Number of replicates that did not converge.
        kind (`str`): The way of resampling, `"runs"` or `"wild"`, see [`bootstrap`].
        seed (`int`): Seed of the random generator.
    """

    fit: Fit
    values: Mapping[str, np.ndarray]
    failed: int
    kind: Kind
    seed: int

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def cloud(self, quantity: DerivedQuantity) -> np.ndarray:
        """Return a quantity in every replicate, shape (draws,). Undefined numbers are NaN."""
        scaled = np.broadcast_to(quantity.scaled(self.values), (len(self),))
        return np.exp(scaled) if quantity.scale == "log" else np.array(scaled)

    def interval(
        self, quantity: DerivedQuantity, level: float = 0.95, method: Method = "percentile"
    ) -> Interval:
        """Return the interval between two quantiles of the replicates.

        Args:
            quantity ([`DerivedQuantity`]): The quantity, for example `coefficient(law, "gamma")`.
            level (`float`): Confidence level, between 0 and 1.
            method (`str`): `"percentile"`, or `"bca"`, which corrects for bias and skewness (Efron
                1987, "Better Bootstrap Confidence Intervals", JASA 82(397)).

        Raises:
            ScalingError: If there are too few replicates for the level.
        """
        check_level(level)
        if method not in METHODS:
            raise ScalingError(f"`method` must be one of {list(METHODS)}, got {method!r}.")
        tail = (1 - level) / 2
        if len(self) * tail < 1:
            raise ScalingError(
                f"`level` = {level} needs {math.ceil(1 / tail)} replicates or more, got "
                f"{len(self)}. Raise `draws`."
            )
        cloud = np.broadcast_to(quantity.scaled(self.values), (len(self),))
        ends = (tail, 1 - tail)
        if method == "bca":
            ends = self._corrected(quantity, cloud, ends)
        # an undefined value could lie at either end, so it widens both
        edges = [
            _quantile(np.nan_to_num(cloud, nan=edge), share)
            for edge, share in zip((-np.inf, np.inf), ends, strict=True)
        ]
        return Interval(level, quantity.unscaled(edges[0]), quantity.unscaled(edges[1]), method)

    def _corrected(
        self, quantity: DerivedQuantity, cloud: np.ndarray, ends: tuple[float, float]
    ) -> tuple[float, float]:
        covariance = CoefficientCovariance.of(self.fit)
        below = np.mean(cloud < covariance.estimate(quantity))
        bias = ndtri(np.clip(below, 0.5 / len(cloud), 1 - 0.5 / len(cloud)))
        # the influence of a run is the opposite of the move when the run is left out
        influence = -(covariance.influence @ covariance.slope(quantity))
        square = np.square(influence).sum()
        skew = (influence**3).sum() / (6 * square**1.5) if square > 0 else 0.0
        low, high = (bias + ndtri(end) for end in ends)
        return tuple(float(ndtr(bias + z / (1 - skew * z))) for z in (low, high))  # type: ignore[return-value]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, which does not include the fit."""
        return {
            "values": {name: values.tolist() for name, values in self.values.items()},
            "failed": self.failed,
            "kind": self.kind,
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], fit: Fit) -> Bootstrap:
        """Build a bootstrap from the form that `to_dict` returns and from its fit."""
        values = {name: np.array(column, float) for name, column in record["values"].items()}
        return cls(fit, values, record["failed"], record["kind"], record["seed"])


@np.errstate(all="ignore")  # a law can be undefined at some points, and they are checked later
def bootstrap(
    fit: Fit, draws: int = 1000, kind: Kind = "runs", seed: int = 0, workers: int = 1
) -> Bootstrap:
    """Repeat a fit on many resampled sets of rows, starting from its optimum.

    Args:
        fit ([`Fit`]): The fit.
        draws (`int`): Number of replicates.
        kind (`str`): `"runs"` draws runs with replacement, each with all its rows. `"wild"` keeps
            all rows and multiplies the residuals of each run by a random sign. It allows noise
            that differs from run to run.
        seed (`int`): Seed of the random generator. The number of workers does not change the
            result.
        workers (`int`): Number of threads.

    Raises:
        ScalingError: If an argument is out of range.
        NoOptimumError: If more than a tenth of the replicates do not converge.

    Example:
        >>> bootstrap(fitted).interval(coefficient(fitted.law, "gamma"))
    """
    if kind not in KINDS:
        raise ScalingError(f"`kind` must be one of {list(KINDS)}, got {kind!r}.")
    if draws < 1 or workers < 1:
        raise ScalingError(f"`draws` and `workers` must be 1 or more, got {draws} and {workers}.")
    covariance = None if kind == "runs" else CoefficientCovariance.of(fit)

    def part(chunk: tuple[int, np.random.SeedSequence]) -> Any:
        count, sequence = chunk
        return refit(fit, *_replicates(fit, covariance, count, np.random.default_rng(sequence)))

    chunks = list(_chunks(draws, seed))
    if workers == 1:
        parts = [part(chunk) for chunk in chunks]
    else:
        with ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(part, chunks))
    kept = np.concatenate([found.converged for found in parts])
    if kept.mean() < ENOUGH:
        raise NoOptimumError(
            f"{(~kept).sum()} of {draws} replicates did not converge, so the rows are too few to "
            "resample. Use the delta method, or a law with fewer coefficients."
        )
    values = {
        name: np.concatenate([found.values[name] for found in parts])[kept] for name in fit.values
    }
    return Bootstrap(fit, values, int((~kept).sum()), kind, seed)


def _chunks(draws: int, seed: int) -> Iterator[tuple[int, np.random.SeedSequence]]:
    counts = [min(CHUNK, draws - start) for start in range(0, draws, CHUNK)]
    return zip(counts, np.random.SeedSequence(seed).spawn(len(counts)), strict=True)


def _replicates(
    fit: Fit,
    covariance: CoefficientCovariance | None,
    count: int,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Draw the weights and losses of some replicates, each of shape (count, rows)."""
    data = fit.data
    if covariance is None:
        times = generator.multinomial(data.runs, np.full(data.runs, 1 / data.runs), size=count)
        return times[:, data.run_id] * data.weight, None
    residual = fit.residuals() / np.sqrt(1 - covariance.leverage) ** 2
    error = residual * generator.choice([-1.0, 1.0], (count, data.runs))[:, data.run_id]
    fitted = fit.fitted()
    logs = fit.settings.objective == "log_huber"
    losses = fitted * np.exp(error) if logs else fitted + error
    return np.broadcast_to(data.weight, losses.shape), losses


def _quantile(values: np.ndarray, share: float) -> float:
    """Return a quantile by linear interpolation. It is infinite if a neighbouring value is."""
    ordered = np.sort(values)
    at = share * (len(ordered) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    if not (math.isfinite(low) and math.isfinite(high)):
        return float(low if share < 0.5 else high)
    return float(low + (at - math.floor(at)) * (high - low))

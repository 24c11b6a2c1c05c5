"""Confidence intervals by resampling: whole runs, or residuals with random signs."""

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
CHUNK = 128  # replicates that share a generator, whatever the number of workers
ENOUGH = 0.9  # share of replicates that must come to an optimum


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """A fit made again on resampled rows.

    Attributes:
        fit ([`Fit`]): The fit.
        values (`Mapping[str, np.ndarray]`): Coefficients of the replicates that came to an
            optimum, each of shape (draws,).
        failed (`int`): Replicates that did not.
        kind (`str`): What was resampled: `"runs"` or `"wild"`.
        seed (`int`): Of the generator.
    """

    fit: Fit
    values: Mapping[str, np.ndarray]
    failed: int
    kind: Kind
    seed: int

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def cloud(self, quantity: DerivedQuantity) -> np.ndarray:
        """Return a quantity in every replicate, (draws,); NaN where it does not exist."""
        scaled = np.broadcast_to(quantity.scaled(self.values), (len(self),))
        return np.exp(scaled) if quantity.scale == "log" else np.array(scaled)

    def interval(
        self, quantity: DerivedQuantity, level: float = 0.95, method: Method = "percentile"
    ) -> Interval:
        """Return the interval between quantiles of the replicates.

        Method `"bca"` corrects `"percentile"` for bias and skewness, by the influence of each run
        (Efron 1987, "Better Bootstrap Confidence Intervals", JASA 82(397)). `ScalingError` is
        raised if there are too few replicates for the level.
        """
        check_level(level)
        if method not in METHODS:
            raise ScalingError(f"`method` must be one of {list(METHODS)}, got {method!r}.")
        tail = (1 - level) / 2
        if len(self) * tail < 1:
            raise ScalingError(
                f"a level of {level} needs {math.ceil(1 / tail)} replicates or more, got "
                f"{len(self)}."
            )
        cloud = np.broadcast_to(quantity.scaled(self.values), (len(self),))
        ends = (tail, 1 - tail)
        if method == "bca":
            ends = self._corrected(quantity, cloud, ends)
        # what does not exist in a replicate may lie at either end
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
        # a run's influence on the quantity: minus what its score pushes the optimum by
        influence = -(covariance.influence @ covariance.slope(quantity))
        square = np.square(influence).sum()
        skew = (influence**3).sum() / (6 * square**1.5) if square > 0 else 0.0
        low, high = (bias + ndtri(end) for end in ends)
        return tuple(float(ndtr(bias + z / (1 - skew * z))) for z in (low, high))  # type: ignore[return-value]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without the fit."""
        return {
            "values": {name: values.tolist() for name, values in self.values.items()},
            "failed": self.failed,
            "kind": self.kind,
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], fit: Fit) -> Bootstrap:
        """Read `to_dict`'s form, given the fit it belongs to."""
        values = {name: np.array(column, float) for name, column in record["values"].items()}
        return cls(fit, values, record["failed"], record["kind"], record["seed"])


@np.errstate(all="ignore")  # a law may have no value at a point; such points are judged by name
def bootstrap(
    fit: Fit, draws: int = 1000, kind: Kind = "runs", seed: int = 0, workers: int = 1
) -> Bootstrap:
    """Fit again on resampled rows, from the optimum.

    Args:
        fit ([`Fit`]): The fit.
        draws (`int`): Replicates.
        kind (`str`): `"runs"` draws runs with all their rows and with replacement; `"wild"` keeps
            the design and gives the residuals of each run a random sign, so their size may differ
            from run to run.
        seed (`int`): Of the generator. The result is the same for any number of workers.
        workers (`int`): Threads.

    Raises:
        ScalingError: If an argument is out of range.
        NoOptimumError: If more than a tenth of the replicates come to no optimum.
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
            f"{(~kept).sum()} of {draws} replicates came to no optimum: the rows do not bear "
            "resampling. Use the delta method, or a law with fewer coefficients."
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
    """Draw weights and losses of some replicates, each (count, rows)."""
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
    """Return a quantile that may be infinite, between order statistics where both are finite."""
    ordered = np.sort(values)
    at = share * (len(ordered) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    if not (math.isfinite(low) and math.isfinite(high)):
        return float(low if share < 0.5 else high)
    return float(low + (at - math.floor(at)) * (high - low))

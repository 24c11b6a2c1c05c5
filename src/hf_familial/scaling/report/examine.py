"""Everything a report shows of a fit, made in one go: intervals, bootstrap, profiles, doubts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import NoOptimumError, NotIdentifiedError, TooFewError
from .._covariance import CoefficientCovariance, Profile
from ..comparison import Comparison, compare
from ..confidence import intervals
from ..diagnostics import diagnose
from ..laws.law import Law
from ..quantities import Interval, coefficient
from ..resampling import Kind, bootstrap
from ..results import Fit
from .study import Origin, Study
from .wording import scientific


@np.errstate(all="ignore")  # a law may have no value at a point; such points are judged by name
def examine(
    fit: Fit,
    origin: Origin | None = None,
    draws: int = 0,
    kind: Kind = "runs",
    seed: int = 0,
    workers: int = 1,
    profiles: bool = True,
    level: float = 0.95,
    rivals: Sequence[Law] = (),
    version: str = "",
) -> Study:
    """Find out how far a fit may be trusted.

    An interval that cannot be had is no error here: the study says why in its warnings.

    Args:
        fit ([`Fit`]): The fit.
        origin ([`Origin`], *optional*): Where its rows came from.
        draws (`int`): Replicates of the bootstrap; 0 for none.
        kind (`str`): What the bootstrap resamples: `"runs"`, `"residuals"` or `"wild"`.
        seed (`int`): Of the bootstrap.
        workers (`int`): Threads of the bootstrap.
        profiles (`bool`): Whether to trace the profile of every free coefficient.
        level (`float`): Coverage of the intervals.
        rivals (`Sequence[Law]`): Further laws to fit to the same rows, for comparison.
        version (`str`): Of the package, for the record.

    Returns:
        [`Study`]

    Raises:
        ScalingError: If an argument is out of range.
    """
    found: dict[str, Mapping[str, Interval]] = {}
    traced: dict[str, Profile] = {}
    replicates, refusals = None, []
    try:
        found["delta"] = intervals(fit, level=level)
        if profiles:
            traced = _profiles(fit, level)
            found["profile"] = {name: profile.interval for name, profile in traced.items()}
    except (TooFewError, NotIdentifiedError) as refusal:
        refusals.append(f"No intervals: {refusal}")
    if draws:
        try:
            replicates = bootstrap(fit, draws, kind, seed, workers)
            found["bca"] = intervals(fit, level=level, method="bca", replicates=replicates)
        except (NoOptimumError, TooFewError, NotIdentifiedError) as refusal:
            refusals.append(f"No bootstrap: {refusal}")
    first, warnings = next(iter(found.values()), {}), list(refusals)
    tables: dict[str, list[dict[str, Any]]] = {}
    if rivals:
        comparison = _against(fit, rivals)
        tables = comparison_tables(comparison)
        warnings += comparison.notes
    return Study(
        fit=fit,
        origin=origin or Origin(),
        level=level,
        intervals=found,
        replicates=replicates,
        profiles=traced,
        tables=tables,
        warnings=(*diagnose(fit, first), *warnings),
        version=version,
    )


def _profiles(fit: Fit, level: float) -> dict[str, Profile]:
    """Of the free coefficients that the rows determine."""
    spread, traced = CoefficientCovariance.of(fit), {}
    for name in fit.free:
        if name not in fit.bounds_hit:
            try:
                traced[name] = spread.profile(coefficient(fit.law, name), level)
            except NotIdentifiedError:
                continue
    return traced


def _against(fit: Fit, rivals: Sequence[Law]) -> Comparison:
    """The law of a fit and others on its rows, under its objective."""
    others = [law for law in rivals if law.name != fit.law.name]
    settings = fit.settings
    return compare(fit.data, [fit.law, *others], settings.objective, settings.delta)


def comparison_tables(found: Comparison) -> dict[str, list[dict[str, Any]]]:
    """A comparison as rows of words and numbers, by title.

    Args:
        found ([`Comparison`]): The laws side by side.

    Returns:
        `dict[str, list[dict]]`: The laws; and, where there is more than one budget, the error on
            larger budgets than those fitted, in percent of the loss.
    """
    laws = [
        {
            "law": entry.law,
            "coefficients": entry.free or None,
            "AICc": entry.aicc if math.isfinite(entry.aicc) else None,
            "weight": round(entry.weight, 3),
            "error (%)": 100 * entry.error if math.isfinite(entry.error) else None,
            "held out (%)": None if entry.held_out is None else 100 * entry.held_out,
            "status": (entry.refusal or entry.status).replace("_", " "),
        }
        for entry in found.entries
    ]
    rollout = [
        {
            "C up to (FLOPs)": scientific(split.C),
            "rows": split.fitted,
            "held out": split.held_out,
            **{
                f"{law} (%)": None if error is None else 100 * error
                for law, error in split.errors.items()
            },
        }
        for split in found.splits
    ]
    return {"Laws compared": laws, "Error on larger budgets": rollout}


__all__ = ["comparison_tables", "examine"]

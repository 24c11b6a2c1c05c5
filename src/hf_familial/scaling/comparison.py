"""Comparison of several laws on the same runs, and of their predictions for larger runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..errors import ScalingError
from .data import RunTable
from .fitting import fit
from .isoflop_optima import budgets
from .laws import get_law
from .laws.law import Law
from .results import FarResiduals, Fit, FitStatus, Objective


# Below this difference of AICc, the worse law still has substantial support: Burnham & Anderson
# 2004, https://doi.org/10.1177/0049124104268644, section 2.6
DECISIVE = 2.0
APART = 0.2  # smallest relative difference of gamma between variants that causes a warning
MANY = 12  # with more computes than this, the runs are not grouped into budgets
SHARES = (0.5, 0.65, 0.8, 0.9)  # quantiles of compute to split at, if there are no budgets


def log_likelihood(result: Fit) -> float:
    """Return the log likelihood of a fit, under the error density that matches its objective.

    The density is `exp(-rho(r) / s^2) / Z(s)`, where rho is Huber's function and r a residual. It
    is normal for small residuals and has exponential tails beyond `delta`. The width s is the one
    that maximises the likelihood.

    Reference: Huber 1964, "Robust estimation of a location parameter".
    """
    from scipy import optimize

    settings, data = result.settings, result.data
    count = float(data.weight.sum())
    # the residuals of an exact fit are rounding errors, and no width maximises the likelihood
    total = max(result.objective, 1e-28 * count)
    jacobian = -float(data.weight @ np.log(data.loss)) if settings.objective == "log_huber" else 0.0
    if settings.objective == "mse":
        return jacobian - 0.5 * count * (math.log(2 * math.pi * 2 * total / count) + 1)

    def minus(log_width: float) -> float:
        width, knee = math.exp(log_width), settings.delta / math.exp(log_width)
        middle = math.sqrt(2 * math.pi) * math.erf(knee / math.sqrt(2))
        # exp(-knee^2 / 2) underflows for a large knee, where the density is normal everywhere
        tails = 2 / knee * math.exp(-0.5 * knee * knee) if knee < 38 else 0.0
        return total / width**2 + count * (log_width + math.log(middle + tails))

    scale = 0.5 * math.log(2 * total / count)
    best = optimize.minimize_scalar(minus, bounds=(scale - 5, scale + 12), method="bounded")
    return jacobian - float(best.fun)


def aicc(result: Fit) -> float:
    """Return AICc, Akaike's information criterion with the correction for small samples.

    The width of the noise counts as one more coefficient. Checkpoints of one run count as
    independent rows. Reference: Hurvich and Tsai 1989, "Regression and time series model selection
    in small samples".
    """
    count, free = float(result.data.weight.sum()), len(result.free) + 1
    if count <= free + 1:
        return math.inf
    correction = 2 * free * (free + 1) / (count - free - 1)
    return 2 * free - 2 * log_likelihood(result) + correction


@dataclass(frozen=True)
class Split:
    """The errors of laws that were fitted to runs up to `C` FLOPs and tested on larger runs.

    Attributes:
        errors: The root mean square error of the log loss above `C`, by law. `None` if the law
            could not be fitted.
        drift: The mean of predicted minus measured log loss above `C`, by law. It is negative if
            the law predicts losses that are too low.
    """

    C: float  # largest compute fitted, in FLOPs
    fitted: int  # rows at or below it
    held_out: int  # rows above it
    errors: Mapping[str, float | None]
    drift: Mapping[str, float | None]


@dataclass(frozen=True)
class Entry:
    """The result of one law in a comparison.

    `weight` is its Akaike weight among the compared laws. `error` is the root mean square error of
    the log loss on the fitted rows. `held_out` is the same error on larger computes, over the
    splits at which all laws could be fitted. `refusal` is the reason why the law could not be
    fitted, else empty.
    """

    law: str
    values: Mapping[str, float]
    free: int
    objective: float
    aicc: float
    weight: float
    error: float
    held_out: float | None
    status: str
    refusal: str = ""


@dataclass(frozen=True)
class Comparison:
    """The result of [`compare`].

    Attributes:
        entries (`tuple[Entry, ...]`): The laws, in order of AICc with the best first. Laws that
            could not be fitted are last.
        splits (`tuple[Split, ...]`): The tests on larger runs, by rising compute.
        rows (`int`): Number of fitted rows.
        notes (`tuple[str, ...]`): Warnings, one sentence each.
    """

    entries: tuple[Entry, ...]
    splits: tuple[Split, ...]
    rows: int
    notes: tuple[str, ...]

    def __getitem__(self, law: str) -> Entry:
        return {entry.law: entry for entry in self.entries}[law]

    @property
    def best(self) -> str:
        """The law with the least held-out error, or with the least AICc if there is no such error.

        `ScalingError` is raised if no law could be fitted.
        """
        if self.entries[0].refusal:
            raise ScalingError(f"None of the laws could be fitted: {self.entries[0].refusal}")
        judged = [entry for entry in self.entries if entry.held_out is not None]
        if not judged:
            return self.entries[0].law
        return min(judged, key=lambda entry: (entry.held_out, entry.aicc)).law

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form. Infinite numbers become null."""
        record = asdict(self)
        for entry in record["entries"]:
            for name in ("objective", "aicc", "error"):
                entry[name] = entry[name] if math.isfinite(entry[name]) else None
        return record


@np.errstate(all="ignore")  # a law can be undefined at some points, and they are checked later
def compare(
    data: Any,
    laws: Sequence[str | Law],
    objective: Objective = "log_huber",
    delta: float = 1e-3,
    **settings: Any,
) -> Comparison:
    """Fit several laws to the same runs and rank them.

    Laws are compared by AICc on all rows, and by the error of their predictions for runs larger
    than those fitted. One table may contain dense, sparse and familial runs. A law that cannot use
    every row is not fitted, because AICc compares laws on the same rows only.

    Args:
        data: The runs, in any form that `RunTable.read` accepts. The compute of a run is its
            column `C` (FLOPs), else 6ND.
        laws (`Sequence[str | Law]`): One or more different laws, or their names.
        objective, delta, settings: Arguments passed to every [`fit`].

    Raises:
        ScalingError: If `laws` is empty or names a law twice, or the outlier rule depends on the
            law.

    Example:
        >>> compare(runs, ["hoffmann", "familial", "familial_e_inside"]).best
    """
    known = [get_law(law) for law in laws]
    names = [law.name for law in known]
    if not names or len(set(names)) < len(names):
        raise ScalingError(f"`laws` must be one or more different laws, got {names}.")
    if isinstance(settings.get("outliers"), FarResiduals):
        raise ScalingError(
            "`outliers` must not depend on the law, got `FarResiduals`. Use `LargestLosses`."
        )
    rows = RunTable.read(data, duplicates="keep")
    settings = {"objective": objective, "delta": delta, **settings}
    found = {law.name: _try(law, rows, settings) for law in known}
    fits = {name: result for name, result in found.items() if isinstance(result, Fit)}
    splits = list(_rollout(rows, fits, settings)) if fits else []
    scores = {name: aicc(result) for name, result in fits.items()}
    least = min(scores.values(), default=math.inf)
    likely = {name: math.exp(-0.5 * (score - least)) for name, score in scores.items()}
    entries = []
    for name, result in found.items():
        if isinstance(result, str):
            nothing = (math.inf, math.inf, 0.0, math.inf, None, "refused", result)
            entries.append(Entry(name, {}, 0, *nothing))
            continue
        off = _off(result, rows)
        entries.append(
            Entry(
                name,
                dict(result.values),
                len(result.free),
                result.objective,
                scores[name],
                likely[name] / sum(likely.values()),
                math.sqrt(float(np.average(off**2, weights=rows.weight))),
                _held_out(name, splits),
                str(result.status),
            )
        )
    entries.sort(key=lambda entry: entry.aicc)
    ordered = Comparison(tuple(entries), tuple(splits), len(rows), ())
    return replace(ordered, notes=tuple(_notes(ordered, fits, rows)))


def _try(law: Law, rows: RunTable, settings: Mapping[str, Any]) -> Fit | str:
    """Return the fit, or the error message if the law cannot be fitted."""
    try:
        return fit(law, rows, **settings)
    except ScalingError as error:
        return str(error)


def _rollout(
    rows: RunTable, fits: Mapping[str, Fit], settings: Mapping[str, Any]
) -> Iterator[Split]:
    columns = rows.columns
    if "C" not in columns and not {"N", "D"} <= set(columns):
        return
    compute = columns["C"] if "C" in columns else 6 * columns["N"] * columns["D"]
    groups = budgets(compute)
    # Each cut is the largest compute to fit. At least two budgets are fitted if possible, because
    # one alone can hardly separate E from the exponents.
    cuts = [float(np.quantile(compute, share)) for share in SHARES]
    if len(groups) <= MANY:
        cuts = [float(compute[group].max()) for group in groups[1:-1] or groups[:-1]]
    for cut in cuts:
        below = compute <= cut
        if not below.any() or below.all():
            continue
        small, large = rows.take(np.flatnonzero(below)), rows.take(np.flatnonzero(~below))
        errors: dict[str, float | None] = {}
        drift: dict[str, float | None] = {}
        for name, whole in fits.items():
            result = _try(whole.law, small, settings)
            errors[name] = drift[name] = None
            if isinstance(result, Fit) and result.status is not FitStatus.NOT_CONVERGED:
                off = _off(result, large)
                errors[name] = math.sqrt(float(np.average(off**2, weights=large.weight)))
                drift[name] = float(np.average(off, weights=large.weight))
        yield Split(cut, len(small), len(large), errors, drift)


def _off(result: Fit, rows: RunTable) -> np.ndarray:
    """Return predicted minus measured log loss, shape (rows,)."""
    columns = {name: rows.columns[name] for name in result.law.variable_names}
    return np.log(result.predict(**columns)) - np.log(rows.loss)


def _held_out(name: str, splits: Sequence[Split]) -> float | None:
    """Pool a law's errors over the splits at which all laws were fitted, weighted by their rows."""
    fair = [split for split in splits if None not in split.errors.values()]
    if not fair:
        return None
    total = sum(split.held_out for split in fair)
    squares = sum(split.held_out * float(split.errors[name] or 0.0) ** 2 for split in fair)
    return math.sqrt(squares / total)


def _notes(found: Comparison, fits: Mapping[str, Fit], rows: RunTable) -> Iterator[str]:
    fitted = [entry for entry in found.entries if not entry.refusal]
    if len(fitted) > 1:
        first, second = fitted[:2]
        if second.aicc - first.aicc < DECISIVE:
            yield (
                f"AICc cannot decide between `{first.law}` and `{second.law}` (difference "
                f"{second.aicc - first.aicc:.2g}). These runs support both."
            )
        if found.best != first.law:
            yield (
                f"AICc prefers `{first.law}`, but `{found.best}` predicts larger runs better. Use "
                f"`{found.best}` for extrapolation."
            )
    yield from _gammas(found, fits)
    if rows.runs < len(rows):
        yield (
            "Several rows share a run. AICc treats them as independent, so it favours laws with "
            "many coefficients."
        )
    lost = [split for split in found.splits if None in split.errors.values()]
    if lost:
        names = sorted({n for split in lost for n, error in split.errors.items() if error is None})
        shown = ", ".join(f"`{name}`" for name in names)
        yield (
            f"{len(lost)} of {len(found.splits)} splits do not count for the held-out error, "
            f"because {shown} could not be fitted there."
        )


def _gammas(found: Comparison, fits: Mapping[str, Fit]) -> Iterator[str]:
    """Yield a note if the familial laws disagree on gamma. It has a different meaning in each."""
    read = {
        name: result.values["gamma"]
        for name, result in fits.items()
        if result.law.family == "familial" and "gamma" in result.free
    }
    if len(read) < 2:
        return
    low, high = min(read.values()), max(read.values())
    if high - low > APART * max(abs(low), abs(high)):
        shown = ", ".join(f"{value:.3f} by `{name}`" for name, value in read.items())
        variants = [entry for entry in found.entries if entry.law in read]
        doubt = _doubt(variants)
        verdict = f"These runs support `{variants[0].law}`"
        if doubt:
            verdict = f"These runs cannot decide between the variants: {doubt}"
        yield (
            f"gamma depends on the variant of the law: {shown}. The wrong variant biases gamma. "
            f"{verdict}."
        )


def _doubt(variants: Sequence[Entry]) -> str:
    """Return the reason why the AICc ranking is not decisive, `""` if it is.

    It is decisive if the best law converged, also has the least error on larger computes, and
    leads the next law in AICc by at least `DECISIVE`.
    """
    first, second = variants[:2]
    if first.status != FitStatus.CONVERGED:
        return f"the fit of `{first.law}`, the best in AICc, is {first.status.replace('_', ' ')}"
    if first.held_out is None:
        return "there were no larger runs to test the laws on"
    least = min(variants, key=lambda entry: entry.held_out or math.inf)
    if (least.held_out or 0.0) < first.held_out:
        return f"AICc prefers `{first.law}`, but `{least.law}` predicts larger runs better"
    if second.aicc - first.aicc < DECISIVE:
        return f"the AICc of `{first.law}` and `{second.law}` differ by less than {DECISIVE:g}"
    return ""

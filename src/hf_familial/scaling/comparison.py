"""Several laws on the same runs: how well each describes them and predicts larger ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import optimize

from ..errors import ScalingError
from .data import RunTable
from .fitting import fit
from .isoflop import budgets
from .laws import get_law
from .laws.law import Law
from .results import FarResiduals, Fit, FitStatus, Objective


def log_likelihood(result: Fit) -> float:
    """Of a fit, under the density that its objective belongs to."""
    settings, data = result.settings, result.data
    count = float(data.weight.sum())
    # an exact fit has no likeliest width: its residuals are rounding
    total = max(result.objective, 1e-28 * count)
    jacobian = -float(data.weight @ np.log(data.loss)) if settings.objective == "log_huber" else 0.0
    if settings.objective == "mse":
        return jacobian - 0.5 * count * (math.log(2 * math.pi * 2 * total / count) + 1)

    def minus(log_width: float) -> float:
        width, knee = math.exp(log_width), settings.delta / math.exp(log_width)
        middle = math.sqrt(2 * math.pi) * math.erf(knee / math.sqrt(2))
        # exp(-knee^2 / 2), in logs: it vanishes where all is normal
        tails = 2 / knee * math.exp(-0.5 * knee * knee) if knee < 38 else 0.0
        return total / width**2 + count * (log_width + math.log(middle + tails))

    scale = 0.5 * math.log(2 * total / count)
    best = optimize.minimize_scalar(minus, bounds=(scale - 5, scale + 12), method="bounded")
    return jacobian - float(best.fun)


def aicc(result: Fit) -> float:
    """Return Akaike's criterion, corrected for few rows; the noise counts as a coefficient."""
    count, free = float(result.data.weight.sum()), len(result.free) + 1
    if count <= free + 1:
        return math.inf
    correction = 2 * free * (free + 1) / (count - free - 1)
    return 2 * free - 2 * log_likelihood(result) + correction


# Difference of AICc up to which the worse law has substantial support: Burnham & Anderson 2004,
# https://doi.org/10.1177/0049124104268644, section 2.6
DECISIVE = 2.0
APART = 0.2  # relative difference of gamma between variants worth a warning
MANY = 12  # computes beyond which there are no budgets
SHARES = (0.5, 0.65, 0.8, 0.9)  # of the runs fitted, where compute takes many values


@dataclass(frozen=True)
class Split:
    """Laws fitted to the smaller computes and tried on the larger."""

    C: float
    fitted: int
    held_out: int
    errors: Mapping[str, float | None]
    drift: Mapping[str, float | None]


@dataclass(frozen=True)
class Entry:
    """One law in a comparison."""

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
    """Laws side by side, the best in AICc first, those refused last.

    Attributes:
        entries (`tuple[Entry, ...]`): The laws.
        splits (`tuple[Split, ...]`): The rollout, by compute.
        rows (`int`): Rows fitted.
        notes (`tuple[str, ...]`): What to beware of, one sentence each.
    """

    entries: tuple[Entry, ...]
    splits: tuple[Split, ...]
    rows: int
    notes: tuple[str, ...]

    def __getitem__(self, law: str) -> Entry:
        for entry in self.entries:
            if entry.law == law:
                return entry
        raise KeyError(law)

    @property
    def best(self) -> str:
        """The law of least held-out error; of least AICc where nothing could be held out.

        Raises:
            ScalingError: If every law was refused.
        """
        if self.entries[0].refusal:
            raise ScalingError(f"every law was refused: {self.entries[0].refusal}")
        judged = [entry for entry in self.entries if entry.held_out is not None]
        if not judged:
            return self.entries[0].law
        return min(judged, key=lambda entry: (entry.held_out, entry.aicc)).law

    def to_dict(self) -> dict[str, Any]:
        """JSON form; what is infinite becomes null."""
        record = asdict(self)
        for entry in record["entries"]:
            for name in ("objective", "aicc", "error"):
                entry[name] = entry[name] if math.isfinite(entry[name]) else None
        return record


@np.errstate(all="ignore")  # a law may have no value at a point; such points are judged by name
def compare(
    data: Any,
    laws: Sequence[str | Law],
    objective: Objective = "log_huber",
    delta: float = 1e-3,
    **settings: Any,
) -> Comparison:
    """Fit several laws to the same runs.

    Dense, sparse and familial runs may stand in one table: a law reads the columns it knows of,
    and one that cannot take every row is refused, since criteria compare on the same rows alone.

    Args:
        data: Runs, see `RunTable.read`. Computes are in the column `C`, or `6ND`.
        laws (`Sequence[str | Law]`): At least one.
        objective (`str`, *optional*, defaults to `"log_huber"`): Of every fit.
        delta (`float`, *optional*, defaults to 1e-3): Of every fit.
        settings: Further arguments of every `fit`.

    Returns:
        [`Comparison`].

    Raises:
        ScalingError: If there is no law, or one twice, or outliers are to be left out by a law's
            own residuals.

    Example:
        >>> compare(runs, ["hoffmann", "familial", "familial_e_inside", "familial_n_only"])
    """
    known = [get_law(law) for law in laws]
    names = [law.name for law in known]
    if not names or len(set(names)) < len(names):
        raise ScalingError(f"`laws` must be one or more different laws, got {names}.")
    if isinstance(settings.get("outliers"), FarResiduals):
        raise ScalingError(
            "`outliers` must not depend on the law: use `LargestLosses`, not `FarResiduals`."
        )
    rows = RunTable.read(data, duplicates="keep")
    settings = {"objective": objective, "delta": delta, **settings}
    found = {law.name: _try(law, rows, settings) for law in known}
    fits = {name: result for name, result in found.items() if isinstance(result, Fit)}
    compute = _compute(rows)
    splits = [] if compute is None or not fits else list(_rollout(rows, compute, fits, settings))
    scores = {name: aicc(result) for name, result in fits.items()}
    least = min(scores.values(), default=math.inf)
    total = sum(math.exp(-0.5 * (score - least)) for score in scores.values())
    entries = []
    for law in known:
        result = found[law.name]
        if isinstance(result, Fit):
            entries.append(
                Entry(
                    law.name,
                    dict(result.values),
                    len(result.free),
                    result.objective,
                    scores[law.name],
                    math.exp(-0.5 * (scores[law.name] - least)) / total,
                    _rms(result, rows),
                    _held_out(law.name, splits),
                    str(result.status),
                )
            )
        else:
            nothing = (math.inf, math.inf, 0.0, math.inf, None, "refused", result)
            entries.append(Entry(law.name, {}, 0, *nothing))
    entries.sort(key=lambda entry: entry.aicc)
    ordered = Comparison(tuple(entries), tuple(splits), len(rows), ())
    notes = tuple(_notes(ordered, fits, rows))
    return Comparison(ordered.entries, ordered.splits, ordered.rows, notes)


def _try(law: Law, rows: RunTable, settings: Mapping[str, Any]) -> Fit | str:
    """The fit, or why it was refused."""
    try:
        return fit(law, rows, **settings)
    except ScalingError as refusal:
        return str(refusal)


def _compute(rows: RunTable) -> np.ndarray | None:
    if "C" in rows.columns:
        return rows.columns["C"]
    if {"N", "D"} <= set(rows.columns):
        return 6 * rows.columns["N"] * rows.columns["D"]
    return None


def _cuts(compute: np.ndarray) -> list[float]:
    """Largest computes to fit: two budgets and more, or some shares of the runs."""
    groups = budgets(compute)
    if len(groups) <= MANY:
        return [float(compute[rows].max()) for rows in groups[1:-1] or groups[:-1]]
    return [float(np.quantile(compute, share)) for share in SHARES]


def _rollout(
    rows: RunTable,
    compute: np.ndarray,
    fits: Mapping[str, Fit],
    settings: Mapping[str, Any],
) -> Iterator[Split]:
    for cut in _cuts(compute):
        below = compute <= cut
        if not below.any() or below.all():
            continue
        small, large = rows.take(np.flatnonzero(below)), rows.take(np.flatnonzero(~below))
        errors: dict[str, float | None] = {}
        drift: dict[str, float | None] = {}
        for name, whole in fits.items():
            result = _try(whole.law, small, settings)
            usable = isinstance(result, Fit) and result.status is not FitStatus.NOT_CONVERGED
            errors[name] = drift[name] = None
            if usable:
                off = _off(result, large)  # type: ignore[arg-type]
                errors[name] = math.sqrt(float(np.average(off**2, weights=large.weight)))
                drift[name] = float(np.average(off, weights=large.weight))
        yield Split(cut, len(small), len(large), errors, drift)


def _off(result: Fit, rows: RunTable) -> np.ndarray:
    """Predicted minus measured log loss, (rows,)."""
    columns = {name: rows.columns[name] for name in result.law.variable_names}
    return np.log(result.predict(**columns)) - np.log(rows.loss)


def _rms(result: Fit, rows: RunTable) -> float:
    return math.sqrt(float(np.average(_off(result, rows) ** 2, weights=rows.weight)))


def _held_out(name: str, splits: Sequence[Split]) -> float | None:
    """Over the splits at which all laws were fitted; each of their rows counts the same."""
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
                f"AICc does not tell `{first.law}` from `{second.law}` "
                f"(difference {second.aicc - first.aicc:.2g}): these runs bear both."
            )
        if found.best != first.law:
            yield (
                f"AICc prefers `{first.law}`, the error on larger computes `{found.best}`: trust "
                "the latter for extrapolation."
            )
    yield from _gammas(found, fits)
    if rows.runs < len(rows):
        yield "several rows share a run: AICc takes them for independent and favours large laws."
    lost = [split for split in found.splits if None in split.errors.values()]
    if lost:
        names = sorted({n for split in lost for n, error in split.errors.items() if error is None})
        shown = ", ".join(f"`{name}`" for name in names)
        yield (
            f"{len(lost)} of {len(found.splits)} splits do not count for the held-out error: "
            f"{shown} could not be fitted there."
        )


def _gammas(found: Comparison, fits: Mapping[str, Fit]) -> Iterator[str]:
    """The exponent of G means something else in each variant; the wrong one misreads it."""
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
        doubt = _doubt([entry for entry in found.entries if entry.law in read])
        best = next(entry.law for entry in found.entries if entry.law in read)
        verdict = (
            f"these runs do not tell the variants apart: {doubt}"
            if doubt
            else f"these runs speak for `{best}`"
        )
        yield f"gamma depends on the variant: {shown}. The wrong one biases it; {verdict}."


def _doubt(variants: Sequence[Entry]) -> str:
    """Return why the best law in AICc must not be taken for the true one; empty if it may."""
    first, second = variants[:2]
    if first.status != FitStatus.CONVERGED:
        return f"the fit of `{first.law}`, the best in AICc, is {first.status.replace('_', ' ')}"
    if first.held_out is None:
        return "no larger compute could be held out"
    least = min(variants, key=lambda entry: entry.held_out or math.inf)
    if (least.held_out or 0.0) < first.held_out:
        return f"AICc prefers `{first.law}`, the error on larger computes `{least.law}`"
    if second.aicc - first.aicc < DECISIVE:
        return f"the AICc of `{first.law}` and `{second.law}` differ by less than {DECISIVE:g}"
    return ""

"""Several laws on the same runs: how well each describes them, and predicts larger ones."""

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


# Difference of AICc up to which the worse law has substantial support: Burnham & Anderson 2004,
# https://doi.org/10.1177/0049124104268644, section 2.6
DECISIVE = 2.0
APART = 0.2  # relative difference of gamma between variants worth a warning
MANY = 12  # computes beyond which there are no budgets
SHARES = (0.5, 0.65, 0.8, 0.9)  # of the runs fitted, where compute takes many values


def log_likelihood(result: Fit) -> float:
    """Return the log likelihood of a fit, under the density that its objective belongs to.

    That is `exp(-rho(r) / s^2) / Z(s)` with rho Huber's function: normal in the middle, with
    exponential tails beyond `delta`. Its width s is chosen to make the likelihood largest.

    Reference: Huber 1964, "Robust estimation of a location parameter".
    """
    from scipy import optimize

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
    """Return Akaike's criterion, corrected for few rows; the noise counts as a coefficient.

    Checkpoints of one run are counted as if they were independent. Reference: Hurvich and Tsai
    1989, "Regression and time series model selection in small samples".
    """
    count, free = float(result.data.weight.sum()), len(result.free) + 1
    if count <= free + 1:
        return math.inf
    correction = 2 * free * (free + 1) / (count - free - 1)
    return 2 * free - 2 * log_likelihood(result) + correction


@dataclass(frozen=True)
class Split:
    """Laws fitted to the smaller computes and tried on the larger.

    Attributes:
        errors: By law, root mean square of the difference of log losses above `C`; `None` where the
            law could not be fitted.
        drift: By law, the mean of predicted minus measured log loss there; negative is too hopeful.
    """

    C: float  # largest compute fitted, in FLOPs
    fitted: int  # rows at or below it
    held_out: int  # rows above it
    errors: Mapping[str, float | None]
    drift: Mapping[str, float | None]


@dataclass(frozen=True)
class Entry:
    """A law in a comparison; `refusal` says why it could not be fitted.

    `weight` is its Akaike weight among the laws compared, `error` the root mean square of the
    difference of log losses in sample, `held_out` the same on larger computes, over the splits
    at which all laws could be fitted.
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
    """Laws side by side, the best in AICc first, those that could not be fitted last.

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
        return {entry.law: entry for entry in self.entries}[law]

    @property
    def best(self) -> str:
        """The law of least held-out error; of least AICc where nothing could be held out."""
        if self.entries[0].refusal:
            raise ScalingError(f"every law was refused: {self.entries[0].refusal}")
        judged = [entry for entry in self.entries if entry.held_out is not None]
        if not judged:
            return self.entries[0].law
        return min(judged, key=lambda entry: (entry.held_out, entry.aicc)).law

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; what is infinite becomes null."""
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

    Dense, sparse and familial runs may stand in one table. A law that cannot take every row is not
    fitted, since criteria compare on the same rows alone.

    Args:
        data: Runs, see `RunTable.read`. Computes are in the column `C`, or `6ND`.
        laws (`Sequence[str | Law]`): At least one.
        objective, delta, settings: Arguments of every `fit`.

    Raises:
        ScalingError: If there is no law, or one twice, or outliers depend on the law.

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
    """Return the fit, or why there is none."""
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
    # the largest computes to fit: two budgets and more, for one alone hardly tells the floor from
    # the exponents; or some shares of the runs
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
    """Return predicted minus measured log loss, (rows,)."""
    columns = {name: rows.columns[name] for name in result.law.variable_names}
    return np.log(result.predict(**columns)) - np.log(rows.loss)


def _held_out(name: str, splits: Sequence[Split]) -> float | None:
    """Pool the splits at which all laws were fitted; each of their rows counts the same."""
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
    """Yield a note where variants disagree on gamma, which means something else in each."""
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
        verdict = f"these runs speak for `{variants[0].law}`"
        if doubt:
            verdict = f"these runs do not tell the variants apart: {doubt}"
        yield f"gamma depends on the variant: {shown}. The wrong one biases it; {verdict}."


def _doubt(variants: Sequence[Entry]) -> str:
    """Return why the best law in AICc must not be taken for the true one; empty if it may.

    It must have converged, have the least error on larger computes too, and a clear distance in
    AICc to the next (see `DECISIVE`).
    """
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

"""The analysis of a fit (its intervals, profiles and warnings), and its file fit.json."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..._files import write_whole
from ..._records import from_strict_json, strict_json
from ..._wording import scientific
from ...errors import (
    AnalysisError,
    NoOptimumError,
    NotIdentifiedError,
    ScalingError,
    TooFewError,
)
from .._covariance import CoefficientCovariance, Profile
from ..comparison import Comparison, compare
from ..confidence import intervals
from ..diagnostics import diagnose
from ..flop_models import HeadFlops
from ..laws import get_law
from ..laws.law import Law
from ..quantities import Interval, coefficient
from ..resampling import Bootstrap, Kind, bootstrap
from ..results import Fit
from ..tables.facts import Facts
from ..tables.load import LoadedRuns


FORMAT, SCHEMA = "hf_familial.fit", 2


@dataclass(frozen=True)
class DataSource:
    """The table that the rows of a fit came from.

    Attributes:
        file (`str`): Name of the file, without its folder.
        columns (`Mapping[str, str]`): Column of every variable, or the formula that computed it.
        rows (`int`): Number of rows in the file.
        used (`int`): Number of these rows that could be fitted.
        observed (`int`): Number of rows created from them. For a branch law, each exit is a
            row.
        notes (`tuple[str, ...]`): Sentences on data that were left out, converted or computed.
        facts ([`Facts`]): Facts about the runs: vocabulary, data, and how N and C were counted.
    """

    file: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    rows: int = 0
    used: int = 0
    observed: int = 0
    notes: tuple[str, ...] = ()
    facts: Facts = field(default_factory=Facts)

    @classmethod
    def of(cls, reading: LoadedRuns) -> DataSource:
        """Return the description of the file that `reading` was loaded from."""
        return cls(
            Path(reading.source).name,
            reading.columns,
            reading.found,
            reading.used,
            len(reading.data),
            reading.notes,
            reading.facts,
        )

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> DataSource:
        """Build a source from its JSON form. Schema 1 has no facts."""
        facts = Facts.from_dict(record.get("facts", {}))
        return cls(**{**record, "notes": tuple(record["notes"]), "facts": facts})


@dataclass(frozen=True, eq=False)
class Analysis:
    """The result of [`analyse`]: a fit with its intervals, profiles and warnings.

    Attributes:
        fit ([`Fit`]): The fit, with its rows.
        source ([`DataSource`]): The table of the rows.
        level (`float`): Confidence level of the intervals, between 0 and 1.
        intervals (`Mapping[str, Mapping[str, Interval]]`): Intervals of the fitted coefficients,
            by method and then by coefficient.
        replicates ([`Bootstrap`], *optional*): Fits to resampled rows.
        profiles (`Mapping[str, Profile]`): Profiles by coefficient.
        tables (`Mapping[str, list[dict]]`): Other results by title, as rows of numbers and text.
        warnings (`tuple[str, ...]`): Reasons to doubt the fit, one or two sentences each.
        version (`str`): Version of the package that computed the analysis.
    """

    fit: Fit
    source: DataSource = field(default_factory=DataSource)
    level: float = 0.95
    intervals: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)
    replicates: Bootstrap | None = None
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    tables: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    version: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form. `from_dict` restores the same analysis bit for bit."""
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "version": self.version,
            "fit": self.fit.to_dict(),
            "origin": asdict(self.source),
            "level": self.level,
            "intervals": {
                method: {name: interval.to_dict() for name, interval in found.items()}
                for method, found in self.intervals.items()
            },
            "bootstrap": None if self.replicates is None else self.replicates.to_dict(),
            "profiles": {name: _profile_to_dict(p) for name, p in self.profiles.items()},
            "tables": dict(self.tables),
            "warnings": list(self.warnings),
        }

    def to_json(self) -> str:
        """Return the content of fit.json: the result of `to_dict` as strict JSON on one line."""
        return json.dumps(strict_json(self.to_dict()), allow_nan=False)

    @property
    def cost(self) -> HeadFlops | None:
        """The FLOP model that the runs used, `None` for C = 6ND."""
        return self.source.facts.cost() if self.source.facts.flops == "heads" else None

    @property
    def left_out(self) -> str:
        """The numbers of rows left out, such as `"3 left out in reading"`, `""` if none were."""
        unread = self.source.rows - self.source.used
        far = (self.source.observed or len(self.fit.data)) - len(self.fit.data)
        parts = [f"{unread:,} left out in reading"] if unread else []
        return ", ".join([*parts, f"{far:,} as outliers"] if far else parts)

    @classmethod
    def from_dict(
        cls, record: Mapping[str, Any], find_law: Callable[[str], Law] = get_law
    ) -> Analysis:
        """Build an analysis from the form that `to_dict` returns.

        Args:
            record (`Mapping`): The JSON form.
            find_law (`Callable`): A function from a name to a [`Law`]. Pass one if the law is not
                in `LAWS`.

        Raises:
            AnalysisError: If the record is not an analysis, a newer version wrote it, or a part is
                missing.
            UnknownLawError: If `find_law` does not find the law.
        """
        if not isinstance(record, Mapping) or record.get("format") != FORMAT:
            raise AnalysisError(
                f"This is not a fit, because its `format` is not {FORMAT!r}. Write one with "
                "`hf-familial fit`."
            )
        schema = record.get("schema")
        if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
            raise AnalysisError(
                f"`schema` is {schema!r}, but this version reads 1 to {SCHEMA} only. Upgrade "
                "hf_familial."
            )
        try:
            fit = Fit.from_dict(record["fit"], find_law)
            draws = record["bootstrap"]
            return cls(
                fit=fit,
                source=DataSource.from_dict(record["origin"]),
                level=float(record["level"]),
                intervals={
                    method: {name: Interval.from_dict(interval) for name, interval in found.items()}
                    for method, found in record["intervals"].items()
                },
                replicates=None if draws is None else Bootstrap.from_dict(draws, fit),
                profiles={name: _profile_from_dict(p) for name, p in record["profiles"].items()},
                tables=dict(record["tables"]),
                warnings=tuple(record["warnings"]),
                version=str(record["version"]),
            )
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise AnalysisError(f"A part of the fit is missing or invalid: {error!r}.") from None


@np.errstate(all="ignore")  # a law can be undefined at some points, and they are checked later
def analyse(
    fit: Fit,
    source: DataSource | None = None,
    draws: int = 0,
    kind: Kind = "runs",
    seed: int = 0,
    workers: int = 1,
    profiles: bool = True,
    level: float = 0.95,
    rivals: Sequence[Law] = (),
    version: str = "",
) -> Analysis:
    """Compute the intervals, profiles and warnings of a fit.

    If an interval cannot be computed, no error is raised. A warning of the analysis states the
    reason.

    Args:
        fit ([`Fit`]): The fit.
        source ([`DataSource`], *optional*): The table of its rows.
        draws (`int`): Number of bootstrap replicates. 0 skips the bootstrap.
        kind (`str`): The way of resampling, `"runs"` or `"wild"`, see [`bootstrap`].
        seed (`int`): Seed of the bootstrap.
        workers (`int`): Number of threads of the bootstrap.
        profiles (`bool`): Whether to compute the profile of every fitted coefficient.
        level (`float`): Confidence level of the intervals, between 0 and 1.
        rivals (`Sequence[Law]`): Other laws to fit to the same rows, for comparison.
        version (`str`): Version of the package, stored in the analysis.

    Returns:
        [`Analysis`]: The analysis. Save it with [`write_analysis`].

    Raises:
        ScalingError: If an argument is out of range.
    """
    found: dict[str, Mapping[str, Interval]] = {}
    traced: dict[str, Profile] = {}
    replicates, warnings = None, []
    try:
        found["delta"] = intervals(fit, level=level)
        if profiles:
            traced = _profiles(fit, level)
            found["profile"] = {name: profile.interval for name, profile in traced.items()}
    except (TooFewError, NotIdentifiedError) as error:
        warnings.append(f"Intervals cannot be computed. {error}")
    if draws:
        try:
            replicates = bootstrap(fit, draws, kind, seed, workers)
            found["bca"] = intervals(fit, level=level, method="bca", replicates=replicates)
        except (NoOptimumError, TooFewError, NotIdentifiedError) as error:
            warnings.append(f"Bootstrap intervals cannot be computed. {error}")
    tables: dict[str, list[dict[str, Any]]] = {}
    if rivals:
        laws = [fit.law, *(law for law in rivals if law.name != fit.law.name)]
        comparison = compare(fit.data, laws, fit.settings.objective, fit.settings.delta)
        tables = comparison_tables(comparison)
        warnings += comparison.notes
    return Analysis(
        fit=fit,
        source=source or DataSource(),
        level=level,
        intervals=found,
        replicates=replicates,
        profiles=traced,
        tables=tables,
        warnings=(*diagnose(fit, next(iter(found.values()), {})), *warnings),
        version=version,
    )


def _profiles(fit: Fit, level: float) -> dict[str, Profile]:
    """Return the profiles of the free coefficients that the rows determine."""
    covariance, traced = CoefficientCovariance.of(fit), {}
    for name in fit.free:
        if name not in fit.bounds_hit:
            try:
                traced[name] = covariance.profile(coefficient(fit.law, name), level)
            except NotIdentifiedError:
                continue
    return traced


def comparison_tables(found: Comparison) -> dict[str, list[dict[str, Any]]]:
    """Return two tables by title: the laws, and their errors on larger budgets in percent."""
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
    rollout = []
    for split in found.splits:
        errors = {
            f"{law} (%)": None if error is None else 100 * error
            for law, error in split.errors.items()
        }
        row = {"C up to (FLOPs)": scientific(split.C), "rows": split.fitted}
        rollout.append({**row, "held out": split.held_out, **errors})
    return {"Laws compared": laws, "Error on larger budgets": rollout}


def _profile_to_dict(profile: Profile) -> dict[str, Any]:
    return {
        "values": profile.values.tolist(),
        "rise": profile.rise.tolist(),
        "threshold": profile.threshold,
        "interval": profile.interval.to_dict(),
    }


def _profile_from_dict(record: Mapping[str, Any]) -> Profile:
    values, rise = (np.array(record[name], dtype=np.float64) for name in ("values", "rise"))
    return Profile(values, rise, record["threshold"], Interval.from_dict(record["interval"]))


def write_analysis(path: str | os.PathLike[str], analysis: Analysis) -> None:
    """Write an analysis to fit.json as a single atomic write.

    Raises:
        OSError: If the file cannot be written. An existing file stays unchanged.
    """
    write_whole(path, analysis.to_json() + "\n")


def read_analysis(
    path: str | os.PathLike[str], find_law: Callable[[str], Law] = get_law
) -> Analysis:
    """Read an analysis from fit.json.

    Args:
        path (`str` or `os.PathLike`): A file that [`write_analysis`] wrote.
        find_law (`Callable`): A function from a name to a [`Law`]. Pass one if the law is not in
            `LAWS`.

    Returns:
        [`Analysis`]: The analysis.

    Raises:
        OSError: If the file cannot be read.
        AnalysisError: If the file is not a `fit.json`, or a newer version wrote it.

    Example:
        >>> read_analysis("studies/stdlib_cpu/fit.json").fit.values["gamma"]
    """
    content = Path(path).read_bytes()
    try:
        record = json.loads(content, object_hook=from_strict_json)
    except (ValueError, RecursionError):
        raise AnalysisError(
            f"{path} is not a fit, because it is not JSON. Write one with `hf-familial fit`."
        ) from None
    try:
        return Analysis.from_dict(record, find_law)
    except ScalingError as error:
        raise AnalysisError(f"{path}: {error}") from None

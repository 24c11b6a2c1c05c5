"""A fit with what was made of it, as a file: fit.json, which needs nothing else to be read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ScalingError, StudyError
from .._covariance import Profile
from ..flop_models import HeadFlops
from ..laws import get_law
from ..laws.law import Law
from ..quantities import Interval
from ..resampling import Bootstrap
from ..results import Fit
from ..tables.facts import Facts
from ..tables.load import LoadedRuns


FORMAT, SCHEMA = "hf_familial.fit", 2


@dataclass(frozen=True)
class Origin:
    """Where the rows came from.

    Attributes:
        file (`str`): Name of the file, without its folder.
        columns (`Mapping[str, str]`): Column of every variable, or the formula it came from.
        rows (`int`): Rows of the file.
        used (`int`): Those of them that could be fitted.
        observed (`int`): Rows they became: of a branch law as many as they have exits.
        notes (`tuple[str, ...]`): What was left out, converted or derived in reading.
        facts ([`Facts`]): What the runs tell: vocabulary, data, how N and C were counted.
    """

    file: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    rows: int = 0
    used: int = 0
    observed: int = 0
    notes: tuple[str, ...] = ()
    facts: Facts = field(default_factory=Facts)

    @classmethod
    def of(cls, reading: LoadedRuns) -> Origin:
        """Where the rows of a reading came from."""
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
    def from_dict(cls, record: Mapping[str, Any]) -> Origin:
        """Read the JSON form; one of schema 1 has no facts."""
        facts = Facts.from_dict(record.get("facts", {}))
        return cls(**{**record, "notes": tuple(record["notes"]), "facts": facts})


@dataclass(frozen=True, eq=False)
class Study:
    """A fit and what is known of its uncertainty.

    Attributes:
        fit ([`Fit`]): The fit, its rows included.
        origin ([`Origin`]): Where they came from.
        level (`float`): Coverage of the intervals.
        intervals (`Mapping[str, Mapping[str, Interval]]`): By method, then by free coefficient.
        replicates ([`Bootstrap`], *optional*): Of the fit.
        profiles (`Mapping[str, Profile]`): By coefficient.
        tables (`Mapping[str, list[dict]]`): Further results by title: rows of numbers and words.
        warnings (`tuple[str, ...]`): What speaks against the fit; one sentence each.
        version (`str`): Of the package that made it.
    """

    fit: Fit
    origin: Origin = field(default_factory=Origin)
    level: float = 0.95
    intervals: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)
    replicates: Bootstrap | None = None
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    tables: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    version: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON form, read back by `from_dict` bit for bit."""
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "version": self.version,
            "fit": self.fit.to_dict(),
            "origin": asdict(self.origin),
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
        """`to_dict` in strict JSON, on one line; `read_study` reads it back."""
        return json.dumps(_speakable(self.to_dict()), allow_nan=False)

    @property
    def cost(self) -> HeadFlops | None:
        """What a run costs as the runs counted it; `None` for C = 6ND."""
        return self.origin.facts.cost() if self.origin.facts.flops == "heads" else None

    @property
    def left_out(self) -> str:
        """How many rows were left out, in words; empty if none were."""
        unread = self.origin.rows - self.origin.used
        far = (self.origin.observed or len(self.fit.data)) - len(self.fit.data)
        parts = [f"{unread:,} left out in reading"] if unread else []
        return ", ".join([*parts, f"{far:,} as outliers"] if far else parts)

    @classmethod
    def from_dict(
        cls, record: Mapping[str, Any], find_law: Callable[[str], Law] = get_law
    ) -> Study:
        """Read `to_dict`'s form.

        Args:
            record (`Mapping`): What `to_dict` gave, through JSON or not.
            find_law (`Callable`): Law of a name; give your own for laws of your own.

        Raises:
            StudyError: If it is of another kind or a newer version, or a part is missing.
            UnknownLawError: If the law is not in the catalogue.
        """
        if not isinstance(record, Mapping) or record.get("format") != FORMAT:
            raise StudyError(f"not a fit: its `format` must be {FORMAT!r}; make one with `fit`.")
        schema = record.get("schema")
        if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
            raise StudyError(
                f"its `schema` is {schema!r}, this version reads up to {SCHEMA}: upgrade "
                "hf_familial."
            )
        try:
            return cls._read(record, find_law)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise StudyError(f"a part is missing or broken: {error!r}.") from None

    @classmethod
    def _read(cls, record: Mapping[str, Any], find_law: Callable[[str], Law]) -> Study:
        fit, origin, replicates = (record[part] for part in ("fit", "origin", "bootstrap"))
        fit = Fit.from_dict(fit, find_law)
        return cls(
            fit=fit,
            origin=Origin.from_dict(origin),
            level=float(record["level"]),
            intervals={
                method: {name: Interval.from_dict(interval) for name, interval in found.items()}
                for method, found in record["intervals"].items()
            },
            replicates=None if replicates is None else Bootstrap.from_dict(replicates, fit),
            profiles={name: _profile_from_dict(p) for name, p in record["profiles"].items()},
            tables=dict(record["tables"]),
            warnings=tuple(record["warnings"]),
            version=str(record["version"]),
        )


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


def _speakable(value: Any) -> Any:
    """The same in strict JSON, which has no NaN and no infinity: those as `{"number": "inf"}`."""
    if isinstance(value, Mapping):
        return {str(name): _speakable(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_speakable(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": str(value)}
    return value


def _number(record: dict[str, Any]) -> Any:
    """Undoes `_speakable` in reading."""
    return float(record["number"]) if list(record) == ["number"] else record


def write_study(path: str | os.PathLike[str], study: Study) -> None:
    """Write fit.json, whole or not at all.

    Args:
        path (`str` or `os.PathLike`): The file; what is there is replaced at the very end.
        study ([`Study`]): What to write.

    Raises:
        OSError: If it cannot be written; what was there stays.
    """
    write_whole(path, study.to_json() + "\n")


def read_study(path: str | os.PathLike[str], find_law: Callable[[str], Law] = get_law) -> Study:
    """Read fit.json.

    Args:
        path (`str` or `os.PathLike`): A file of [`write_study`].
        find_law (`Callable`): Law of a name; give your own for laws of your own.

    Returns:
        [`Study`]

    Raises:
        OSError: If it cannot be read.
        StudyError: Naming the file, if it is no fit.json or a newer one.
    """
    content = Path(path).read_bytes()
    try:
        record = json.loads(content, object_hook=_number)
    except (ValueError, RecursionError):
        raise StudyError(f"{path} is not a fit: it is not JSON; make one with `fit`.") from None
    try:
        return Study.from_dict(record, find_law)
    except ScalingError as error:
        raise StudyError(f"{path}: {error}") from None


def check_place(path: str | os.PathLike[str]) -> None:
    """Refuse a place where no file can be written, before the work is done that would go there.

    Args:
        path (`str` or `os.PathLike`): The file to be written.

    Raises:
        OSError: If its folder is missing or closed to us, or something else stands there.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {path}: it is no ordinary file.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}.")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: its folder is read-only.")


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file beside its place and move it there, so that nobody sees half of it.

    Args:
        path (`str` or `os.PathLike`): The file.
        content (`str` or `bytes`): All of it; text goes out as UTF-8.

    Raises:
        OSError: If it cannot be written; what was there stays.
    """
    check_place(path)
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("xb") as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                beside.unlink()
                raise
        beside.replace(path)
    except OSError as error:
        raise type(error)(f"cannot write {path}: {error.strerror or error}.") from None


__all__ = [
    "Origin",
    "Study",
    "StudyError",
    "check_place",
    "read_study",
    "write_study",
    "write_whole",
]

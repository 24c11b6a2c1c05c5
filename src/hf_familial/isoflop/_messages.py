"""Messages between a sweep and its workers: plain data, a line of JSON each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .._records import plain
from ._fields import FIELDS
from .plan import RunPlan


Line = TypeVar("Line", bound="_Line")


class _Line:
    def __post_init__(self) -> None:
        FIELDS.check(self)

    def to_json(self) -> str:
        """Return the fields as one line."""
        return json.dumps(plain(self))

    @classmethod
    def from_json(cls: type[Line], line: str) -> Line:
        """Read a line; errors as in [`RunPlan`]."""
        message: Line = FIELDS.read(cls, json.loads(line))
        return message


@dataclass(frozen=True)
class RunTask(_Line):
    """A run for a worker, with the options of its sweep."""

    plan: RunPlan
    folder: str  # the sweep's, a path or a URL that `fsspec` knows
    data_print: str = ""  # fingerprint that the data must have; empty to accept any
    save_seconds: float = 60.0
    processes: int = 1  # that share the run, started by `accelerate launch`
    keep_models: bool = False


@dataclass(frozen=True)
class WorkerEvent(_Line):
    """News of a run.

    The kind is `"progress"`, `"finished"` (its record is written; diverged runs too), `"failed"`
    (it raised) or `"lost"` (its worker died).
    """

    kind: str
    run_id: str
    step: int = 0  # optimiser steps done
    loss: float | None = None  # last training loss, nats per token
    flops_per_second: float | None = None  # since the last log
    message: str = ""  # the error
    trace: str = ""
    stops_sweep: bool = False  # whether other runs would fail like this: a full disk, lost data


Tell = Callable[[WorkerEvent], Any]


@dataclass(frozen=True)
class Failure:
    """The failed attempts of a run since its last checkpoint, and the last error."""

    attempts: int
    step: int  # of its checkpoint
    message: str
    trace: str = ""

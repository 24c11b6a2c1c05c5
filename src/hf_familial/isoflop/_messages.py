"""Messages between a sweep and its workers. Each message is one line of JSON."""

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
        """Return the message as one line of JSON."""
        return json.dumps(plain(self))

    @classmethod
    def from_json(cls: type[Line], line: str) -> Line:
        """Read a message from a line of JSON. Raise `DesignError` if a field is wrong."""
        message: Line = FIELDS.read(cls, json.loads(line))
        return message


@dataclass(frozen=True)
class RunTask(_Line):
    """A run that a sweep sends to a worker, with the options of the sweep."""

    plan: RunPlan
    folder: str  # path or `fsspec` URL of the sweep's folder
    data_print: str = ""  # fingerprint that the data must have; empty accepts any data
    save_seconds: float = 60.0
    processes: int = 1  # number of processes that share the run, with `accelerate launch`
    keep_models: bool = False


@dataclass(frozen=True)
class WorkerEvent(_Line):
    """A message from a worker about one run.

    The `kind` is `"progress"`, `"finished"` (the record is written, for diverged runs too),
    `"failed"` (the run raised an error) or `"lost"` (the worker died).
    """

    kind: str
    run_id: str
    step: int = 0  # number of finished optimiser steps
    loss: float | None = None  # last training loss, nats per token
    flops_per_second: float | None = None  # since the last log
    message: str = ""  # message of the error
    trace: str = ""  # traceback of the error
    stops_sweep: bool = False  # true if all runs would fail, for example because the disk is full


Tell = Callable[[WorkerEvent], Any]


@dataclass(frozen=True)
class Failure:
    """The failed attempts of a run since its last checkpoint, and the last error."""

    attempts: int
    step: int  # optimiser step of the last checkpoint
    message: str
    trace: str = ""

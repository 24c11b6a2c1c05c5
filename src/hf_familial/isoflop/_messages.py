"""What a sweep and its workers say to each other: plain data, a line of JSON each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ._fields import check_fields, plain, read
from .plan import RunPlan


Line = TypeVar("Line", bound="_Line")


class _Line:
    def __post_init__(self) -> None:
        check_fields(self)

    def to_json(self) -> str:
        """Return the fields as one line."""
        return json.dumps(plain(self))

    @classmethod
    def from_json(cls: type[Line], line: str) -> Line:
        """Read a line; errors as in [`RunPlan`]."""
        message: Line = read(cls, json.loads(line))
        return message


@dataclass(frozen=True)
class RunTask(_Line):
    """One run for a worker to do.

    Attributes:
        plan ([`RunPlan`]): The run.
        folder (`str`): The sweep's folder, a path or a URL that `fsspec` knows.
        data_print (`str`): Fingerprint that the data must have; empty to accept any.
        save_seconds (`float`): Seconds between checkpoints, at least; they stand where losses are
            logged.
        processes (`int`): Processes that share the run, started by `accelerate launch`.
        keep_models (`bool`): Whether the trained family stays in the run's folder.
    """

    plan: RunPlan
    folder: str
    data_print: str = ""
    save_seconds: float = 60.0
    processes: int = 1
    keep_models: bool = False


@dataclass(frozen=True)
class WorkerEvent(_Line):
    """News of a run.

    Attributes:
        kind (`str`): `"progress"`, `"finished"` (its record is written; diverged runs too),
            `"failed"` (it raised) or `"lost"` (its worker died).
        run_id (`str`): The run.
        step (`int`): Optimiser steps done.
        loss (`float`, *optional*): Last training loss, nats per token.
        flops_per_second (`float`, *optional*): Rate of training since the last log.
        message (`str`): The error.
        trace (`str`): Its traceback.
        stops_sweep (`bool`): Whether other runs would fail in the same way: a full disk, data that
            are gone.
    """

    kind: str
    run_id: str
    step: int = 0
    loss: float | None = None
    flops_per_second: float | None = None
    message: str = ""
    trace: str = ""
    stops_sweep: bool = False


Tell = Callable[[WorkerEvent], Any]


@dataclass(frozen=True)
class Failure:
    """The failed attempts of a run so far.

    Attributes:
        attempts (`int`): Attempts that got no further than the checkpoint before.
        step (`int`): Step of its checkpoint at the last attempt.
        message (`str`): The last error.
        trace (`str`): Its traceback.
    """

    attempts: int
    step: int
    message: str
    trace: str = ""

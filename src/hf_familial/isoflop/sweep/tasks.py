"""What a sweep hands to its workers, and what these tell it: plain data that JSON can carry."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..design.fields import check_fields, plain, read
from ..design.plans import RunPlan


KINDS = ("progress", "finished", "failed", "lost")


@dataclass(frozen=True)
class Task:
    """One run to be done.

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

    def __post_init__(self) -> None:
        check_fields(self)

    def to_json(self) -> str:
        """The task as one line."""
        return json.dumps(plain(self))

    @classmethod
    def from_json(cls, line: str) -> Task:
        """The task of a line; errors as in [`RunPlan`]."""
        task: Task = read(cls, json.loads(line))
        return task


@dataclass(frozen=True)
class Event:
    """What happened to a run.

    Attributes:
        kind (`str`): `"progress"`, `"finished"` (its record is written; diverged runs too),
            `"failed"` (it raised) or `"lost"` (its worker died).
        run_id (`str`): Which run.
        step (`int`): Optimiser steps done.
        loss (`float`, *optional*): Last training loss, nats per token.
        flops_per_second (`float`, *optional*): Of training, since the last log.
        message (`str`): What went wrong.
        trace (`str`): Where.
        stops_sweep (`bool`): Whether other runs would fail in the same way: a full disk, data that
            is gone.
    """

    kind: str
    run_id: str
    step: int = 0
    loss: float | None = None
    flops_per_second: float | None = None
    message: str = ""
    trace: str = ""
    stops_sweep: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def to_json(self) -> str:
        """The event as one line."""
        return json.dumps(plain(self))

    @classmethod
    def from_json(cls, line: str) -> Event:
        """The event of a line; errors as in [`RunPlan`]."""
        event: Event = read(cls, json.loads(line))
        return event


Tell = Callable[[Event], Any]

"""How far a sweep is: the state of every run of its design, read from its folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ...runs import RunRecord
from ..design.plans import RunPlan
from .folder import FAILURE, STATE, SweepFolder


SILENCE = 60  # seconds without a word after which a sweep is taken to be dead
STATES = ("finished", "diverged", "running", "failed", "waiting")


@dataclass(frozen=True)
class Failure:
    """What went wrong with a run so far.

    Attributes:
        attempts (`int`): Times that it was tried in vain, without getting further.
        step (`int`): Step of its checkpoint at the last attempt.
        message (`str`): The last error.
        trace (`str`): Where it was raised.
    """

    attempts: int
    step: int
    message: str
    trace: str = ""


@dataclass(frozen=True)
class RunState:
    """One run of a sweep.

    Attributes:
        plan ([`RunPlan`]): The run.
        state (`str`): `"finished"`, `"diverged"`, `"running"`, `"failed"` or `"waiting"`.
        step (`int`): Optimiser steps that are safe, or done if it runs.
        record ([`~hf_familial.runs.RunRecord`], *optional*): Its row, once it ended.
        failure ([`Failure`], *optional*): What went wrong so far.
        loss (`float`, *optional*): Mean training loss, nats per token, if it runs.
    """

    plan: RunPlan
    state: str
    step: int
    record: RunRecord | None = None
    failure: Failure | None = None
    loss: float | None = None


def read_failure(folder: SweepFolder, run_id: str) -> Failure | None:
    """What went wrong with a run; `None` if nothing did, or it was forgiven."""
    row = folder.read_json("runs", run_id, FAILURE)
    try:
        return Failure(**row) if row else None
    except TypeError:
        return None


def given_up(failure: Failure | None, retries: int) -> bool:
    """Whether a run has failed so often that it is no more tried."""
    return failure is not None and failure.attempts > retries


def survey(folder: SweepFolder, plans: Sequence[RunPlan], retries: int = 2) -> tuple[RunState, ...]:
    """Look at every run of a design.

    Args:
        folder ([`SweepFolder`]): Of the sweep; nothing in it changes.
        plans (`Sequence[RunPlan]`): The runs.
        retries (`int`, *optional*, defaults to 2): Failures after which a run is no more tried,
            less one.

    Returns:
        `tuple[RunState, ...]`: In the order of the design.

    Raises:
        RunRecordError: If a row of runs.jsonl is wrong.
    """
    rows = folder.rows()
    state = folder.read_json(STATE)
    alive = time.time() - state.get("time", 0) < SILENCE
    running = state.get("running", {}) if alive else {}
    return tuple(_state(folder, plan, rows.get(plan.id), running, retries) for plan in plans)


def _state(
    folder: SweepFolder,
    plan: RunPlan,
    record: RunRecord | None,
    running: dict[str, dict[str, float]],
    retries: int,
) -> RunState:
    if record is not None:
        return RunState(plan, record.status, plan.steps, record)
    failure = read_failure(folder, plan.id)
    step = folder.steps_saved(plan.id)
    if plan.id in running:
        now = running[plan.id]
        step = max(step, int(now.get("step", 0)))
        return RunState(plan, "running", step, failure=failure, loss=now.get("loss"))
    state = "failed" if given_up(failure, retries) else "waiting"
    return RunState(plan, state, step, failure=failure)

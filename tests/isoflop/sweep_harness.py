"""What tests of sweeps share: a tiny corpus and design, an executor of this process, rows."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_familial.isoflop import BackboneTemplate, Fixed, IsoFlopDesign, RunTask, WorkerEvent
from hf_familial.isoflop._worker import run_task


WORDS = "alpha beta gamma delta the of and a b exit layer loss".split()
BUDGET = 4.3e7  # FLOPs: 20 steps of G = 1, 14 of G = 2, on 16x2
CLOCKS = ("wall_s", "tokens_per_s")


class Killed(BaseException):
    """The process is gone: nothing catches it, as nothing catches a signal 9."""


def write_corpus(folder: Path, seed: int = 0, documents: int = 30, words: int = 120) -> Path:
    """A folder of small texts."""
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        text = " ".join(chance.choice(WORDS) for _ in range(words))
        (folder / f"{number:02}.txt").write_text(text)
    return folder


def design_of(data: Path | str, **fields: Any) -> IsoFlopDesign:
    """Two runs, G = 1 and 2, of less than a second."""
    training = {"eval_fraction": 0.2, "use_cpu": True, "logging_steps": 2, "eval_steps": 6}
    usual: dict[str, Any] = {
        "budgets": (BUDGET,),
        "sizes": ("16x2",),
        "vocab_size": 300,
        "seq_length": 16,
        "granularities": (1, 2),
        "backbone": BackboneTemplate(head_dim=8, multiple=8, kv_heads=1),
        "rule": Fixed(lr=1e-2, batch_tokens=32),
        "data": str(data),
    }
    training |= fields.pop("training", {})
    return IsoFlopDesign(**(usual | fields), training=training)


class Here:
    """An executor that does a run at once, in this process.

    Args:
        before: Called with every task, before it is done.
        hear: Called with every event; what it raises comes out of the run.
    """

    slots = 1

    def __init__(
        self,
        before: Callable[[RunTask], Any] = lambda task: None,
        hear: Callable[[WorkerEvent], Any] = lambda event: None,
    ) -> None:
        self.before, self.hear = before, hear
        self.events: list[WorkerEvent] = []
        self.submitted: list[str] = []
        self.closed = 0

    def start(self) -> None:
        pass

    def submit(self, task: RunTask) -> None:
        self.submitted.append(task.plan.id)
        self.before(task)
        run_task(task, self._tell)

    def _tell(self, event: WorkerEvent) -> None:
        self.events.append(event)
        self.hear(event)

    def poll(self, seconds: float) -> list[WorkerEvent]:
        events, self.events = self.events, []
        return events

    def close(self) -> None:
        self.closed += 1


def killed_at(count: int, kind: str = "progress") -> Callable[[WorkerEvent], None]:
    """Dies of the event of a kind with this number, from 1."""
    left = [count]

    def hear(event: WorkerEvent) -> None:
        left[0] -= event.kind == kind
        if not left[0]:
            left[0] = -1
            raise Killed

    return hear


def rows_of(folder: Path, name: str = "runs.jsonl") -> list[dict[str, Any]]:
    """The rows of a file without their clocks, in an order of their own."""
    path = folder / name
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    told = [{key: row[key] for key in row if key not in CLOCKS} for row in rows]
    return sorted(told, key=lambda row: (row["run_id"], row.get("step", 0)))


def assert_same_sweep(folder: Path, other: Path) -> None:
    """Every run once, equal to the last bit, and nothing left of their doing."""
    assert rows_of(folder)
    assert rows_of(folder) == rows_of(other)
    assert rows_of(folder, "evaluations.jsonl") == rows_of(other, "evaluations.jsonl")
    assert not list((folder / "runs").iterdir())
    assert not (folder / "state.json").exists()
    assert not list(folder.glob(".*.json*"))

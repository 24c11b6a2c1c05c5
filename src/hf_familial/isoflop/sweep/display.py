"""How a sweep goes: on a terminal as bars, elsewhere as lines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from ...runs import RunRecord
from ..design.plans import RunPlan
from ..design.table import words_of_time
from .status import Failure
from .tasks import Event


LINE_SECONDS = 60.0  # between two plain lines of progress


class Display(Protocol):
    """What a sweep tells while it runs."""

    def begin(self, plans: Sequence[RunPlan], ended: Sequence[RunPlan]) -> None:
        """All runs, and those that had ended before."""

    def progress(self, plan: RunPlan, event: Event) -> None:
        """A run that goes on."""

    def ended(self, plan: RunPlan, record: RunRecord) -> None:
        """A run that ended."""

    def failed(self, plan: RunPlan, failure: Failure, again: bool) -> None:
        """A run that failed, and whether it is tried again."""

    def close(self) -> None:
        """Nothing more comes."""


@dataclass
class Tally:
    """FLOPs of a sweep: all, done, and done before it was taken up.

    Attributes:
        total (`float`): FLOPs of all runs.
        done (`dict[str, float]`): FLOPs done, by run.
        before (`dict[str, float]`): Of these, those done before this start.
        start (`float`): Time of this start, seconds.
    """

    total: float = 0.0
    done: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)

    def put(self, plan: RunPlan, step: int, before: bool = False) -> None:
        """How far a run is; what a checkpoint had is no work of this start."""
        self.done[plan.id] = plan.flops * step / plan.steps
        if before:
            self.before.setdefault(plan.id, self.done[plan.id])

    @property
    def rate(self) -> float:
        """FLOP/s since this start, over all workers."""
        new = sum(self.done.values()) - sum(self.before.values())
        return max(new, 0.0) / max(time.monotonic() - self.start, 1e-9)

    @property
    def share(self) -> float:
        """Share of all FLOPs that is done."""
        return sum(self.done.values()) / self.total if self.total else 1.0

    def left(self) -> str:
        """Time left, in words."""
        rate = self.rate
        return words_of_time((1 - self.share) * self.total / rate) if rate > 0 else "?"


class LineDisplay:
    """Plain lines: one for every run that ends, and now and then how far all are.

    Args:
        console (`rich.console.Console`, *optional*): Where to; standard error by default.
        seconds (`float`, *optional*, defaults to 60): Between two lines of progress.
    """

    def __init__(self, console: Console | None = None, seconds: float = LINE_SECONDS) -> None:
        self.console = console or Console(stderr=True)
        self.seconds, self.tally = seconds, Tally()
        self.runs, self.ended_runs, self.given_up = 0, 0, 0
        self._now: dict[str, tuple[RunPlan, Event]] = {}
        self._said = 0.0

    def begin(self, plans: Sequence[RunPlan], ended: Sequence[RunPlan]) -> None:
        """All runs, and those that had ended before."""
        self.tally = Tally(sum(plan.flops for plan in plans))
        for plan in ended:
            self.tally.put(plan, plan.steps, before=True)
        self.runs, self.ended_runs, self._said = len(plans), len(ended), time.monotonic()
        self._say(f"{len(ended)} of {len(plans)} runs done, {self.tally.total:.3e} FLOPs in all")

    def progress(self, plan: RunPlan, event: Event) -> None:
        """A run that goes on."""
        self.tally.put(plan, event.step, before=plan.id not in self._now)
        self._now[plan.id] = (plan, event)
        self._show(plan, event)

    def _show(self, plan: RunPlan, event: Event) -> None:
        if time.monotonic() - self._said < self.seconds:
            return
        self._said = time.monotonic()
        runs = "; ".join(f"{name_of(p)} {progress_of(p, e)}" for p, e in self._now.values())
        self._say(f"{self.summary()}: {runs}")

    def ended(self, plan: RunPlan, record: RunRecord) -> None:
        """A run that ended."""
        self._now.pop(plan.id, None)
        self.tally.put(plan, plan.steps)
        self.ended_runs += 1
        self._say(f"{self.ended_runs}/{self.runs} {name_of(plan)} {outcome_of(record)}")

    def failed(self, plan: RunPlan, failure: Failure, again: bool) -> None:
        """A run that failed, and whether it is tried again."""
        self._now.pop(plan.id, None)
        self.given_up += not again
        then = "is tried again" if again else "is given up"
        self._say(f"{name_of(plan)} failed and {then}: {failure.message}")

    def close(self) -> None:
        """Nothing more comes."""

    def summary(self, share: bool = True) -> str:
        """Runs done, their share of the FLOPs, FLOP/s, time left."""
        gone = f", {self.given_up} given up" if self.given_up else ""
        done = f", {self.tally.share:.0%} of the FLOPs" if share else ""
        return (
            f"{self.ended_runs}/{self.runs} runs{gone}{done}, "
            f"{self.tally.rate / 1e9:.1f} GFLOP/s, {self.tally.left()} left"
        )

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class BarDisplay(LineDisplay):
    """Bars that stay in place: one over all runs, one for each that goes on; ends stay as lines."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[text]}"),
            console=self.console,
        )
        self._ids: dict[str, TaskID] = {}
        self._all: TaskID | None = None

    def begin(self, plans: Sequence[RunPlan], ended: Sequence[RunPlan]) -> None:
        """All runs, and those that had ended before."""
        super().begin(plans, ended)
        self._all = self._bars.add_task("all runs", total=1.0, text="")
        self._bars.start()
        self._refresh()

    def _show(self, plan: RunPlan, event: Event) -> None:
        if plan.id not in self._ids:
            self._ids[plan.id] = self._bars.add_task(name_of(plan), total=plan.steps, text="")
        text = progress_of(plan, event)
        self._bars.update(self._ids[plan.id], completed=event.step, text=text)
        self._refresh()

    def ended(self, plan: RunPlan, record: RunRecord) -> None:
        """A run that ended."""
        super().ended(plan, record)
        self._drop(plan)

    def failed(self, plan: RunPlan, failure: Failure, again: bool) -> None:
        """A run that failed, and whether it is tried again."""
        super().failed(plan, failure, again)
        self._drop(plan)

    def close(self) -> None:
        """Take the bars away; what they said last stays as a line."""
        if self._all is not None:
            self._bars.stop()

    def _drop(self, plan: RunPlan) -> None:
        bar = self._ids.pop(plan.id, None)
        if bar is not None:
            self._bars.remove_task(bar)
        self._refresh()

    def _refresh(self) -> None:
        if self._all is not None:
            text = self.summary(share=False)  # the bar shows it; lines of 80 columns
            self._bars.update(self._all, completed=self.tally.share, text=text)


def display_for(console: Console | None = None) -> LineDisplay:
    """Bars where there is a terminal, lines elsewhere."""
    console = console or Console(stderr=True)
    return BarDisplay(console) if console.is_terminal else LineDisplay(console)


def name_of(plan: RunPlan) -> str:
    """A run in few words."""
    return f"{plan.id[:8]} C={plan.budget:.3g} {plan.width}x{plan.depth} G={plan.G} s{plan.seed}"


def progress_of(plan: RunPlan, event: Event) -> str:
    """How far a run is, in few words."""
    loss = "" if event.loss is None else f", loss {event.loss:.3f}"
    rate = event.flops_per_second
    speed = "" if rate is None else f", {rate / 1e9:.1f} GFLOP/s"
    return f"step {event.step}/{plan.steps}{loss}{speed}"


def outcome_of(record: RunRecord) -> str:
    """What a run came to, in few words."""
    losses = record.eval_loss_exits
    shown = "no evaluation"
    if losses is not None:
        shown = "eval loss " + " ".join("nan" if x is None else f"{x:.4f}" for x in losses)
    speed = f"{record.C_flops / max(record.wall_s, 1e-9) / 1e9:.1f} GFLOP/s"
    return f"{record.status}: {shown}, {words_of_time(record.wall_s)}, {speed}"

"""Display of a sweep's progress, as bars in a terminal and as lines of text elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import progress as bars
from rich.console import Console

from .._wording import duration
from ..runs import RunRecord
from ._messages import Failure, WorkerEvent
from .plan import RunPlan


@dataclass
class Progress:
    """FLOPs of a sweep: the total, those done by each run, and those done before this start."""

    total: float = 0.0
    done: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)

    def put(self, plan: RunPlan, step: int, before: bool = False) -> None:
        """Record the steps of a run. Pass `before=True` for steps done before this start."""
        self.done[plan.id] = plan.flops * step / plan.steps
        if before:
            self.before.setdefault(plan.id, self.done[plan.id])

    @property
    def rate(self) -> float:
        """FLOP/s of all workers since this start."""
        new = sum(self.done.values()) - sum(self.before.values())
        return max(new, 0.0) / max(time.monotonic() - self.start, 1e-9)

    @property
    def share(self) -> float:
        """Share of the total FLOPs that is done."""
        return sum(self.done.values()) / self.total if self.total else 1.0

    def left(self) -> str:
        """Return the remaining time as text."""
        rate = self.rate
        return duration((1 - self.share) * self.total / rate) if rate > 0 else "?"


class SweepDisplay:
    """A display of a sweep's progress on a console.

    A terminal shows one bar for the whole sweep and one for each run in progress. A run that ends
    becomes a line of text. Elsewhere, each run that ends prints a line, and so does the whole sweep
    from time to time.

    Args:
        console (`rich.console.Console`, *optional*): Console to print to. Defaults to standard
            error.
        seconds (`float`, *optional*, defaults to 60): Seconds between two lines about the whole
            sweep.

    Example:
        >>> Sweep(design, "sweep", display=SweepDisplay()).run()
    """

    def __init__(self, console: Console | None = None, seconds: float = 60.0) -> None:
        self.console = console or Console(stderr=True)
        self.seconds, self.flops = seconds, Progress()
        self.runs, self.ended_runs, self.given_up = 0, 0, 0
        self._now: dict[str, tuple[RunPlan, WorkerEvent]] = {}
        self._said = 0.0
        self._bars: bars.Progress | None = None
        self._ids: dict[str, bars.TaskID] = {}

    def begin(self, plans: Sequence[RunPlan], ended: Sequence[RunPlan]) -> None:
        """Start the display, with all runs and those that had ended before."""
        self.flops = Progress(sum(plan.flops for plan in plans))
        for plan in ended:
            self.flops.put(plan, plan.steps, before=True)
        self.runs, self.ended_runs, self._said = len(plans), len(ended), time.monotonic()
        self._say(f"{len(ended)} of {len(plans)} runs done, {self.flops.total:.3e} FLOPs in total")
        if self.console.is_terminal:
            columns = (
                bars.TextColumn("{task.description}"),
                bars.BarColumn(bar_width=8),
                bars.TextColumn("{task.fields[text]}"),
            )
            self._bars = bars.Progress(*columns, console=self.console)
            self._ids[""] = self._bars.add_task("all runs", total=1.0, text="")
            self._bars.start()
            self._show_bar()

    def progress(self, plan: RunPlan, event: WorkerEvent) -> None:
        """Update a run that is in progress."""
        self.flops.put(plan, event.step, before=plan.id not in self._now)
        self._now[plan.id] = (plan, event)
        if self._bars is not None:
            self._show_bar(plan, event)
        elif time.monotonic() - self._said >= self.seconds:
            self._said = time.monotonic()
            runs = "; ".join(f"{_name(p)} {_progress(p, e)}" for p, e in self._now.values())
            self._say(f"{self.summary()}: {runs}")

    def ended(self, plan: RunPlan, record: RunRecord) -> None:
        """Print the result of a run that ended."""
        self.flops.put(plan, plan.steps)
        self.ended_runs += 1
        self._drop(plan, f"{self.ended_runs}/{self.runs} {_name(plan)} {_outcome(record)}")

    def failed(self, plan: RunPlan, failure: Failure, again: bool) -> None:
        """Print the error of a run. `again` is true if the sweep tries the run again."""
        self.given_up += not again
        then = "will be tried again" if again else "will not be tried again"
        self._drop(plan, f"{_name(plan)} failed and {then}: {failure.message}")

    def close(self) -> None:
        """Stop the bars. Their last state stays on the screen."""
        if self._bars is not None:
            self._bars.stop()

    def summary(self, share: bool = True) -> str:
        """Return one line: runs done, share of the FLOPs, FLOP/s and remaining time."""
        gone = f", {self.given_up} failed" if self.given_up else ""
        done = f", {self.flops.share:.0%} of the FLOPs" if share else ""
        return (
            f"{self.ended_runs}/{self.runs} runs{gone}{done}, "
            f"{self.flops.rate / 1e9:.1f} GFLOP/s, {self.flops.left()} left"
        )

    def _drop(self, plan: RunPlan, line: str) -> None:
        """Print how a run ended, and remove its bar."""
        self._now.pop(plan.id, None)
        self._say(line)
        if self._bars is not None:
            bar = self._ids.pop(plan.id, None)
            if bar is not None:
                self._bars.remove_task(bar)
            self._show_bar()

    def _show_bar(self, plan: RunPlan | None = None, event: WorkerEvent | None = None) -> None:
        """Update the bar of a run, if one is passed, and the bar of the whole sweep."""
        assert self._bars is not None
        if plan is not None and event is not None:
            if plan.id not in self._ids:
                self._ids[plan.id] = self._bars.add_task(_name(plan), total=plan.steps, text="")
            text = _progress(plan, event)
            self._bars.update(self._ids[plan.id], completed=event.step, text=text)
        text = self.summary(share=False)  # the bar already shows the share; a line has 80 columns
        self._bars.update(self._ids[""], completed=self.flops.share, text=text)

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _name(plan: RunPlan) -> str:
    return f"{plan.id[:8]} C={plan.budget:.3g} {plan.width}x{plan.depth} G={plan.G} s{plan.seed}"


def _progress(plan: RunPlan, event: WorkerEvent) -> str:
    loss = "" if event.loss is None else f", loss {event.loss:.3f}"
    rate = event.flops_per_second
    speed = "" if rate is None else f", {rate / 1e9:.1f} GFLOP/s"
    return f"step {event.step}/{plan.steps}{loss}{speed}"


def _outcome(record: RunRecord) -> str:
    losses = record.eval_loss_exits
    shown = "no evaluation"
    if losses is not None:
        shown = "eval loss " + " ".join("nan" if x is None else f"{x:.4f}" for x in losses)
    speed = f"{record.C_flops / max(record.wall_s, 1e-9) / 1e9:.1f} GFLOP/s"
    return f"{record.status}: {shown}, {duration(record.wall_s)}, {speed}"

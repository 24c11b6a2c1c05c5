"""The callback of a run in a sweep: tells how it goes, saves by the clock, stops what diverged."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...training.record import last_exit_losses, named_losses
from ..design.plans import RunPlan
from .folder import RUN_POINTS
from .tasks import Event, Tell
from .workspace import Workspace


class SweepCallback(TrainerCallback):
    """Tells, saves, stops.

    Checkpoints stand where losses are logged, for a log is a mean since the last one: a run that is
    taken up elsewhere would have another.

    Args:
        plan ([`RunPlan`]): The run.
        space ([`Workspace`]): Where it trains.
        tell (`Callable[[Event], Any]`): Takes events.
        save_seconds (`float`): Seconds between checkpoints, at least.
    """

    def __init__(self, plan: RunPlan, space: Workspace, tell: Tell, save_seconds: float) -> None:
        self.plan, self.space, self.tell, self.save_seconds = plan, space, tell, save_seconds
        self._saved = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._saved = time.monotonic()
        self.tell(Event("progress", self.plan.id, step=state.global_step))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell the loss; stop a run that has none any more."""
        if not logs or "exit_0_loss" not in logs:
            return
        losses = [logs[f"exit_{k}_loss"] for k in range(self.plan.G)]
        mean = sum(losses) / len(losses)
        finite = math.isfinite(mean)
        control.should_training_stop |= not finite
        # the clocks of several processes differ, and all must save or none
        due = broadcast_object_list([time.monotonic() - self._saved >= self.save_seconds])[0]
        control.should_save = finite and due and state.global_step < state.max_steps
        loss, rate = mean if finite else None, logs.get("flops_per_second")
        self.tell(Event("progress", self.plan.id, state.global_step, loss, rate))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the checkpoint count."""
        if state.is_world_process_zero:
            self.space.commit(state.global_step)
        self._saved = time.monotonic()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the evaluations of the run."""
        if state.is_world_process_zero:
            text = "".join(f"{json.dumps(row)}\n" for row in self._points(args, state))
            (self.space.path / RUN_POINTS).write_text(text, encoding="utf-8")

    def _points(self, args: TrainingArguments, state: TrainerState) -> list[dict[str, Any]]:
        plan, rows = self.plan, []
        for log in state.log_history:
            losses = last_exit_losses([log], "eval_exit", plan.G)
            if losses is None:
                continue
            tokens = log["step"] * plan.batch_tokens
            row = {"run_id": plan.id, "step": log["step"], "D_tokens": tokens}
            row["C_flops"] = tokens * plan.flops_per_token
            # JSON has no NaN
            known = [loss if math.isfinite(loss) else None for loss in losses]
            whole = named_losses("eval_loss", losses) if None not in known else {}
            rows.append(row | whole | {"eval_loss_exits": known})
        return rows

"""Callbacks: count FLOPs, stop at a budget of them, write a row of runs.jsonl, show progress."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from transformers import (
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from .. import __version__
from ..errors import RunRecordError
from ..runs import append_run, read_runs
from .budget import flops_per_step, sequence_length, steps_for_budget, unwrap
from .run_record import TokenCounts, make_record
from .tuning import what_learns


logger = logging.getLogger(__name__)


class FlopCounterCallback(TrainerCallback):
    """Logs the FLOPs trained so far, their rate, and the share of the hardware's peak (MFU).

    Adds to every training log `flops`, `flops_per_second` and, where the peak is known, `mfu`. It
    reads `state.total_flos`, which the trainer counts. The time of evaluations and of saving is
    left out of the rate.

    Args:
        peak_flops (`float`, *optional*): FLOPs per second of one device at its best.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        if peak_flops is not None and not 0 < peak_flops < math.inf:
            raise ValueError(f"`peak_flops` must be positive FLOPs per second, got {peak_flops}.")
        self.peak_flops = peak_flops
        self._since, self._busy, self._counted = 0.0, 0.0, 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._since, self._busy, self._counted = time.perf_counter(), 0.0, state.total_flos

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the time since the last step."""
        now = time.perf_counter()
        self._busy, self._since = self._busy + now - self._since, now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave out the time of the evaluation."""
        self._since = time.perf_counter()

    on_save = on_evaluate

    def measure(self, args: TrainingArguments, state: TrainerState) -> dict[str, float]:
        """Return `flops`, `flops_per_second` and maybe `mfu`; start the next interval."""
        # on an accelerator the steps end here, where the host has waited for their loss
        self.on_step_end(args, state, None)
        rate = (state.total_flos - self._counted) / max(self._busy, 1e-9)
        self._busy, self._counted = 0.0, state.total_flos
        values = {"flops": float(state.total_flos), "flops_per_second": rate}
        if self.peak_flops is not None:
            values["mfu"] = rate / (self.peak_flops * args.world_size * max(1, args.n_gpu))
        return values

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the measures where the trainer has not: to the history and to later callbacks."""
        if logs is not None and "loss" in logs and "flops" not in logs:
            values = self.measure(args, state)
            logs |= values
            state.log_history[-1] |= values


class FlopBudgetCallback(TrainerCallback):
    """Ends training at the optimiser step that reaches a budget of FLOPs.

    The learning rate's schedule must end there too: set `args.max_steps` with `steps_for_budget`
    before training, which takes every step to hold a full batch of full sequences. Under a
    [`FamilialTrainer`] the run ends at the step whose counted FLOPs (`state.total_flos`) reach the
    budget, which rows of other lengths reach sooner. A run that ends before it says so.

    Args:
        budget (`float`): FLOPs of the whole run, resumed parts counted.
        seq_length (`int`, *optional*): Tokens of every sequence, or their mean; read off the first
            row of the training data by default.
    """

    def __init__(self, budget: float, seq_length: int | None = None) -> None:
        self.budget, self.seq_length, self.steps = budget, seq_length, 0
        # brings `state.total_flos` up to date; set by the trainer
        self.store: Callable[[], None] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        """Raise a ValueError if `max_steps` is more than one step off the budget."""
        length = self.seq_length or sequence_length(kwargs.get("train_dataloader"))
        per_step = flops_per_step(unwrap(kwargs["model"]), args, length)
        self.steps = steps_for_budget(self.budget, per_step)
        if abs(state.max_steps - self.steps) > 1:
            raise ValueError(
                f"`max_steps` must be {self.steps} for a budget of {self.budget:.4g} FLOPs at "
                f"{per_step:.4g} a step, or the learning rate would not end with it; got "
                f"{state.max_steps}. Set it with `steps_for_budget`."
            )
        # the host ends a run here, with its last log, evaluation and checkpoint
        state.max_steps = min(state.max_steps, self.steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the run where its FLOPs reach the budget, as the host ends one at `max_steps`."""
        if self.store is None or state.global_step >= state.max_steps:
            return
        self.store()
        if self._reached(state):
            state.max_steps = state.global_step
            control.should_training_stop = control.should_log = True
            control.should_evaluate |= args.eval_strategy == "steps"
            control.should_save |= args.save_strategy == "steps"

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Warn if the budget was not reached."""
        if self.store is not None and not self._reached(state):
            logger.warning(
                "The run ended at %.4g of its budget of %.4g FLOPs: its batches or sequences were "
                "smaller than full ones. Give `seq_length` the mean length, or more steps.",
                state.total_flos,
                self.budget,
            )

    def _reached(self, state: TrainerState) -> bool:
        # the sum of many steps may come out a hair below it
        return state.total_flos >= self.budget * (1 - 1e-9)


class RunRecordCallback(TrainerCallback, ExportableState):
    """Appends one row of runs.jsonl when training ends, in the first process only.

    The last step is logged, and evaluated if the run evaluates at all, so that the row has its
    losses. A run that is resumed from a checkpoint keeps its `run_id` and adds to its `wall_s`; one
    that the file already has as finished is not written again.

    Under a [`FamilialTrainer`] tokens and FLOPs are those that were run, whatever the lengths of
    rows and batches. Another trainer does not count them, and an old checkpoint may have no counts:
    then every step is taken to hold a full batch of full sequences, and a warning says so.

    Args:
        path (`str`): File of the runs.
        run_id (`str`, *optional*): Name of the run; drawn by default.
        data (`str`, *optional*): The training data.
        seq_length (`int`, *optional*): Tokens of every sequence; read off the first row of the
            training data by default.
        code_version (`str`, *optional*): Defaults to this package's version.
    """

    def __init__(
        self,
        path: str,
        run_id: str | None = None,
        data: str = "",
        seq_length: int | None = None,
        code_version: str = __version__,
    ) -> None:
        self.path, self.run_id, self.data = str(path), run_id, data
        self.seq_length, self.code_version = seq_length, code_version
        self._name: str | None = None
        self._family: Any = None
        self._train: Any = "all"
        self._wall_before, self._began = 0.0, 0.0
        self._counts: TokenCounts | None = None
        self._counted, self._open = False, False

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; older checkpoints are read by these names."""
        names = ("path", "run_id", "data", "seq_length", "code_version")
        kept: dict[str, Any] = {"_name": self._name, "_wall_before": self._wall()}
        if self._counted and self._counts is not None:
            kept["_tokens"] = asdict(self._counts)
        return {"args": {name: getattr(self, name) for name in names}, "attributes": kept}

    def _wall(self) -> float:
        return self._wall_before + (time.perf_counter() - self._began if self._open else 0.0)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock; read name, time and counts from the checkpoint."""
        # the host looks for this entry when it saves, also after a run that had none
        saved = state.stateful_callbacks.setdefault(type(self).__name__, {})
        kept = saved.get("attributes", {}) if isinstance(saved, Mapping) else {}
        if not state.global_step:
            kept = {}
        self._wall_before = kept.get("_wall_before", 0.0)
        self._name = self.run_id or kept.get("_name") or uuid.uuid4().hex
        before = kept.get("_tokens", {})
        self._counts = None if state.global_step and not before else TokenCounts(**before)
        self._counted = False
        self.seq_length = self.seq_length or sequence_length(kwargs.get("train_dataloader"))
        family = unwrap(kwargs["model"])
        self._family, self._train = family.config, what_learns(family)
        self._began, self._open = time.perf_counter(), True

    def count(self, tokens: TokenCounts) -> None:
        """Add tokens that were run over all processes; the trainer calls it with its FLOPs."""
        self._counted = True
        if self._counts is not None:
            self._counts += tokens

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for the losses of the last step."""
        if control.should_training_stop or state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate |= args.eval_strategy == "steps"

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the row."""
        finished = state.global_step >= state.max_steps
        self._write(args, state, "finished" if finished else "stopped")

    def on_failure(self, args: TrainingArguments, state: TrainerState) -> None:
        """Write the row of a run that raised; the trainer calls it, since the host does not."""
        self._write(args, state, "failed")

    def _write(self, args: TrainingArguments, state: TrainerState, status: str) -> None:
        if not self._open:
            return
        wall, self._open = self._wall(), False
        if not state.is_world_process_zero:
            return
        if _has_finished(self.path, self._name):
            logger.warning("%s has the finished run %s; not written again.", self.path, self._name)
            return
        counted = self._counts if self._counted else None
        if counted is None:
            logger.warning(
                "Nobody counted the tokens of the run %s: its row takes every step to hold a full "
                "batch of sequences of %s tokens.",
                self._name,
                self.seq_length,
            )
        record = make_record(
            self._family,
            args,
            state,
            self.seq_length or 0,
            wall,
            status,
            self._train,
            counted,
            run_id=str(self._name),
            data=self.data,
            code_version=self.code_version,
        )
        if record.eval_loss_exits is None and args.eval_strategy != "no":
            logger.warning(
                "The run %s has no loss of an evaluation; its `eval_loss_*` are null.", self._name
            )
        append_run(self.path, record)


def _has_finished(path: str, run_id: str | None) -> bool:
    try:
        records = read_runs(path)
    except (FileNotFoundError, RunRecordError):
        # a wrong line of another run must not cost this one its row
        return False
    return any(record.run_id == run_id and record.status == "finished" for record in records)


# the losses take the place of the host's steps per second
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
BAR_COLUMNS = 10  # that the bar itself keeps, however many exits there are


class ExitProgressCallback(ProgressCallback):
    """The host's progress bar with the latest losses on it; evaluations stay as lines above it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.bar_format = BAR

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show training losses on the bar and write evaluations above it."""
        logs = logs or {}
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(fitting(logs, self._room()))
        elif "eval_loss" in logs:
            exits = _losses(logs, "eval_exit")
            line = f"step {state.global_step}: eval loss {logs['eval_loss']:.4f}, exits {exits}"
            self.training_bar.write(line)

    def _room(self) -> int | None:
        """Return the columns for the losses beside the bar; `None` where there is no terminal."""
        state = self.training_bar.format_dict
        if state["ncols"] is None:
            return None
        # 100%||, the brackets, both times with hours
        around = 29 + 2 * len(str(state["total"]))
        return int(state["ncols"]) - around - BAR_COLUMNS


def fitting(logs: dict[str, Any], room: int | None) -> str:
    """Return the losses in as many words as there is room for; the deepest exit's always.

    For four exits `loss 3.141, exits 3.512 3.204 3.011 2.837`; in 25 columns
    `exits 3.51 3.20 3.01 2.84`; in 15 `exits 3.51..2.84`.
    """
    exact, short = _losses(logs, "exit"), _losses(logs, "exit", 2)
    if not exact:
        return f"loss {logs['loss']:.3f}"
    ends = short.split()
    ways = [
        f"loss {logs['loss']:.3f}, exits {exact}",
        f"exits {exact}",
        f"exits {short}",
        f"exits {ends[0]}..{ends[-1]}",
    ]
    return next((words for words in ways if room is None or len(words) <= room), ends[-1])


def _losses(logs: dict[str, Any], prefix: str, digits: int = 3) -> str:
    """Return the losses of all exits, shallowest first."""
    values: list[str] = []
    while (key := f"{prefix}_{len(values)}_loss") in logs:
        values.append(f"{logs[key]:.{digits}f}")
    return " ".join(values)

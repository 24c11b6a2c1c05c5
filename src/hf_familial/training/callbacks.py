"""Trainer callbacks: FLOP counter, FLOP budget, rows of runs.jsonl, and the progress bar."""

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
    """A callback that adds FLOPs to every training log.

    `flops` is the number of FLOPs trained so far, as the trainer counts them in `state.total_flos`.
    `flops_per_second` is the rate since the last log, without the time of evaluations and saving.
    `mfu` is the share of the hardware's peak rate. It is logged if `peak_flops` is set.

    Args:
        peak_flops (`float`, *optional*): Peak FLOPs per second of one device.

    Example:
        >>> trainer.add_callback(FlopCounterCallback(peak_flops=989e12))  # H100 or H200, bfloat16
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
        """Add the time since the last step to the busy time."""
        now = time.perf_counter()
        self._busy, self._since = self._busy + now - self._since, now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock again, so that the time of the evaluation does not count."""
        self._since = time.perf_counter()

    on_save = on_evaluate

    def measure(self, args: TrainingArguments, state: TrainerState) -> dict[str, float]:
        """Return the values to log since the last call: `flops`, `flops_per_second`, `mfu`."""
        # on an accelerator the steps end only now, when `Trainer` has read their loss
        self.on_step_end(args, state, None)
        rate = (state.total_flos - self._counted) / max(self._busy, 1e-9)
        self._busy, self._counted = 0.0, state.total_flos
        values = {"flops": float(state.total_flos), "flops_per_second": rate}
        if self.peak_flops is not None:
            values["mfu"] = rate / (self.peak_flops * args.world_size * max(1, args.n_gpu))
        return values

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the values to the logs, if a trainer other than `FamilialTrainer` wrote the logs."""
        if logs is not None and "loss" in logs and "flops" not in logs:
            values = self.measure(args, state)
            logs |= values
            state.log_history[-1] |= values


class FlopBudgetCallback(TrainerCallback):
    """A callback that ends training at the optimiser step that reaches a FLOP budget.

    Set `args.max_steps` with `steps_for_budget` before training, so that the learning rate schedule
    ends at the same step. `steps_for_budget` counts full batches of full sequences. With a
    [`FamilialTrainer`], the run ends when the counted FLOPs (`state.total_flos`) reach the budget.
    Longer rows reach it earlier than `max_steps`. A run that ends below the budget logs a warning.

    Args:
        budget (`float`): FLOPs of the whole run, including the part before a resume.
        seq_length (`int`, *optional*): Tokens per sequence, or their mean. Defaults to the length
            of the first row of the training data.

    Raises:
        ValueError: When training starts, if `max_steps` differs from the budget by more than one
            step.

    Example:
        >>> args.max_steps = steps_for_budget(1e18, flops_per_step(model, args, seq_length=2048))
        >>> budget = FlopBudgetCallback(1e18)
        >>> FamilialTrainer(model, args, train_dataset=rows, callbacks=[budget]).train()
    """

    def __init__(self, budget: float, seq_length: int | None = None) -> None:
        self.budget, self.seq_length, self.steps = budget, seq_length, 0
        # function of the trainer that updates `state.total_flos`
        self.store: Callable[[], None] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        """Check that `max_steps` fits the budget, with a tolerance of one step."""
        length = self.seq_length or sequence_length(kwargs.get("train_dataloader"))
        per_step = flops_per_step(unwrap(kwargs["model"]), args, length)
        self.steps = steps_for_budget(self.budget, per_step)
        if abs(state.max_steps - self.steps) > 1:
            raise ValueError(
                f"`max_steps` must be {self.steps} for a budget of {self.budget:.4g} FLOPs at "
                f"{per_step:.4g} FLOPs per step, got {state.max_steps}. Otherwise the learning "
                "rate schedule does not end with the budget. Set `args.max_steps` with "
                "`steps_for_budget`."
            )
        # `Trainer` ends a run at this step, with its last log, evaluation and checkpoint
        state.max_steps = min(state.max_steps, self.steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the run once its FLOPs reach the budget, as `Trainer` does at `max_steps`."""
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
                "The run ended at %.4g FLOPs, below its budget of %.4g, because some batches or "
                "sequences were not full. Set `seq_length` of the callback to the mean length, or "
                "use more steps.",
                state.total_flos,
                self.budget,
            )

    def _reached(self, state: TrainerState) -> bool:
        # rounding may leave the sum of many steps slightly below the budget
        return state.total_flos >= self.budget * (1 - 1e-9)


class RunRecordCallback(TrainerCallback, ExportableState):
    """A callback that appends one row to a runs.jsonl file when training ends.

    Only the first process writes. The callback logs the last step, and evaluates the model there if
    `eval_strategy` is `"steps"`, so that the row has the final losses. A run that resumes from a
    checkpoint keeps its `run_id` and adds to its `wall_s`. If the file already has the run as
    finished, the callback does not write it again.

    With a [`FamilialTrainer`], the row has the tokens and FLOPs that the run really computed. Other
    trainers do not count tokens, and an old checkpoint may have no counts. The row then assumes
    full batches of full sequences, and the callback logs a warning.

    Args:
        path (`str`): Path of the runs.jsonl file.
        run_id (`str`, *optional*): Name of the run. Defaults to a random one.
        data (`str`, *optional*): Name of the training data.
        seq_length (`int`, *optional*): Tokens per sequence. Defaults to the length of the first row
            of the training data.
        code_version (`str`, *optional*): Version of the training code. Defaults to the version of
            this package.

    Example:
        >>> trainer.add_callback(RunRecordCallback("runs.jsonl", data="wikitext"))
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
        """Return the state for a checkpoint. The names match those in older checkpoints."""
        names = ("path", "run_id", "data", "seq_length", "code_version")
        kept: dict[str, Any] = {"_name": self._name, "_wall_before": self._wall()}
        if self._counted and self._counts is not None:
            kept["_tokens"] = asdict(self._counts)
        return {"args": {name: getattr(self, name) for name in names}, "attributes": kept}

    def _wall(self) -> float:
        return self._wall_before + (time.perf_counter() - self._began if self._open else 0.0)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock, and load the name, time and counts of a resumed run."""
        # `Trainer` needs this entry when it saves, even if the resumed run did not have it
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
        """Add the tokens of all processes since the last call. `FamilialTrainer` calls it."""
        self._counted = True
        if self._counts is not None:
            self._counts += tokens

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Request a log of the last step, and an evaluation if the run evaluates by steps."""
        if control.should_training_stop or state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate |= args.eval_strategy == "steps"

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the row of a run that finished or was stopped."""
        finished = state.global_step >= state.max_steps
        self._write(args, state, "finished" if finished else "stopped")

    def on_failure(self, args: TrainingArguments, state: TrainerState) -> None:
        """Write the row of a run that raised. `FamilialTrainer` calls it."""
        self._write(args, state, "failed")

    def _write(self, args: TrainingArguments, state: TrainerState, status: str) -> None:
        if not self._open:
            return
        wall, self._open = self._wall(), False
        if not state.is_world_process_zero:
            return
        if _has_finished(self.path, self._name):
            logger.warning(
                "%s already has the finished run %s, so its row is not written again.",
                self.path,
                self._name,
            )
            return
        counted = self._counts if self._counted else None
        if counted is None:
            logger.warning(
                "The tokens of the run %s were not counted. Its row assumes that every step has a "
                "full batch of sequences of %s tokens.",
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
                "The run %s has no evaluation loss, so `eval_loss_*` are null in its row.",
                self._name,
            )
        append_run(self.path, record)


def _has_finished(path: str, run_id: str | None) -> bool:
    try:
        records = read_runs(path)
    except (FileNotFoundError, RunRecordError):
        # a wrong line of another run must not prevent this run's row
        return False
    return any(record.run_id == run_id and record.status == "finished" for record in records)


# the losses replace the steps per second of the original bar
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
BAR_COLUMNS = 10  # columns that stay free for the bar itself


class ExitProgressCallback(ProgressCallback):
    """The progress bar of `Trainer` with the latest losses. Evaluations are lines above it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Create the progress bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.bar_format = BAR

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show training losses on the bar, and print evaluations above it."""
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
        """Return the columns free for the losses, or `None` if there is no terminal."""
        state = self.training_bar.format_dict
        if state["ncols"] is None:
            return None
        # columns of "100%||", of the brackets and of both times with hours
        around = 29 + 2 * len(str(state["total"]))
        return int(state["ncols"]) - around - BAR_COLUMNS


def fitting(logs: dict[str, Any], room: int | None) -> str:
    """Return the losses in the longest form that fits into `room` columns.

    The longest form is `loss 3.141, exits 3.512 3.204 3.011 2.837`. In 25 columns the form is
    `exits 3.51 3.20 3.01 2.84`, and in 16 columns it is `exits 3.51..2.84`. The loss of the
    deepest exit is always shown.
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
    """Return the losses of all exits as text, shallowest first."""
    values: list[str] = []
    while (key := f"{prefix}_{len(values)}_loss") in logs:
        values.append(f"{logs[key]:.{digits}f}")
    return " ".join(values)

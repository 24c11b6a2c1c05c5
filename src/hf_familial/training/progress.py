"""A progress bar that shows the loss of every exit."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments


# the losses take the place of the host's steps per second
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
BAR_COLUMNS = 10  # that the bar itself keeps, however many exits there are


class ExitProgressCallback(ProgressCallback):
    """The host's progress bar with the latest losses on it; evaluations stay as lines above it."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.bar_format = BAR

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
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
        """Columns for the losses beside the bar; `None` where there is no terminal."""
        state = self.training_bar.format_dict
        if state["ncols"] is None:
            return None
        # 100%||, the brackets, both times with hours
        around = 29 + 2 * len(str(state["total"]))
        return int(state["ncols"]) - around - BAR_COLUMNS


def fitting(logs: dict[str, Any], room: int | None) -> str:
    """Return the losses in as many words as there is room for; the deepest exit's always.

    Args:
        logs (`dict[str, Any]`): Of a training step, with `loss` and `exit_<k>_loss`.
        room (`int`, *optional*): Columns; any number by default.

    Returns:
        `str`: For four exits `loss 3.141, exits 3.512 3.204 3.011 2.837`; in 25 columns
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
    """The losses of all exits, shallowest first."""
    values: list[str] = []
    while (key := f"{prefix}_{len(values)}_loss") in logs:
        values.append(f"{logs[key]:.{digits}f}")
    return " ".join(values)

"""A progress bar that shows the loss of every exit."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments


class ExitProgressCallback(ProgressCallback):
    """The host's progress bar with the latest losses on it; evaluations stay as lines above it."""

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
            exits = _losses(logs, "exit")
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}, exits {exits}")
        elif "eval_loss" in logs:
            exits = _losses(logs, "eval_exit")
            line = f"step {state.global_step}: eval loss {logs['eval_loss']:.4f}, exits {exits}"
            self.training_bar.write(line)


def _losses(logs: dict[str, Any], prefix: str) -> str:
    """The losses of all exits, shallowest first."""
    values: list[str] = []
    while (key := f"{prefix}_{len(values)}_loss") in logs:
        values.append(f"{logs[key]:.3f}")
    return " ".join(values)

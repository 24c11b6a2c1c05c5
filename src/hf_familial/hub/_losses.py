"""Evaluation losses that training saved with a checkpoint."""

from __future__ import annotations

import json
import math

from ..errors import RunRecordError
from ..models.familial import FamilialConfig
from ..runs import RunRecord
from ._source import Source


def read_losses(source: Source, config: FamilialConfig) -> list[float | None] | None:
    """Return the saved loss of each exit in nats per token, or `None` if there is none."""
    # The order is: members.json, exits.json, the trainer's last evaluation, the last run.
    for read in (_from_members, _from_evaluation, _from_trainer, _from_runs):
        losses = read(source, config)
        if losses and len(losses) == config.num_exits and any(x is not None for x in losses):
            return [x if x is not None and math.isfinite(x) else None for x in losses]
    return None


def _from_members(source: Source, config: FamilialConfig) -> list[float | None]:
    rows = source.read_json("members.json")
    rows = rows if isinstance(rows, list) else []
    depths = [row.get("depth") for row in rows if isinstance(row, dict)]
    return [row.get("eval_loss") for row in rows] if depths == config.exits else []


def _from_evaluation(source: Source, config: FamilialConfig) -> list[float | None]:
    found = source.read_json("exits.json")
    found = found.get("after", found) if isinstance(found, dict) else {}
    rows = found.get("rows", []) if isinstance(found, dict) else []
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    depths = [row.get("depth") for row in rows]
    return [row.get("loss") for row in rows] if depths == config.exits else []


def _from_trainer(source: Source, config: FamilialConfig) -> list[float | None]:
    state = source.read_json("trainer_state.json")
    history = state.get("log_history", []) if isinstance(state, dict) else []
    names = [f"eval_exit_{k}_loss" for k in range(config.num_exits)]
    rows = [row for row in history if names[0] in row]
    return [rows[-1].get(name) for name in names] if rows else []


def _from_runs(source: Source, config: FamilialConfig) -> list[float | None]:
    lines = (source.read_text("runs.jsonl") or "").splitlines()
    for line in reversed(lines):
        try:
            run = RunRecord.from_dict(json.loads(line))
        except (RunRecordError, ValueError):
            continue  # skip a line that a crash cut off
        if list(run.exits) == config.exits and run.eval_loss_exits:
            return list(run.eval_loss_exits)
    return []

"""Token counts of a training run, and its row in runs.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerState, TrainingArguments

from ..flops import count_family, training_flops_per_token
from ..models.familial import FamilialConfig
from ..models.familial.losses import IGNORE_INDEX
from ..runs import Backbone, RunRecord
from .budget import tokens_per_step


if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class TokenCounts:
    """Token counts of a run so far, over all processes."""

    computed: int = 0  # positions that the model computed, padding included
    seen: int = 0  # positions without padding (`attention_mask` is not 0)
    targets: int = 0  # positions that have a loss
    longest: int = 0  # positions of the longest sequence, padding included

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(
            self.computed + other.computed,
            self.seen + other.seen,
            self.targets + other.targets,
            max(self.longest, other.longest),
        )


def main_input(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return a tensor of shape `(batch, seq)` with one entry for each position of a batch."""
    ids: Any = inputs.get("input_ids")
    return inputs["inputs_embeds"][..., 0] if ids is None else ids


def count_targets(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return the number of targets in a batch, as a tensor of shape `()`."""
    given = inputs.get("shift_labels")
    targets = inputs["labels"][..., 1:] if given is None else given
    return (targets != IGNORE_INDEX).sum()


def count_tokens(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return the four numbers of [`TokenCounts`] for a batch, on its device, without waiting."""
    ids, mask = main_input(inputs), inputs.get("attention_mask")
    computed = ids.new_full((), ids.numel(), dtype=torch.int64)
    seen = computed
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        seen = torch.count_nonzero(mask)
    labelled = inputs.get("labels") is not None or inputs.get("shift_labels") is not None
    targets = count_targets(inputs) if labelled else torch.zeros_like(computed)
    longest = torch.full_like(computed, ids.shape[1])
    return torch.stack((computed, seen, targets.to(computed), longest))


def add_counts(rows: torch.Tensor) -> torch.Tensor:
    """Sum the rows of counts of shape `(n, 4)`. The last column, `longest`, has a maximum."""
    return torch.cat((rows[:, :3].sum(0), rows[:, 3:].amax(0)))


def make_record(
    config: FamilialConfig,
    args: TrainingArguments,
    state: TrainerState,
    seq_length: int,
    wall_s: float,
    status: str,
    train: str | LoraConfig = "all",
    counted: TokenCounts | None = None,
    **names: Any,
) -> RunRecord:
    """Return the row of runs.jsonl of a run.

    `train` is the value that `what_learns` returns. `names` are `run_id`, `data` and
    `code_version`. If `counted` is `None`, the row assumes full batches of sequences of
    `seq_length` tokens. If a loss is not finite, the status is `"diverged"`.
    """
    sizes = count_family(config)
    if counted is None:
        tokens = state.global_step * tokens_per_step(args, seq_length)
        flops = tokens * training_flops_per_token(config, seq_length, train).per_token
    else:
        tokens, flops, seq_length = counted.seen, float(state.total_flos), counted.longest
    exits = last_exit_losses(state.log_history, "exit", config.num_exits)
    evaluated = last_exit_losses(state.log_history, "eval_exit", config.num_exits)
    if not all(math.isfinite(loss) for loss in (*(exits or ()), *(evaluated or ()))):
        status = "diverged"
    backbone = Backbone(config.text_config.model_type, config.hidden_size, config.num_hidden_layers)
    return RunRecord(
        N_total=sizes["total"],
        N_non_embedding=sizes["non_embedding"],
        N_active=sizes["active"],
        D_tokens=tokens,
        C_flops=flops,
        G=config.num_exits,
        exits=tuple(config.exits),
        **named_losses("loss", exits),
        **named_losses("eval_loss", evaluated),
        seed=args.seed,
        lr=args.learning_rate,
        batch_tokens=tokens_per_step(args, seq_length),
        seq_len=seq_length,
        vocab_size=config.vocab_size,
        backbone=backbone,
        wall_s=wall_s,
        tokens_per_s=tokens / max(wall_s, 1e-9),
        status=status,
        target_tokens=None if counted is None else counted.targets,
        computed_tokens=None if counted is None else counted.computed,
        **names,
    )


def last_exit_losses(
    log_history: Sequence[Mapping[str, Any]], prefix: str, num_exits: int
) -> tuple[float, ...] | None:
    """Return the newest losses of all exits in `log_history`, shallowest first.

    `prefix` is `"exit"` or `"eval_exit"`. Return `None` if the history has no such losses.
    """
    names = [f"{prefix}_{k}_loss" for k in range(num_exits)]
    rows = (row for row in reversed(log_history) if all(name in row for name in names))
    return next((tuple(float(row[name]) for name in names) for row in rows), None)


def named_losses(name: str, exits: Sequence[float] | None) -> dict[str, Any]:
    """Return the fields `<name>_mean`, `<name>_exits` and `<name>_final` of a row."""
    mean = None if exits is None else sum(exits) / len(exits)
    return {f"{name}_mean": mean, f"{name}_exits": exits, f"{name}_final": exits and exits[-1]}

"""The row of runs.jsonl of a training run, from its config, arguments and logs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerState, TrainingArguments

from ..flops import count_family, training_flops_per_token
from ..models.familial import FamilialConfig
from ..runs import Backbone, RunRecord
from .budget import tokens_per_step
from .tokens import TokenCounts


if TYPE_CHECKING:
    from peft import LoraConfig


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
    """Sum up a run.

    Args:
        config ([`FamilialConfig`]): Of the family that was trained.
        args ([`~transformers.TrainingArguments`]): Of the trainer.
        state ([`~transformers.TrainerState`]): Of the trainer, at the end.
        seq_length (`int`): Tokens of every sequence, where they were not counted.
        wall_s (`float`): Seconds of training.
        status (`str`): Becomes `"diverged"` if a last loss is not finite.
        train (`str` or `peft.LoraConfig`, *optional*, defaults to `"all"`): What learnt, see
            `what_learns`.
        counted ([`TokenCounts`], *optional*): What the trainer counted. Without it every step is
            taken to hold a full batch of full sequences.
        **names: `run_id`, `data`, `code_version`.

    Returns:
        [`RunRecord`]
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
    """The newest losses of all exits in a history of logs.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`): `state.log_history`.
        prefix (`str`): `"exit"` or `"eval_exit"`.
        num_exits (`int`): Number of exits.

    Returns:
        `tuple[float, ...]`, *optional*: Shallowest first; `None` if there are none.
    """
    names = [f"{prefix}_{k}_loss" for k in range(num_exits)]
    rows = (row for row in reversed(log_history) if all(name in row for name in names))
    return next((tuple(float(row[name]) for name in names) for row in rows), None)


def named_losses(name: str, exits: Sequence[float] | None) -> dict[str, Any]:
    """Losses of all exits under the names that a row has for them.

    Args:
        name (`str`): `"loss"` or `"eval_loss"`.
        exits (`Sequence[float]`, *optional*): Shallowest first, nats per token.

    Returns:
        `dict[str, Any]`: `<name>_mean`, `<name>_exits`, `<name>_final`.
    """
    mean = None if exits is None else sum(exits) / len(exits)
    return {f"{name}_mean": mean, f"{name}_exits": exits, f"{name}_final": exits and exits[-1]}

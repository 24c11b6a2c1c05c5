"""FLOPs of one optimiser step, and the number of steps that a FLOP budget pays for."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..flops import training_flops_per_token
from ..models import is_family_config
from ..models.familial import FamilialConfig, FamilialForCausalLM
from .tuning import what_learns


def tokens_per_step(args: TrainingArguments, seq_length: int) -> int:
    """Return the tokens of one optimiser step over all processes, with full batches."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size * seq_length


def flops_per_token(
    model_or_config: FamilialForCausalLM | FamilialConfig, seq_length: int
) -> float:
    """Return the training FLOPs per token.

    For a model, gradients of frozen parameters do not count. For a config, all are trained.
    """
    train = "all" if is_family_config(model_or_config) else what_learns(model_or_config)
    return training_flops_per_token(model_or_config, seq_length, train).per_token


def flops_per_step(
    model_or_config: FamilialForCausalLM | FamilialConfig, args: TrainingArguments, seq_length: int
) -> float:
    """Return the FLOPs of one optimiser step over all processes.

    Args:
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family. For a model,
            the count leaves out the gradients of frozen parameters. For a config, all parameters
            count as trained.
        args ([`~transformers.TrainingArguments`]): Arguments that set the batch size, the
            accumulation steps and the number of processes.
        seq_length (`int`): Tokens in each sequence.

    Example:
        >>> flops = flops_per_step(model, args, seq_length=2048)
    """
    return flops_per_token(model_or_config, seq_length) * tokens_per_step(args, seq_length)


def steps_for_budget(budget: float, flops_per_step: float) -> int:
    """Return the number of optimiser steps after which a run has used its FLOP budget.

    Set `args.max_steps` to it, so that the learning rate schedule ends where the budget ends.

    Args:
        budget (`float`): FLOPs of the whole run.
        flops_per_step (`float`): FLOPs of one optimiser step, from `flops_per_step`.

    Raises:
        ValueError: If an argument is not positive, or if the budget is less than one step.

    Example:
        >>> args.max_steps = steps_for_budget(1e18, flops_per_step(model, args, seq_length=2048))
    """
    for name, value in (("budget", budget), ("flops_per_step", flops_per_step)):
        if not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be a positive number of FLOPs, got {value}.")
    if budget < flops_per_step * (1 - 1e-9):
        raise ValueError(
            f"`budget` must pay for at least one step of {flops_per_step:.4g} FLOPs, got "
            f"{budget:.4g}."
        )
    # rounding may put the quotient slightly above a whole number of steps
    return max(1, math.ceil(budget / flops_per_step * (1 - 1e-12)))


def sequence_length(dataloader: Any) -> int:
    """Return the number of tokens in the first row of a dataloader's dataset."""
    try:
        return len(dataloader.dataset[0]["input_ids"])
    except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError):
        raise ValueError(
            "`seq_length` is missing and cannot be read from the training data: the data has no "
            "row 0, or the row has no `input_ids`. Pass `seq_length`."
        ) from None


def unwrap(model: nn.Module) -> Any:
    """Return the family inside the wrappers of data parallelism or `torch.compile`."""
    while not is_family_config(getattr(model, "config", None)):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None:
            raise TypeError(f"This callback needs a familial model, got {type(model).__name__}.")
        model = inner
    return model

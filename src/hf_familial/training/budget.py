"""From FLOPs to optimiser steps: the cost of a step, and the steps that a budget pays for."""

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
    """Return the tokens of one step over all processes: full batches of full sequences."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size * seq_length


def flops_per_token(
    model_or_config: FamilialForCausalLM | FamilialConfig, seq_length: int
) -> float:
    """Return the FLOPs of training on one token: of a model as it learns, of a config all."""
    train = "all" if is_family_config(model_or_config) else what_learns(model_or_config)
    return training_flops_per_token(model_or_config, seq_length, train).per_token


def flops_per_step(
    model_or_config: FamilialForCausalLM | FamilialConfig, args: TrainingArguments, seq_length: int
) -> float:
    """Return the FLOPs of one optimiser step, over all processes.

    Args:
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family. Of a model,
            frozen parameters are taken into account; of a config all are taken to learn.
        args ([`~transformers.TrainingArguments`]): Batch size, accumulation, processes.
        seq_length (`int`): Tokens of every sequence.
    """
    return flops_per_token(model_or_config, seq_length) * tokens_per_step(args, seq_length)


def steps_for_budget(budget: float, flops_per_step: float) -> int:
    """Return the number of optimiser steps whose last one reaches a budget.

    As `args.max_steps` it lets the learning rate's schedule end with the budget.

    Raises:
        ValueError: If one of them is not positive, or the budget does not pay for a single step.

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
    # the quotient of a whole number of steps may come out a hair above it
    return max(1, math.ceil(budget / flops_per_step * (1 - 1e-12)))


def sequence_length(dataloader: Any) -> int:
    """Return the tokens of the first row of a loader's dataset."""
    try:
        return len(dataloader.dataset[0]["input_ids"])
    except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError):
        raise ValueError(
            "`seq_length` must be given: the training data does not show its rows, or they have no "
            "`input_ids`."
        ) from None


def unwrap(model: nn.Module) -> Any:
    """Return the family inside what data parallelism or a compiler wrapped around it."""
    while not is_family_config(getattr(model, "config", None)):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if inner is None:
            raise TypeError(f"this callback needs a familial model, got {type(model).__name__}.")
        model = inner
    return model

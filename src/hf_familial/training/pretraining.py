"""Pretraining of one family: its arguments and the run. Examples and sweeps use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from ..models.familial import FamilialForCausalLM
from ..models.familial.configuration_familial import check_choice
from .args import FamilialTrainingArguments, argument
from .data import DataArguments, PackedData
from .trainer import FamilialTrainer


PRECISIONS = ("highest", "high", "medium")


def _inherit(name: str, default: object, host: Any = TrainingArguments) -> Any:
    """Return the field `name` of a base class with another default and the same help text."""
    return field(default=default, metadata=host.__dataclass_fields__[name].metadata)


@dataclass
class PretrainingData(DataArguments):
    """Data arguments with defaults for an evaluation of many documents that takes seconds."""

    eval_fraction: float = _inherit("eval_fraction", 0.05, DataArguments)
    max_eval_tokens: int | None = _inherit("max_eval_tokens", 131_072, DataArguments)


@dataclass
class PretrainingArguments(FamilialTrainingArguments):
    """Training arguments whose defaults suit a run of a few minutes on two CPU cores.

    Args:
        float32_matmul_precision (`str`, *optional*): `"highest"`, `"high"` or `"medium"`. The run
            sets it with `torch.set_float32_matmul_precision` and restores it at the end.

    Example:
        >>> args = PretrainingArguments("outputs/pretrain", max_steps=350)
    """

    output_dir: str | None = _inherit("output_dir", "outputs/pretrain")
    max_steps: int = _inherit("max_steps", 350)
    per_device_train_batch_size: int = _inherit("per_device_train_batch_size", 8)
    per_device_eval_batch_size: int = _inherit("per_device_eval_batch_size", 16)
    learning_rate: float = _inherit("learning_rate", 3e-3)
    lr_scheduler_type: str = _inherit("lr_scheduler_type", "cosine")
    warmup_steps: float = _inherit("warmup_steps", 0.05)
    weight_decay: float = _inherit("weight_decay", 0.1)
    adam_beta2: float = _inherit("adam_beta2", 0.95)
    logging_steps: float = _inherit("logging_steps", 10)
    eval_strategy: str = _inherit("eval_strategy", "steps")
    eval_steps: float | None = _inherit("eval_steps", 0.5)
    save_steps: float = _inherit("save_steps", 0.5)
    save_total_limit: int | None = _inherit("save_total_limit", 1)
    dataloader_pin_memory: bool = _inherit(
        "dataloader_pin_memory", torch.accelerator.is_available()
    )
    ddp_find_unused_parameters: bool | None = _inherit("ddp_find_unused_parameters", False)
    float32_matmul_precision: str | None = argument(
        None,
        f"Precision of float32 matrix products during the run: {', '.join(PRECISIONS)}. "
        "`medium` can be much faster.",
    )

    def __post_init__(self) -> None:
        """Check the values before Transformers sets anything up."""
        if self.float32_matmul_precision is not None:
            check_choice("float32_matmul_precision", self.float32_matmul_precision, PRECISIONS)
        super().__post_init__()


def pretrain(
    build_model: Callable[[], FamilialForCausalLM],
    args: PretrainingArguments,
    data: PackedData,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    checkpoint: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> FamilialTrainer:
    """Build a family, train it, and return its trainer.

    Args:
        build_model (`Callable`): Function that builds the family. It is called after
            `set_seed(args.seed)`, so the seed determines the initial weights.
        args ([`PretrainingArguments`]): Arguments of the run.
        data ([`PackedData`]): Blocks for training and evaluation.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Tokenizer to save with the weights.
        checkpoint (`str`, *optional*): Folder of the checkpoint to continue from. The result is
            bit for bit the same as without the interruption.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Callbacks to add to the trainer.

    Returns:
        [`FamilialTrainer`]: The trainer after training. `trainer.model` is the family.

    Example:
        >>> data, tokenizer = prepare_data(PretrainingData(train_files=["book.txt"]))
        >>> trainer = pretrain(lambda: FamilialForCausalLM(config), args, data, tokenizer)
    """
    set_seed(args.seed)
    trainer = FamilialTrainer(
        model=build_model(),
        args=args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    )
    with matmul_precision(args.float32_matmul_precision):
        trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@contextmanager
def matmul_precision(name: str | None) -> Iterator[None]:
    """Set the precision of float32 matrix products inside the `with` block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name or before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

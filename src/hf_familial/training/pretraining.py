"""Pretraining one family, as examples and sweeps do: the arguments and the run."""

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
    """Return a field of the base's arguments with another default and the same help."""
    return field(default=default, metadata=host.__dataclass_fields__[name].metadata)


@dataclass
class PretrainingData(DataArguments):
    """The data arguments, with an evaluation that is broad but takes seconds."""

    eval_fraction: float = _inherit("eval_fraction", 0.05, DataArguments)
    max_eval_tokens: int | None = _inherit("max_eval_tokens", 131_072, DataArguments)


@dataclass
class PretrainingArguments(FamilialTrainingArguments):
    """The host's training arguments, with the defaults of a run of a few minutes on two cores.

    Args:
        float32_matmul_precision (`str`, *optional*): `"highest"`, `"high"` or `"medium"`, for the
            time of the run; see `torch.set_float32_matmul_precision`.
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
        f"{', '.join(PRECISIONS)}: of matrix products in float32, for the time of the run; medium "
        "can be much faster.",
    )

    def __post_init__(self) -> None:
        """Check the values before the host sets anything up."""
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
    """Train a family from the seed on.

    Args:
        build_model (`Callable`): Makes the family; called once the random state is that of
            `args.seed`, so that its weights follow from the seed.
        args ([`PretrainingArguments`]): Of the run.
        data ([`PackedData`]): Blocks to train and to evaluate on.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Saved beside the weights.
        checkpoint (`str`, *optional*): Folder of the checkpoint to go on from, bit for bit as if
            there had been no break.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Further ones.
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
    """Set the precision of matrix products inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name or before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

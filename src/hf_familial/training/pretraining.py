"""Pretraining one family: the arguments and the run that the example and sweeps share."""

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
from .args import FamilialTrainingArguments
from .data import DataArguments, PackedData
from .trainer import FamilialTrainer


PRECISIONS = ("highest", "high", "medium")


def of_host(name: str, default: object, host: Any = TrainingArguments) -> Any:
    """One of the host's arguments, with another default and its own help."""
    return field(default=default, metadata=host.__dataclass_fields__[name].metadata)


@dataclass
class PretrainingData(DataArguments):
    """The data arguments, with an evaluation that is broad but takes seconds."""

    eval_fraction: float = of_host("eval_fraction", 0.05, DataArguments)
    max_eval_tokens: int | None = of_host("max_eval_tokens", 131_072, DataArguments)


@dataclass
class PretrainingArguments(FamilialTrainingArguments):
    """The host's training arguments, with the defaults of a run of a few minutes on two cores.

    Args:
        float32_matmul_precision (`str`, *optional*): `"highest"`, `"high"` or `"medium"`, for the
            time of the run; see `torch.set_float32_matmul_precision`.

    Raises:
        ValueError: If one of them is out of its range.
    """

    output_dir: str | None = of_host("output_dir", "outputs/pretrain")
    max_steps: int = of_host("max_steps", 350)
    per_device_train_batch_size: int = of_host("per_device_train_batch_size", 8)
    per_device_eval_batch_size: int = of_host("per_device_eval_batch_size", 16)
    learning_rate: float = of_host("learning_rate", 3e-3)
    lr_scheduler_type: str = of_host("lr_scheduler_type", "cosine")
    warmup_steps: float = of_host("warmup_steps", 0.05)
    weight_decay: float = of_host("weight_decay", 0.1)
    adam_beta2: float = of_host("adam_beta2", 0.95)
    logging_steps: float = of_host("logging_steps", 10)
    eval_strategy: str = of_host("eval_strategy", "steps")
    eval_steps: float | None = of_host("eval_steps", 0.5)
    save_steps: float = of_host("save_steps", 0.5)
    save_total_limit: int | None = of_host("save_total_limit", 1)
    dataloader_pin_memory: bool = of_host("dataloader_pin_memory", torch.accelerator.is_available())
    ddp_find_unused_parameters: bool | None = of_host("ddp_find_unused_parameters", False)
    float32_matmul_precision: str | None = field(
        default=None,
        metadata={
            "help": f"{', '.join(PRECISIONS)}: of matrix products in float32, for the time of the "
            "run; medium can be much faster."
        },
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, before the host sets anything up."""
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

    Returns:
        [`FamilialTrainer`]: After training.
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
    """Matrix products of a precision inside the block, of the earlier one after it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name or before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

"""Training a family: trainer, arguments, callbacks, schedules, budgets, and packed data."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .args import FamilialTrainingArguments
    from .budget import flops_per_step, steps_for_budget
    from .callbacks import (
        ExitProgressCallback,
        FlopBudgetCallback,
        FlopCounterCallback,
        RunRecordCallback,
    )
    from .data import DataArguments, PackedData, prepare_data
    from .pretraining import PretrainingArguments, PretrainingData, pretrain
    from .report import MemberRow, member_rows, plot_losses, print_members, save_members
    from .schedules import ExitSchedule, exit_weights
    from .trainer import FamilialTrainer
    from .tuning import lora_targets, train_exits_only

# imported when first asked for: a trainer needs no corpus, a corpus no trainer
_LAZY = {
    "DataArguments": ".data",
    "exit_weights": ".schedules",
    "ExitProgressCallback": ".callbacks",
    "ExitSchedule": ".schedules",
    "FamilialTrainer": ".trainer",
    "FamilialTrainingArguments": ".args",
    "FlopBudgetCallback": ".callbacks",
    "FlopCounterCallback": ".callbacks",
    "flops_per_step": ".budget",
    "lora_targets": ".tuning",
    "member_rows": ".report",
    "MemberRow": ".report",
    "PackedData": ".data",
    "plot_losses": ".report",
    "prepare_data": ".data",
    "pretrain": ".pretraining",
    "PretrainingArguments": ".pretraining",
    "PretrainingData": ".pretraining",
    "print_members": ".report",
    "RunRecordCallback": ".callbacks",
    "save_members": ".report",
    "steps_for_budget": ".budget",
    "train_exits_only": ".tuning",
}

__all__ = [
    "DataArguments",
    "ExitProgressCallback",
    "ExitSchedule",
    "FamilialTrainer",
    "FamilialTrainingArguments",
    "FlopBudgetCallback",
    "FlopCounterCallback",
    "MemberRow",
    "PackedData",
    "PretrainingArguments",
    "PretrainingData",
    "RunRecordCallback",
    "exit_weights",
    "flops_per_step",
    "lora_targets",
    "member_rows",
    "plot_losses",
    "prepare_data",
    "pretrain",
    "print_members",
    "save_members",
    "steps_for_budget",
    "train_exits_only",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)

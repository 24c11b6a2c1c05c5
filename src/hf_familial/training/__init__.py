"""Training of families: the trainer, its arguments, callbacks, schedules, budgets and data."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ._multi_exit import multi_exit
    from .args import FamilialTrainingArguments
    from .budget import flops_per_step, steps_for_budget
    from .callbacks import (
        ExitProgressCallback,
        FlopBudgetCallback,
        FlopCounterCallback,
        RunRecordCallback,
    )
    from .checkpoints import last_complete_checkpoint
    from .data import DataArguments, PackedData, prepare_data
    from .pretraining import PretrainingArguments, PretrainingData, pretrain
    from .report import MemberRow, member_rows, plot_losses, print_members, save_members
    from .schedules import ExitSchedule, exit_weights
    from .trainer import FamilialTrainer
    from .tuning import lora_targets, train_exits_only

# imported on first use, because a trainer needs no corpus and a corpus needs no trainer
_MODULES = {
    ".args": "FamilialTrainingArguments",
    ".budget": "flops_per_step steps_for_budget",
    ".callbacks": "ExitProgressCallback FlopBudgetCallback FlopCounterCallback RunRecordCallback",
    ".checkpoints": "last_complete_checkpoint",
    ".data": "DataArguments PackedData prepare_data",
    "._multi_exit": "multi_exit",
    ".pretraining": "PretrainingArguments PretrainingData pretrain",
    ".report": "MemberRow member_rows plot_losses print_members save_members",
    ".schedules": "ExitSchedule exit_weights",
    ".trainer": "FamilialTrainer",
    ".tuning": "lora_targets train_exits_only",
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names.split()}

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
    "last_complete_checkpoint",
    "lora_targets",
    "member_rows",
    "multi_exit",
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

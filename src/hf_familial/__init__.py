"""Familial models: one training run, many deployable language models.

Importing this package registers the familial model with the Auto classes of transformers; the rest
is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .models.familial import (
    BackboneReport,
    ConfidenceRelay,
    Distillation,
    FamilialCausalLMOutput,
    FamilialConfig,
    FamilialForCausalLM,
    FamilialModel,
    FamilialModelOutput,
    FamilialPreTrainedModel,
    FixedExit,
    HandoffRelay,
    RelayCache,
    RelayOutput,
    RelayPolicy,
    RelayStats,
    SpeculativeRelay,
    evenly_spaced_exits,
    relay_decode,
    verify_backbone,
)


if TYPE_CHECKING:
    from .evaluation import evaluate_exits
    from .training.args import FamilialTrainingArguments
    from .training.trainer import FamilialTrainer


__version__ = "0.1.0.dev0"

_LAZY = {
    "evaluate_exits": ".evaluation",
    "FamilialTrainer": ".training.trainer",
    "FamilialTrainingArguments": ".training.args",
}

__all__ = [
    "BackboneReport",
    "ConfidenceRelay",
    "Distillation",
    "FamilialCausalLMOutput",
    "FamilialConfig",
    "FamilialForCausalLM",
    "FamilialModel",
    "FamilialModelOutput",
    "FamilialPreTrainedModel",
    "FamilialTrainer",
    "FamilialTrainingArguments",
    "FixedExit",
    "HandoffRelay",
    "RelayCache",
    "RelayOutput",
    "RelayPolicy",
    "RelayStats",
    "SpeculativeRelay",
    "__version__",
    "evaluate_exits",
    "evenly_spaced_exits",
    "relay_decode",
    "verify_backbone",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)

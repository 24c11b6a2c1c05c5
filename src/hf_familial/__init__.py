"""Familial models: one training run, many deployable language models."""

from .models.familial import (
    FamilialCausalLMOutput,
    FamilialConfig,
    FamilialForCausalLM,
    FamilialModel,
    FamilialModelOutput,
    FamilialPreTrainedModel,
    evenly_spaced_exits,
)


__version__ = "0.1.0.dev0"

__all__ = [
    "FamilialCausalLMOutput",
    "FamilialConfig",
    "FamilialForCausalLM",
    "FamilialModel",
    "FamilialModelOutput",
    "FamilialPreTrainedModel",
    "__version__",
    "evenly_spaced_exits",
]

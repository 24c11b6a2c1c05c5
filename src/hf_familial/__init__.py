"""Familial models: one training run, many deployable language models."""

from .models.familial import (
    BackboneReport,
    FamilialCausalLMOutput,
    FamilialConfig,
    FamilialForCausalLM,
    FamilialModel,
    FamilialModelOutput,
    FamilialPreTrainedModel,
    evenly_spaced_exits,
    verify_backbone,
)


__version__ = "0.1.0.dev0"

__all__ = [
    "BackboneReport",
    "FamilialCausalLMOutput",
    "FamilialConfig",
    "FamilialForCausalLM",
    "FamilialModel",
    "FamilialModelOutput",
    "FamilialPreTrainedModel",
    "__version__",
    "evenly_spaced_exits",
    "verify_backbone",
]

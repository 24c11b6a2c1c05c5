"""The familial model, registered with the Auto classes: the only registration there is."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from .configuration_familial import FamilialConfig, evenly_spaced_exits
from .losses import Distillation
from .modeling_base import FamilialModel, FamilialModelOutput, FamilialPreTrainedModel
from .modeling_familial import FamilialCausalLMOutput, FamilialForCausalLM
from .relay import RelayOutput, RelayStats, relay_decode
from .relay_cache import RelayCache
from .relay_policies import FixedExit, RelayPolicy, SpeculativeRelay


AutoConfig.register(FamilialConfig.model_type, FamilialConfig)
AutoModel.register(FamilialConfig, FamilialModel)
AutoModelForCausalLM.register(FamilialConfig, FamilialForCausalLM)

# `register` leaves out the tables of names that Trainer, pipelines and lm_eval read
MODEL_MAPPING_NAMES[FamilialConfig.model_type] = FamilialModel.__name__
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[FamilialConfig.model_type] = FamilialForCausalLM.__name__

# every checkpoint carries its code, so that `trust_remote_code=True` is enough to load it
FamilialConfig.register_for_auto_class()
FamilialModel.register_for_auto_class("AutoModel")
FamilialForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "Distillation",
    "FamilialCausalLMOutput",
    "FamilialConfig",
    "FamilialForCausalLM",
    "FamilialModel",
    "FamilialModelOutput",
    "FamilialPreTrainedModel",
    "FixedExit",
    "RelayCache",
    "RelayOutput",
    "RelayPolicy",
    "RelayStats",
    "SpeculativeRelay",
    "evenly_spaced_exits",
    "relay_decode",
]

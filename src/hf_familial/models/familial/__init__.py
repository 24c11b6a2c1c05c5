"""The familial model. Importing it registers the model with the Auto classes of Transformers."""

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

# `register` does not fill the tables of names, which Trainer, pipelines and lm_eval read
MODEL_MAPPING_NAMES[FamilialConfig.model_type] = FamilialModel.__name__
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[FamilialConfig.model_type] = FamilialForCausalLM.__name__

# copy the code into every checkpoint, so that `trust_remote_code=True` is enough to load it
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

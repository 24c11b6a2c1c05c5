"""Transformers' `ModelTesterMixin` on familial models over several backbones; see `run.py`."""

import unittest
from dataclasses import dataclass, field
from typing import Any

from backbones import tiny_config
from host import load
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from hf_familial import FamilialConfig, FamilialForCausalLM, FamilialModel


modeling = load("test_modeling_common")
configuration = load("test_configuration_common")
training = load("test_training_mixin")


@dataclass(frozen=True)
class Family:
    """How the exits stand on a backbone; `exits=None` is the backbone's own class, no family."""

    exits: dict[str, Any] | None = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    # the yardstick: what fails here is no fault of ours
    "Stock": Family(exits=None),
    "Plain": Family(),
    "OwnHeads": Family({"exit_head": "own", "exit_norm": "own"}),
    "ExitLayers": Family({"num_exit_layers": 1}),
    "Tied": Family({"exit_norm": "shared"}, {"tie_word_embeddings": True}),
}

BACKBONES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    # what it may learn is capped by these: the zoo's are too low for a model to overfit
    "gemma2": {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "mixtral": {},
    # the rotary part of a head must have more than two channels for scaled RoPE
    "gpt_neox": {"num_attention_heads": 2},
    "gpt2": {},
}


class ModelTester:
    """What `ModelTesterMixin` asks about a model: sizes, a config, inputs."""

    batch_size = 3
    seq_length = 7
    is_training = True

    def __init__(self, backbone: str, family: Family):
        self.backbone = backbone
        self.family = family
        config = self.get_config().get_text_config()
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads
        if family.exits is None:
            self.base_model_class = MODEL_MAPPING[type(config)]
            self.causal_lm_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        else:
            self.base_model_class = FamilialModel
            self.causal_lm_class = FamilialForCausalLM

    def get_config(self) -> PreTrainedConfig:
        overrides = {"initializer_range": 0.02} | BACKBONES[self.backbone] | self.family.text
        text_config = tiny_config(self.backbone, num_hidden_layers=2, **overrides)
        if self.family.exits is None:
            return text_config
        return FamilialConfig(text_config=text_config, exits=[1, 2], **self.family.exits)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        # special tokens mean something to some of the tests
        input_ids = modeling.ids_tensor(shape, self.vocab_size).clamp(min=3)
        inputs = {"input_ids": input_ids, "attention_mask": modeling.random_attention_mask(shape)}
        return self.get_config(), inputs


class ConformanceTests(
    modeling.ModelTesterMixin, modeling.GenerationTesterMixin, training.TrainingTesterMixin
):
    """All of transformers' common model tests on one family over one backbone."""

    # otherwise run only for classes whose file says it is of 2023 or later
    test_can_init_all_missing_weights_before_2023 = True

    backbone: str
    family: Family

    def setUp(self):
        self._is_composite = self.family.exits is not None
        self.model_tester = ModelTester(self.backbone, self.family)
        self.all_model_classes = (
            self.model_tester.base_model_class,
            self.model_tester.causal_lm_class,
        )

    def test_config(self):
        config = self.model_tester.get_config()
        tester = configuration.ConfigTester(self, type(config), **(self.family.exits or {}))
        tester.run_common_tests()

    def test_auto_classes(self):
        config = self.model_tester.get_config()
        assert type(AutoModel.from_config(config)) is self.model_tester.base_model_class
        assert type(AutoModelForCausalLM.from_config(config)) is self.model_tester.causal_lm_class


for backbone in BACKBONES:
    for label, family in FAMILIES.items():
        name = f"Test_{backbone}_{label}"
        globals()[name] = type(
            name,
            (ConformanceTests, unittest.TestCase),
            {"backbone": backbone, "family": family, "__module__": __name__},
        )

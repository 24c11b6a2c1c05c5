"""Which decoders can be backbones: those that work, those refused, strangers put to the test."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backbones import tiny_config, tiny_model
from reference import copy_of, logits, token_ids
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from hf_familial import FamilialConfig, FamilialForCausalLM, verify_backbone
from hf_familial.models.backbone_verification import VERIFIED
from hf_familial.models.familial.backbones import UNSUPPORTED, find_backbone_spec
from hf_familial.models.familial.segments import HostDecoder


ROOT = Path(__file__).resolve().parents[2]
SUPPORTED = "decoder-only language model .*docs/backbones.md"


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "mixtral", "lfm2", "opt"])
def test_a_right_backbone_passes_every_check(model_type):
    report = verify_backbone(tiny_model(model_type))
    assert set(report.errors) == {"logits", "taps", "steps", "segments", "relay"}
    assert max(report.errors.values()) <= report.tolerance == 1e-4
    assert report.ok
    assert report.continues
    assert report.relays
    assert report.failure(*report.errors) == ""
    assert report.model_type == model_type


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_any_depth_can_be_verified(depth):
    assert verify_backbone(tiny_model("llama"), depth=depth).relays


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_tolerance_follows_the_dtype(dtype):
    report = verify_backbone(tiny_model("llama").to(dtype))
    assert report.ok
    assert report.tolerance == {torch.bfloat16: 5e-2, torch.float64: 1e-6}[dtype]


def test_verifying_changes_nothing():
    host = tiny_model("gemma2").train()
    host.model.layers[0].eval()
    before = {n: p.clone() for n, p in host.state_dict().items()}
    fields, state = host.config.to_dict(), torch.get_rng_state()
    verify_backbone(host)
    assert host.config.to_dict() == fields
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) for n, p in host.state_dict().items())
    assert host.training
    assert not host.model.layers[0].training
    assert all(p.grad is None for p in host.parameters())


@pytest.mark.parametrize("model_type", ["zamba2", "gemma4_text"])
def test_a_backbone_that_cannot_go_on_from_a_tap_has_exits_still(model_type):
    host = tiny_model(model_type)
    report = verify_backbone(host)
    assert report.ok
    assert not report.continues
    assert "embedding" in report.failure("segments")
    with pytest.raises(ValueError, match=f"`{model_type}`.*`num_exit_layers` must be 0, got 1"):
        FamilialForCausalLM.from_backbone(copy_of(host), exits=[2, 4], num_exit_layers=1)
    FamilialForCausalLM.from_backbone(host, exits=[2, 4])


@pytest.mark.parametrize(
    "model_type",
    sorted(UNSUPPORTED),
)
def test_a_known_misfit_is_refused_with_its_reason(model_type):
    host = tiny_model(model_type)
    exits = [2, host.config.num_hidden_layers]
    with pytest.raises(ValueError, match=SUPPORTED) as raised:
        FamilialForCausalLM.from_backbone(host, exits=exits)
    assert f"`{model_type}` cannot be the backbone of a family" in str(raised.value)
    assert UNSUPPORTED[model_type] in str(raised.value)
    with pytest.raises(ValueError, match=SUPPORTED):
        FamilialConfig(text_config=host.config, exits=exits)


@pytest.mark.parametrize("model_type", ["bert", "vit"])
def test_an_encoder_is_refused(model_type):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    text_config = {"model_type": model_type, "intermediate_size": 16, **sizes}
    with pytest.raises(ValueError, match=f"`{model_type}` cannot be the backbone"):
        FamilialConfig(text_config=text_config, exits=[1, 2])


def test_no_type_is_both():
    assert not VERIFIED & UNSUPPORTED.keys()


@pytest.mark.parametrize(
    ("model_type", "owner", "layers", "norm"),
    [
        ("llama", "", "layers", "norm"),
        ("gpt2", "", "h", "ln_f"),
        ("opt", "decoder", "layers", "final_layer_norm"),
        ("gpt_neox", "", "layers", "final_layer_norm"),
        ("openai-gpt", "", "h", None),
    ],
)
def test_parts_are_found_by_their_names(model_type, owner, layers, norm):
    backbone = AutoModel.from_config(tiny_config(model_type))
    spec = find_backbone_spec(backbone)
    assert (spec.host.owner, spec.layers, spec.norm) == (owner, layers, norm)
    decoder = HostDecoder(backbone)
    assert decoder.spec == spec
    assert len(decoder.layers) == 4
    assert isinstance(decoder.norm, nn.Module)


# strangers: decoders that transformers does not know


class HarmlessModel(LlamaModel):
    """A Llama under another name."""


class ScaledEmbeddingModel(LlamaModel):
    """Scales the embedding in its forward, at every entry: a segment would do so again."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return super().forward(inputs_embeds=embeds * 3.0, **kwargs)


class DepthScaledModel(LlamaModel):
    """Scales its final state by the depth that its config gives."""

    def forward(self, **kwargs):
        kwargs["inputs_embeds"] = self.embed_tokens(kwargs.pop("input_ids"))
        kwargs["inputs_embeds"] = kwargs["inputs_embeds"] * self.config.num_hidden_layers
        return super().forward(**kwargs)


class LogitsModel(LlamaModel):
    """Right itself; its causal LM does something to the logits that no config field says."""


class NoNormModel(LlamaModel):
    """Keeps its final norm under a name of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.finish = self._modules.pop("norm")

    def forward(self, **kwargs):
        self._modules["norm"] = self.finish
        try:
            return super().forward(**kwargs)
        finally:
            del self._modules["norm"]


def causal(inner, change=None):
    """A causal LM class around a decoder class."""

    class CausalLM(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model = inner(config)
            self.post_init()

        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            if change is not None:
                outputs.logits = change(outputs.logits)
            return outputs

    return CausalLM


@pytest.fixture
def register():
    """Registers a decoder as a type of its own, for one test; gives its tiny config's maker."""
    done = []

    def make(model_type, inner, change=None):
        name = f"test_{model_type}"
        config_class = type(f"{name}Config", (LlamaConfig,), {"model_type": name})
        inner = type(
            inner.__name__, (inner,), {"config_class": config_class, "__module__": __name__}
        )
        outer = causal(inner, change)
        outer.config_class = config_class
        AutoConfig.register(name, config_class)
        AutoModel.register(config_class, inner)
        AutoModelForCausalLM.register(config_class, outer)
        done.append((name, config_class))

        def config():
            fields = tiny_config("llama").to_dict()
            return config_class(**{k: v for k, v in fields.items() if k != "model_type"})

        return config

    yield make
    for name, config_class in done:
        CONFIG_MAPPING._extra_content.pop(name)
        for mapping in (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
            mapping._extra_content.pop(config_class)


def hosted(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_harmless_stranger_works(register):
    config = register("harmless", HarmlessModel)
    host = hosted(config())
    assert type(host.model).__name__ == "HarmlessModel"
    right = logits(host, token_ids())
    assert verify_backbone(host).relays
    family = FamilialForCausalLM.from_backbone(host, exits=[1, 4], num_exit_layers=1)
    assert torch.equal(logits(family, token_ids()), right)
    drawn = FamilialForCausalLM(FamilialConfig(text_config=config(), exits=[1, 4]))
    assert drawn(token_ids(), labels=token_ids()).loss.isfinite()
    assert drawn.config.text_config.model_type == "test_harmless"


STRANGERS = {
    "depth": (DepthScaledModel, None, 0, "taps|KeyError"),
    "embedding": (ScaledEmbeddingModel, None, 1, "segments"),
    "logits": (LogitsModel, lambda logits: logits.square(), 0, "logits"),
    "norm": (NoNormModel, None, 0, "no final norm"),
}


@pytest.mark.parametrize(
    ("inner", "change", "private", "reason"), STRANGERS.values(), ids=STRANGERS
)
def test_a_stranger_that_breaks_the_rule_is_refused(register, inner, change, private, reason):
    config = register("stranger", inner, change)
    message = f"`test_stranger` cannot be the backbone of a family: .*({reason}).*{SUPPORTED}"
    with pytest.raises(ValueError, match=message):
        FamilialForCausalLM.from_backbone(hosted(config()), exits=[2, 4], num_exit_layers=private)
    with pytest.raises(ValueError, match=message):
        FamilialForCausalLM(
            FamilialConfig(text_config=config(), exits=[2, 4], num_exit_layers=private)
        )


def test_a_stranger_that_cannot_go_on_from_a_tap_has_exits_still(register):
    host = hosted(register("entry", ScaledEmbeddingModel)())
    right = logits(host, token_ids())
    report = verify_backbone(host)
    assert report.ok
    assert not report.continues
    family = FamilialForCausalLM.from_backbone(host, exits=[2, 4])
    assert torch.equal(logits(family, token_ids()), right)


@pytest.mark.slow
def test_the_list_of_backbones_is_true():
    done = subprocess.run(
        [sys.executable, "scripts/list_backbones.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr

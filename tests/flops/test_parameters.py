"""Parameters and FLOPs of members equal a count by hand."""

from typing import Any

import pytest
from backbones import tiny_model
from reference import truncated_host
from torch import nn

from hf_familial import FamilialConfig, FamilialForCausalLM
from hf_familial.flops import (
    count_family,
    count_parameters,
    family_parameters,
    measure_flops_per_token,
)


EXITS = [1, 2, 4]
VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "own heads": {"exit_head": "own"},
    "shared norm": {"exit_norm": "shared"},
    "private layers": {"num_exit_layers": 1},
    "all of them": {"tie_word_embeddings": False, "exit_head": "own", "num_exit_layers": 1},
}


def family_of(variant: str, model_type: str = "llama") -> Any:
    fields: dict[str, Any] = {"tie_word_embeddings": True} | VARIANTS[variant]
    host = tiny_model(model_type, tie_word_embeddings=fields.pop("tie_word_embeddings"))
    return FamilialForCausalLM.from_backbone(host, exits=EXITS, **fields)


def size(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_equal_a_sum_over_modules(variant: str) -> None:
    family = family_of(variant)
    backbone, config = family.model.backbone, family.config
    embedding = size(backbone.embed_tokens)
    totals = []
    for k, depth in enumerate(EXITS):
        early = k < len(EXITS) - 1
        own_norm = early and config.exit_norm == "own"
        inner = size(*backbone.layers[:depth])
        inner += size(*family.model.exits[k].layers) if early and config.num_exit_layers else 0
        inner += size(family.model.exits[k].norm if own_norm else backbone.norm)
        if early and config.exit_head == "own":
            head = size(family.exit_heads[k])
        else:
            # a tied head is the embedding, counted once
            head = 0 if config.tie_word_embeddings else size(family.lm_head)
        assert count_parameters(family, k) == {
            "total": embedding + inner + head,
            "non_embedding": inner,
        }
        totals.append(inner)
    if not config.num_exit_layers:
        assert totals == sorted(set(totals))
    deepest = truncated_host(family, 2)
    deepest.tie_weights()
    assert count_parameters(family, -1)["total"] == deepest.num_parameters()


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3", "gemma2", "mixtral"])
def test_parameters_of_other_hosts(model_type: str) -> None:
    family = family_of("tied", model_type)
    counts = [count_parameters(family, k) for k in range(len(EXITS))]
    for name in ("total", "non_embedding"):
        values = [count[name] for count in counts]
        assert values == sorted(set(values))
    early = size(*family.model.exits)
    assert counts[-1]["total"] == family.num_parameters() - early


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seq_length", [5, 16])
def test_flops_equal_the_closed_form(variant: str, attention: str, seq_length: int) -> None:
    family = family_of(variant)
    family.set_attn_implementation(attention)
    sizes = family.config.text_config
    layers = list(family.model.backbone.layers)
    for k, depth in enumerate(EXITS):
        private = family.config.num_exit_layers if k < len(EXITS) - 1 else 0
        linear = [m for layer in layers[: depth + private] for m in layer.modules()]
        weights = sum(m.weight.numel() for m in linear if isinstance(m, nn.Linear))
        weights += sizes.vocab_size * sizes.hidden_size
        # scores and values, over all pairs of positions
        attended = 4 * seq_length * sizes.num_attention_heads * sizes.head_dim
        expected = 2 * weights + (depth + private) * attended
        assert measure_flops_per_token(family, k, seq_length) == expected


def test_measuring_changes_nothing() -> None:
    family = family_of("tied").train()
    measure_flops_per_token(family, 0, 8)
    assert family.training
    assert all(parameter.grad is None for parameter in family.parameters())


def test_a_missing_exit_is_named() -> None:
    family = family_of("tied")
    with pytest.raises(IndexError, match="got 3. This family has"):
        count_parameters(family, 3)
    with pytest.raises(IndexError, match="got 3. This family has"):
        measure_flops_per_token(family, 3, 8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_from_the_config_alone(variant: str) -> None:
    family = family_of(variant)
    config, backbone = family.config, family.model.backbone
    found = family_parameters(config)
    assert found.segments == (
        size(backbone.layers[0]),
        size(backbone.layers[1]),
        size(*backbone.layers[2:]),
    )
    heads = size(family.exit_heads[0]) if config.exit_head == "own" else 0
    assert found.exits == (*(size(part) + heads for part in family.model.exits), 0)
    layers = size(
        *backbone.layers, *(layer for part in family.model.exits for layer in part.layers)
    )
    assert found.family.layers_and_head == layers + size(family.lm_head)
    for k, member in enumerate(found.members):
        counts = count_parameters(family, k)
        assert (member.total, member.non_embedding) == (counts["total"], counts["non_embedding"])
        assert member.active == member.total
        run = [*backbone.layers[: EXITS[k]], *(family.model.exits[k].layers if k < 2 else [])]
        assert member.layers_and_head == size(*run) + size(family.lm_head)
    # segments, exits, and what all share: embedding, final norm and head
    shared = {
        id(p): p
        for m in (backbone.embed_tokens, backbone.norm, family.lm_head)
        for p in m.parameters()
    }
    whole = sum(found.segments) + sum(found.exits) + sum(p.numel() for p in shared.values())
    assert found.family.total == whole == count_family(config)["total"]


def test_a_member_meets_its_own_experts_only() -> None:
    family = family_of("tied", "mixtral")
    found = family_parameters(family)
    for member, depth in zip(found.members, EXITS, strict=True):
        experts = [
            p
            for n, p in family.model.backbone.layers[:depth].named_parameters()
            if ".experts." in n
        ]
        assert member.total - member.active == sum(p.numel() for p in experts) // 2


# billions of parameters on the labels and in the reports of the Ruyi models
RUYI = {
    "qwen2": ([11, 15, 19, 23, 28], [3.342, 4.274, 5.206, 6.138, 7.071], 10.728),
    "qwen3": ([2, 21, 40], [1.769, 8.045, 13.990], 16.985),
}
RUYI_SIZES: dict[str, dict[str, Any]] = {
    "qwen2": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    },
    "qwen3": {
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 17408,
        "vocab_size": 151936,
    },
}


@pytest.mark.parametrize("model_type", RUYI)
def test_layers_and_head_are_the_size_labels_of_ruyi(model_type: str) -> None:
    exits, members, stored = RUYI[model_type]
    text_config = {"model_type": model_type, "tie_word_embeddings": False} | RUYI_SIZES[model_type]
    config = FamilialConfig(
        text_config=text_config, exits=exits, num_exit_layers=1, exit_head="own"
    )
    found = family_parameters(config)
    assert [round(m.layers_and_head / 1e9, 3) for m in found.members] == members
    assert round(found.family.total / 1e9, 3) == stored

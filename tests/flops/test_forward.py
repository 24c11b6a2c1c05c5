"""Forward FLOPs and cache of members and relays, from the config, equal those of a real model."""

from typing import Any

import pytest
import torch
from backbones import MUST_WORK, UNCACHED, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from hf_familial import FamilialConfig, FamilialForCausalLM
from hf_familial.flops import (
    Flops,
    cache_sizes,
    forward,
    forward_flops,
    measure_flops_per_token,
    member_flops,
)
from hf_familial.flops.counting import CPU_ATTENTION


EXITS, LENGTH = [1, 2, 4], 12
# hosts that walk position by position, have a state, or do something to the token embedding
OTHERS = ("jamba", "falcon_mamba", "mamba2", "qwen3_next", "opt")


def config_of(model_type: str, **fields: Any) -> FamilialConfig:
    return FamilialConfig(text_config=tiny_config(model_type), exits=EXITS, **fields)


def real_family(config: FamilialConfig) -> Any:
    """A family with weights, with experts of which torch knows the FLOPs."""
    for part in (config, config.text_config):
        part._attn_implementation = part._experts_implementation = "eager"
    return FamilialForCausalLM(config).eval()


def counted(family: Any, **inputs: Any) -> tuple[int, Any]:
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        outputs = family(**inputs)
    return counter.get_total_flops(), outputs


def token_ids(length: int) -> torch.Tensor:
    return torch.randint(8, 120, (1, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", [*MUST_WORK, *OTHERS])
def test_members_cost_what_torch_counts(model_type: str) -> None:
    config = config_of(model_type)
    family = real_family(config)
    prefill = forward_flops(config, LENGTH)
    assert prefill.exact
    for k in range(len(EXITS)):
        found, _ = counted(family, input_ids=token_ids(LENGTH), exit_idx=k, use_cache=False)
        assert prefill.member(k).total == found, k
    found, _ = counted(family, input_ids=token_ids(LENGTH), output_exits=True, use_cache=False)
    assert prefill.all_exits.total == found


@pytest.mark.parametrize("model_type", [m for m in MUST_WORK if m not in UNCACHED])
def test_decoding_costs_what_torch_counts(model_type: str) -> None:
    config = config_of(model_type)
    family = real_family(config)
    step, sizes = forward_flops(config, 1, past=LENGTH), cache_sizes(config, LENGTH, torch.float32)
    assert step.exact
    assert sizes is not None
    for k in (0, 2):
        _, outputs = counted(family, input_ids=token_ids(LENGTH), exit_idx=k, use_cache=True)
        cache = outputs.past_key_values
        before = floats_in(cache)
        found, _ = counted(family, input_ids=token_ids(1), exit_idx=k, past_key_values=cache)
        assert step.member(k).total == found
        assert sizes[k].bytes == before
        assert sizes[k].per_token == floats_in(cache) - before


def floats_in(cache: Any) -> int:
    """Bytes of floating-point tensors that a cache's layers hold."""
    found, open_ = 0, [vars(layer) for layer in cache.layers]
    while open_:
        value = open_.pop()
        if isinstance(value, torch.Tensor):
            found += value.nbytes if value.is_floating_point() else 0
        elif isinstance(value, dict):
            open_ += value.values()
        elif isinstance(value, (list, tuple)):
            open_ += value
    return found


@pytest.mark.parametrize("head", ["shared", "own"])
def test_parts_equal_the_closed_form(head: str) -> None:
    config = config_of("llama", num_exit_layers=1, exit_head=head)
    sizes = config.text_config
    width, inner = sizes.hidden_size, sizes.num_attention_heads * sizes.head_dim
    kept = sizes.num_key_value_heads * sizes.head_dim
    weights = width * (2 * inner + 2 * kept) + 3 * width * sizes.intermediate_size
    tokens, past = 5, 7
    found = forward_flops(config, tokens, past=past)
    layer = Flops(2 * tokens * weights, 4 * tokens * (past + tokens) * inner)
    assert found.entry == Flops()
    assert set(found.layers) == {layer}
    assert found.private == (layer, layer, Flops())
    assert set(found.heads) == {Flops(2 * tokens * sizes.vocab_size * width)}
    # from the taps at depth 1 to the logits at depth 2, its private layer among them
    assert found.relay(0, 1) == layer + layer + found.heads[1]
    assert found.relay(0, -1) == layer + layer + layer + found.heads[2]
    assert found.segment(1, 2) == layer
    assert found.layer_passes(1) == tokens * 3
    assert found.layer_passes(-1) == tokens * 4
    assert found.layer_passes(-1, from_exit=0) == tokens * 3
    with pytest.raises(ValueError, match="deeper than `from_exit`, got depths 2 and 4"):
        found.relay(2, 1)


def test_experts_are_weights_and_states_are_not() -> None:
    config = config_of("mixtral")
    sizes = config.text_config
    inner = sizes.num_attention_heads * sizes.head_dim
    for layer in forward_flops(config, LENGTH).layers:
        assert layer.attention == 4 * LENGTH * LENGTH * inner
        experts = 2 * 3 * sizes.hidden_size * sizes.intermediate_size
        router = sizes.hidden_size * 4
        kept = sizes.num_key_value_heads * sizes.head_dim
        attended = sizes.hidden_size * (2 * inner + 2 * kept)
        assert layer.matmul == 2 * LENGTH * (experts + router + attended)


def test_a_relay_and_its_draft_are_the_whole_model() -> None:
    config = config_of("qwen3")
    found = forward_flops(config, LENGTH)
    for k in (0, 1):
        both = found.member(k) + found.relay(k, -1)
        # the draft's head is what drafting costs on top
        assert both == found.member(-1) + found.heads[k]


@pytest.mark.parametrize("model_type", ["jamba", "zamba"])
def test_a_host_that_walks_is_extrapolated(model_type: str) -> None:
    config = config_of(model_type)
    found = forward_flops(config, 40).member(-1).total
    assert found == measure_flops_per_token(real_family(config), -1, 40) * 40


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_the_estimate_is_the_count(model_type: str) -> None:
    config = config_of(model_type, num_exit_layers=1, exit_head="own")
    family = forward.fake_model(config)
    for past in (0, 6):
        # the zoo's windows hide part of the past, which an estimate does not know
        config.text_config.sliding_window = None
        exact, rough = forward_flops(config, 4, past), forward.estimated(family, 4, past)
        assert exact.exact
        assert not rough.exact
        assert rough.all_exits == exact.all_exits
        assert rough.heads == exact.heads
        assert rough.layers == exact.layers


def test_costs_of_members() -> None:
    config = config_of("llama", num_exit_layers=1)
    rows = member_flops(config, LENGTH, torch.float32)
    assert [row.layers for row in rows] == [2, 3, 4]
    kept = 2 * 2 * 8 * 4  # keys and values, heads, width, bytes
    for k, row in enumerate(rows):
        assert row.exact
        assert row.prefill_flops_per_token == forward_flops(config, LENGTH).member(k).total / LENGTH
        assert row.decode_flops_per_token == forward_flops(config, 1, LENGTH).member(k).total
        assert row.cache is not None
        assert (row.cache.bytes, row.cache.per_token) == (
            kept * row.layers * LENGTH,
            kept * row.layers,
        )
    half = member_flops(config, LENGTH, torch.bfloat16)[0]
    assert half.cache is not None
    assert half.cache.per_token == kept


def test_a_host_without_a_cache_cannot_decode() -> None:
    config = config_of("openai-gpt")
    assert cache_sizes(config, LENGTH) is None
    assert [row.decode_flops_per_token for row in member_flops(config, LENGTH)] == [None] * 3
    with pytest.raises(ValueError, match="because `openai-gpt` has no cache, got 3"):
        forward_flops(config, 1, past=3)


def test_wrong_lengths_are_refused() -> None:
    config = config_of("llama")
    for call, message in (
        (lambda: forward_flops(config, 0), "`tokens` must be 1 or more, got 0"),
        (lambda: forward_flops(config, 1, past=-1), "`past` must be 0 or more, got -1"),
        (lambda: cache_sizes(config, 0), "`context` must be 1 or more, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="got LlamaConfig"):
        forward_flops(tiny_config("llama"), 8)

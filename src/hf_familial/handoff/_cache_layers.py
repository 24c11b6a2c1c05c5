"""Functions that read, restore and check the keys, values and recurrent states of a KV cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from ..errors import HandoffError
from ..models.familial.segments import SegmentRunner


# attribute of a cache layer -> the dimension of that tensor that counts positions
BY_POSITION: Mapping[str, int] = {"keys": 2, "values": 2, "indexer_keys": 1}
RECURRENT = ("conv_states", "recurrent_states")
# tensors that a cache layer may have; `_sliding_window_tensor` is not sent, the config has it
KNOWN = {*BY_POSITION, "_sliding_window_tensor"}
# allowed difference between two passes over the same numbers, as a share of the largest number
SAME = {torch.float32: 1e-4, torch.float64: 1e-8}
ROUNDED = 2e-2  # the same for 16-bit dtypes


@dataclass(frozen=True, eq=False)
class LayerState:
    """The KV cache of one layer after some positions of a text.

    Attributes:
        kind (`str`): Class name of the cache layer, for example `"DynamicLayer"`.
        seen (`int`): Number of positions that the layer has processed. A sliding window stores
            fewer. Purely recurrent layers do not count positions and have 0.
        tensors (`Mapping[str, torch.Tensor]`): `keys` and `values` of shape
            `(batch, heads, kept, width)`, `indexer_keys` of shape `(batch, kept, width)`, and
            recurrent states of shape `(batch, ...)` named `conv_states.0`, `recurrent_states.0`.
    """

    kind: str
    seen: int
    tensors: Mapping[str, torch.Tensor]


def capture(cache: Cache, slots: Iterable[int]) -> dict[int, LayerState]:
    """Return the states of the cache layers in `slots`. Keys and values are not copied."""
    return {slot: _captured(slot, cache.layers[slot]) for slot in slots}


def _captured(slot: int, layer: Any) -> LayerState:
    kind = type(layer).__name__
    if not isinstance(layer, (DynamicLayer, LinearAttentionCacheLayerMixin, DummyLayer)):
        raise HandoffError(
            f"cache layer {slot} is a {kind}. Only layers of a `DynamicCache` can be sent."
        )
    odd = [n for n, value in vars(layer).items() if torch.is_tensor(value) and n not in KNOWN]
    if odd:
        raise HandoffError(f"cache layer {slot} keeps `{odd[0]}` in its {kind}. It cannot be sent.")
    tensors = {name: getattr(layer, name, None) for name in BY_POSITION}
    for name in RECURRENT:
        for i, state in getattr(layer, name, {}).items():
            # the next position overwrites this tensor in place, unlike keys and values
            tensors[f"{name}.{i}"] = None if state is None else state.clone()
    seen = int(layer.get_seq_length()) if isinstance(layer, CacheLayerMixin) else 0
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return LayerState(kind, seen, kept)


def restore(cache: Cache, layers: Mapping[int, LayerState], device: torch.device) -> None:
    """Copy captured layers into the empty layers of a cache."""
    for slot, state in layers.items():
        layer: Any = cache.layers[slot]
        tensors = {name: tensor.to(device) for name, tensor in state.tensors.items()}
        if "keys" in tensors:
            layer.update(tensors["keys"], tensors["values"])
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = state.seen
        if "indexer_keys" in tensors:
            layer.update_indexer(tensors["indexer_keys"])
        for name in tensors.keys() - BY_POSITION.keys():
            plural, index = name.split(".")
            update = getattr(layer, f"update_{plural.removesuffix('s')}")
            update(tensors[name], state_idx=int(index))


def check_against_model(
    layers: Mapping[int, LayerState],
    expected: Mapping[int, LayerState],
    cache: Cache,
    batch: int,
    length: int,
) -> None:
    """Raise `HandoffError` if received layers differ in slot, kind, name, dtype or shape.

    Args:
        layers (`Mapping[int, LayerState]`): The received layers, by slot.
        expected (`Mapping[int, LayerState]`): The result of `probe_layers` in this process.
        cache (`Cache`): An empty cache of this process. Its layers have the sliding windows.
        batch (`int`): Number of rows of the text.
        length (`int`): Number of columns of the text.
    """
    if layers.keys() != expected.keys():
        raise HandoffError(
            f"keys and values of the layers {sorted(expected)} are needed, got {sorted(layers)}."
        )
    for slot, mine in expected.items():
        state = layers[slot]
        if (state.kind, state.tensors.keys()) != (mine.kind, mine.tensors.keys()):
            raise HandoffError(
                f"layer {slot} must be a {mine.kind} with the tensors {sorted(mine.tensors)}, got "
                f"a {state.kind!r:.60} with {sorted(state.tensors)}."
            )
        seen = length * (mine.seen > 0)
        if state.seen != seen:
            raise HandoffError(
                f"layer {slot} must have processed {seen} positions, got {state.seen}."
            )
        window = getattr(cache.layers[slot], "sliding_window", None)
        kept = length if window is None else min(length, window - 1)
        for name, tensor in mine.tensors.items():
            shape = [batch, *tensor.shape[1:]]
            if name in BY_POSITION:
                shape[BY_POSITION[name]] = kept
            got = state.tensors[name]
            if list(got.shape) != shape or got.dtype != tensor.dtype:
                raise HandoffError(
                    f"`{name}` of layer {slot} must be {tensor.dtype} of shape {shape}, got "
                    f"{got.dtype} of shape {list(got.shape)}."
                )


@torch.no_grad()
def probe_layers(model: Any, start: int, stop: int) -> dict[int, LayerState]:
    """Return the cache states of the layers `[start, stop)` after one position, by layer.

    The function also checks that these layers can be handed off. It runs a second position twice:
    once on the same cache, and once on a new cache with the restored state. Another text runs
    between the two.

    Raises:
        ValueError: If the two results differ, because then the layers store a part of the text
            outside the cache, or if the model is in training mode.
    """
    if model.training:
        raise ValueError("the model is in training mode. Call `model.eval()` before a hand-off.")

    def run(cache: DynamicCache, index: int) -> torch.Tensor:
        return _run_position(model, start, stop, cache, index)

    def fresh() -> DynamicCache:
        return DynamicCache(config=model.model.backbone.config)

    first, carried = fresh(), fresh()
    run(first, 0)
    state = capture(first, range(start, stop))
    expected = run(first, 1)
    run(fresh(), 2)
    restore(carried, state, model.device)
    found = run(carried, 1)
    allowed = SAME.get(found.dtype, ROUNDED) * expected.abs().max()
    if not bool((found - expected).abs().max() <= allowed):
        raise ValueError(
            f"`{model.config.text_config.model_type}` does not support hand-offs: its layers store "
            "a part of the text outside the cache."
        )
    return state


def _run_position(
    model: Any, start: int, stop: int, cache: DynamicCache, index: int
) -> torch.Tensor:
    """Run one token through the layers. Token 1 has position 1, tokens 0 and 2 have position 0."""
    inner, token = model.model, torch.tensor([[index]], device=model.device)
    inputs = {"input_ids": token}
    if start:
        # hidden states that differ for each index
        wave = torch.arange(inner.backbone.config.hidden_size, device=model.device) * (index + 1)
        inputs = {"inputs_embeds": wave.cos().to(inner.backbone.dtype)[None, None]}
    seen = torch.ones((1, 1 + int(index == 1)), dtype=torch.long, device=model.device)
    segment = inner.members.segment(start, stop)
    runner = SegmentRunner(inner.decoder, segment, cache)
    return runner(position_ids=token * 0 + (index == 1), attention_mask=seen, **inputs)

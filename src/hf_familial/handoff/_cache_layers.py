"""Keys, values and recurrent states of cache layers, taken out and put back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from ..errors import HandoffError


# attribute of a cache layer -> its dimension that counts positions
BY_POSITION: Mapping[str, int] = {"keys": 2, "values": 2, "indexer_keys": 1}
RECURRENT = ("conv_states", "recurrent_states")
# tensors that a layer may have: what travels, and what its config says
KNOWN = {*BY_POSITION, "_sliding_window_tensor"}


@dataclass(frozen=True, eq=False)
class LayerState:
    """The cache of one layer after a text.

    Attributes:
        kind (`str`): Class of its cache layer.
        seen (`int`): Positions it has seen; a window keeps fewer. 0 for purely recurrent layers,
            which count none.
        tensors (`Mapping[str, torch.Tensor]`): `keys` and `values` of shape
            `(batch, heads, kept, width)`, `indexer_keys` of shape `(batch, kept, width)`, and
            recurrent states of shape `(batch, ...)` under `conv_states.0`, `recurrent_states.0`.
    """

    kind: str
    seen: int
    tensors: Mapping[str, torch.Tensor]


def capture(cache: Cache, slots: Iterable[int]) -> dict[int, LayerState]:
    """Read layers of a cache, by slot; keys and values are not copied."""
    return {slot: _captured(slot, cache.layers[slot]) for slot in slots}


def _captured(slot: int, layer: Any) -> LayerState:
    kind = type(layer).__name__
    if not isinstance(layer, (DynamicLayer, LinearAttentionCacheLayerMixin, DummyLayer)):
        raise HandoffError(f"layer {slot} keeps a {kind}; only a `DynamicCache` can travel.")
    odd = [n for n, value in vars(layer).items() if torch.is_tensor(value) and n not in KNOWN]
    if odd:
        raise HandoffError(f"layer {slot} keeps `{odd[0]}` in its {kind}, which cannot travel.")
    tensors = {name: getattr(layer, name, None) for name in BY_POSITION}
    for name in RECURRENT:
        for i, state in getattr(layer, name, {}).items():
            # written in place by the next position, unlike keys and values
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

    `expected` is what one position leaves in the same slots here, see `probe_layers`. The empty
    `cache` knows the windows of this side, `batch` and `length` are those of the text.
    """
    if layers.keys() != expected.keys():
        raise HandoffError(
            f"keys and values of the layers {sorted(expected)} are needed, got {sorted(layers)}."
        )
    for slot, mine in expected.items():
        state = layers[slot]
        if (state.kind, state.tensors.keys()) != (mine.kind, mine.tensors.keys()):
            raise HandoffError(
                f"layer {slot} must be a {mine.kind} of {sorted(mine.tensors)}, got a "
                f"{state.kind!r:.60} of {sorted(state.tensors)}."
            )
        seen = length * (mine.seen > 0)
        if state.seen != seen:
            raise HandoffError(f"layer {slot} must have seen {seen} positions, not {state.seen}.")
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

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

from ..errors import RelayStateError


# attribute of a cache layer -> its dimension that counts positions
BY_POSITION: Mapping[str, int] = {"keys": 2, "values": 2, "indexer_keys": 1}
RECURRENT = ("conv_states", "recurrent_states")
# tensors that a layer may have: what travels, and what its config says
KNOWN = {*BY_POSITION, "_sliding_window_tensor"}


@dataclass(frozen=True, eq=False)
class LayerState:
    """What one layer remembers of a text.

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
    """Read layers of a cache; keys and values are not copied.

    Args:
        cache ([`DynamicCache`]): Filled.
        slots (`Iterable[int]`): Which layers.

    Returns:
        `dict[int, LayerState]`: By slot.

    Raises:
        RelayStateError: If a layer is of a kind that cannot be put back elsewhere.
    """
    return {slot: _captured(slot, cache.layers[slot]) for slot in slots}


def _captured(slot: int, layer: Any) -> LayerState:
    kind = type(layer).__name__
    if not isinstance(layer, (DynamicLayer, LinearAttentionCacheLayerMixin, DummyLayer)):
        raise RelayStateError(f"layer {slot} keeps a {kind}; only a `DynamicCache` can travel.")
    odd = [n for n, value in vars(layer).items() if torch.is_tensor(value) and n not in KNOWN]
    if odd:
        raise RelayStateError(f"layer {slot} keeps `{odd[0]}` in its {kind}, which cannot travel.")
    tensors = {name: getattr(layer, name, None) for name in BY_POSITION}
    for name in RECURRENT:
        for i, state in getattr(layer, name, {}).items():
            # written in place by the next position, unlike keys and values
            tensors[f"{name}.{i}"] = None if state is None else state.clone()
    seen = int(layer.get_seq_length()) if isinstance(layer, CacheLayerMixin) else 0
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return LayerState(kind, seen, kept)


def restore(cache: Cache, layers: Mapping[int, LayerState], device: torch.device) -> None:
    """Fill empty layers of a cache.

    Args:
        cache ([`DynamicCache`]): Its layers are of the kinds captured, see `check_layers`.
        layers (`Mapping[int, LayerState]`): By slot; copied.
        device (`torch.device`): Where the layers run.
    """
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


def check_layers(
    layers: Mapping[int, LayerState],
    like: Mapping[int, LayerState],
    cache: Cache,
    batch: int,
    length: int,
) -> None:
    """Hold layers that came from elsewhere against those of this side.

    Args:
        layers (`Mapping[int, LayerState]`): What came.
        like (`Mapping[int, LayerState]`): What one position leaves in the same slots here.
        cache ([`DynamicCache`]): An empty one, with this side's windows.
        batch (`int`): Rows of the text.
        length (`int`): Positions of the text.

    Raises:
        RelayStateError: If slots, kinds, names, dtypes or shapes differ.
    """
    if layers.keys() != like.keys():
        raise RelayStateError(
            f"keys and values of the layers {sorted(like)} are needed, got {sorted(layers)}."
        )
    for slot, mine in like.items():
        state = layers[slot]
        if (state.kind, state.tensors.keys()) != (mine.kind, mine.tensors.keys()):
            raise RelayStateError(
                f"layer {slot} must be a {mine.kind} of {sorted(mine.tensors)}, got a "
                f"{state.kind!r:.60} of {sorted(state.tensors)}."
            )
        seen = length * (mine.seen > 0)
        if state.seen != seen:
            raise RelayStateError(
                f"layer {slot} must have seen {seen} positions, not {state.seen}."
            )
        window = getattr(cache.layers[slot], "sliding_window", None)
        kept = length if window is None else min(length, window - 1)
        for name, tensor in mine.tensors.items():
            shape = [batch, *tensor.shape[1:]]
            if name in BY_POSITION:
                shape[BY_POSITION[name]] = kept
            got = state.tensors[name]
            if list(got.shape) != shape or got.dtype != tensor.dtype:
                raise RelayStateError(
                    f"`{name}` of layer {slot} must be {tensor.dtype} of shape {shape}, got "
                    f"{got.dtype} of shape {list(got.shape)}."
                )

"""Keys, values and recurrent states of cache layers: read, put back, checked, probed."""

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


# attribute of a cache layer -> its dimension that counts positions
BY_POSITION: Mapping[str, int] = {"keys": 2, "values": 2, "indexer_keys": 1}
RECURRENT = ("conv_states", "recurrent_states")
# tensors that a layer may have: what travels, and what its config says
KNOWN = {*BY_POSITION, "_sliding_window_tensor"}
# two passes over the same numbers may be rounded differently, as a share of the largest
SAME = {torch.float32: 1e-4, torch.float64: 1e-8}
ROUNDED = 2e-2  # of the shorter dtypes


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


@torch.no_grad()
def probe_layers(model: Any, start: int, stop: int) -> dict[int, LayerState]:
    """Return what one position leaves in the cache of the layers `[start, stop)`, by layer.

    A second position runs after the first twice: on the same cache, and on a new one that was
    given the first one's state, after another text ran in between. If the results differ, the
    layers keep a part of the text outside the cache, and a `ValueError` says so.
    """
    if model.training:
        raise ValueError("the model is in training mode; call `model.eval()` before a hand-off.")

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
            f"`{model.config.text_config.model_type}` cannot be handed over: its layers keep "
            "a part of the text in themselves, not in the cache."
        )
    return state


def _run_position(
    model: Any, start: int, stop: int, cache: DynamicCache, index: int
) -> torch.Tensor:
    """Run input 0 or 2 at position 0, or input 1 at position 1, through the layers."""
    inner, token = model.model, torch.tensor([[index]], device=model.device)
    inputs = {"input_ids": token}
    if start:
        # hidden states unlike those of another index: a wave of its own length
        wave = torch.arange(inner.backbone.config.hidden_size, device=model.device) * (index + 1)
        inputs = {"inputs_embeds": wave.cos().to(inner.backbone.dtype)[None, None]}
    seen = torch.ones((1, 1 + int(index == 1)), dtype=torch.long, device=model.device)
    segment = inner.members.segment(start, stop)
    runner = SegmentRunner(inner.decoder, segment, cache)
    return runner(position_ids=token * 0 + (index == 1), attention_mask=seen, **inputs)

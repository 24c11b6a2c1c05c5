"""Taking positions back out of the host's cache layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)


class UnusedLayer(DummyLayer):
    """A slot that no exit has used yet, in a cache that must not reach it."""


def record_past(layers: Iterable[Any], on: bool) -> None:
    """Say whether windowed layers keep what a crop may need.

    Args:
        layers (`Iterable`): Of a cache.
        on (`bool`): From now on.
    """
    for layer in layers:
        if hasattr(layer, "record_past"):
            layer.record_past = on


def crop(layers: Iterable[Any], excess: int) -> None:
    """Take the last positions out.

    Args:
        layers (`Iterable`): Of a cache, of one length.
        excess (`int`): How many; nothing if 0 or less.
    """
    for layer in layers:
        if excess <= 0 or not isinstance(layer, CacheLayerMixin) or not layer.is_initialized:
            continue
        if isinstance(layer, DynamicSlidingWindowLayer):
            # its own crop also drops what a later, longer crop may need: `settle` does that
            DynamicLayer.crop(layer, -excess)
            layer.cumulative_length -= excess
        else:
            layer.crop(-excess)


def settle(layers: Iterable[Any]) -> None:
    """Drop what only a crop of the positions so far would need.

    Args:
        layers (`Iterable`): Of a cache.
    """
    for layer in layers:
        windowed = isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized
        if windowed and layer.record_past and layer.get_seq_length() >= layer.sliding_window:
            layer.crop(0)


def hide_unused(cache: DynamicCache, slots: Collection[int]) -> None:
    """Put placeholders where a cache has empty slots that are not needed.

    What the host does to every slot, such as cropping, would fail on a slot that was never filled.

    Args:
        cache ([`DynamicCache`]): Changed in place; `grow_cache` brings the slots back.
        slots (`Collection[int]`): The slots that are needed.
    """
    for slot, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            used = any(layer.has_previous_state.values())
        else:
            used = isinstance(layer, DummyLayer) or layer.is_initialized
        if slot not in slots and not used:
            cache.layers[slot] = UnusedLayer()

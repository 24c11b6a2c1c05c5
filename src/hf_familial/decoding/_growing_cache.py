"""A cache layer that grows by doubling, instead of copying the whole past at every token."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


# Tokens that a layer makes room for at first.
ROOM = 64


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` over buffers with room for tokens to come, at most twice those seen.

    `keys` and `values`, shape `(batch, heads, seq, head_dim)`, are views of the buffers. They are
    overwritten when tokens are cropped and others take their place.
    """

    _buffers: tuple[torch.Tensor, torch.Tensor]
    # what `keys` and `values` are while they are views of the buffers, and nobody replaced them
    _views: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, layer: DynamicLayer) -> GrowingLayer:
        """Return a growing layer with the keys and values of another."""
        growing = cls()
        if layer.is_initialized and layer.get_seq_length() > 0:
            growing.lazy_initialization(layer.keys, layer.values)
            growing.keys, growing.values = layer.keys, layer.values
        return growing

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._show(key_states[..., :0, :], value_states[..., :0, :], 0)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens; return all keys and all values, as views."""
        if key_states.requires_grad and torch.is_grad_enabled():
            # writing in place would break the graph
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, new = self.keys.shape[2], key_states.shape[2]
        if not self._has_room(start + new):
            self._grow(start + new)
        keys, values = self._buffers
        keys.narrow(2, start, new).copy_(key_states)
        values.narrow(2, start, new).copy_(value_states)
        return self._show(keys, values, start + new)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the argument is 0 or negative, as in the host."""
        if tokens_to_remove < 0 and self._in_place():
            self._show(*self._buffers, max(0, self.keys.shape[2] + tokens_to_remove))
        else:
            super().crop(tokens_to_remove)

    def _in_place(self) -> bool:
        """Return whether `keys` and `values` still are the views that were made here."""
        return self.is_initialized and self.keys is self._views[0] and self.values is self._views[1]

    def _has_room(self, length: int) -> bool:
        keys = self._buffers[0]
        # tensors made in inference mode cannot be written to outside of it
        writable = torch.is_inference_mode_enabled() or not keys.is_inference()
        return length <= keys.shape[-2] and writable and self._in_place()

    def _grow(self, length: int) -> None:
        """Move what is held to buffers with room for `length` tokens, or twice as many as now."""
        held = self.keys.shape[2]
        room = max(ROOM, length, 2 * held)
        self._show(_roomier(self.keys, room), _roomier(self.values, room), held)

    def _show(
        self, keys: torch.Tensor, values: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let `keys` and `values` be the first tokens of these buffers."""
        self._buffers = (keys, values)
        self._views = views = (keys.narrow(2, 0, length), values.narrow(2, 0, length))
        self.keys, self.values = views
        return views


def _roomier(states: torch.Tensor, room: int) -> torch.Tensor:
    """Return a copy with room for so many tokens."""
    buffer = states.new_empty((*states.shape[:2], room, states.shape[-1]))
    buffer.narrow(2, 0, states.shape[2]).copy_(states)
    return buffer


def growing(cache: Cache) -> Cache:
    """Let every full-attention layer of a dynamic cache grow by doubling; return the cache.

    Layers of other kinds (sliding windows, recurrent states, static and quantised ones) stay as
    they are, and so does a cache that is offloaded, whose layers change place at every token.
    """
    if cache.offloading:
        return cache
    cache.layers[:] = [
        GrowingLayer.of(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache

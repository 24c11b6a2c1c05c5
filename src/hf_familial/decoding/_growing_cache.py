"""A cache layer that grows by doubling, so that it does not copy all past tokens at each step."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


# the initial capacity of a layer in tokens
ROOM = 64


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` with buffers that have free room for future tokens.

    `keys` and `values`, shape `(batch, heads, seq, head_dim)`, are views of the buffers. New tokens
    after a crop overwrite the cropped ones in place.
    """

    _buffers: tuple[torch.Tensor, torch.Tensor]
    # the views made here; if `keys` or `values` are other tensors, outside code replaced them
    _views: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, layer: DynamicLayer) -> GrowingLayer:
        """Return a growing layer with the keys and values of another layer."""
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
        """Append tokens and return views of all keys and all values."""
        if key_states.requires_grad and torch.is_grad_enabled():
            # an in-place write would break the autograd graph
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
        """Remove the last tokens. The argument is 0 or negative, as in `DynamicLayer.crop`."""
        if tokens_to_remove < 0 and self._in_place():
            self._show(*self._buffers, max(0, self.keys.shape[2] + tokens_to_remove))
        else:
            super().crop(tokens_to_remove)

    def _in_place(self) -> bool:
        """Return whether `keys` and `values` are still the views that this layer created."""
        return self.is_initialized and self.keys is self._views[0] and self.values is self._views[1]

    def _has_room(self, length: int) -> bool:
        keys = self._buffers[0]
        # tensors created in inference mode are read-only outside of it
        writable = torch.is_inference_mode_enabled() or not keys.is_inference()
        return length <= keys.shape[-2] and writable and self._in_place()

    def _grow(self, length: int) -> None:
        """Copy keys and values to buffers for `length` tokens, at least twice as large."""
        held = self.keys.shape[2]
        room = max(ROOM, length, 2 * held)
        self._show(_roomier(self.keys, room), _roomier(self.values, room), held)

    def _show(
        self, keys: torch.Tensor, values: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Set `keys` and `values` to views of the first `length` tokens of the buffers."""
        self._buffers = (keys, values)
        self._views = views = (keys.narrow(2, 0, length), values.narrow(2, 0, length))
        self.keys, self.values = views
        return views


def _roomier(states: torch.Tensor, room: int) -> torch.Tensor:
    """Return a copy of the states in a buffer with room for `room` tokens."""
    buffer = states.new_empty((*states.shape[:2], room, states.shape[-1]))
    buffer.narrow(2, 0, states.shape[2]).copy_(states)
    return buffer


def growing(cache: Cache) -> Cache:
    """Replace the full-attention layers of a dynamic cache by growing ones, and return the cache.

    Other layers (sliding windows, recurrent states, static, quantised) stay unchanged. An offloaded
    cache stays unchanged too, because its layers move between devices at each token.
    """
    if cache.offloading:
        return cache
    cache.layers[:] = [
        GrowingLayer.of(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache

"""What the parts of a state must satisfy, whatever model they are for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import RelayStateError
from ._message import NAMES


if TYPE_CHECKING:
    from .state import RelayState


def check_columns(state: RelayState) -> None:
    """Shapes and ranges of what counts columns, and of what goes with the text as a whole.

    Args:
        state ([`RelayState`]): To be checked.

    Raises:
        RelayStateError: Naming what is wrong.
    """
    shape = state.tokens.shape
    if len(shape) != 2 or not state.tokens.numel():
        raise RelayStateError(f"`tokens` must be (batch, seq), neither 0, got {tuple(shape)}.")
    if type(state.start) is not int or not 0 <= state.start < 1 << 31:
        raise RelayStateError(f"`start` must count columns, got {state.start!r:.60}.")
    most = {"tokens": 1 << 31, "attention_mask": 2, "position_ids": state.start + shape[1]}
    for name, limit in most.items():
        tensor = getattr(state, name)
        if tensor.shape != shape or tensor.is_floating_point():
            raise RelayStateError(
                f"`{name}` must be whole numbers of shape {tuple(shape)}, got {tensor.dtype} of "
                f"{tuple(tensor.shape)}."
            )
        if int(tensor.min()) < 0 or int(tensor.max()) >= limit:
            raise RelayStateError(f"`{name}` must be from 0 to {limit - 1}.")
    if not isinstance(state.fingerprint, str) or not state.fingerprint:
        raise RelayStateError("`fingerprint` must say which layers made the taps.")
    finished, generator = state.finished, state.generator
    if finished is not None:
        whole = finished.shape == shape[:1] and not finished.is_floating_point()
        if not whole or int(finished.min()) < 0 or int(finished.max()) > 1:
            raise RelayStateError("`finished` must be 0 or 1 for each row.")
    if generator is not None and (generator.dtype != torch.uint8 or generator.ndim != 1):
        raise RelayStateError("`generator` must be the bytes of `torch.Generator.get_state()`.")


def check_taps(state: RelayState) -> None:
    """Every column is pending at one depth at most.

    Args:
        state ([`RelayState`]): To be checked.

    Raises:
        RelayStateError: Naming what is wrong.
    """
    batch, columns = state.shape
    pending = 0
    for depth, tap in state.taps.items():
        if type(depth) is not int or depth < 1:
            raise RelayStateError(f"`taps` go by depth, from 1 on, got {depth!r:.60}.")
        floating = tap.dtype in NAMES and tap.is_floating_point()
        if tap.ndim != 3 or tap.shape[0] != batch or not floating:
            raise RelayStateError(
                f"the taps at depth {depth} must be ({batch}, pending, hidden) of a floating "
                f"dtype, got {tap.dtype} of {tuple(tap.shape)}."
            )
        pending += tap.shape[1]
        check_finite(f"the taps at depth {depth}", tap)
    if pending > columns:
        raise RelayStateError(f"{pending} positions are pending, of {columns} columns.")


def check_layers(state: RelayState) -> None:
    """What can be known of them without the model: see `caches.check_layers` for the rest.

    Args:
        state ([`RelayState`]): To be checked.

    Raises:
        RelayStateError: Naming what is wrong.
    """
    if state.layers and state.start:
        raise RelayStateError("keys and values travel with the whole text: `start` must be 0.")
    for slot, layer in state.layers.items():
        if not 0 <= layer.seen <= state.shape[1]:
            raise RelayStateError(
                f"layer {slot} has seen {layer.seen} positions, of {state.shape[1]}."
            )
        for name, tensor in layer.tensors.items():
            if tensor.dtype not in NAMES or not tensor.is_floating_point():
                raise RelayStateError(f"`{name:.60}` of layer {slot} cannot be {tensor.dtype}.")
            if not tensor.ndim or tensor.shape[0] != state.shape[0]:
                raise RelayStateError(
                    f"`{name:.60}` of layer {slot} must have {state.shape[0]} rows, got "
                    f"{tuple(tensor.shape)}."
                )
            check_finite(f"`{name:.60}` of layer {slot}", tensor)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse NaN and infinity.

    Args:
        name (`str`): What to call it.
        tensor (`torch.Tensor`): Of any dtype and shape.

    Raises:
        RelayStateError: If it holds any.
    """
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise RelayStateError(f"{name} holds numbers that are not finite.")

"""Splitting a text between two processes over any channel of bytes.

The other two modes need no loop: one side sends `text.state("migrate").to_bytes()`, the other
calls `side.resume(HandoffState.from_bytes(payload)).generate()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import HandoffError
from ._message import decode, encode
from .device import DeviceText
from .server import ServerSide, ServerText
from .state import HandoffState


def run_device(
    text: DeviceText,
    send: Callable[[bytes], None],
    receive: Callable[[], bytes],
    dtype: str | None = None,
) -> torch.Tensor:
    """Run the layers below the exit for every token, while the server runs those above.

    Args:
        text ([`DeviceText`]): Begun on this side.
        send (`Callable[[bytes], None]`): Sends one message to the server.
        receive (`Callable[[], bytes]`): Waits for its next one.
        dtype (`str`, *optional*): The format that taps travel in: `"fp32"`, `"bf16"`, `"int8"`, or
            as they are.

    Returns:
        `torch.LongTensor` of shape `(batch, seq)`: The whole text, as the deepest exit writes it.

    Raises:
        HandoffError: If an answer is not what `run_server` sends.
    """
    while True:
        send(text.state("split", dtype).to_bytes())
        tokens, done = decode_tokens(receive(), len(text.tokens))
        if done:
            return torch.cat((text.tokens, tokens.to(text.tokens)), 1)
        text.take(tokens)


def run_server(
    side: ServerSide,
    send: Callable[[bytes], None],
    receive: Callable[[], bytes],
    **options: Any,
) -> ServerText:
    """Run the other side of `run_device`, for one text.

    Args:
        side ([`ServerSide`]): With or without the layers below the exit.
        send (`Callable[[bytes], None]`): Sends one message to the device.
        receive (`Callable[[], bytes]`): Waits for its next one.
        **options: As for [`ServerSide.resume`].

    Returns:
        [`ServerText`]: To its end.

    Raises:
        HandoffError: If a message is not what `run_device` sends.
    """
    text = side.resume(HandoffState.from_bytes(receive()), **options)
    while True:
        tokens = text.step()
        send(encode_tokens(tokens, text.done))
        if text.done:
            return text
        text.take(HandoffState.from_bytes(receive()))


def encode_tokens(tokens: torch.Tensor, done: bool) -> bytes:
    """Return the message that carries tokens of shape `(batch, 1)` to the device.

    `done` says whether the text ends with them.
    """
    return encode({"tokens": tokens.to(torch.int32)}, {"done": done})


def decode_tokens(payload: bytes, batch: int) -> tuple[torch.Tensor, bool]:
    """Read a message that `encode_tokens` wrote, for a text of `batch` rows."""
    tensors, words = decode(payload)
    tokens = tensors.get("tokens")
    if set(tensors) != {"tokens"} or tokens is None or set(words) != {"done"}:
        raise HandoffError("this message carries no tokens.")
    if type(words["done"]) is not bool or tokens.dtype != torch.int32:
        raise HandoffError("this message carries no tokens.")
    if tokens.shape != (batch, 1) or int(tokens.min()) < 0:
        raise HandoffError(
            f"a token for each of {batch} rows is wanted, got {tokens.tolist()!s:.60}."
        )
    return tokens.long(), words["done"]

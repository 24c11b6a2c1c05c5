"""Loops for the mode `"split"`, in which device and server run each token together.

They work over any channel that sends bytes. The other two modes need no loop. The device sends
`text.state("migrate").to_bytes()`, and the server calls
`side.resume(HandoffState.from_bytes(payload)).generate()`.
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
    """Run the device side of a split text to its end.

    The device runs the layers below the exit for every token. The server runs the layers above
    with [`run_server`] and chooses the tokens.

    Args:
        text ([`DeviceText`]): The text, started on this device.
        send (`Callable[[bytes], None]`): A function that sends one message to the server.
        receive (`Callable[[], bytes]`): A function that waits for the server's next message and
            returns it.
        dtype (`str`, *optional*): The format of the sent taps: `"fp32"`, `"bf16"` or `"int8"`.
            Defaults to the model's dtype.

    Returns:
        `torch.LongTensor` of shape `(batch, seq)`: The whole text. It is the text of the deepest
        exit.

    Raises:
        HandoffError: If a message from the server is not valid.

    Example:
        >>> device_end, server_end = multiprocessing.Pipe()
        >>> tokens = run_device(text, device_end.send_bytes, device_end.recv_bytes)
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
    """Run the server side of one split text to its end. The device runs [`run_device`].

    Args:
        side ([`ServerSide`]): The server side, with or without the layers below the exit.
        send (`Callable[[bytes], None]`): A function that sends one message to the device.
        receive (`Callable[[], bytes]`): A function that waits for the device's next message and
            returns it.
        **options: Options of [`ServerSide.resume`].

    Returns:
        [`ServerText`]: The finished text.

    Raises:
        HandoffError: If a message from the device is not valid.
    """
    text = side.resume(HandoffState.from_bytes(receive()), **options)
    while True:
        tokens = text.step()
        send(encode_tokens(tokens, text.done))
        if text.done:
            return text
        text.take(HandoffState.from_bytes(receive()))


def encode_tokens(tokens: torch.Tensor, done: bool) -> bytes:
    """Return a message to the device with tokens of shape `(batch, 1)`.

    `done` is `True` if the text ends with these tokens.
    """
    return encode({"tokens": tokens.to(torch.int32)}, {"done": done})


def decode_tokens(payload: bytes, batch: int) -> tuple[torch.Tensor, bool]:
    """Return the tokens and `done` of a message from `encode_tokens` for a text of `batch` rows."""
    tensors, words = decode(payload)
    tokens = tensors.get("tokens")
    if set(tensors) != {"tokens"} or tokens is None or set(words) != {"done"}:
        raise HandoffError("the message must contain `tokens` and `done` only.")
    if type(words["done"]) is not bool or tokens.dtype != torch.int32:
        raise HandoffError("`tokens` of the message must be int32, and `done` must be a bool.")
    if tokens.shape != (batch, 1) or int(tokens.min()) < 0:
        raise HandoffError(
            f"`tokens` must be one token for each of {batch} rows, got {tokens.tolist()!s:.60}."
        )
    return tokens.long(), words["done"]

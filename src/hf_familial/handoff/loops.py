"""Splitting a text between two processes over any channel of bytes.

The other two modes need no loop: one side sends `text.state("migrate").to_bytes()`, the other
calls `side.resume(RelayState.from_bytes(payload)).generate()`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import RelayStateError
from ._message import seal, unseal
from ._server_text import DeepText
from .device import ShallowText
from .server import DeepSide
from .state import RelayState


def split(
    text: ShallowText,
    send: Callable[[bytes], None],
    receive: Callable[[], bytes],
    dtype: str | None = None,
) -> torch.Tensor:
    """Run the layers below the exit for every token; the other side runs those above.

    Args:
        text ([`ShallowText`]): Begun on this side.
        send (`Callable[[bytes], None]`): Sends one message to the other side.
        receive (`Callable[[], bytes]`): Waits for its next one.
        dtype (`str`, *optional*): What taps travel in: `"fp32"`, `"bf16"`, `"int8"`, or as they
            are.

    Returns:
        `torch.LongTensor` of shape `(batch, seq)`: The whole text, as the deepest exit writes it.

    Raises:
        RelayStateError: If an answer is not what `serve` sends.
    """
    while True:
        send(text.state("split", dtype).to_bytes())
        tokens, done = read_tokens(receive(), len(text.tokens))
        if done:
            return torch.cat((text.tokens, tokens.to(text.tokens)), 1)
        text.take(tokens)


def serve(
    side: DeepSide,
    send: Callable[[bytes], None],
    receive: Callable[[], bytes],
    **options: Any,
) -> DeepText:
    """The other side of `split`, for one text.

    Args:
        side ([`DeepSide`]): Whole, or an upper part.
        send (`Callable[[bytes], None]`): Sends one message to the device.
        receive (`Callable[[], bytes]`): Waits for its next one.
        **options: As for [`DeepSide.resume`].

    Returns:
        [`DeepText`]: To its end.

    Raises:
        RelayStateError: If a message is not what `split` sends.
    """
    text = side.resume(RelayState.from_bytes(receive()), **options)
    while True:
        tokens = text.step()
        send(write_tokens(tokens, text.done))
        if text.done:
            return text
        text.take(RelayState.from_bytes(receive()))


def write_tokens(tokens: torch.Tensor, done: bool) -> bytes:
    """The message that carries tokens down.

    Args:
        tokens (`torch.LongTensor` of shape `(batch, 1)`): Just chosen.
        done (`bool`): Whether the text ends with them.

    Returns:
        `bytes`: 4 for each token, and a header.
    """
    return seal({"tokens": tokens.to(torch.int32)}, {"done": done})


def read_tokens(payload: bytes, batch: int) -> tuple[torch.Tensor, bool]:
    """Read what `write_tokens` wrote.

    Args:
        payload (`bytes`): From the other side.
        batch (`int`): Rows of the text.

    Returns:
        `tuple`: Tokens of shape `(batch, 1)` and dtype int64, and whether the text ends.

    Raises:
        RelayStateError: If it is anything else.
    """
    tensors, words = unseal(payload)
    tokens = tensors.get("tokens")
    if set(tensors) != {"tokens"} or tokens is None or set(words) != {"done"}:
        raise RelayStateError("this message carries no tokens.")
    if type(words["done"]) is not bool or tokens.dtype != torch.int32:
        raise RelayStateError("this message carries no tokens.")
    if tokens.shape != (batch, 1) or int(tokens.min()) < 0:
        raise RelayStateError(
            f"a token for each of {batch} rows is wanted, got {tokens.tolist()!s:.60}."
        )
    return tokens.long(), words["done"]

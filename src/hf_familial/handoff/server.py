"""The server side of a hand-off: it runs the layers above an exit, or the whole family."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import HandoffError
from ..flops.counting import FlopTally
from ..models.familial.relay_cache import RelayCache, check_relay
from ..models.familial.segments import SegmentRunner
from ._cache_layers import LayerState, check_against_model, probe_layers, restore
from ._settings import check_length, largest_id
from ._text import HandoffText, PortableText, restored_generator
from ._upper_half import without_lower_layers
from ._weights_digest import weights_digest
from .state import HandoffState, check_finite


@dataclass(frozen=True)
class Recomputed:
    """The cost of computing keys and values again that the device did not send.

    Attributes:
        positions (`int`): Number of positions that ran, over all rows, padding included.
        layers (`int`): Number of layers that each position ran through.
        flops (`int`): FLOPs of all matmuls and attention. A multiply-add counts as two, and causal
            attention counts in full.
        seconds (`float`): Wall time.
        tap_error (`float`): The largest difference between received and recomputed taps, divided
            by the largest recomputed absolute value. A small value is the rounding of `dtype`.
    """

    positions: int
    layers: int
    flops: int
    seconds: float
    tap_error: float

    @property
    def layer_passes(self) -> int:
        """The number of positions times the number of layers."""
        return self.positions * self.layers


@dataclass(frozen=True)
class ServerSide:
    """The server side of a hand-off, created by [`server_side`].

    Attributes:
        model ([`FamilialForCausalLM`]): The family, whole or without its lower layers.
        exit_idx (`int`): The exit whose hidden states (taps) the device sends.
        weights_digest (`str`): The digest of the layers below the exit at creation.
        expected_layers (`Mapping[int, LayerState]`): The cache state of each layer below the exit
            after one position. Received keys and values are checked against it. It is empty if
            the server does not have these layers.
    """

    model: Any
    exit_idx: int
    weights_digest: str
    expected_layers: Mapping[int, LayerState]

    @property
    def keeps_lower(self) -> bool:
        """`True` if this process also has the layers below the exit."""
        return bool(self.expected_layers)

    @property
    def depth(self) -> int:
        """The number of layers below the exit."""
        return self.model.config.exits[self.exit_idx]

    def _current_digest(self) -> str:
        """Return the digest that the state of a new text must contain.

        The digest is computed again for each text because weights may have changed. It is not
        computed again after `model.freeze_weights()`, or if the lower layers are not here.
        """
        if not self.keeps_lower or self.model.model.frozen:
            return self.weights_digest
        return weights_digest(self.model, self.depth)

    def resume(self, state: HandoffState, **options: Any) -> ServerText:
        """Continue a text that another process started.

        Args:
            state ([`HandoffState`]): The state of the text from its first column.
            **options: Arguments of `generate`, for example `max_new_tokens=50`. They override the
                settings in `state`.

        Returns:
            [`ServerText`]: The text on this side.

        Raises:
            HandoffError: If the weights below the exit differ between the two processes, or if the
                state does not fit this model.
        """
        return ServerText(self, state, options)


def server_side(model: Any, exit_idx: int, keep_lower: bool = True) -> ServerSide:
    """Build the server side of a hand-off.

    Args:
        model ([`FamilialForCausalLM`]): The whole family. It is not changed.
        exit_idx (`int`): The exit whose hidden states (taps) the device sends. It must not be the
            deepest exit.
        keep_lower (`bool`, *optional*, defaults to `True`): Whether the server keeps the layers
            below the exit. It needs them to continue a text alone. With `False` only the mode
            `"split"` works. The memory of these layers, the embedding and the lower exits is then
            freed when nothing else refers to `model`.

    Returns:
        [`ServerSide`]: The server side. Call its `resume` with a received state.

    Raises:
        IndexError: If the family does not have this exit.
        ValueError: If the exit is the deepest, or if the backbone does not support hand-offs.

    Example:
        >>> side = server_side(FamilialForCausalLM.from_pretrained("me/family"), exit_idx=0)
        >>> tokens = side.resume(HandoffState.from_bytes(payload)).generate()
    """
    check_relay(model)
    exit_idx = model.config.resolve_exit(exit_idx)
    if exit_idx == model.config.num_exits - 1:
        raise ValueError(
            f"exit {exit_idx} is the deepest. `exit_idx` must be from 0 to {exit_idx - 1}, because "
            "the server runs the layers above the exit."
        )
    depth = model.config.exits[exit_idx]
    digest = weights_digest(model, depth)
    probe_layers(model, depth, model.config.exits[-1])
    expected = probe_layers(model, 0, depth)
    if keep_lower:
        return ServerSide(model, exit_idx, digest, expected)
    return ServerSide(without_lower_layers(model, exit_idx), exit_idx, digest, {})


class ServerText(HandoffText):
    """A batch of texts on the server side of a hand-off, created by [`ServerSide.resume`].

    Attributes:
        side ([`ServerSide`]): The server side that runs the text.
        tokens (`torch.LongTensor` of shape `(batch, seq)`): The text so far.
        relay ([`UpperCache`]): The keys, values and pending taps of the text.
        recomputed ([`Recomputed`], *optional*): The cost of keys and values that this process
            computed again. It is `None` as long as it has computed none.
    """

    def __init__(self, side: ServerSide, state: HandoffState, options: dict[str, Any]) -> None:
        self.side, model, device = side, side.model, side.model.device
        self._weights_digest = side._current_digest()
        self.recomputed: Recomputed | None = None
        if state.start:
            raise HandoffError(
                f"the state must begin at column 0, got `start={state.start}`. This server does "
                "not have the earlier columns."
            )
        self._check(state)
        if options.get("max_new_tokens") is None:
            check_length(state.settings, int(state.position_ids.max()), model.config)
        self.relay = UpperCache(model, side.exit_idx)
        if state.layers:
            check_against_model(state.layers, side.expected_layers, self.relay.cache, *state.shape)
        text = PortableText(
            model,
            -1,
            state.tokens.to(device),
            state.attention_mask.to(device),
            state.finished,
            restored_generator(state.generator),
            **{**state.settings, **options},
        )
        super().__init__(text)
        restore(self.relay.cache, state.layers, device)
        # True once this process runs the lower layers; until then it keeps the received taps
        self._alone = bool(state.layers)
        self._came: list[torch.Tensor] = []
        self._push(state)

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Choose the next token of each row. The taps of all tokens must have arrived.

        Returns:
            `torch.LongTensor` of shape `(batch, 1)`: The new tokens. They are also appended to
            `tokens`.

        Raises:
            HandoffError: If the taps of the last token are missing, or if received taps, keys or
                values are so large that the logits are not finite.
        """
        if self.relay.length < self.tokens.shape[1]:
            raise HandoffError(
                f"taps of {self.relay.length} columns have arrived, but the text has "
                f"{self.tokens.shape[1]}. First call `take` with the taps of the last token."
            )
        self.relay.catch_up(-1)
        logits = self.relay.logits(-1)[:, -1]
        # minus infinity is valid: some backbones use it for tokens that cannot follow
        check_finite("the logits row", logits.clamp(min=0))
        return self._text.choose_next(logits)

    @torch.no_grad()
    def take(self, state: HandoffState) -> None:
        """Add the taps of the tokens that `step` chose, after the device has run these tokens.

        Args:
            state ([`HandoffState`]): The device's state of the next columns, mode `"split"`.

        Raises:
            HandoffError: If the state has other columns or other tokens, or contains keys and
                values.
        """
        self._check(state)
        seen, columns = self.relay.length, state.shape[1]
        chosen = self.tokens[:, seen:].cpu()
        if state.start != seen or columns != chosen.shape[1] or state.layers or self._alone:
            raise HandoffError(
                f"expected only the taps of columns {seen} to {seen + chosen.shape[1]}, got "
                f"columns {state.start} to {state.start + columns}."
            )
        counted = self._positions[:, -1:].cpu() + torch.arange(1, columns + 1)
        if not torch.equal(state.tokens, chosen):
            raise HandoffError(
                f"expected the taps of the tokens {chosen.tolist()!s:.60}, got those of "
                f"{state.tokens.tolist()!s:.60}."
            )
        if not torch.equal(state.position_ids, counted) or not state.attention_mask.all():
            raise HandoffError(
                f"expected the positions {counted.tolist()!s:.60} without padding, got "
                f"{state.position_ids.tolist()!s:.60}."
            )
        self._push(state)

    @torch.no_grad()
    def generate(self, streamer: Any = None) -> torch.Tensor:
        """Generate the rest of the text without the device.

        If the state had no keys and values of the layers below the exit, they are computed first.
        The attribute `recomputed` then contains the cost.

        Args:
            streamer (`BaseStreamer`, *optional*): A streamer that receives the text so far, then
                each new token.

        Returns:
            `torch.LongTensor` of shape `(batch, seq)`: The whole text, prompt included.

        Raises:
            ValueError: If this process does not have the layers below the exit.
        """
        if streamer is not None:
            streamer.put(self.tokens.cpu())
        while not self.done:
            self._run_last()
            tokens = self.step()
            if streamer is not None:
                streamer.put(tokens[:, 0].cpu())
        if streamer is not None:
            streamer.end()
        return self.tokens

    def _run_last(self) -> None:
        """Run chosen tokens through the layers below the exit if they have not run yet."""
        new = self.tokens[:, self.relay.length :]
        if not new.shape[1]:
            return
        if not self.side.keeps_lower:
            raise ValueError(
                f"the layers below depth {self.side.depth} are not in this process. The device "
                "runs them: call `take` with its taps, or build the server with `keep_lower=True`."
            )
        if not self._alone:
            self._recompute()
        self.relay.feed(new)

    def _recompute(self) -> None:
        """Compute the keys and values of the layers below the exit for all columns."""
        inner, depth, seen = self.side.model.model, self.side.depth, self.relay.length
        segment = inner.members.segment(0, depth)
        below = SegmentRunner(inner.decoder, segment, self.relay.cache)
        began = time.perf_counter()
        with FlopTally() as tally:
            taps = below(input_ids=self.tokens[:, :seen], **self._inputs())
        difference = (taps - torch.cat(self._came, 1)).abs().max()
        self.recomputed = Recomputed(
            positions=taps.shape[0] * seen,
            layers=depth,
            flops=tally.total,
            seconds=time.perf_counter() - began,
            tap_error=float(difference / taps.abs().max().clamp(min=1e-30)),
        )
        self._came, self._alone = [], True

    def _push(self, state: HandoffState) -> None:
        """Add the taps of new columns as pending positions."""
        device = self.side.model.device
        taps, mask = state.taps[self.side.depth].to(device), state.attention_mask.to(device)
        positions = state.position_ids.to(device)
        self._add_columns(mask, positions)
        self.relay.push(taps, positions, None if bool(self._mask.all()) else mask)
        if self.side.keeps_lower and not self._alone:
            self._came.append(taps)

    def _check(self, state: HandoffState) -> None:
        """Raise `HandoffError` if a state is from other weights, or does not fit this model."""
        side = self.side
        if state.weights_digest != self._weights_digest:
            raise HandoffError(
                f"the taps come from other layers (digest {state.weights_digest:.12}) than those "
                f"below this exit (digest {self._weights_digest:.12}). Use the same config and "
                "weights in both processes."
            )
        backbone, (batch, columns) = side.model.model.backbone, state.shape
        shape = (batch, columns, backbone.config.hidden_size)
        found = {depth: (tuple(tap.shape), tap.dtype) for depth, tap in state.taps.items()}
        if found != {side.depth: (shape, backbone.dtype)}:
            raise HandoffError(
                f"expected taps at depth {side.depth} with shape and dtype "
                f"{(shape, backbone.dtype)}, got {found}."
            )
        check_length({}, int(state.position_ids.max()), side.model.config)
        vocab = side.model.config.vocab_size
        largest = max(int(state.tokens.max()), largest_id(state.settings))
        if largest >= vocab:
            raise HandoffError(f"token ids must be below {vocab}, got {largest}.")


class UpperCache(RelayCache):
    """A relay cache that starts from the taps of one exit and ends at the deepest exit."""

    def __init__(self, model: Any, exit_idx: int) -> None:
        super().__init__(model, [exit_idx, -1])
        self._branches[0] = None  # its private layers do not run, because it needs no logits

    def push(
        self, taps: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> None:
        """Add taps of new columns as pending positions.

        The first segment does not run for these columns, so it has no keys and values for them.

        Args:
            taps (`torch.Tensor` of shape `(batch, new, hidden)`): The hidden states at the exit.
            positions (`torch.LongTensor` of shape `(batch, new)`, *optional*): Position ids. By
                default they continue after the last column.
            mask (`torch.Tensor` of shape `(batch, new)`, *optional*): 0 for padding, else 1.
        """
        new = self._extend(taps, positions, mask)
        self._keep(0, taps)
        self._done[0] += new

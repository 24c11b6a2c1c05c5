"""The server's side of a hand-off: it runs the layers above an exit, or the whole family."""

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
    """The cost of computing keys and values anew that did not travel.

    Attributes:
        positions (`int`): Positions that were run, padding included, over all rows.
        layers (`int`): Layers that each of them ran through.
        flops (`int`): Of every matmul and attention, a multiply-add as two, causal attention
            counted in full.
        seconds (`float`): Wall time.
        tap_error (`float`): Largest difference of the taps that came from those computed here, as
            a share of the largest of these: what rounding on the way did, if it is small.
    """

    positions: int
    layers: int
    flops: int
    seconds: float
    tap_error: float

    @property
    def layer_passes(self) -> int:
        """Positions times layers."""
        return self.positions * self.layers


@dataclass(frozen=True)
class ServerSide:
    """A process that holds the layers above an exit; made by [`server_side`].

    Attributes:
        model ([`FamilialForCausalLM`]): The family, whole or without its lower layers.
        exit_idx (`int`): The exit whose taps come from the device.
        weights_digest (`str`): Of the layers below it when the side was made.
        expected_layers (`Mapping[int, LayerState]`): What one position leaves in the cache of each
            layer below the exit; empty when those layers are not here.
    """

    model: Any
    exit_idx: int
    weights_digest: str
    expected_layers: Mapping[int, LayerState]

    @property
    def keeps_lower(self) -> bool:
        """Return whether the layers below the exit are here too."""
        return bool(self.expected_layers)

    @property
    def depth(self) -> int:
        """Layers below the exit."""
        return self.model.config.exits[self.exit_idx]

    def _current_digest(self) -> str:
        """Return the digest that the taps of a new text must carry.

        It is computed anew, since weights may have changed; not where `model.freeze_weights()`
        promises that they do not, nor where the layers are not here.
        """
        if not self.keeps_lower or self.model.model.frozen:
            return self.weights_digest
        return weights_digest(self.model, self.depth)

    def resume(self, state: HandoffState, **options: Any) -> ServerText:
        """Go on with a text from another process.

        Args:
            state ([`HandoffState`]): The text from its beginning.
            **options: As for `generate`; they win over the settings that came with the text.

        Returns:
            [`ServerText`]: The text on this side.

        Raises:
            HandoffError: If the taps come from other layers, or do not fit these.
        """
        return ServerText(self, state, options)


def server_side(model: Any, exit_idx: int, keep_lower: bool = True) -> ServerSide:
    """Make the server side of a hand-off.

    Args:
        model ([`FamilialForCausalLM`]): The whole family; left as it is.
        exit_idx (`int`): The exit whose taps come from the device, not the deepest.
        keep_lower (`bool`, *optional*, defaults to `True`): Whether to hold the layers below the
            exit too, which going on alone needs. Without them only the mode `"split"` works:
            layers, embedding and private layers below are neither held nor runnable, and when
            nothing else refers to `model`, their memory is free.

    Returns:
        [`ServerSide`]: With the digest of the layers below the exit.

    Raises:
        IndexError: If there is no such exit.
        ValueError: If nothing stands above it, or the host's layers cannot go on from a tap or from
            what is in the cache.

    Example:
        >>> side = server_side(FamilialForCausalLM.from_pretrained("me/family"), exit_idx=0)
        >>> tokens = side.resume(HandoffState.from_bytes(payload)).generate()
    """
    check_relay(model)
    exit_idx = model.config.resolve_exit(exit_idx)
    if exit_idx == model.config.num_exits - 1:
        raise ValueError(f"exit {exit_idx} is the deepest: no layers go on from its taps.")
    depth = model.config.exits[exit_idx]
    digest = weights_digest(model, depth)
    probe_layers(model, depth, model.config.exits[-1])
    expected = probe_layers(model, 0, depth)
    if keep_lower:
        return ServerSide(model, exit_idx, digest, expected)
    return ServerSide(without_lower_layers(model, exit_idx), exit_idx, digest, {})


class ServerText(HandoffText):
    """A text, or a batch of them, on the side that runs the layers above the exit.

    Made by [`ServerSide.resume`].

    Attributes:
        side ([`ServerSide`]): Where it runs.
        tokens (`torch.LongTensor` of shape `(batch, seq)`): The text so far.
        relay ([`UpperCache`]): Its keys, values and pending taps.
        recomputed ([`Recomputed`], *optional*): What keys and values that did not travel cost.
    """

    def __init__(self, side: ServerSide, state: HandoffState, options: dict[str, Any]) -> None:
        self.side, model, device = side, side.model, side.model.device
        self._weights_digest = side._current_digest()
        self.recomputed: Recomputed | None = None
        if state.start:
            raise HandoffError(f"the text begins at column {state.start}: 0 was never seen here.")
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
        # whether this side runs the lower layers itself; until then the taps that came are kept
        self._alone = bool(state.layers)
        self._came: list[torch.Tensor] = []
        self._push(state)

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Choose the next token, once the taps of all tokens so far are here.

        Returns:
            `torch.LongTensor` of shape `(batch, 1)`: Also added to `tokens`.

        Raises:
            HandoffError: If the taps of the last token are still to come, or they or the keys
                and values that came are so large that the logits are not finite.
        """
        if self.relay.length < self.tokens.shape[1]:
            raise HandoffError(
                f"taps of {self.relay.length} columns are here, of {self.tokens.shape[1]}: `take` "
                "those of the last token first."
            )
        self.relay.catch_up(-1)
        logits = self.relay.logits(-1)[:, -1]
        # a host may mean minus infinity
        check_finite("the logits row", logits.clamp(min=0))
        return self._text.choose_next(logits)

    @torch.no_grad()
    def take(self, state: HandoffState) -> None:
        """Take the taps of the tokens that `step` chose, from the side that ran them.

        Args:
            state ([`HandoffState`]): Of the columns that follow.

        Raises:
            HandoffError: If it is of other columns or other tokens, or has layers with it.
        """
        self._check(state)
        seen, columns = self.relay.length, state.shape[1]
        chosen = self.tokens[:, seen:].cpu()
        if state.start != seen or columns != chosen.shape[1] or state.layers or self._alone:
            raise HandoffError(
                f"expected the taps alone of columns {seen} to {seen + chosen.shape[1]}, got "
                f"columns {state.start} to {state.start + columns}."
            )
        counted = self._positions[:, -1:].cpu() + torch.arange(1, columns + 1)
        if not torch.equal(state.tokens, chosen):
            raise HandoffError(f"the taps of {chosen.tolist()} are wanted, of no other tokens.")
        if not torch.equal(state.position_ids, counted) or not state.attention_mask.all():
            raise HandoffError(f"the positions {counted.tolist()} are wanted, without padding.")
        self._push(state)

    @torch.no_grad()
    def generate(self, streamer: Any = None) -> torch.Tensor:
        """Go on alone to the end of the text.

        Keys and values of the layers below the exit that did not travel are computed anew first,
        see `recomputed`.

        Args:
            streamer (`BaseStreamer`, *optional*): Is given the text so far, then every token.

        Returns:
            `torch.LongTensor` of shape `(batch, seq)`: The whole text.

        Raises:
            ValueError: If the layers below the exit are not here.
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
        """Run the tokens that were chosen and not run yet through the layers below the exit."""
        new = self.tokens[:, self.relay.length :]
        if not new.shape[1]:
            return
        if not self.side.keeps_lower:
            raise ValueError(
                f"the layers below depth {self.side.depth} are not here: the other side runs them, "
                "and `take` takes its taps."
            )
        if not self._alone:
            self._recompute()
        self.relay.feed(new)

    def _recompute(self) -> None:
        """Compute keys and values of the layers below the exit for all columns."""
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
        """Make the taps of new columns pending."""
        device = self.side.model.device
        taps, mask = state.taps[self.side.depth].to(device), state.attention_mask.to(device)
        positions = state.position_ids.to(device)
        self._add_columns(mask, positions)
        self.relay.push(taps, positions, None if bool(self._mask.all()) else mask)
        if self.side.keeps_lower and not self._alone:
            self._came.append(taps)

    def _check(self, state: HandoffState) -> None:
        """Raise `HandoffError` if a state's taps come from other layers or do not fit these."""
        side = self.side
        if state.weights_digest != self._weights_digest:
            raise HandoffError(
                f"the taps come from other layers ({state.weights_digest:.12}) than those below "
                f"this exit ({self._weights_digest:.12}): config or weights differ."
            )
        backbone, (batch, columns) = side.model.model.backbone, state.shape
        shape = (batch, columns, backbone.config.hidden_size)
        found = {depth: (tuple(tap.shape), tap.dtype) for depth, tap in state.taps.items()}
        if found != {side.depth: (shape, backbone.dtype)}:
            raise HandoffError(
                f"taps of depth {side.depth} are wanted, {backbone.dtype} of {shape}, got {found}."
            )
        check_length({}, int(state.position_ids.max()), side.model.config)
        vocab = side.model.config.vocab_size
        largest = max(int(state.tokens.max()), largest_id(state.settings))
        if largest >= vocab:
            raise HandoffError(f"token ids must be below {vocab}, got {largest}.")


class UpperCache(RelayCache):
    """A relay cache from an exit, which is not read here, to the deepest exit."""

    def __init__(self, model: Any, exit_idx: int) -> None:
        super().__init__(model, [exit_idx, -1])
        self._branches[0] = None  # nobody reads that exit, so its private layers need not run

    def push(
        self, taps: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> None:
        """Take taps of new columns, `(batch, new, hidden)`; they become pending.

        The first segment never runs for them, and its keys and values stay empty. `positions` and
        `mask` have the shape `(batch, new)`; by default positions count on and nothing is padding.
        """
        new = self._extend(taps, positions, mask)
        self._keep(0, taps)
        self._done[0] += new

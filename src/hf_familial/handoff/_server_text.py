"""A text that began in another process, on the side that runs the layers above an exit."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from ..errors import RelayStateError
from ..flops import FlopTally
from ..models.familial.relay_cache import RelayCache
from ._cache_layers import check_layers, restore
from ._checks import check_finite
from ._cost import Recomputed
from ._settings import check_length, largest_id
from ._text import Chooser, restored_generator
from .state import RelayState


if TYPE_CHECKING:
    from .server import DeepSide


class DeepText:
    """One text, or a batch of them, on the side that runs the layers above the exit.

    Made by [`DeepSide.resume`].

    Attributes:
        side ([`DeepSide`]): Where it runs.
        relay ([`RelayCache`]): Its keys, values and pending taps.
        recomputed ([`Recomputed`], *optional*): What keys and values that did not travel cost.
    """

    def __init__(self, side: DeepSide, state: RelayState, options: dict[str, Any]) -> None:
        self.side, model, device = side, side.model, side.model.device
        self._fingerprint = side.fingerprint_now()
        self.recomputed: Recomputed | None = None
        if state.start:
            raise RelayStateError(
                f"the text begins at column {state.start}: 0 was never seen here."
            )
        self._check(state)
        if options.get("max_new_tokens") is None:
            check_length(state.settings, int(state.position_ids.max()), model.config)
        self.relay = RelayCache(model, [side.exit_idx, -1], reads=[-1])
        if state.layers:
            check_layers(state.layers, side.like, self.relay.cache, *state.shape)
        self._chooser = Chooser(
            model,
            -1,
            state.tokens.to(device),
            state.attention_mask.to(device),
            state.finished,
            restored_generator(state.generator),
            **{**state.settings, **options},
        )
        restore(self.relay.cache, state.layers, device)
        self._alone = bool(state.layers)
        # of what came: the taps until keys and values are here, positions and mask of all columns
        self._came: list[torch.Tensor] = []
        self._positions = self._mask = state.tokens[:, :0].to(device)
        self._push(state)

    @property
    def tokens(self) -> torch.Tensor:
        """The text so far, shape `(batch, seq)`."""
        return self._chooser.tokens

    @property
    def done(self) -> bool:
        """Whether the text has ended."""
        return self._chooser.done

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Choose the next token, once the taps of all tokens so far are here.

        Returns:
            `torch.LongTensor` of shape `(batch, 1)`: Also added to `tokens`.

        Raises:
            RelayStateError: If the taps of the last token are still to come, or they or the keys
                and values that came are so large that the logits are not finite.
        """
        if self.relay.length < self.tokens.shape[1]:
            raise RelayStateError(
                f"taps of {self.relay.length} columns are here, of {self.tokens.shape[1]}: `take` "
                "those of the last token first."
            )
        self.relay.catch_up(-1)
        logits = self.relay.logits(-1)[:, -1]
        # a host may mean minus infinity
        check_finite("the logits row", logits.clamp(min=0))
        return self._chooser(logits)

    @torch.no_grad()
    def take(self, state: RelayState) -> None:
        """Take the taps of the tokens that `step` chose, from the side that ran them.

        Args:
            state ([`RelayState`]): Of the columns that follow.

        Raises:
            RelayStateError: If it is of other columns or other tokens, or has layers with it.
        """
        self._check(state)
        seen, columns = self.relay.length, state.shape[1]
        chosen = self.tokens[:, seen:].cpu()
        if state.start != seen or columns != chosen.shape[1] or state.layers or self._alone:
            raise RelayStateError(
                f"columns {state.start} to {state.start + columns} came; wanted are the taps alone "
                f"of {seen} to {seen + chosen.shape[1]}."
            )
        counted = self._positions[:, -1:].cpu() + torch.arange(1, columns + 1)
        if not torch.equal(state.tokens, chosen):
            raise RelayStateError(f"the taps of {chosen.tolist()} are wanted, of no other tokens.")
        if not torch.equal(state.position_ids, counted) or not state.attention_mask.all():
            raise RelayStateError(f"the positions {counted.tolist()} are wanted, without padding.")
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
        if not self.side.whole:
            raise ValueError(
                f"the layers below depth {self.side.depth} are not here: the other side runs them, "
                "and `take` takes its taps."
            )
        if not self._alone:
            self._recompute()
        self.relay.feed(new)

    def _recompute(self) -> None:
        """Keys and values of the layers below the exit, for all columns, from their tokens."""
        seen = self.relay.length
        inputs = {"input_ids": self.tokens[:, :seen], "position_ids": self._positions}
        if not bool(self._mask.all()):
            inputs["attention_mask"] = self._mask
        began = time.perf_counter()
        with FlopTally() as tally:
            taps = self.side.below(self.relay.cache)(**inputs)
        self.recomputed = Recomputed(
            positions=taps.shape[0] * seen,
            layers=self.side.depth,
            flops=tally.total,
            seconds=time.perf_counter() - began,
            tap_error=_share(taps - torch.cat(self._came, 1), taps),
        )
        self._came, self._alone = [], True

    def _push(self, state: RelayState) -> None:
        """Make the taps of new columns pending."""
        device = self.side.model.device
        taps, mask = state.taps[self.side.depth].to(device), state.attention_mask.to(device)
        positions = state.position_ids.to(device)
        self._mask = torch.cat((self._mask, mask), 1)
        self._positions = torch.cat((self._positions, positions), 1)
        self.relay.push(taps, positions, None if bool(self._mask.all()) else mask)
        if self.side.whole and not self._alone:
            self._came.append(taps)

    def _check(self, state: RelayState) -> None:
        """Whether its taps come from the layers below the exit, and fit those above."""
        side = self.side
        if state.fingerprint != self._fingerprint:
            raise RelayStateError(
                f"the taps come from other layers ({state.fingerprint:.12}) than those below this "
                f"exit ({self._fingerprint:.12}): config or weights differ."
            )
        backbone, (batch, columns) = side.model.model.backbone, state.shape
        shape = (batch, columns, backbone.config.hidden_size)
        found = {depth: (tuple(tap.shape), tap.dtype) for depth, tap in state.taps.items()}
        if found != {side.depth: (shape, backbone.dtype)}:
            raise RelayStateError(
                f"taps of depth {side.depth} are wanted, {backbone.dtype} of {shape}, got {found}."
            )
        check_length({}, int(state.position_ids.max()), side.model.config)
        vocab = side.model.config.vocab_size
        largest = max(int(state.tokens.max()), largest_id(state.settings))
        if largest >= vocab:
            raise RelayStateError(f"token ids must be below {vocab}, got {largest}.")


def _share(difference: torch.Tensor, whole: torch.Tensor) -> float:
    """Largest magnitude of one tensor over that of another."""
    return float(difference.abs().max() / whole.abs().max().clamp(min=1e-30))

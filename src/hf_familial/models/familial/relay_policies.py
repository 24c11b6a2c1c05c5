"""Relay policies: frozen dataclasses, given as `relay=`, that say when a text goes deeper.

A policy builds the decoder that makes its tokens; the loop in `relay.py` knows no policy by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .relay_cache import RelayCache


@dataclass
class NewTokens:
    """The tokens that one step of a decoder yields, at least one per row.

    Attributes:
        tokens (`torch.LongTensor` of shape `(batch, count)`): The same number in every row.
        sources (`torch.LongTensor` of shape `(batch, count)`): Exit that each came from.
        scores (`list[torch.Tensor]`): Of each, processed scores `(batch, vocab)`; empty unless
            the text wants them.
        logits (`list[torch.Tensor]`): Of each, logits `(batch, vocab)`; likewise.
    """

    tokens: torch.Tensor
    sources: torch.Tensor
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


class RelayDecoder:
    """The decoder of one text (or batch of texts), made anew by a policy for every call.

    Attributes:
        rounds (`int`): Checks of drafts; without drafts, steps.
        drafted (`int`): Drafted tokens that were checked, of one row.
        accepted (`int`): Those that every unfinished row accepted.
    """

    rounds = drafted = accepted = 0

    def step(self, **inputs: Any) -> NewTokens:
        """Make the next tokens.

        Args:
            **inputs: For [`RelayCache.feed`]: the tokens that have not run, positions, mask.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """Do what is left to do at the end of the text."""


class RelayPolicy:
    """The base of relay policies: which exits a relay reads, and which tokens leave at them.

    A subclass gives `exits` and `leaves`. What it must remember between tokens it keeps in what
    `new_state` returns. A policy that makes tokens in another way overrides `decoder`.

    Attributes:
        rolls_back (`bool`): Whether the decoder takes positions out of the cache again.

    Example:
        >>> class SureOfSpaces(RelayPolicy):
        ...     def exits(self, num_exits):
        ...         return (0, -1)
        ...     def leaves(self, exit_idx, logits, state):
        ...         return logits.argmax(-1) == 220
    """

    rolls_back = False

    def exits(self, num_exits: int) -> tuple[int, ...]:
        """Return the exits to read, shallowest first. At the last one every token leaves.

        Args:
            num_exits (`int`): G of the family.

        Returns:
            `tuple[int, ...]`: Indices, which may count from the end.
        """
        raise NotImplementedError

    def decoder(self, cache: RelayCache, text: Any) -> RelayDecoder:
        """Build the decoder that makes the tokens of one call.

        Args:
            cache ([`RelayCache`]): Over this policy's exits.
            text ([`GeneratedText`]): What is written so far, and how tokens are chosen.
        """
        return ThresholdDecoder(self, cache, text)

    def new_state(self, batch_size: int) -> Any:
        """Return what `leaves` remembers, for a batch of new texts."""
        return None

    def reads(self, exit_idx: int, state: Any) -> bool:
        """Return whether to read this exit for the next token. If not, `leaves` is not called.

        Args:
            exit_idx (`int`): Index of the exit, not negative.
            state: From `new_state`.
        """
        return True

    def leaves(self, exit_idx: int, logits: torch.Tensor, state: Any) -> torch.Tensor:
        """Return which rows take their next token from this exit.

        Args:
            exit_idx (`int`): Index of the exit, not negative.
            logits (`torch.Tensor` of shape `(batch, vocab)`): Float32, before any logits processor.
            state: From `new_state`; may be changed.

        Returns:
            `torch.Tensor` of shape `(batch,)`: Boolean. One row never decides for another. The
            answer for rows that left at a shallower exit is ignored.
        """
        raise NotImplementedError


class ThresholdDecoder(RelayDecoder):
    """Makes tokens one by one, each at the first exit where the policy lets it leave."""

    def __init__(self, relay: RelayPolicy, cache: RelayCache, text: Any) -> None:
        self.relay, self.cache, self.text = relay, cache, text
        self.state = relay.new_state(len(text.input_ids))

    def step(self, **inputs: Any) -> NewTokens:
        """Make one token for every row."""
        self.rounds += 1
        self.cache.feed(**inputs)
        open_rows, last = self.text.kept_rows, self.cache.exits[-1]
        logits = sources = None
        for k in self.cache.exits:
            if k != last and not self.relay.reads(k, self.state):
                continue
            self.cache.catch_up(k)
            here = self.cache.logits(k)[:, -1].float()
            leaving = open_rows
            if k != last:
                leaving = open_rows & self.relay.leaves(k, here, self.state)
            if logits is None or sources is None:
                logits, sources = here, torch.full_like(leaving, k, dtype=torch.long)
            else:
                logits = torch.where(leaving[:, None], here, logits)
                sources = sources.masked_fill(leaving, k)
            if k == last or not (open_rows := open_rows & ~leaving).any():
                break
        assert logits is not None
        assert sources is not None
        scores = self.text.process(self.text.input_ids, logits)
        tokens = self.text.choose(scores, self.text.input_ids.shape[1])
        return NewTokens(tokens, sources[:, None], [scores], [logits])


@dataclass(frozen=True)
class FixedExit(RelayPolicy):
    """Every token comes from one exit: plain decoding of that member.

    Attributes:
        exit_idx (`int`): The exit.
    """

    exit_idx: int = -1

    def exits(self, num_exits: int) -> tuple[int, ...]:
        """Return the one exit."""
        return (self.exit_idx,)


def check_chain(exits: Sequence[int], num_exits: int) -> tuple[int, ...]:
    """Return the indices of a policy's exits, none negative, or raise if it has no such exits."""
    for k in exits:
        if not -num_exits <= k < num_exits:
            raise IndexError(
                f"the relay asks for exit {k}; this family has exits 0 to {num_exits - 1}."
            )
    chain = tuple(k % num_exits for k in exits)
    if not chain or any(a >= b for a, b in zip(chain, chain[1:], strict=False)):
        raise ValueError(f"a relay's exits must go deeper one after the other, got {tuple(exits)}.")
    return chain


def matrix_sizes(model: Any, exits: Sequence[int]) -> tuple[list[int], list[int]]:
    """Count the weights in matrices, each of which is multiplied and added once per position.

    Returns, for each of some exits, shallowest first, the weights of the backbone's layers from the
    exit before it on, and those of its head.
    """
    members = model.model.members
    depths = [0, *(model.config.exits[k] for k in exits)]
    spans = zip(depths, depths[1:], strict=False)
    layers = [_matrix_weights(members.segment(*span).layers) for span in spans]
    return layers, [_matrix_weights([model.head(k)]) for k in exits]


def _matrix_weights(modules: Iterable[nn.Module]) -> int:
    weights = {id(p): p for module in modules for p in module.parameters() if p.dim() > 1}
    return sum(p.numel() for p in weights.values())

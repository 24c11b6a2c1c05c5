"""The interface of relay policies: what is given as `relay=`, and says when a text goes deeper.

A policy builds the decoder that makes its tokens; the loop in `relay.py` knows no policy by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

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

    This one writes the text of the deepest of its exits, token by token.

    Attributes:
        cache ([`RelayCache`]): Over the policy's exits.
        text ([`GeneratedText`]): What is written so far, and how tokens are chosen.
        exits (`tuple[int, ...]`): The exits, shallowest first.
        rounds (`int`): Checks of drafts; without drafts, steps.
        drafted (`int`): Drafted tokens that were checked, of one row.
        accepted (`int`): Those that every unfinished row accepted.
    """

    rounds = drafted = accepted = 0

    def __init__(self, cache: RelayCache, text: Any) -> None:
        self.cache, self.text, self.exits = cache, text, cache.exits

    def step(self, **inputs: Any) -> NewTokens:
        """Make the next tokens.

        Args:
            **inputs: For [`RelayCache.feed`]: the tokens that have not run, positions, mask.
        """
        self.cache.feed(**inputs, whole=True)
        logits = self.cache.logits(self.exits[-1])[:, -1].float()
        return self.one_token(logits, self.text.input_ids.new_full((len(logits),), self.exits[-1]))

    def one_token(self, logits: torch.Tensor, sources: torch.Tensor) -> NewTokens:
        """Choose a token for every row from float32 logits `(batch, vocab)` of exits `(batch,)`."""
        self.rounds += 1
        ids = self.text.input_ids
        scores = self.text.process(ids, logits)
        tokens = self.text.choose(scores, ids.shape[1])
        return NewTokens(tokens, sources[:, None], [scores], [logits])

    def finish(self) -> None:
        """Do what is left to do at the end of the text."""


class RelayPolicy:
    """The interface of relay policies: which exits run, and which decoder makes the tokens.

    The base of a policy that lets tokens leave at early exits is [`EarlyExitRelay`], in the package
    `hf_familial`.

    Attributes:
        rolls_back (`bool`): Whether the decoder takes positions out of the cache again.
    """

    rolls_back = False

    def exits(self, num_exits: int) -> tuple[int, ...]:
        """Return the exits to read, shallowest first. The last one decides.

        Args:
            num_exits (`int`): G of the family.

        Returns:
            `tuple[int, ...]`: Indices, which may count from the end.
        """
        raise NotImplementedError

    def decoder(self, cache: RelayCache, text: Any) -> RelayDecoder:
        """Build the decoder of one call, over a cache of this policy's exits."""
        return RelayDecoder(cache, text)


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

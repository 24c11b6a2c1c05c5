"""Relay policies, the values of `relay=`, and the decoders that they build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from operator import index
from typing import Any

import torch
from torch.nn import functional as F

from .relay_cache import RelayCache


# `draft_length="auto"` starts with this many drafts
FIRST_LENGTH = 4


@dataclass
class NewTokens:
    """The tokens of one decoding step. Every row gets the same number."""

    tokens: torch.Tensor  # (batch, count), count is 1 or more
    sources: torch.Tensor  # exit that produced each token, (batch, count)
    # for each token (batch, vocab), if `GeneratedText.wants_scores`
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


class RelayDecoder:
    """The decoder of one text or batch. This base class writes the tokens of the deepest exit."""

    rounds = drafted = accepted = 0  # see `RelayStats`

    def __init__(self, cache: RelayCache, text: Any) -> None:
        self.cache, self.text, self.exits = cache, text, cache.exits

    def step(self, **inputs: Any) -> NewTokens:
        """Generate the next tokens. `inputs` are arguments of [`RelayCache.feed`]."""
        self.cache.feed(**inputs, whole=True)
        logits = self.cache.logits(self.exits[-1])[:, -1].float()
        return self.one_token(logits, self.text.input_ids.new_full((len(logits),), self.exits[-1]))

    def one_token(self, logits: torch.Tensor, sources: torch.Tensor) -> NewTokens:
        """Choose one token per row from float32 logits `(batch, vocab)` of exits `(batch,)`."""
        self.rounds += 1
        ids = self.text.input_ids
        scores = self.text.process(ids, logits)
        tokens = self.text.choose(scores, ids.shape[1])
        return NewTokens(tokens, sources[:, None], [scores], [logits])

    def finish(self) -> None:
        """Run after the last token. The base class does nothing."""


class RelayPolicy:
    """The interface of relay policies. A policy lists its exits and builds a decoder.

    To write a policy of your own, start from [`EarlyExitRelay`], which is easier.
    """

    rolls_back = False  # whether the decoder crops the cache

    def exits(self, num_exits: int) -> tuple[int, ...]:
        """Return the indices of the exits, shallowest first. The last is the deepest that runs."""
        raise NotImplementedError

    def decoder(self, cache: RelayCache, text: Any) -> RelayDecoder:
        """Build the decoder of one `relay_generate` call. `cache` has the exits of `exits`."""
        return RelayDecoder(cache, text)


@dataclass(frozen=True)
class FixedExit(RelayPolicy):
    """The policy of plain decoding, in which exit `exit_idx` writes every token."""

    exit_idx: int = -1

    def exits(self, num_exits: int) -> tuple[int, ...]:
        """Return the index of the one exit."""
        return (self.exit_idx,)


@dataclass(frozen=True)
class SpeculativeRelay(RelayPolicy):
    """The policy of self-speculation. A shallow exit drafts tokens, and deeper layers verify them.

    In float32, greedy text equals that of the deepest exit. In half precision, rounding can change
    a token where two nearly tie. Sampled text has the distribution of the deepest exit. Without the
    package, only the shallowest of several draft exits drafts. The automatic length then starts at
    4, grows by 2 if all drafts of a round are accepted, and shrinks by 1 otherwise.

    Args:
        draft_exit (`int`, `Sequence[int]` or `"auto"`, *optional*, defaults to 0): Exit that
            drafts. In a list, each exit verifies the drafts of the one before. `"auto"` measures
            which exit is fastest.
        draft_length (`int` or `"auto"`, *optional*, defaults to `"auto"`): Number of drafts in a
            round. `"auto"` learns it from the drafts accepted and the time measured. It stops
            drafting if plain decoding is faster.
        exit_idx (`int`, *optional*, defaults to -1): Exit that verifies. `config.default_exit` has
            no effect here.

    Example:
        >>> relay = SpeculativeRelay(draft_exit=0, draft_length=4)
        >>> model.relay_generate(**inputs, relay=relay, max_new_tokens=20)

    Reference: Leviathan et al., arXiv:2211.17192. Elhoushi et al., arXiv:2404.16710.
    """

    rolls_back = True

    draft_exit: int | Sequence[int] | str = 0
    draft_length: int | str = "auto"
    exit_idx: int = -1

    def __post_init__(self) -> None:
        for name in ("draft_exit", "draft_length"):
            number = getattr(self, name)
            if isinstance(number, Integral) and not isinstance(number, int):  # from numpy
                object.__setattr__(self, name, index(number))
        length = self.draft_length
        whole = isinstance(length, int) and not isinstance(length, bool) and length >= 1
        if length != "auto" and not whole:
            raise ValueError(f'`draft_length` must be "auto" or 1 or more, got {length!r}.')
        named = isinstance(self.draft_exit, str) and self.draft_exit != "auto"
        if named or not isinstance(self.draft_exit, (int, Sequence)):
            raise ValueError(
                f'`draft_exit` must be "auto", an index or a list, got {self.draft_exit!r}.'
            )

    def exits(self, num_exits: int) -> tuple[int, ...]:
        """Return the exits that draft, then the one that verifies."""
        last = self.exit_idx % num_exits if abs(self.exit_idx) <= num_exits else self.exit_idx
        if last == 0:
            raise ValueError(
                f"`exit_idx` must be deeper than the shallowest of {num_exits} exits, got "
                f"{self.exit_idx}. Pass `relay=FixedExit({self.exit_idx})`, or call `generate`."
            )
        drafts: Any = range(last) if self.draft_exit == "auto" else self.draft_exit
        drafts = [drafts] if isinstance(drafts, int) else drafts
        chain = tuple(k % num_exits if -num_exits <= k < num_exits else k for k in (*drafts, last))
        if len(chain) < 2 or any(a >= b for a, b in zip(chain, chain[1:], strict=False)):
            raise ValueError(
                "`draft_exit` must be shallower than `exit_idx`, and a list must increase, got "
                f"{self.draft_exit} and {self.exit_idx} in a family of {num_exits} exits."
            )
        return chain

    def decoder(self, cache: RelayCache, text: Any) -> RelayDecoder:
        """Build a [`SpeculativeDecoder`]."""
        return SpeculativeDecoder(self, cache, text)


@dataclass
class DraftedTokens:
    """A text that ends in drafts, which the next exit verifies."""

    ids: torch.Tensor  # the text and the drafts, (batch, start + count)
    start: int  # column of the first draft
    scores: list[torch.Tensor]  # processed scores of each draft, (batch, vocab)
    sources: torch.Tensor  # exit that produced each draft, (batch, count)
    ran: bool = True  # whether the last draft has run too, so that verifying adds one more token

    @property
    def tokens(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(batch, count)`: The drafts."""
        return self.ids[:, self.start :]


class SpeculativeDecoder(RelayDecoder):
    """A decoder that drafts and verifies in rounds. The accelerator replaces it if it `adapts`."""

    def __init__(self, relay: SpeculativeRelay, cache: RelayCache, text: Any) -> None:
        super().__init__(cache, text)
        self.relay = relay
        self.fixed = relay.draft_length if isinstance(relay.draft_length, int) else None
        self.adapts = self.fixed is None or len(self.exits) > 2
        # index in `exits` of the exit that drafts, and the largest number of drafts in a round
        self.draft_index, self.draft_length = 0, self.fixed or FIRST_LENGTH

    def step(self, **inputs: Any) -> NewTokens:
        """Run one round of drafting and verifying. Return the accepted tokens."""
        self.cache.commit()  # not earlier, because a text that ends within a round is cropped
        drafts = self.draft(self.text.input_ids, inputs, self.text.tokens_left)
        return self.verify(drafts, self.exits[-1], self.text.wants_scores)

    def run_draft(self, inputs: dict[str, Any]) -> None:
        """Run new tokens to the exit that drafts."""
        self.cache.feed(**inputs)
        self.cache.catch_up(self.exits[self.draft_index])

    def read_draft(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the processed scores of the exit that drafts, shape `(batch, vocab)`."""
        logits = self.cache.logits(self.exits[self.draft_index])[:, -1]
        return self.text.process(ids, logits.float())

    def goes_on(self, scores: torch.Tensor) -> bool:
        """Return whether to add a draft from these processed scores."""
        return True

    def run_check(self, exit_idx: int) -> None:
        """Run the pending positions to the exit that verifies."""
        self.cache.catch_up(exit_idx)

    def learn(self, drafts: DraftedTokens, exit_idx: int, scores: torch.Tensor, right: int) -> None:
        """Update the counts and the draft length. `right` is the number of accepted drafts."""
        count = drafts.tokens.shape[1]
        self.rounds, self.drafted = self.rounds + 1, self.drafted + count
        self.accepted += right
        if self.fixed is None and count:
            self.draft_length = max(1, self.draft_length + (2 if right == count else -1))

    def draft(self, ids: torch.Tensor, inputs: dict[str, Any], tokens_left: int) -> DraftedTokens:
        """Draft tokens after the text `ids`. `inputs` are its tokens that have not run yet."""
        # Decide whether to draft before the token is drawn. Dropping a token after looking at it
        # would change the distribution of sampled text.
        start, most = ids.shape[1], min(self.draft_length, tokens_left - 1)
        scores: list[torch.Tensor] = []
        while True:
            self.run_draft(inputs)
            if len(scores) >= most or not self.goes_on(processed := self.read_draft(ids)):
                break
            drawn = self.text.choose(processed, ids.shape[1])
            scores.append(processed)
            ids, inputs = torch.cat((ids, drawn), 1), {"input_ids": drawn}
        sources = torch.full_like(ids[:, start:], self.exits[self.draft_index])
        return DraftedTokens(ids, start, scores, sources)

    def verify(self, drafts: DraftedTokens, exit_idx: int, keep: bool) -> NewTokens:
        """Run an exit over the drafts, keep those that it accepts, and add one token."""
        count = drafts.tokens.shape[1]
        columns = count + drafts.ran
        self.run_check(exit_idx)
        scores = logits = self.cache.logits(exit_idx, last=columns).float()
        if self.text.processors:  # they need the text before each column
            before = [drafts.ids[:, : drafts.start + i] for i in range(columns)]
            processed = [self.text.process(ids, logits[:, i]) for i, ids in enumerate(before)]
            scores = torch.stack(processed, dim=1)
        tokens, reached, right = self.accept(drafts, scores)
        number = tokens.shape[1]  # waits for the accelerator
        self.learn(drafts, exit_idx, scores, reached)
        self.cache.crop(max(0, columns - number))
        inherited = F.pad(drafts.sources, (0, max(0, number - count)))[:, :number]
        sources = torch.where(right[:, :number], inherited, torch.full_like(tokens, exit_idx))
        kept = [[each[:, i] for i in range(number if keep else 0)] for each in (scores, logits)]
        return NewTokens(tokens, sources, *kept)

    def accept(
        self, drafts: DraftedTokens, scores: torch.Tensor
    ) -> tuple[torch.Tensor, int, torch.Tensor]:
        """Return the tokens, how many drafts every row accepts, and a mask of accepted drafts."""
        # every row keeps as many drafts as the row with the fewest, so that lengths stay equal
        drafted, columns, count = drafts.tokens, scores.shape[1], drafts.tokens.shape[1]
        if not self.text.do_sample:
            targets = scores.argmax(-1)
            right = (drafted == targets[:, :count]).cumprod(1).bool()
            reached = self._fewest(right)
            tokens = targets[:, : reached + 1]
        else:
            wanted, given = scores.softmax(-1), torch.empty(0)
            right = drafted.new_zeros(drafted.shape, dtype=torch.bool)
            if count:
                given = torch.stack(drafts.scores, 1).softmax(-1)
                index = drafted.unsqueeze(-1)
                ratio = wanted[:, :count].gather(2, index) / given.gather(2, index)
                draws = self.text.uniform(drafted, drafts.start)
                right = (draws < ratio.squeeze(-1)).cumprod(1).bool()
            reached = self._fewest(right)
            tokens = drafted[:, :reached]
            if reached < columns:
                chances = wanted[:, reached]
                if reached < count:  # sample from the positive part of the difference
                    rest = (chances - given[:, reached]).clamp_(min=0)
                    total = rest.sum(-1, keepdim=True)
                    chances = torch.where(total > 0, rest / total, chances)
                drawn = self.text.draw(chances, drafts.start + reached)
                if reached < count:
                    here = slice(reached, reached + 1)
                    drawn = torch.where(right[:, here], drafted[:, here], drawn)
                tokens = torch.cat((tokens, drawn), 1)
        return tokens, reached, F.pad(right, (0, columns - count))

    def _fewest(self, right: torch.Tensor) -> int:
        """Return the number of drafts that every unfinished row accepts."""
        return int(right.sum(1)[self.text.kept_rows].min()) if right.shape[1] else 0


def check_chain(exits: Sequence[int], num_exits: int) -> tuple[int, ...]:
    """Return a policy's exits as indices of 0 or more. Raise if they are unknown or unordered."""
    for k in exits:
        if not -num_exits <= k < num_exits:
            raise IndexError(
                f"`relay` names exit {k}, but this family has only exits 0 to {num_exits - 1}."
            )
    chain = tuple(k % num_exits for k in exits)
    if not chain or any(a >= b for a, b in zip(chain, chain[1:], strict=False)):
        raise ValueError(f"The exits of `relay` must be in increasing order, got {tuple(exits)}.")
    return chain

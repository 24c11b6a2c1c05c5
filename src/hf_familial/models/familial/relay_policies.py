"""Relay policies: what is given as `relay=`, and builds the decoder that makes the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from operator import index
from typing import Any

import torch
from torch.nn import functional as F

from .relay_cache import RelayCache


# most drafts of the first round, where the length adapts
FIRST_LENGTH = 4


@dataclass
class NewTokens:
    """The tokens that one step of a decoder yields, the same number in every row."""

    tokens: torch.Tensor  # (batch, count), at least one
    sources: torch.Tensor  # the exit that each came from, (batch, count)
    # of each token, (batch, vocab), if the text wants them
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


class RelayDecoder:
    """The decoder of one text (or batch of texts); this one writes the deepest exit's, by token."""

    rounds = drafted = accepted = 0  # counted as in `RelayStats`

    def __init__(self, cache: RelayCache, text: Any) -> None:
        self.cache, self.text, self.exits = cache, text, cache.exits

    def step(self, **inputs: Any) -> NewTokens:
        """Make the next tokens; `inputs`, for [`RelayCache.feed`], are those that have not run."""
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

    The base of policies that let tokens leave at early exits is [`EarlyExitRelay`] of the package.
    """

    rolls_back = False  # whether the decoder takes positions out of the cache again

    def exits(self, num_exits: int) -> tuple[int, ...]:
        """Return the exits to read, shallowest first, perhaps negative; the last one decides."""
        raise NotImplementedError

    def decoder(self, cache: RelayCache, text: Any) -> RelayDecoder:
        """Build the decoder of one call, over a cache of this policy's exits."""
        return RelayDecoder(cache, text)


@dataclass(frozen=True)
class FixedExit(RelayPolicy):
    """Every token comes from one exit, `exit_idx`: plain decoding of that member."""

    exit_idx: int = -1

    def exits(self, num_exits: int) -> tuple[int, ...]:
        """Return the one exit."""
        return (self.exit_idx,)


@dataclass(frozen=True)
class SpeculativeRelay(RelayPolicy):
    """Lossless self-speculation: a shallow exit drafts, the layers above it verify in one pass.

    Greedy text is that of the deepest exit (in float32; in half precision a pass over several
    positions may round a tie otherwise), sampled text has its distribution. Without the package
    `hf_familial` the shallowest of several exits drafts alone, and `draft_length="auto"` is 4 at
    first, then 2 more after a round in which all drafts were accepted, else 1 less.

    Attributes:
        draft_exit (`int`, `Sequence[int]` or `"auto"`): Exit that drafts. Several make a chain, in
            which each verifies the one before; `"auto"` finds the fastest.
        draft_length (`int`, `"auto"`): Tokens drafted before a check. By default as many as pay,
            from the acceptance and the cost seen so far, and none where none pay.
        exit_idx (`int`): Exit whose text is wanted; the config's `default_exit` does not matter.

    Raises:
        ValueError: If `draft_length` is neither `"auto"` nor 1 or more, or `draft_exit` is no exit.

    Reference: Leviathan et al., arXiv:2211.17192; Elhoushi et al., arXiv:2404.16710.
    """

    rolls_back = True

    draft_exit: int | Sequence[int] | str = 0
    draft_length: int | str = "auto"
    exit_idx: int = -1

    def __post_init__(self) -> None:
        for name in ("draft_exit", "draft_length"):
            number = getattr(self, name)
            if isinstance(number, Integral) and not isinstance(number, int):  # as numpy's are
                object.__setattr__(self, name, index(number))
        length = self.draft_length
        whole = isinstance(length, int) and not isinstance(length, bool) and length >= 1
        if length != "auto" and not whole:
            raise ValueError(f'`draft_length` must be "auto" or 1 or more, got {length!r}.')
        named = isinstance(self.draft_exit, str) and self.draft_exit != "auto"
        if named or not isinstance(self.draft_exit, (int, Sequence)):
            raise ValueError(
                f'`draft_exit` must be "auto", an exit or several, got {self.draft_exit!r}.'
            )

    def exits(self, num_exits: int) -> tuple[int, ...]:
        """Return the exits that draft, then the one that decides."""
        last = self.exit_idx % num_exits if abs(self.exit_idx) <= num_exits else self.exit_idx
        if last == 0:
            raise ValueError(
                f"exit {self.exit_idx} is the shallowest of {num_exits}, so none can draft for it: "
                f"give `relay=FixedExit({self.exit_idx})`, or call `generate(exit_idx=...)`."
            )
        drafts: Any = range(last) if self.draft_exit == "auto" else self.draft_exit
        drafts = [drafts] if isinstance(drafts, int) else drafts
        chain = tuple(k % num_exits if -num_exits <= k < num_exits else k for k in (*drafts, last))
        if len(chain) < 2 or any(a >= b for a, b in zip(chain, chain[1:], strict=False)):
            raise ValueError(
                f"`draft_exit` must be shallower than `exit_idx`, each deeper than the one before; "
                f"got {self.draft_exit} and {self.exit_idx} in a family of {num_exits} exits."
            )
        return chain

    def decoder(self, cache: RelayCache, text: Any) -> RelayDecoder:
        """Build a [`SpeculativeDecoder`]."""
        return SpeculativeDecoder(self, cache, text)


@dataclass
class DraftedTokens:
    """A text with drafts at its end, which one exit proposes to the next."""

    ids: torch.Tensor  # the text and the drafts, (batch, start + count)
    start: int  # column of the first draft
    scores: list[torch.Tensor]  # what each was drawn from, processed, (batch, vocab)
    sources: torch.Tensor  # the exit that each came from, (batch, count)
    ran: bool = True  # whether the last draft has run too, so that the check yields one more token

    @property
    def tokens(self) -> torch.Tensor:
        """`torch.LongTensor` of shape `(batch, count)`: The drafts."""
        return self.ids[:, self.start :]


class SpeculativeDecoder(RelayDecoder):
    """A decoder in rounds of drafts and a check; if it `adapts`, a subclass may take its place."""

    def __init__(self, relay: SpeculativeRelay, cache: RelayCache, text: Any) -> None:
        super().__init__(cache, text)
        self.relay = relay
        self.fixed = relay.draft_length if isinstance(relay.draft_length, int) else None
        self.adapts = self.fixed is None or len(self.exits) > 2
        # which of `exits` drafts, and the most tokens of the next round
        self.draft_index, self.draft_length = 0, self.fixed or FIRST_LENGTH

    def step(self, **inputs: Any) -> NewTokens:
        """Draft, verify, and return the tokens that stay."""
        self.cache.commit()  # not before: the text may have ended among the last round's tokens
        drafts = self.draft(self.text.input_ids, inputs, self.text.tokens_left)
        return self.verify(drafts, self.exits[-1], self.text.wants_scores)

    def run_draft(self, inputs: dict[str, Any]) -> None:
        """Run new tokens to the exit that drafts."""
        self.cache.feed(**inputs)
        self.cache.catch_up(self.exits[self.draft_index])

    def read_draft(self, ids: torch.Tensor) -> torch.Tensor:
        """Read the exit that drafts; return processed scores of shape `(batch, vocab)`."""
        logits = self.cache.logits(self.exits[self.draft_index])[:, -1]
        return self.text.process(ids, logits.float())

    def goes_on(self, scores: torch.Tensor) -> bool:
        """Return whether to draw one more draft from these processed scores."""
        return True

    def run_check(self, exit_idx: int) -> None:
        """Run what is pending to the exit that verifies."""
        self.cache.catch_up(exit_idx)

    def learn(self, drafts: DraftedTokens, exit_idx: int, scores: torch.Tensor, right: int) -> None:
        """Learn from processed scores `(batch, columns, vocab)` and drafts that all rows accept."""
        count = drafts.tokens.shape[1]
        self.rounds, self.drafted = self.rounds + 1, self.drafted + count
        self.accepted += right
        if self.fixed is None and count:
            self.draft_length = max(1, self.draft_length + (2 if right == count else -1))

    def draft(self, ids: torch.Tensor, inputs: dict[str, Any], tokens_left: int) -> DraftedTokens:
        """Draw tokens after `ids`, the text so far; `inputs` are those that have not run."""
        # Every token that is drawn is verified: whether to draw is decided before, as to drop a
        # token after a look at it would change what is sampled.
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
        """Run an exit over the drafts, keep those it accepts, and add one token of its own."""
        count = drafts.tokens.shape[1]
        columns = count + drafts.ran
        self.run_check(exit_idx)
        logits = self.cache.logits(exit_idx, last=columns).float()
        scores = logits
        if self.text.processors:  # each with the text before it
            before = [drafts.ids[:, : drafts.start + i] for i in range(columns)]
            processed = [self.text.process(ids, logits[:, i]) for i, ids in enumerate(before)]
            scores = torch.stack(processed, dim=1)
        tokens, reached, right = self.accept(drafts, scores)
        number = tokens.shape[1]  # syncs
        self.learn(drafts, exit_idx, scores, reached)
        self.cache.crop(max(0, columns - number))
        inherited = F.pad(drafts.sources, (0, max(0, number - count)))[:, :number]
        sources = torch.where(right[:, :number], inherited, torch.full_like(tokens, exit_idx))
        kept = [[each[:, i] for i in range(number if keep else 0)] for each in (scores, logits)]
        return NewTokens(tokens, sources, *kept)

    def accept(
        self, drafts: DraftedTokens, scores: torch.Tensor
    ) -> tuple[torch.Tensor, int, torch.Tensor]:
        """Return a check's tokens, how many drafts all rows accept, and which, `(batch, columns)`.

        Rows take as many as the row of which fewest are accepted, so that all stay of one length.
        """
        drafted, columns = drafts.tokens, scores.shape[1]
        count = drafted.shape[1]
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
                if reached < count:  # what the draft's distribution had too little of
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
        """Return the number of drafts that every row accepts whose next tokens are written."""
        return int(right.sum(1)[self.text.kept_rows].min()) if right.shape[1] else 0


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

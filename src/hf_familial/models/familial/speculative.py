"""Rounds of self-speculation: draft at a shallow exit, check with the layers above it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from .draft_length import DraftLength
from .relay_cache import RelayCache
from .relay_policies import SpeculativeRelay
from .relay_text import Block, RelayText


# drafts of a round, where nothing else limits them
LONGEST = 15
# tokens that an exit in the middle of a chain collects before the next one checks them
COLLECTED = 6
# rounds in which each exit that may draft is tried at first, and after how many it is tried again
TRIAL, AGAIN = 6, 32


@dataclass
class Proposal:
    """Tokens that one exit proposes to the next.

    Attributes:
        tokens (`torch.LongTensor` of shape `(batch, count)`): The last of them has not run, unless
            `ran`.
        scores (`list[torch.Tensor]`): For each, the processed scores it was drawn from, shape
            `(batch, vocab)`; only when sampling.
        sources (`torch.LongTensor` of shape `(batch, count)`): Exit that each token came from.
        ran (`bool`): Whether the last token has run too, so that the check yields one more.
        next (`torch.LongTensor` of shape `(batch, 1)`, *optional*): A draft that was not worth
            running; the check tells for nothing whether it was right.
    """

    tokens: torch.Tensor
    scores: list[torch.Tensor]
    sources: torch.Tensor
    ran: bool
    next: torch.Tensor | None = None


class Speculation:
    """Makes tokens in rounds.

    Args:
        relay ([`SpeculativeRelay`]): The policy.
        exits (`tuple[int, ...]`): Its chain.
        cache ([`RelayCache`]): Over that chain, with rollback.
        text ([`RelayText`]): What is written so far, and how tokens are chosen.
    """

    def __init__(
        self, relay: SpeculativeRelay, exits: tuple[int, ...], cache: RelayCache, text: RelayText
    ) -> None:
        self.exits, self.cache, self.text = exits, cache, text
        depths = [cache.model.config.exits[k] for k in exits]
        fixed = relay.draft_length if isinstance(relay.draft_length, int) else None
        # a clock would make sampled text depend on the machine's mood
        timed = not text.do_sample
        self.chosen_freely = relay.draft_exit == "auto" and len(exits) > 2
        above = depths[1] if not self.chosen_freely else depths[-1]
        drafting = exits[:-1] if self.chosen_freely else exits[:1]
        # what was learned of a model serves its next text; sampled ones all begin alike
        self._known = cache.model.model.draft_lengths if timed and fixed is None else {}
        self._keys = [(exits, len(text.input_ids), cache.lean, k) for k in drafting]
        self.lengths = [
            # a copy, since another thread may be writing too
            copy.deepcopy(self._known.get(key)) or DraftLength(depth / above, fixed, timed)
            for key, depth in zip(self._keys, depths, strict=False)
        ]
        self.arm = 0
        self.rounds = self.drafted = self.accepted = 0

    def remember(self) -> None:
        """Leave what was learned with the model, for its next text."""
        self._known.update(zip(self._keys, self.lengths, strict=True))

    @property
    def length(self) -> DraftLength:
        """Of the exit that drafts in this round."""
        return self.lengths[self.arm]

    def __call__(self, **inputs: Any) -> Block:
        """One round.

        Args:
            **inputs: For `RelayCache.feed`: the tokens that have not run yet, positions, mask.
        """
        top = len(self.exits) - 1
        if self.chosen_freely:
            self.arm = self._best_arm()
            proposal = self._draft(self.text.input_ids, inputs, self.text.room)
        else:
            proposal = self._propose(top - 1, self.text.input_ids, inputs, self.text.room)
        block = self._check(top, self.text.input_ids, proposal, self.text.wants_scores)
        self.cache.settle()
        return block

    def _best_arm(self) -> int:
        """The exit that yields most tokens per time; the others are tried now and then."""
        count = len(self.lengths)
        if self.rounds < TRIAL * count:
            return self.rounds // TRIAL
        turn, place = divmod(self.rounds, AGAIN)
        if place < 2:
            return turn % count
        return max(range(count), key=lambda i: self.lengths[i].rate)

    def _propose(
        self, level: int, ids: torch.Tensor, inputs: dict[str, Any], room: int
    ) -> Proposal:
        """What the exit at a level of the chain proposes; `inputs` are what has not run yet."""
        if level == 0:
            return self._draft(ids, inputs, room)
        blocks: list[Block] = []
        count, length = 0, ids.shape[1]
        while count < min(COLLECTED, room):
            proposal = self._propose(level - 1, ids, inputs, room - count)
            block = self._check(level, ids, proposal, self.text.do_sample)
            blocks.append(block)
            ids = torch.cat((ids, block.tokens), 1)
            inputs = {"input_ids": block.tokens[:, -1:]}
            count = ids.shape[1] - length
        return Proposal(
            ids[:, length:],
            [scores for block in blocks for scores in block.scores],
            torch.cat([block.sources for block in blocks], 1),
            ran=False,
        )

    def _draft(self, ids: torch.Tensor, inputs: dict[str, Any], room: int) -> Proposal:
        """Tokens of the shallowest exit, one after the other, all of which have run."""
        clock, exit_idx = self.length, self.exits[self.arm]
        tokens: list[torch.Tensor] = []
        scores: list[torch.Tensor] = []
        fixed = LONGEST if clock.fixed is None else clock.fixed
        drafts, unused = clock.drafts(), None
        while True:
            clock.start_clock()
            before = self.cache.length
            self.cache.feed(**inputs)
            self.cache.catch_up(exit_idx)
            if self.cache.length == before + 1:
                clock.fed()
            if not drafts or len(tokens) >= min(fixed, room - 1):
                break
            clock.start_clock()
            processed = self.text.process(ids, self.cache.logits(exit_idx)[:, -1].float())
            drawn = self.text.choose(processed)
            if clock.fixed is None:
                chances = processed.softmax(-1).gather(1, drawn)
                sure = chances[self.text.unfinished].min().item()
                clock.read()
            if clock.fixed is None and not clock.goes_on(sure):
                unused = drawn
                break
            tokens.append(drawn)
            scores.append(processed)
            ids, inputs = torch.cat((ids, drawn), 1), {"input_ids": drawn}
        drafted = torch.cat(tokens, 1) if tokens else ids[:, :0]
        return Proposal(drafted, scores, torch.full_like(drafted, exit_idx), True, unused)

    def _check(self, level: int, ids: torch.Tensor, proposal: Proposal, keep: bool) -> Block:
        """Run what is pending through the exit at a level, keep what it accepts, add its own."""
        count, exit_idx = proposal.tokens.shape[1], self.exits[level]
        columns = count + proposal.ran
        pending = self.cache.pending(exit_idx)
        self.length.start_clock()
        self.cache.catch_up(exit_idx)
        logits = self.cache.logits(exit_idx, last=columns).float()
        scores = self._scores(ids, proposal.tokens, logits)
        tokens, reached, right = self._accept(proposal, scores)
        number = tokens.shape[1]  # syncs
        lowest = level == 1 or self.chosen_freely
        if lowest and pending == columns:
            self.length.checked(columns)
        self.cache.crop(max(0, columns - number))
        if lowest:
            self.length.finish(count, reached, number)
            if proposal.next is not None and reached == count and not self.text.do_sample:
                same_next = (proposal.next == tokens[:, -1:])[self.text.unfinished]
                self.length.learn_next(float(same_next.float().mean()))
            self.rounds, self.drafted = self.rounds + 1, self.drafted + count
            self.accepted += reached
        sources = torch.full_like(tokens, exit_idx)
        same = right[:, :number] & (torch.arange(number, device=tokens.device) < count)
        inherited = torch.nn.functional.pad(proposal.sources, (0, max(0, number - count)))
        sources = torch.where(same, inherited[:, :number], sources)
        kept = [scores[:, i] for i in range(number)] if keep else []
        raw = [logits[:, i] for i in range(number)] if keep else []
        return Block(tokens, sources, kept, raw)

    def _scores(
        self, ids: torch.Tensor, tokens: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Processed scores at every checked position, each with the text before it."""
        if not self.text.processors:
            return logits
        grown = torch.cat((ids, tokens), 1)
        length = ids.shape[1]
        return torch.stack(
            [
                self.text.process(grown[:, : length + i], logits[:, i])
                for i in range(logits.shape[1])
            ],
            dim=1,
        )

    def _accept(
        self, proposal: Proposal, scores: torch.Tensor
    ) -> tuple[torch.Tensor, int, torch.Tensor]:
        """The tokens that a check yields.

        Every row takes as many as the row of which fewest are accepted, so that all stay of one
        length; what is left out is drafted anew.

        Returns:
            `tuple`: Tokens of shape `(batch, number)`; how many drafts every row accepted; and
            which drafts are accepted, of shape `(batch, columns)`, nowhere after the first refusal.
        """
        count, columns = proposal.tokens.shape[1], scores.shape[1]
        if not self.text.do_sample:
            targets = scores.argmax(-1)
            right = (proposal.tokens == targets[:, :count]).cumprod(1).bool()
            reached = self._fewest(right)
            tokens = targets[:, : reached + 1]
        else:
            wanted, given = scores.softmax(-1), torch.empty(0)
            right = proposal.tokens.new_zeros(proposal.tokens.shape, dtype=torch.bool)
            if count:
                given = torch.stack(proposal.scores, 1).softmax(-1)
                index = proposal.tokens.unsqueeze(-1)
                ratio = wanted[:, :count].gather(2, index) / given.gather(2, index)
                draws = torch.rand(proposal.tokens.shape, device=scores.device)
                right = (draws < ratio.squeeze(-1)).cumprod(1).bool()
            reached = self._fewest(right)
            tokens = proposal.tokens[:, :reached]
            if reached < columns:
                tokens = torch.cat(
                    (tokens, self._drawn(proposal, wanted, given, right, reached)), 1
                )
        return tokens, reached, torch.nn.functional.pad(right, (0, columns - count))

    def _fewest(self, right: torch.Tensor) -> int:
        """Number of drafts that every row accepts whose next tokens are written."""
        return int(right.sum(1)[self.text.kept_rows].min()) if right.shape[1] else 0

    def _drawn(
        self,
        proposal: Proposal,
        wanted: torch.Tensor,
        given: torch.Tensor,
        right: torch.Tensor,
        place: int,
    ) -> torch.Tensor:
        """The token after the accepted ones: the draft where a row accepts it, else a new draw."""
        chances = wanted[:, place]
        if place < proposal.tokens.shape[1]:
            # what the draft's distribution had too little of
            rest = (chances - given[:, place]).clamp_(min=0)
            total = rest.sum(-1, keepdim=True)
            chances = torch.where(total > 0, rest / total, chances)
        drawn = torch.multinomial(chances, 1)
        if place < proposal.tokens.shape[1]:
            accepted = right[:, place : place + 1]
            drawn = torch.where(accepted, proposal.tokens[:, place : place + 1], drawn)
        return drawn

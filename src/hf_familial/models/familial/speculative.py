"""Rounds of self-speculation: draft at a shallow exit, check with the layers above it."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch

from .draft_length import DRAFTED, LONGEST, PLAIN, WATCHED, DraftLength
from .members import matrix_sizes
from .relay_cache import RelayCache
from .relay_policies import SpeculativeRelay
from .relay_text import Block, RelayText


# tokens that an exit in the middle of a chain collects before the next one checks them
COLLECTED = 6
# rounds after which all exits are watched again, where several may draft
AGAIN = 64


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
        undrawn (`torch.Tensor` of shape `(batch, vocab)`, *optional*): Processed scores from which
            no draft was drawn any more; the check tells whether one would have been right.
    """

    tokens: torch.Tensor
    scores: list[torch.Tensor]
    sources: torch.Tensor
    ran: bool
    undrawn: torch.Tensor | None = None


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
        fixed = relay.draft_length if isinstance(relay.draft_length, int) else None
        # a clock would make sampled text depend on the machine's mood
        timed = not text.do_sample
        free = relay.draft_exit == "auto"
        # in a chain, each exit but the shallowest checks the one before and always proposes
        self.chain = len(exits) > 2 and not free
        self.drafting = exits[:1] if self.chain else exits[:-1]
        watch = not self.chain and (fixed is None or len(self.drafting) > 1)
        # what was learned of a model serves its next text; sampled ones all begin alike
        self._known = cache.model.model.draft_lengths if timed and fixed is None else {}
        self._keys = [(exits, free, len(text.input_ids), cache.lean, k) for k in self.drafting]
        self.lengths = [
            # a copy, since another thread may be writing too
            copy.deepcopy(self._known.get(key)) or DraftLength(*cost, fixed, timed, watch)
            for key, cost in zip(self._keys, self._costs(), strict=True)
        ]
        self.arm = 0
        self.rounds = self.drafted = self.accepted = 0
        # on a CPU the time of this thread alone: other work on the machine says nothing of a pass
        on_cpu = cache.model.device.type == "cpu"
        self._clock = time.thread_time if on_cpu else time.perf_counter
        self._began = self._clock()

    def _costs(self) -> list[tuple[float, float]]:
        """Cost of running and of reading each exit that drafts, as shares of a whole pass."""
        layers, heads = matrix_sizes(self.cache.model, self.exits)
        checker = 1 if self.chain else len(self.exits) - 1
        whole = sum(layers[: checker + 1]) + heads[checker]
        return [(sum(layers[: i + 1]) / whole, heads[i] / whole) for i in range(len(self.drafting))]

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
        self.cache.settle()  # not before: the text may have ended among the last round's tokens
        kind = DRAFTED if self.chain else self._kind()
        if kind == PLAIN:
            block = self._write_plainly(inputs)
        elif kind == WATCHED:
            block = self._watch(inputs)
        else:
            top, ids = len(self.exits) - 1, self.text.input_ids
            level = top - 1 if self.chain else 0
            proposal = self._propose(level, ids, inputs, self.text.room)
            block = self._check(top, ids, proposal, self.text.wants_scores)
        return block

    def _kind(self) -> str:
        """The kind of the next round; of the exits that may draft, the most promising one does."""
        if len(self.lengths) > 1 and self.rounds % AGAIN == AGAIN - 1:
            for length in self.lengths:
                length.watch_again()
        kinds = [length.mode() for length in self.lengths]
        if DRAFTED not in kinds or WATCHED in kinds:
            return WATCHED if WATCHED in kinds else PLAIN
        ready = [i for i, kind in enumerate(kinds) if kind == DRAFTED]
        self.arm = max(ready, key=lambda i: self.lengths[i].promise)
        return DRAFTED

    def _write_plainly(self, inputs: dict[str, Any]) -> Block:
        """Write one token of the deepest exit, in one pass through all layers."""
        before = self.cache.length
        self._lap()
        self.cache.feed(**inputs, whole=True)
        block = self._deepest(self.cache.logits(self.exits[-1])[:, -1])
        if self.cache.length == before + 1:
            seconds = self._lap()
            for length in self.lengths:
                length.wrote_plainly(seconds)
        return block

    def _watch(self, inputs: dict[str, Any]) -> Block:
        """Write one token of the deepest exit, and read the exits that may draft beside it."""
        before = self.cache.length
        self._lap()
        self.cache.feed(**inputs)
        laps = [self._lap()]
        for exit_idx in self.exits[1:]:
            self.cache.catch_up(exit_idx)
            laps.append(self._lap())
        *drafts, deep = self.cache.logits_beside((*self.drafting, self.exits[-1]))
        block = self._deepest(deep[:, -1])
        read = self._lap()
        if self.cache.length == before + 1:
            for i, length in enumerate(self.lengths):
                length.fed(sum(laps[: i + 1]))
                length.checked(1, sum(laps[i + 1 :]) + read)
        for length, logits in zip(self.lengths, drafts, strict=True):
            given = self.text.process(self.text.input_ids, logits[:, -1].float())
            length.read(read)
            length.watched(self._confidence(given), self._agreement(given, block.scores[0]))
        return block

    def _deepest(self, logits: torch.Tensor) -> Block:
        """The token that the deepest exit gives, from its logits of shape `(batch, vocab)`."""
        logits = logits.float()
        scores = self.text.process(self.text.input_ids, logits)
        tokens = self.text.choose(scores)
        self.rounds += 1
        return Block(tokens, torch.full_like(tokens, self.exits[-1]), [scores], [logits])

    def _lap(self) -> float:
        """Seconds since the last call."""
        now = self._clock()
        lap, self._began = now - self._began, now
        return lap

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
        """Tokens of one exit, one after the other, all of which have run.

        Every token that is drawn is checked. Whether to draw one is decided before, from the
        distribution alone: to drop a token after a look at it would change what is sampled.
        """
        length, exit_idx = self.length, self.exits[self.arm]
        most = min(LONGEST if length.fixed is None else length.fixed, room - 1)
        tokens: list[torch.Tensor] = []
        scores: list[torch.Tensor] = []
        undrawn = None
        while True:
            before = self.cache.length
            self._lap()
            self.cache.feed(**inputs)
            self.cache.catch_up(exit_idx)
            if self.cache.length == before + 1:
                length.fed(self._lap())
            if len(tokens) >= most:
                break
            self._lap()
            processed = self.text.process(ids, self.cache.logits(exit_idx)[:, -1].float())
            if length.fixed is None:
                confidence = self._confidence(processed)
                length.read(self._lap())
                if not length.goes_on(confidence):
                    undrawn = processed
                    break
            drawn = self.text.choose(processed)
            tokens.append(drawn)
            scores.append(processed)
            ids, inputs = torch.cat((ids, drawn), 1), {"input_ids": drawn}
        drafted = torch.cat(tokens, 1) if tokens else ids[:, :0]
        return Proposal(drafted, scores, torch.full_like(drafted, exit_idx), True, undrawn)

    def _check(self, level: int, ids: torch.Tensor, proposal: Proposal, keep: bool) -> Block:
        """Run what is pending through the exit at a level, keep what it accepts, add its own."""
        count, exit_idx = proposal.tokens.shape[1], self.exits[level]
        columns = count + proposal.ran
        pending = self.cache.pending(exit_idx)
        self._lap()
        self.cache.catch_up(exit_idx)
        logits = self.cache.logits(exit_idx, last=columns).float()
        scores = self._scores(ids, proposal.tokens, logits)
        tokens, reached, right = self._accept(proposal, scores)
        number = tokens.shape[1]  # syncs
        lowest = level == 1 or not self.chain
        seconds = self._lap()
        if lowest and pending == columns:
            self.length.checked(columns, seconds)
        self.cache.crop(max(0, columns - number))
        if lowest:
            self.length.finish(count, reached, number)
            if proposal.undrawn is not None and reached == count:
                self.length.learn_next(self._agreement(proposal.undrawn, scores[:, count]))
            self.rounds, self.drafted = self.rounds + 1, self.drafted + count
            self.accepted += reached
        sources = torch.full_like(tokens, exit_idx)
        same = right[:, :number] & (torch.arange(number, device=tokens.device) < count)
        inherited = torch.nn.functional.pad(proposal.sources, (0, max(0, number - count)))
        sources = torch.where(same, inherited[:, :number], sources)
        kept = [scores[:, i] for i in range(number)] if keep else []
        raw = [logits[:, i] for i in range(number)] if keep else []
        return Block(tokens, sources, kept, raw)

    def _confidence(self, scores: torch.Tensor) -> float:
        """Largest probability in the row that is least sure."""
        return float(scores.softmax(-1).amax(-1)[self.text.kept_rows].min())

    def _agreement(self, given: torch.Tensor, wanted: torch.Tensor) -> float:
        """Probability that every row accepts a draft from `given`, wanting `wanted`.

        Both are processed scores of shape `(batch, vocab)`. A sampled draft is accepted with the
        overlap of the two distributions (arXiv:2211.17192, corollary 3.6).
        """
        if self.text.do_sample:
            chances = torch.minimum(given.softmax(-1), wanted.softmax(-1)).sum(-1)
        else:
            chances = (given.argmax(-1) == wanted.argmax(-1)).float()
        return float(chances[self.text.kept_rows].prod())

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

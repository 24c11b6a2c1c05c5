"""Lossless self-speculation: a shallow exit drafts tokens, the layers above it verify them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from operator import index
from typing import Any

import torch
from torch.nn import functional as F

from .relay_cache import RelayCache
from .relay_policies import NewTokens, RelayDecoder, RelayPolicy


# tokens that an exit in the middle of a chain collects before the next one verifies them
COLLECTED = 6


@dataclass(frozen=True)
class SpeculativeRelay(RelayPolicy):
    """Lossless self-speculation: a shallow exit drafts, the layers above it verify.

    Only the segments above the draft exit run again over the drafted positions, all in one pass.
    Greedy text is that of the deepest exit (in float32; in half precision a pass over several
    positions may round a tie otherwise), sampled text has its distribution. Without the package
    `hf_familial` a family cannot learn what pays: then `"auto"` drafts from the shallowest exit, 4
    tokens at first, 2 more when all were accepted, else 1 less.

    Attributes:
        draft_exit (`int`, `Sequence[int]` or `"auto"`): Exit that drafts. Several make a chain, in
            which each verifies the drafts of the one before. `"auto"` tries all shallower ones and
            goes on with the one that yields most tokens per time.
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
        """Return the exits that draft, then the one that decides.

        Raises:
            ValueError: If they do not go deeper one after the other.
        """
        last = self.exit_idx % num_exits if abs(self.exit_idx) <= num_exits else self.exit_idx
        if last == 0:
            raise ValueError(
                f"exit {self.exit_idx} is the shallowest of {num_exits}, so none can draft for it: "
                f"give `relay=FixedExit({self.exit_idx})`, or call `generate(exit_idx=...)`."
            )
        drafts: Sequence[Any]
        if isinstance(self.draft_exit, int):
            drafts = [self.draft_exit]
        else:
            drafts = range(last) if self.draft_exit == "auto" else self.draft_exit
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


class SpeculativeDecoder(RelayDecoder):
    """Makes tokens in rounds of drafts and a check.

    A subclass that learns when to draft overrides the steps of a round: `run_draft`, `read_draft`,
    `goes_on`, `run_check` and `learn`.

    Args:
        relay ([`SpeculativeRelay`]): The policy.
        cache ([`RelayCache`]): Over its exits, with rollback.
        text ([`GeneratedText`]): What is written so far, and how tokens are chosen.

    Attributes:
        adapts (`bool`): Whether the decoder chooses the length of drafts or the exit itself.
        chain (`bool`): Whether several exits draft, each verified by the next.
        draft_index (`int`): Index in the chain of the exit that drafts.
        draft_length (`int`): Most tokens that the next round drafts.
    """

    def __init__(self, relay: SpeculativeRelay, cache: RelayCache, text: Any) -> None:
        self.relay, self.cache, self.text, self.exits = relay, cache, text, cache.exits
        self.fixed = relay.draft_length if isinstance(relay.draft_length, int) else None
        self.adapts = self.fixed is None or relay.draft_exit == "auto"
        self.chain = len(self.exits) > 2 and relay.draft_exit != "auto"
        self.draft_index = 0
        self.draft_length = self.fixed or 4

    def step(self, **inputs: Any) -> NewTokens:
        """Draft, verify, and return the tokens that stay."""
        self.cache.commit()  # not before: the text may have ended among the last round's tokens
        top, ids = len(self.exits) - 1, self.text.input_ids
        level = top - 1 if self.chain else 0
        drafts = self._propose(level, ids, inputs, self.text.tokens_left)
        return self._verify(top, ids, drafts, self.text.wants_scores)

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

    def run_check(self, level: int) -> None:
        """Run what is pending to the exit that verifies."""
        self.cache.catch_up(self.exits[level])

    def learn(self, drafts: DraftedTokens, scores: torch.Tensor, reached: int, new: int) -> None:
        """Learn from the check of the drafting exit; by default as transformers' heuristic does.

        Args:
            drafts ([`DraftedTokens`]): What was verified.
            scores (`torch.Tensor` of shape `(batch, columns, vocab)`): The processed scores of the
                exit that verified.
            reached (`int`): Drafts that every row accepted.
            new (`int`): Tokens that the check yields.
        """
        if self.fixed is None and drafts.tokens.shape[1]:
            all_accepted = reached == drafts.tokens.shape[1]
            self.draft_length = max(1, self.draft_length + (2 if all_accepted else -1))

    def _propose(
        self, level: int, ids: torch.Tensor, inputs: dict[str, Any], tokens_left: int
    ) -> DraftedTokens:
        """Return what the exit at a level proposes; `inputs` are the tokens that have not run."""
        if level == 0:
            return self._draft(ids, inputs, tokens_left)
        parts: list[NewTokens] = []
        count, length = 0, ids.shape[1]
        while count < min(COLLECTED, tokens_left):
            drafts = self._propose(level - 1, ids, inputs, tokens_left - count)
            part = self._verify(level, ids, drafts, self.text.do_sample)
            parts.append(part)
            ids = torch.cat((ids, part.tokens), 1)
            inputs = {"input_ids": part.tokens[:, -1:]}
            count = ids.shape[1] - length
        scores = [scores for part in parts for scores in part.scores]
        sources = torch.cat([part.sources for part in parts], 1)
        return DraftedTokens(ids[:, length:], scores, sources, ran=False)

    def _draft(self, ids: torch.Tensor, inputs: dict[str, Any], tokens_left: int) -> DraftedTokens:
        """Draw tokens of one exit, one after the other, all of which run.

        Every token that is drawn is verified. Whether to draw one is decided before, from the
        distribution alone: to drop a token after a look at it would change what is sampled.
        """
        most = min(self.draft_length, tokens_left - 1)
        tokens: list[torch.Tensor] = []
        scores: list[torch.Tensor] = []
        undrawn = None
        while True:
            self.run_draft(inputs)
            if len(tokens) >= most:
                break
            processed = self.read_draft(ids)
            if not self.goes_on(processed):
                undrawn = processed
                break
            drawn = self.text.choose(processed, ids.shape[1])
            tokens.append(drawn)
            scores.append(processed)
            ids, inputs = torch.cat((ids, drawn), 1), {"input_ids": drawn}
        drafted = torch.cat(tokens, 1) if tokens else ids[:, :0]
        sources = torch.full_like(drafted, self.exits[self.draft_index])
        return DraftedTokens(drafted, scores, sources, ran=True, undrawn=undrawn)

    def _verify(
        self, level: int, ids: torch.Tensor, drafts: DraftedTokens, keep: bool
    ) -> NewTokens:
        """Run the exit at a level over the drafts, keep those it accepts, add one of its own."""
        count, exit_idx = drafts.tokens.shape[1], self.exits[level]
        columns = count + drafts.ran
        self.run_check(level)
        logits = self.cache.logits(exit_idx, last=columns).float()
        scores = self._scores(ids, drafts.tokens, logits)
        tokens, reached, right = self._accept(ids.shape[1], drafts, scores)
        number = tokens.shape[1]  # syncs
        if level == 1 or not self.chain:
            self.learn(drafts, scores, reached, number)
            self.rounds, self.drafted = self.rounds + 1, self.drafted + count
            self.accepted += reached
        self.cache.crop(max(0, columns - number))
        same = right[:, :number] & (torch.arange(number, device=tokens.device) < count)
        inherited = F.pad(drafts.sources, (0, max(0, number - count)))[:, :number]
        sources = torch.where(same, inherited, torch.full_like(tokens, exit_idx))
        kept = [scores[:, i] for i in range(number)] if keep else []
        raw = [logits[:, i] for i in range(number)] if keep else []
        return NewTokens(tokens, sources, kept, raw)

    def _scores(
        self, ids: torch.Tensor, tokens: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Process the logits of every checked position, each with the text before it."""
        if not self.text.processors:
            return logits
        grown, length = torch.cat((ids, tokens), 1), ids.shape[1]
        processed = [
            self.text.process(grown[:, : length + i], logits[:, i]) for i in range(logits.shape[1])
        ]
        return torch.stack(processed, dim=1)

    def _accept(
        self, start: int, drafts: DraftedTokens, scores: torch.Tensor
    ) -> tuple[torch.Tensor, int, torch.Tensor]:
        """Decide which tokens a check yields.

        The drafts stand in the columns from `start` on. Every row takes as many as the row of which
        fewest are accepted, so that all stay of one length; what is left out is drafted anew.

        Returns:
            `tuple`: Tokens of shape `(batch, number)`; how many drafts every row accepted; and
            which drafts are accepted, of shape `(batch, columns)`, nowhere after the first refusal.
        """
        count, columns = drafts.tokens.shape[1], scores.shape[1]
        if not self.text.do_sample:
            targets = scores.argmax(-1)
            right = (drafts.tokens == targets[:, :count]).cumprod(1).bool()
            reached = self._fewest(right)
            tokens = targets[:, : reached + 1]
        else:
            wanted, given = scores.softmax(-1), torch.empty(0)
            right = drafts.tokens.new_zeros(drafts.tokens.shape, dtype=torch.bool)
            if count:
                given = torch.stack(drafts.scores, 1).softmax(-1)
                index = drafts.tokens.unsqueeze(-1)
                ratio = wanted[:, :count].gather(2, index) / given.gather(2, index)
                draws = self.text.uniform(drafts.tokens, start)
                right = (draws < ratio.squeeze(-1)).cumprod(1).bool()
            reached = self._fewest(right)
            tokens = drafts.tokens[:, :reached]
            if reached < columns:
                drawn = self._drawn(start, drafts, wanted, given, right, reached)
                tokens = torch.cat((tokens, drawn), 1)
        return tokens, reached, F.pad(right, (0, columns - count))

    def _fewest(self, right: torch.Tensor) -> int:
        """Return the number of drafts that every row accepts whose next tokens are written."""
        return int(right.sum(1)[self.text.kept_rows].min()) if right.shape[1] else 0

    def _drawn(
        self,
        start: int,
        drafts: DraftedTokens,
        wanted: torch.Tensor,
        given: torch.Tensor,
        right: torch.Tensor,
        place: int,
    ) -> torch.Tensor:
        """Return the token after the accepted ones: the draft where accepted, else a new draw."""
        chances = wanted[:, place]
        if place >= drafts.tokens.shape[1]:
            return self.text.draw(chances, start + place)
        # the draw is from what the draft's distribution had too little of
        rest = (chances - given[:, place]).clamp_(min=0)
        total = rest.sum(-1, keepdim=True)
        drawn = self.text.draw(torch.where(total > 0, rest / total, chances), start + place)
        here = slice(place, place + 1)
        return torch.where(right[:, here], drafts.tokens[:, here], drawn)

"""Self-speculation that learns which exit drafts and how many tokens, and chains of drafts."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..models.familial.relay_policies import (
    DraftedTokens,
    NewTokens,
    RelayDecoder,
    SpeculativeDecoder,
)
from ._draft_length import DRAFTED, LONGEST, PLAIN, WATCHED, DraftLength


# number of rounds after which all exits are watched again, if several may draft
AGAIN = 64
# number of tokens that a middle exit of a chain collects before the next exit verifies them
COLLECTED = 6


class LearnedDecoder(SpeculativeDecoder):
    """A speculative decoder that measures its passes and learns from each verification.

    A round is of one of three kinds. A plain round has no drafts. A watched round has no drafts
    either, but it reads the draft exits next to the deepest exit. A drafted round drafts and
    verifies. In a chain, each exit verifies the drafts of the exit before it.

    Args:
        plain ([`SpeculativeDecoder`]): The decoder that the policy built. Its class may come from
            another copy of the code, such as a family's remote code.
        known (`dict`): The draft lengths learned in earlier texts, see
            `ModelAccelerator.draft_lengths`.
    """

    def __init__(self, plain: Any, known: dict[Any, Any]) -> None:
        super().__init__(plain.relay, plain.cache, plain.text)
        cache, text = self.cache, self.text
        self.draft_length = self.fixed or LONGEST
        self.chain = len(self.exits) > 2 and self.relay.draft_exit != "auto"
        self.drafting = self.exits[:1] if self.chain else self.exits[:-1]
        # with a clock, sampled text would depend on the speed of the machine
        timed = not text.do_sample
        watch = not self.chain and (self.fixed is None or len(self.drafting) > 1)
        # greedy texts reuse learned lengths; sampled texts do not, so a seed gives the same text
        self._known = known if timed and self.fixed is None else {}
        free, fused = self.relay.draft_exit == "auto", bool(cache.passes)
        self._keys = [(self.exits, free, len(text.input_ids), fused, k) for k in self.drafting]
        self.lengths = [
            # a copy, because another thread may use the same object
            copy.deepcopy(self._known.get(key)) or DraftLength(*cost, self.fixed, timed, watch)
            for key, cost in zip(self._keys, self._costs(), strict=True)
        ]
        # on a CPU, time of this thread only, because other work must not count
        on_cpu = cache.model.device.type == "cpu"
        self._clock = time.thread_time if on_cpu else time.perf_counter
        self._began = self._clock()
        self._pending = 0
        self._undrawn: torch.Tensor | None = None  # scores at which drafting stopped

    def _costs(self) -> list[tuple[float, float]]:
        """Return the cost of layers and head of each draft exit, as shares of a whole pass."""
        layers, heads = matrix_sizes(self.cache.model, self.exits)
        checker = 1 if self.chain else len(self.exits) - 1
        whole = sum(layers[: checker + 1]) + heads[checker]
        return [(sum(layers[: i + 1]) / whole, heads[i] / whole) for i in range(len(self.drafting))]

    def finish(self) -> None:
        """Save the learned draft lengths for the next text."""
        self._known.update(zip(self._keys, self.lengths, strict=True))

    @property
    def length(self) -> DraftLength:
        """[`DraftLength`]: The draft length of the exit that drafts in this round."""
        return self.lengths[self.draft_index]

    def step(self, **inputs: Any) -> NewTokens:
        """Run one round and return its new tokens."""
        self.cache.commit()
        kind = DRAFTED if self.chain else self._kind()
        if kind == PLAIN:
            return self._write_plainly(inputs)
        if kind == WATCHED:
            return self._watch(inputs)
        level = len(self.exits) - 2 if self.chain else 0
        drafts = self._propose(level, self.text.input_ids, inputs, self.text.tokens_left)
        return self.verify(drafts, self.exits[-1], self.text.wants_scores)

    def _propose(
        self, level: int, ids: torch.Tensor, inputs: dict[str, Any], tokens_left: int
    ) -> DraftedTokens:
        """Return the drafts of the exit at a level of the chain, in the form of `draft`."""
        if level == 0:
            return self.draft(ids, inputs, tokens_left)
        parts: list[NewTokens] = []
        start = ids.shape[1]
        while ids.shape[1] - start < min(COLLECTED, tokens_left):
            left = tokens_left - (ids.shape[1] - start)
            drafts = self._propose(level - 1, ids, inputs, left)
            part = self.verify(drafts, self.exits[level], self.text.do_sample)
            parts.append(part)
            ids = torch.cat((ids, part.tokens), 1)
            inputs = {"input_ids": part.tokens[:, -1:]}
        scores = [scores for part in parts for scores in part.scores]
        sources = torch.cat([part.sources for part in parts], 1)
        return DraftedTokens(ids, start, scores, sources, ran=False)

    def _kind(self) -> str:
        """Return the kind of the next round, and select the draft exit with the best rate."""
        if len(self.lengths) > 1 and self.rounds % AGAIN == AGAIN - 1:
            for length in self.lengths:
                length.watch_again()
        kinds = [length.mode() for length in self.lengths]
        if DRAFTED not in kinds or WATCHED in kinds:
            return WATCHED if WATCHED in kinds else PLAIN
        ready = [i for i, kind in enumerate(kinds) if kind == DRAFTED]
        self.draft_index = max(ready, key=lambda i: self.lengths[i].promise)
        return DRAFTED

    def _write_plainly(self, inputs: dict[str, Any]) -> NewTokens:
        """Generate one token of the deepest exit in one pass through all layers."""
        before = self.cache.length
        self._lap()
        new = RelayDecoder.step(self, **inputs)
        if self.cache.length == before + 1:
            seconds = self._lap()
            for length in self.lengths:
                length.wrote_plainly(seconds)
        return new

    def _watch(self, inputs: dict[str, Any]) -> NewTokens:
        """Generate one token of the deepest exit, and also read the logits of all draft exits."""
        before, ids = self.cache.length, self.text.input_ids
        self._lap()
        self.cache.feed(**inputs)
        laps = [self._lap()]
        for exit_idx in self.exits[1:]:
            self.cache.catch_up(exit_idx)
            laps.append(self._lap())
        *drafts, deep = self._read_beside()
        new = self.one_token(deep[:, -1].float(), ids.new_full((len(ids),), self.exits[-1]))
        read = self._lap()
        if self.cache.length == before + 1:
            for i, length in enumerate(self.lengths):
                length.fed(sum(laps[: i + 1]))
                length.checked(1, sum(laps[i + 1 :]) + read)
        for length, logits in zip(self.lengths, drafts, strict=True):
            given = self.text.process(ids, logits[:, -1].float())
            length.read(read)
            length.watched(self._confidence(given), self._agreement(given, new.scores[0]))
        return new

    def _read_beside(self) -> list[torch.Tensor]:
        """Return the last logits of each exit. A shared head computes them in one call."""
        cache = self.cache
        if len({id(head) for head in cache.heads}) > 1:
            return [cache.logits(k) for k in self.exits]
        for i in range(len(self.drafting)):
            cache.reads[i] += 1
        states = torch.cat([cache.states(k, 1) for k in self.exits])
        return list(cache.read(self.exits[-1], states).chunk(len(self.exits)))

    def _lap(self) -> float:
        now = self._clock()
        lap, self._began = now - self._began, now
        return lap

    def run_draft(self, inputs: dict[str, Any]) -> None:
        """Run new tokens to the draft exit. Record the time if it is a single token."""
        before = self.cache.length
        self._lap()
        super().run_draft(inputs)
        if self.cache.length == before + 1:
            self.length.fed(self._lap())

    def read_draft(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the processed scores of the draft exit, shape `(batch, vocab)`."""
        self._lap()
        return super().read_draft(ids)

    def goes_on(self, scores: torch.Tensor) -> bool:
        """Return whether one more draft is likely to save time. Record the time of the read."""
        if self.fixed is not None:
            return True
        confidence = self._confidence(scores)
        self.length.read(self._lap())
        goes_on = self.length.goes_on(confidence)
        self._undrawn = None if goes_on else scores
        return goes_on

    def run_check(self, exit_idx: int) -> None:
        """Run pending positions to the exit that verifies."""
        self._pending = self.cache.pending(exit_idx)
        self._lap()
        super().run_check(exit_idx)

    def learn(self, drafts: DraftedTokens, exit_idx: int, scores: torch.Tensor, right: int) -> None:
        """Record the time of the verifying pass, and the drafts that it accepted.

        In a chain, only drafts of the shallowest exit count.
        """
        if self.chain and exit_idx != self.exits[1]:
            return
        seconds, count = self._lap(), drafts.tokens.shape[1]
        columns = count + drafts.ran
        if self._pending == columns:
            self.length.checked(columns, seconds)
        self.length.finish(count, right, right + 1)
        undrawn, self._undrawn = self._undrawn, None
        if undrawn is not None and right == count:
            self.length.learn_next(self._agreement(undrawn, scores[:, count]))
        self.rounds, self.drafted = self.rounds + 1, self.drafted + count
        self.accepted += right

    def _confidence(self, scores: torch.Tensor) -> float:
        """Return the largest token probability of the least confident row."""
        return float(scores.softmax(-1).amax(-1)[self.text.kept_rows].min())

    def _agreement(self, given: torch.Tensor, wanted: torch.Tensor) -> float:
        """Return the probability that a draft from `given` is accepted in every row.

        `given` are the scores of the draft exit, and `wanted` those of the exit that verifies. Both
        are processed and have the shape `(batch, vocab)`. A sampled draft is accepted with the
        overlap of the two distributions (arXiv:2211.17192, corollary 3.6).
        """
        if self.text.do_sample:
            chances = torch.minimum(given.softmax(-1), wanted.softmax(-1)).sum(-1)
        else:
            chances = (given.argmax(-1) == wanted.argmax(-1)).float()
        return float(chances[self.text.kept_rows].prod())


def matrix_sizes(model: Any, exits: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the number of weights in matrices, for the segment and the head of each exit.

    The segment of an exit starts at the exit before it in `exits`. Each of these weights needs one
    multiply-add per position.
    """
    members = model.model.members
    depths = [0, *(model.config.exits[k] for k in exits)]
    spans = zip(depths, depths[1:], strict=False)
    layers = [_matrix_weights(members.segment(*span).layers) for span in spans]
    return layers, [_matrix_weights([model.head(k)]) for k in exits]


def _matrix_weights(modules: Iterable[nn.Module]) -> int:
    weights = {id(p): p for module in modules for p in module.parameters() if p.dim() > 1}
    return sum(p.numel() for p in weights.values())

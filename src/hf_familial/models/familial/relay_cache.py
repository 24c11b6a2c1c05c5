"""Keys, values and pending taps of a relay: no other file touches them.

Positions run through the layers in segments, each from the tap of the one before. A segment that is
not wanted yet waits: its positions are pending, their taps are kept, and a later pass runs all of
them at once. Nothing below is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from .contract import logit_ops
from .exits import read_out
from .lean import MAX_TOKENS
from .lean_cache import growing
from .relay_checks import (
    check_cache,
    check_positions,
    check_relay,
    check_rollback,
    past_positions,
)
from .relay_columns import Columns
from .rollback import crop, record_past, settle
from .segments import SegmentRunner


class RelayCache:
    """The state of a relay over some exits of a family.

    Args:
        model ([`FamilialForCausalLM`]): The family.
        exits (`Sequence[int]`): Indices of the exits to be read, in any order.
        cache ([`DynamicCache`], *optional*): To go on from: filled to the full depth, or empty.
        rollback (`bool`, *optional*, defaults to `False`): Whether `crop` will be called.
        lean (`bool`, *optional*, defaults to `False`): Whether to use lean passes where there are
            some (`lean.py`).
        reads (`Sequence[int]`, *optional*): Those of the exits that will be read; by default all.
        max_pending (`int`, *optional*, defaults to 256): Pending positions, beyond those of the
            first call of `feed`, at which all of them run to the deepest of the exits.

    Attributes:
        exits (`tuple[int, ...]`): Shallowest first.
        cache ([`DynamicCache`]): The family's cache; of different lengths per layer.
        ran (`list[int]`): Number of positions that each exit's segment has run, in all.
        reads (`list[int]`): Number of positions that each exit was read at.
        first (`int`): Positions that the cache held at the start.
        lean (`bool`): Whether there are lean passes.
        prompt_end (`int`): Positions seen after the first call of `feed` or `push`.

    Raises:
        ValueError: If the host cannot go on from a tap, or the cache cannot be used.
        IndexError: If there is no such exit.
    """

    def __init__(
        self,
        model: Any,
        exits: Sequence[int],
        cache: DynamicCache | None = None,
        *,
        rollback: bool = False,
        lean: bool = False,
        reads: Sequence[int] | None = None,
        max_pending: int = 256,
    ) -> None:
        self.model, self.rollback, self.max_pending = model, rollback, max_pending
        self.exits = tuple(sorted({model.config.resolve_exit(k) for k in exits}))
        self.contract = model.model.contract
        check_relay(model)
        self.cache = self._prepared(cache)
        members, backbone = model.model.members, model.model.backbone
        early = [k < model.config.num_exits - 1 for k in self.exits]
        self._norms = [members.norm(k) for k in self.exits]
        self._depths = [0, *(model.config.exits[k] for k in self.exits)]
        self._runners: dict[tuple[int, int], SegmentRunner] = {}
        wanted = self.exits if reads is None else [model.config.resolve_exit(k) for k in reads]
        private = [
            bool(model.config.num_exit_layers) and is_early and k in wanted
            for k, is_early in zip(self.exits, early, strict=True)
        ]
        self._branches = [
            SegmentRunner(backbone, self.contract, members.private(k), self.cache) if own else None
            for k, own in zip(self.exits, private, strict=True)
        ]
        self._places = {k: i for i, k in enumerate(self.exits)}
        self._places |= {k - model.config.num_exits: i for k, i in self._places.items()}
        self._embed = model.get_input_embeddings()
        self._ops = logit_ops(model.config.text_config)
        self._heads = [model.head(k) for k in self.exits]
        self._lean = self._lean_passes() if lean else {}
        self.lean = bool(self._lean)
        self.first = self._seen = past_positions(self.cache)  # or those of the prompt, which follow
        count = len(self.exits)
        self._done, self._read = [self.first] * count, [self.first] * count
        self._taps: list[torch.Tensor | None] = [None] * count
        self._states: list[torch.Tensor | None] = [None] * count
        self.ran, self.reads = [0] * count, [0] * count
        self.prompt_end = 0
        self._columns = Columns(self.first)
        if rollback:
            record_past(self.cache.layers, True)

    def _prepared(self, cache: DynamicCache | None) -> DynamicCache:
        config = self.model.config
        if cache is None:
            cache = DynamicCache(config=self.model.model.backbone.config)
        check_cache(cache)
        if (
            past_positions(cache)
            and config.num_exit_layers
            and self.exits[0] < config.num_exits - 1
        ):
            raise ValueError(
                "a relay cannot go on from `past_key_values` when exits have private layers: their "
                "keys and values of the past are not in it. Give it the whole text instead."
            )
        self.model.model.members.grow(cache, self.exits)
        growing(cache)
        if self.rollback:
            check_rollback(cache, config.text_config.model_type)
        return cache

    def _lean_passes(self) -> dict[tuple[int, int], Any]:
        """Lean passes of segments, norms and heads, where there are some."""
        lean, backbone = self.model.model.lean, self.model.model.backbone
        self._norms = [lean.norm(norm) or norm for norm in self._norms]
        self._heads = [lean.head(head) or head for head in self._heads]
        last = len(self.exits) - 1

        def found(*span: int) -> Any:
            runner = self._runner(*span)
            return lean.runner(backbone, self.contract, runner.segment, runner.layers)

        whole, spans = found(0, last), [(i, i) for i in range(last + 1)]
        if whole is None:  # some of its segments may do
            passes = {span: found(*span) for span in spans}
            return {span: runner for span, runner in passes.items() if runner is not None}
        parts = {(i, i): whole.part(*self._depths[i : i + 2]) for i, _ in spans}
        return {**parts, (0, last): whole}

    @property
    def length(self) -> int:
        """Number of positions seen."""
        return self._done[0]

    @property
    def lengths(self) -> dict[int, int]:
        """Number of positions that each exit's depth has seen, by index of the exit."""
        return dict(zip(self.exits, self._done, strict=True))

    def pending(self, exit_idx: int) -> int:
        """Number of positions that have not reached an exit's depth yet."""
        return self.length - self._done[self._place(exit_idx)]

    def _place(self, exit_idx: int) -> int:
        """Place of an exit among those of this relay."""
        if exit_idx not in self._places:
            raise IndexError(f"exit {exit_idx} is none of this relay's exits {self.exits}.")
        return self._places[exit_idx]

    def feed(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        whole: bool = False,
    ) -> None:
        """Run new positions through the first segment, or through all of them.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*): The new tokens.
            inputs_embeds (`torch.Tensor` of shape `(batch, seq, hidden)`, *optional*): Instead.
            position_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*): Of the new
                tokens; counted on from the last ones by default.
            attention_mask (`torch.Tensor` of shape `(batch, seq)`, or `(batch, past + seq)` at the
                first call, *optional*): 0 for padding; by default there is none.
            whole (`bool`, *optional*, defaults to `False`): Run to the deepest of the exits, in one
                pass where nothing is pending. The exits before it cannot be read then.
        """
        given: Any = input_ids if input_ids is not None else inputs_embeds
        new = self._extend(given, position_ids, attention_mask)
        entry = {"inputs_embeds" if input_ids is None else "input_ids": given}
        if whole and self._done[0] == self._done[-1] and not any(self._branches):
            self._run(0, len(self.exits) - 1, new, **entry)
            return
        self._run(0, 0, new, **entry)
        pending = self.length - self._done[-1]
        if whole or pending > self.prompt_end - self.first + self.max_pending:
            self.catch_up(self.exits[-1])

    def push(
        self,
        taps: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> None:
        """Take taps of the first exit that were made elsewhere: they become pending here.

        The first segment is never run then, and its keys and values stay empty.

        Args:
            taps (`torch.Tensor` of shape `(batch, seq, hidden)`): Of the new positions.
            position_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*): As in `feed`.
            attention_mask (`torch.Tensor`, *optional*): As in `feed`.
        """
        new = self._extend(taps, position_ids, attention_mask)
        self._keep(0, taps)
        self._done[0] += new

    def catch_up(self, exit_idx: int) -> None:
        """Run every pending position to the depth of an exit, segment by segment.

        Args:
            exit_idx (`int`): One of `exits`.
        """
        for i in range(1, self._place(exit_idx) + 1):
            new = self._done[i - 1] - self._done[i]
            if new:
                taps = self._taps[i - 1]
                assert taps is not None
                self._run(i, i, new, inputs_embeds=taps[:, -new:])

    def taps(self, exit_idx: int, last: int) -> torch.Tensor:
        """Taps of the last positions that have reached an exit.

        Args:
            exit_idx (`int`): One of `exits`.
            last (`int`): How many; pending ones, or not more than its last pass ran.

        Returns:
            `torch.Tensor` of shape `(batch, last, hidden)`: Before any norm.
        """
        taps = self._taps[self._place(exit_idx)]
        assert taps is not None
        return taps[:, -last:]

    def logits(self, exit_idx: int, last: int = 1) -> torch.Tensor:
        """Read the last positions that have reached an exit.

        Args:
            exit_idx (`int`): One of `exits`, caught up.
            last (`int`, *optional*, defaults to 1): How many; not more than its last pass ran.

        Returns:
            `torch.Tensor` of shape `(batch, last, vocab)`: As the exit's member gives them.
        """
        i = self._place(exit_idx)
        self.reads[i] += last
        return read_out(self._normed(i, last), self._heads[i], self._ops)

    def logits_beside(self, exits: Sequence[int]) -> list[torch.Tensor]:
        """Read the last position at several exits; a head that they share reads all at once.

        Args:
            exits (`Sequence[int]`): Some of `exits`, caught up.

        Returns:
            `list[torch.Tensor]`: For each, logits of shape `(batch, 1, vocab)`.
        """
        places = [self._place(k) for k in exits]
        if len({id(self._heads[i]) for i in places}) > 1:
            return [self.logits(k) for k in exits]
        for i in places:
            self.reads[i] += 1
        states = torch.cat([self._normed(i, 1) for i in places])
        return list(read_out(states, self._heads[places[0]], self._ops).chunk(len(places)))

    def _normed(self, i: int, last: int) -> torch.Tensor:
        """States of an exit after its private layers and norm, shape `(batch, last, hidden)`."""
        taps, branch = self._taps[i], self._branches[i]
        assert taps is not None
        if branch is None:
            return self._norms[i](taps[:, -last:])
        new = self._done[i] - self._read[i]
        if new:
            self._states[i] = branch(
                inputs_embeds=taps[:, -new:], **self._inputs(self._read[i], new)
            )
            self._read[i] += new
        states = self._states[i]
        assert states is not None
        return states[:, -last:]

    def crop(self, count: int) -> None:
        """Forget the last positions everywhere, however deep they got.

        Args:
            count (`int`): How many.
        """
        length = self.length - count
        for i in range(len(self.exits)):
            crop(self._runner(i, i).layers, self._done[i] - length)
            branch = self._branches[i]
            if branch is not None:
                crop(branch.layers, self._read[i] - length)
            excess = max(0, self._done[i] - length)
            self._taps[i] = _without_last(self._taps[i], excess)
            self._states[i] = _without_last(self._states[i], max(0, self._read[i] - length))
            self._done[i] = min(self._done[i], length)
            self._read[i] = min(self._read[i], length)
        self._columns.crop(count)

    def settle(self, last: bool = False) -> None:
        """Drop what only a crop of positions seen so far would need; the `last` time, for good."""
        settle(self.cache.layers)
        if last and self.rollback:
            record_past(self.cache.layers, False)

    def to_plain(self) -> DynamicCache:
        """Complete the keys and values of every backbone layer and hand back an ordinary cache.

        Returns:
            [`DynamicCache`]: Of one length in every layer; private layers of early exits left out.

        Raises:
            ValueError: If the layers above the last exit, or below taps from elsewhere, never ran.
        """
        config = self.model.config
        if self.exits[-1] != config.num_exits - 1:
            raise ValueError(
                f"this relay ends at exit {self.exits[-1]}: the layers above have not run. Only "
                "one that reaches the deepest exit has a plain cache."
            )
        self.catch_up(-1)
        self.settle(last=True)
        del self.cache.layers[config.num_hidden_layers :]
        past_positions(self.cache)  # of one length, or taps came from elsewhere
        return self.cache

    def _extend(
        self,
        given: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> int:
        """Make columns for what is given, of shape `(batch, new, ...)`; return how many."""
        new = given.shape[1]
        self._device = given.device  # of an offloaded model, the model's own says nothing
        if self._seen:
            check_positions(self.model.config.text_config, self._seen, self.length + new)
        else:
            self._seen = new if position_ids is None else int(position_ids.max()) + 1
        self.prompt_end = self.prompt_end or self.length + new
        self._columns.extend(given, position_ids, attention_mask)
        return new

    def _run(self, first: int, last: int, new: int, **entry: torch.Tensor) -> None:
        """Run consecutive segments in one pass over positions that they have not seen."""
        start, runner = self._done[first], self._runner(first, last)
        lean = self._lean.get((first, last))
        if lean is not None and new <= MAX_TOKENS and self._columns.attention_mask is None:
            states = entry.get("inputs_embeds")
            if states is None:
                states = self._embed(entry["input_ids"])
            counted = self._columns.position_ids is None
            positions = None if counted else self._inputs(start, new)["position_ids"]
            taps = lean(states, runner.layers, positions)
        else:
            taps = runner(**entry, **self._inputs(start, new))
        for i in range(first, last):
            self._taps[i] = None
        self._keep(last, taps)
        for i in range(first, last + 1):
            self._done[i] += new
            self.ran[i] += new

    def _runner(self, first: int, last: int) -> SegmentRunner:
        """The host's pass through consecutive segments."""
        if (first, last) not in self._runners:
            model = self.model.model
            segment = model.members.trunk(self._depths[first], self._depths[last + 1])
            runner = SegmentRunner(model.backbone, self.contract, segment, self.cache)
            self._runners[first, last] = runner
        return self._runners[first, last]

    def _inputs(self, start: int, new: int) -> dict[str, Any]:
        return self._columns.inputs(start, new, self._device)

    def _keep(self, i: int, taps: torch.Tensor) -> None:
        """Add new taps of an exit and drop those that every reader has had."""
        readers = [self._done[i]]
        if i + 1 < len(self.exits):
            readers.append(self._done[i + 1])
        if self._branches[i] is not None:
            readers.append(self._read[i])
        waiting, old = self._done[i] - min(readers), self._taps[i]
        if waiting and old is not None:
            taps = torch.cat((old[:, -waiting:], taps), 1)
        self._taps[i] = taps


def _without_last(tensor: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """A buffer without its last columns."""
    return tensor if tensor is None or not count else tensor[:, : max(0, tensor.shape[1] - count)]

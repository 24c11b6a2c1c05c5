"""Keys, values and pending hidden states of a relay.

Segments run from the hidden states at an exit (the taps) of the segment before. Positions that are
not wanted deeper yet are pending: their taps are kept, and a later pass runs all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from .backbones import LogitTransform
from .segments import SegmentRunner, cache_lengths


class RelayCache:
    """The state of a relay over some exits of a family.

    Args:
        model ([`FamilialForCausalLM`]): The family.
        exits (`Sequence[int]`): Indices of the exits to be read, in any order.
        cache ([`DynamicCache`], *optional*): To go on from: filled to the full depth, or empty.
        rollback (`bool`, *optional*, defaults to `False`): Whether `crop` will be called.
        fused_weights (`bool`, *optional*, defaults to `False`): Whether to run the package's fused
            passes where there are some; `None` leaves it to the package.
        max_pending (`int`, *optional*, defaults to 256): Pending positions, beyond those of the
            first call of `feed`, at which all of them run to the deepest of the exits.

    Attributes:
        exits (`tuple[int, ...]`): Shallowest first.
        cache ([`DynamicCache`]): The family's cache; of different lengths per layer.
        ran, reads (`list[int]`): Positions that each exit's segment has run, and its head has read.
        first, prompt_end (`int`): Positions at the start, and after the first call of `feed`.
    """

    def __init__(
        self,
        model: Any,
        exits: Sequence[int],
        cache: DynamicCache | None = None,
        *,
        rollback: bool = False,
        fused_weights: bool | None = False,
        max_pending: int = 256,
    ) -> None:
        self.model, self.rollback, self.max_pending = model, rollback, max_pending
        self.accelerator = model.accelerator
        config, members = model.config, model.model.members
        self.exits = tuple(sorted({config.resolve_exit(k) for k in exits}))
        check_relay(model)
        self.cache = self._prepared(cache)
        # the accelerator may replace these and give passes, by first and last of their segments
        self.norms = [members.norm(k) for k in self.exits]
        self.heads = [model.head(k) for k in self.exits]
        self.passes: dict[tuple[int, int], Any] = {}
        self.depths = [0, *(config.exits[k] for k in self.exits)]
        self._runners: dict[tuple[int, int], SegmentRunner] = {}
        early = config.num_exits - 1 if config.num_exit_layers else 0  # exits with private layers
        self._segment_runner = partial(SegmentRunner, model.model.decoder, cache=self.cache)
        self._branches = [
            self._segment_runner(members.private_segment(k)) if k < early else None
            for k in self.exits
        ]
        self._index = {k: i for i, k in enumerate(self.exits)}
        self._index |= {k - config.num_exits: i for k, i in self._index.items()}
        self._embed = model.get_input_embeddings()
        self._transform = LogitTransform.of(config.text_config)
        if fused_weights is not False:
            self.accelerator.prepare(self, fused_weights)
        self.first = self._seen = past_positions(self.cache)  # or those of the prompt, which follow
        count = len(self.exits)
        self._done, self._read = [self.first] * count, [self.first] * count
        self._taps: list[Any] = [None] * count
        self._states = list(self._taps)
        self.ran, self.reads = [0] * count, [0] * count
        self.prompt_end = 0
        self.columns = Columns(self.first)
        if rollback:
            self.cache.activate_past_recording()

    def _prepared(self, cache: DynamicCache | None) -> DynamicCache:
        """Check a cache, or make one, and give it every slot that the exits write to."""
        config, inner = self.model.config, self.model.model
        cache = DynamicCache(config=inner.backbone.config) if cache is None else cache
        check_cache(cache)
        early = self.exits[0] < config.num_exits - 1
        if past_positions(cache) and config.num_exit_layers and early:
            raise ValueError(
                "a relay cannot go on from `past_key_values` when exits have private layers: their "
                "keys and values of the past are not in it. Give it the whole text instead."
            )
        inner.members.grow(cache, self.exits)
        recurrent = (isinstance(la, LinearAttentionCacheLayerMixin) for la in cache.layers)
        if self.rollback and any(recurrent):
            raise ValueError(
                f"`{config.text_config.model_type}` has recurrent layers, whose state cannot be "
                "taken back: drafts that may be rejected cannot run on it. Use a relay that never "
                "takes a token back, such as `ConfidenceRelay`."
            )
        return self.accelerator.cache(cache)

    @property
    def length(self) -> int:
        """`int`: Positions seen."""
        return self._done[0]

    @property
    def lengths(self) -> dict[int, int]:
        """`dict[int, int]`: Positions that each exit's depth has seen, by index of the exit."""
        return dict(zip(self.exits, self._done, strict=True))

    def pending(self, exit_idx: int) -> int:
        """Return how many positions have not reached an exit's depth yet."""
        return self.length - self._done[self._at(exit_idx)]

    def _at(self, exit_idx: int) -> int:
        if exit_idx not in self._index:
            raise IndexError(f"exit {exit_idx} is none of this relay's exits {self.exits}.")
        return self._index[exit_idx]

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
            input_ids, inputs_embeds, position_ids: Of shape `(batch, seq, ...)`, as the host takes
                them; positions count on by default.
            attention_mask (`torch.Tensor` of shape `(batch, seq)`, or `(batch, past + seq)` at the
                first call, *optional*): 0 for padding; by default there is none.
            whole (`bool`, *optional*, defaults to `False`): Run to the deepest of the exits, in one
                pass where nothing is pending. The exits before it cannot be read then.
        """
        given: Any = input_ids if input_ids is not None else inputs_embeds
        new = self._extend(given, position_ids, attention_mask)
        entry = {"inputs_embeds" if input_ids is None else "input_ids": given}
        at_once = whole and self._done[0] == self._done[-1] and not any(self._branches)
        self._run(0, len(self.exits) - 1 if at_once else 0, new, **entry)
        pending = self.length - self._done[-1]
        if whole or pending > self.prompt_end - self.first + self.max_pending:
            self.catch_up(self.exits[-1])

    def catch_up(self, exit_idx: int) -> None:
        """Run every pending position to the depth of one of `exits`, segment by segment."""
        for i in range(1, self._at(exit_idx) + 1):
            new = self._done[i - 1] - self._done[i]
            if new:
                self._run(i, i, new, inputs_embeds=self._taps[i - 1][:, -new:])

    def taps(self, exit_idx: int, last: int) -> torch.Tensor:
        """Return the taps, `(batch, last, hidden)`, of the last positions that reached an exit."""
        return self._taps[self._at(exit_idx)][:, -last:]

    def logits(self, exit_idx: int, last: int = 1) -> torch.Tensor:
        """Return an exit's logits, `(batch, last, vocab)`, at positions that its last pass ran."""
        return self.read(exit_idx, self.states(exit_idx, last))

    def read(self, exit_idx: int, states: torch.Tensor) -> torch.Tensor:
        """Return the logits that an exit's head reads from normed states `(..., seq, hidden)`."""
        i = self._at(exit_idx)
        self.reads[i] += states.shape[-2]
        return self._transform.read(states, self.heads[i])

    def states(self, exit_idx: int, last: int) -> torch.Tensor:
        """Return states after an exit's private layers and norm, shape `(batch, last, hidden)`."""
        i = self._at(exit_idx)
        taps, branch = self._taps[i], self._branches[i]
        if branch is None:
            return self.norms[i](taps[:, -last:])
        new = self._done[i] - self._read[i]
        if new:
            inputs = self.columns.inputs(self._read[i], new)
            self._states[i] = branch(inputs_embeds=taps[:, -new:], **inputs)
            self._read[i] += new
        return self._states[i][:, -last:]

    def crop(self, count: int) -> None:
        """Forget the last `count` positions everywhere, however deep they got."""
        length = self.length - count
        for i, branch in enumerate(self._branches):
            crop(self.runner(i, i).layers, self._done[i] - length)
            if branch is not None:
                crop(branch.layers, self._read[i] - length)
            self._taps[i] = _without_last(self._taps[i], self._done[i] - length)
            self._states[i] = _without_last(self._states[i], self._read[i] - length)
            self._done[i] = min(self._done[i], length)
            self._read[i] = min(self._read[i], length)
        self.columns.crop(count)

    def commit(self, last: bool = False) -> None:
        """Free what is kept only to crop positions seen so far; the `last` time, for good."""
        for layer in self.cache.layers:
            windowed = isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized
            if windowed and layer.record_past and layer.get_seq_length() >= layer.sliding_window:
                layer.crop(0)
            if last and self.rollback and hasattr(layer, "record_past"):
                layer.record_past = False

    def to_plain(self) -> DynamicCache:
        """Return an ordinary cache of the backbone's layers; raise if some of them never ran."""
        config = self.model.config
        if self.exits[-1] != config.num_exits - 1:
            raise ValueError(
                f"this relay ends at exit {self.exits[-1]}: the layers above have not run."
            )
        self.catch_up(-1)
        self.commit(last=True)
        del self.cache.layers[config.num_hidden_layers :]
        past_positions(self.cache)  # of one length, or taps came from elsewhere
        return self.cache

    def _extend(
        self, given: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> int:
        """Add columns for what is given, of shape `(batch, new, ...)`; return how many."""
        new = given.shape[1]
        if self._seen:
            check_positions(self.model.config.text_config, self._seen, self.length + new)
        else:
            self._seen = new if positions is None else int(positions.max()) + 1
        self.prompt_end = self.prompt_end or self.length + new
        self.columns.extend(given, positions, mask)
        return new

    def _run(self, first: int, last: int, new: int, **entry: torch.Tensor) -> None:
        """Run consecutive segments in one pass over positions that they have not seen."""
        start, runner, columns = self._done[first], self.runner(first, last), self.columns
        fast = self.passes.get((first, last))
        if fast is not None and fast.takes(new, columns.attention_mask):
            states = entry.get("inputs_embeds")
            if states is None:
                states = self._embed(entry["input_ids"])
            counted = columns.position_ids is None
            positions = None if counted else columns.inputs(start, new)["position_ids"]
            taps = fast(states, runner.layers, positions)
        else:
            taps = runner(**entry, **columns.inputs(start, new))
        self._taps[first:last] = [None] * (last - first)
        self._keep(last, taps)
        for i in range(first, last + 1):
            self._done[i] += new
            self.ran[i] += new

    def runner(self, first: int, last: int) -> SegmentRunner:
        """Return the host's pass through consecutive segments, given their indices."""
        if (first, last) not in self._runners:
            members = self.model.model.members
            segment = members.segment(self.depths[first], self.depths[last + 1])
            self._runners[first, last] = self._segment_runner(segment)
        return self._runners[first, last]

    def _keep(self, i: int, taps: torch.Tensor) -> None:
        """Add new taps of an exit and drop those that every reader has had."""
        readers = self._done[i : i + 2]
        if self._branches[i] is not None:
            readers.append(self._read[i])
        waiting, old = self._done[i] - min(readers), self._taps[i]
        if waiting and old is not None:
            taps = torch.cat((old[:, -waiting:], taps), 1)
        self._taps[i] = taps


def _without_last(tensor: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """Return a buffer without its last columns; all of it if `count` is below 1."""
    return tensor if tensor is None or count < 1 else tensor[:, : max(0, tensor.shape[1] - count)]


class Columns:
    """Position ids and mask of the columns seen, where they differ from counting and from ones."""

    def __init__(self, first: int) -> None:
        self.first = self._length = first
        # (batch, seq), from column `first` on; `None` while all rows count on
        self.position_ids: torch.Tensor | None = None
        self.attention_mask: torch.Tensor | None = None  # (batch, first + seq), 0 for padding

    def extend(
        self, given: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> None:
        """Add columns that hold `given`, whose shape begins with `(batch, new)`."""
        (batch, new), length = given.shape[:2], self._length
        old: Any = self.position_ids
        self._device = given.device  # of an offloaded model, the model's own says nothing
        if old is not None or positions is not None:
            counted = torch.arange(length, length + new, device=given.device).expand(batch, new)
            if positions is None:
                positions = counted - length + old[:, -1:] + 1
            positions = positions.expand(batch, new)
            if old is None and not torch.equal(positions, counted):
                old = torch.arange(self.first, length, device=given.device).expand(batch, -1)
            if old is not None:
                self.position_ids = torch.cat((old, positions), 1)
        seen = self.attention_mask
        if mask is None and seen is not None:
            mask = seen.new_ones((batch, new))
        if mask is not None and mask.shape[1] == new:
            seen = mask.new_ones((batch, length)) if seen is None else seen
            mask = torch.cat((seen, mask), 1)
        self.attention_mask = mask
        self._length += new

    def crop(self, count: int) -> None:
        """Forget the last columns."""
        self._length -= count
        self.position_ids = _without_last(self.position_ids, count)
        self.attention_mask = _without_last(self.attention_mask, count)

    def inputs(self, start: int, new: int) -> dict[str, Any]:
        """Return positions and mask of a pass over `new` columns from `start` on."""
        if self.position_ids is None:
            positions = torch.arange(start, start + new, device=self._device).unsqueeze(0)
        else:
            positions = self.position_ids[:, start - self.first : start - self.first + new]
        inputs: dict[str, Any] = {"position_ids": positions}
        if self.attention_mask is not None:
            inputs["attention_mask"] = self.attention_mask[:, : start + new]
        return inputs


def crop(layers: Iterable[Any], excess: int) -> None:
    """Take the last positions out of cache layers of one length; none if `excess` is below 1."""
    for layer in layers:
        if excess <= 0 or not isinstance(layer, CacheLayerMixin) or not layer.is_initialized:
            continue
        if isinstance(layer, DynamicSlidingWindowLayer):
            # its own crop also drops what a later, longer crop may need: `commit` does that
            DynamicLayer.crop(layer, -excess)
            layer.cumulative_length -= excess
        else:
            layer.crop(-excess)


def past_positions(cache: DynamicCache) -> int:
    """Return the number of positions that every layer of a cache has seen; raise if they differ."""
    lengths = cache_lengths(cache.layers)
    if len(lengths) > 1:
        raise ValueError(
            "a relay can go on from `past_key_values` only if every layer holds the same number of "
            f"tokens, got {sorted(lengths)}: use the cache of the deepest exit."
        )
    return lengths.pop() if lengths else 0


def check_relay(model: Any) -> None:
    """Raise for a host whose layers cannot go on from a tap."""
    spec, name = model.model.spec, model.config.text_config.model_type
    reason = spec.host.whole or ("" if spec.cache else "it has no cache of transformers' kinds")
    if reason:
        raise ValueError(
            f"`{name}` cannot be relayed: {reason}. `generate(exit_idx=...)` runs one member of it."
        )


def check_cache(cache: Any) -> None:
    """Raise for a cache whose layers cannot be of different lengths or lose positions again."""
    plain, away = isinstance(cache, DynamicCache), getattr(cache, "offloading", False)
    kinds = (DynamicLayer, LinearAttentionCacheLayerMixin, DummyLayer)
    odd = [] if not plain else [la for la in cache.layers if not isinstance(la, kinds)]
    if not plain or away or odd:
        name = type(odd[0] if odd else cache).__name__
        where = " that offloads its layers (`offloading=True`)" if away else ""
        raise ValueError(
            f"a relay needs a `DynamicCache` in the device's memory, got {name}{where}: leave out "
            "`cache_implementation`, or give `past_key_values=DynamicCache(config=...)`."
        )


def check_positions(config: Any, seen: int, ran: int) -> None:
    """Raise if a text of `seen` positions runs to `ran`, where the host changes its rotary angles.

    They depend on how far the same pass goes, and a relay groups positions in its own way.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        name = str(kind.get("rope_type"))
        if name != "longrope" and "dynamic" not in name:
            continue
        lengths = [config.max_position_embeddings]
        if name == "longrope":
            # the angles change at the first; some hosts drop their cache at the second
            original = "original_max_position_embeddings"
            named = (kind.get(original), getattr(config, original, None))
            lengths = [length for length in named if length] or lengths
            if seen > max(lengths):
                continue  # all positions have the angles of a long text
        if ran > min(lengths):
            raise ValueError(
                f"`{config.model_type}` changes its `{name}` angles at {min(lengths)} tokens, "
                f"which a relay cannot run past: the prompt has {seen} and the text may have "
                f"{ran + 1}. Give a smaller `max_new_tokens`, or call `generate(exit_idx=...)`."
            )

"""The KV cache of a relay, and the hidden states of its pending positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DummyLayer, DynamicCache, DynamicLayer
from transformers.cache_utils import DynamicSlidingWindowLayer as SlidingLayer
from transformers.cache_utils import LinearAttentionCacheLayerMixin as RecurrentLayer

from .backbones import LogitTransform
from .segments import SegmentRunner, cache_lengths


class RelayCache:
    """The KV cache of a relay, with the hidden states of pending positions.

    A position is pending at an exit if the layers above that exit have not run on it yet. The cache
    stores its hidden state at the exit (the tap). One later pass runs all pending positions.

    Args:
        model ([`FamilialForCausalLM`]): The family.
        exits (`Sequence[int]`): Indices of the exits in use, in any order.
        cache ([`DynamicCache`], *optional*): Past tokens, which must have run through all layers.
        rollback (`bool`, *optional*, defaults to `False`): Whether you will call `crop`.
        fused_weights (`bool`, *optional*, defaults to `False`): Whether to use the package's fused
            passes. With `None` the package decides.
        max_pending (`int`, *optional*, defaults to 256): Number of pending positions, besides those
            of the prompt, above which `feed` runs all of them to the deepest exit.

    Attributes:
        exits (`tuple[int, ...]`): Indices of the exits, shallowest first.
        cache ([`DynamicCache`]): Keys and values. Its layers can have different lengths.
        ran (`list[int]`): For each exit, the number of positions that ran through its segment.
        reads (`list[int]`): For each exit, the number of positions whose logits were computed.
        first, prompt_end (`int`): Number of positions at the start, and after the first `feed`.

    Example:
        >>> cache = RelayCache(model, exits=[0, -1])
        >>> cache.feed(inputs["input_ids"])  # runs the layers up to exit 0
        >>> cache.catch_up(-1)  # runs the pending positions to the deepest exit
        >>> cache.logits(-1)  # shape (batch, 1, vocab)
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
        # the accelerator may replace these, and add passes by (first, last) index of segments
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
        # without a past, the first `feed` sets `_seen` to the length of the prompt
        self.first = self._seen = past_positions(self.cache)
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
        config, inner = self.model.config, self.model.model
        cache = DynamicCache(config=inner.backbone.config) if cache is None else cache
        check_cache(cache)
        early = self.exits[0] < config.num_exits - 1
        if past_positions(cache) and config.num_exit_layers and early:
            raise ValueError(
                "`past_key_values` lacks the past keys and values of private layers, so a relay "
                "cannot continue from it. Pass the whole text without `past_key_values` instead."
            )
        inner.members.grow(cache, self.exits)
        recurrent = (isinstance(la, RecurrentLayer) for la in cache.layers)
        if self.rollback and any(recurrent):
            raise ValueError(
                f"`{config.text_config.model_type}` has recurrent layers, whose state cannot drop "
                "rejected drafts. Use a relay without drafts, such as `ConfidenceRelay`."
            )
        return self.accelerator.cache(cache)

    @property
    def length(self) -> int:
        """`int`: Number of positions that `feed` received and `crop` did not remove."""
        return self._done[0]

    @property
    def lengths(self) -> dict[int, int]:
        """`dict[int, int]`: For each exit index, the number of positions that ran to its depth."""
        return dict(zip(self.exits, self._done, strict=True))

    def pending(self, exit_idx: int) -> int:
        """Return the number of positions that have not run to an exit's depth yet."""
        return self.length - self._done[self._at(exit_idx)]

    def _at(self, exit_idx: int) -> int:
        if exit_idx not in self._index:
            raise IndexError(f"`exit_idx` must be one of {self.exits}, got {exit_idx}.")
        return self._index[exit_idx]

    def feed(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        whole: bool = False,
    ) -> None:
        """Run new positions to the shallowest exit, or to the deepest one.

        Args:
            input_ids, inputs_embeds, position_ids: As in `forward`, for the new positions. By
                default, positions continue the count.
            attention_mask (`torch.Tensor` of shape `(batch, seq)`, *optional*): 0 for padding.
                Defaults to no padding. The first call also accepts `(batch, past + seq)`.
            whole (`bool`, *optional*, defaults to `False`): Whether to run to the deepest exit. If
                nothing is pending, that is one pass, and `logits` works for that exit only.
        """
        given: Any = input_ids if input_ids is not None else inputs_embeds
        new = self._extend(given, position_ids, attention_mask)
        entry = {"inputs_embeds" if input_ids is None else "input_ids": given}
        at_once = whole and self._done[0] == self._done[-1] and not any(self._branches)
        self._run(0, len(self.exits) - 1 if at_once else 0, new, **entry)
        if whole or self.length - self._done[-1] > self.prompt_end - self.first + self.max_pending:
            self.catch_up(self.exits[-1])

    def catch_up(self, exit_idx: int) -> None:
        """Run all pending positions to the depth of an exit, segment by segment."""
        for i in range(1, self._at(exit_idx) + 1):
            new = self._done[i - 1] - self._done[i]
            if new:
                self._run(i, i, new, inputs_embeds=self._taps[i - 1][:, -new:])

    def taps(self, exit_idx: int, last: int) -> torch.Tensor:
        """Return the taps of the last positions at an exit, shape `(batch, last, hidden)`."""
        return self._taps[self._at(exit_idx)][:, -last:]

    def logits(self, exit_idx: int, last: int = 1) -> torch.Tensor:
        """Return an exit's logits `(batch, last, vocab)` at the last positions that it has run."""
        return self.read(exit_idx, self.states(exit_idx, last))

    def read(self, exit_idx: int, states: torch.Tensor) -> torch.Tensor:
        """Return the logits of an exit's head for normed states `(..., seq, hidden)`."""
        i = self._at(exit_idx)
        self.reads[i] += states.shape[-2]
        return self._transform.read(states, self.heads[i])

    def states(self, exit_idx: int, last: int) -> torch.Tensor:
        """Return the normed states of an exit, private layers included, `(batch, last, hidden)`."""
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
        """Remove the last `count` positions from all layers. This needs `rollback=True`."""
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
        """Free states that only `crop` needs. With `last=True`, also stop recording them."""
        for layer in self.cache.layers:
            windowed = isinstance(layer, SlidingLayer) and layer.is_initialized
            if windowed and layer.record_past and layer.get_seq_length() >= layer.sliding_window:
                layer.crop(0)
            if last and self.rollback and hasattr(layer, "record_past"):
                layer.record_past = False

    def to_plain(self) -> DynamicCache:
        """Run all pending positions. Return an ordinary `DynamicCache` that `generate` accepts."""
        config = self.model.config
        if self.exits[-1] != config.num_exits - 1:
            raise ValueError(f"`to_plain` needs the family's deepest exit, got exits {self.exits}.")
        self.catch_up(-1)
        self.commit(last=True)
        del self.cache.layers[config.num_hidden_layers :]
        past_positions(self.cache)  # raises if taps from elsewhere left layers of unequal length
        return self.cache

    def _extend(
        self, given: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> int:
        new = given.shape[1]
        if self._seen:
            check_positions(self.model.config.text_config, self._seen, self.length + new)
        else:
            self._seen = new if positions is None else int(positions.max()) + 1
        self.prompt_end = self.prompt_end or self.length + new
        self.columns.extend(given, positions, mask)
        return new

    def _run(self, first: int, last: int, new: int, **entry: torch.Tensor) -> None:
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
        """Return the pass through the segments `first` to `last`, by the backbone's own layers."""
        if (first, last) not in self._runners:
            segment = self.model.model.members.segment(self.depths[first], self.depths[last + 1])
            self._runners[first, last] = self._segment_runner(segment)
        return self._runners[first, last]

    def _keep(self, i: int, taps: torch.Tensor) -> None:
        """Add new taps of an exit and drop those that its branch and the next segment have read."""
        readers = self._done[i : i + 2]
        if self._branches[i] is not None:
            readers.append(self._read[i])
        waiting, old = self._done[i] - min(readers), self._taps[i]
        if waiting and old is not None:
            taps = torch.cat((old[:, -waiting:], taps), 1)
        self._taps[i] = taps


def _without_last(tensor: torch.Tensor | None, count: int) -> torch.Tensor | None:
    return tensor if tensor is None or count < 1 else tensor[:, : max(0, tensor.shape[1] - count)]


class Columns:
    """The position ids and attention mask of all columns. Trivial ones are not stored."""

    def __init__(self, first: int) -> None:
        self.first = self._length = first
        # (batch, seq), from column `first` on, or `None` if they equal the column numbers
        self.position_ids: torch.Tensor | None = None
        self.attention_mask: torch.Tensor | None = None  # (batch, first + seq), 0 for padding

    def extend(
        self, given: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> None:
        """Add columns for the input `given`, whose shape starts with `(batch, new)`."""
        (batch, new), length = given.shape[:2], self._length
        old: Any = self.position_ids
        self._device = given.device  # an offloaded model does not report its real device
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
            mask = torch.cat((mask.new_ones((batch, length)) if seen is None else seen, mask), 1)
        self.attention_mask = mask
        self._length += new

    def crop(self, count: int) -> None:
        """Remove the last columns."""
        self._length -= count
        self.position_ids = _without_last(self.position_ids, count)
        self.attention_mask = _without_last(self.attention_mask, count)

    def inputs(self, start: int, new: int) -> dict[str, Any]:
        """Return position ids and mask for a pass over `new` columns from `start` on."""
        if self.position_ids is None:
            positions = torch.arange(start, start + new, device=self._device).unsqueeze(0)
        else:
            positions = self.position_ids[:, start - self.first : start - self.first + new]
        inputs: dict[str, Any] = {"position_ids": positions}
        if self.attention_mask is not None:
            inputs["attention_mask"] = self.attention_mask[:, : start + new]
        return inputs


def crop(layers: Iterable[Any], excess: int) -> None:
    """Remove the last `excess` positions from cache layers. Do nothing if `excess` is below 1."""
    for layer in layers:
        if excess <= 0 or not isinstance(layer, CacheLayerMixin) or not layer.is_initialized:
            continue
        if isinstance(layer, SlidingLayer):
            # avoid its own `crop`, which drops states that a later, longer crop may need
            DynamicLayer.crop(layer, -excess)
            layer.cumulative_length -= excess
        else:
            layer.crop(-excess)


def past_positions(cache: DynamicCache) -> int:
    """Return the number of tokens in every layer of a cache. Raise if layers differ."""
    lengths = cache_lengths(cache.layers)
    if len(lengths) > 1:
        raise ValueError(
            "`past_key_values` must have the same number of tokens in every layer, got "
            f"{sorted(lengths)}. Use the cache of the deepest exit."
        )
    return lengths.pop() if lengths else 0


def check_relay(model: Any) -> None:
    """Raise for a backbone whose layers cannot continue from a tap."""
    spec, name = model.model.spec, model.config.text_config.model_type
    reason = spec.host.whole or ("" if spec.cache else "it does not use a cache of Transformers")
    if reason:
        raise ValueError(
            f"`{name}` does not work with a relay: {reason}. Call `generate(exit_idx=...)` instead."
        )


def check_cache(cache: Any) -> None:
    """Raise unless every layer of a cache can have its own length and can be cropped."""
    plain, away = isinstance(cache, DynamicCache), getattr(cache, "offloading", False)
    kinds = (DynamicLayer, RecurrentLayer, DummyLayer)
    odd = [] if not plain else [la for la in cache.layers if not isinstance(la, kinds)]
    if not plain or away or odd:
        name = type(odd[0] if odd else cache).__name__
        where = " that offloads its layers (`offloading=True`)" if away else ""
        raise ValueError(
            f"A relay needs a `DynamicCache` in the device's memory, got {name}{where}. Leave out "
            "`cache_implementation`, or pass `past_key_values=DynamicCache(config=...)`."
        )


def check_positions(config: Any, seen: int, ran: int) -> None:
    """Raise if a text may grow from `seen` to `ran` positions across a change of rotary angles."""
    # The angles depend on the longest position of a pass, and relay passes differ from `generate`.
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        name = str(kind.get("rope_type"))
        if name != "longrope" and "dynamic" not in name:
            continue
        lengths = [config.max_position_embeddings]
        if name == "longrope":
            # the angles change at the first length, and some backbones drop the cache at the second
            original = "original_max_position_embeddings"
            named = (kind.get(original), getattr(config, original, None))
            lengths = [length for length in named if length] or lengths
            if seen > max(lengths):
                continue  # all positions have the angles of a long text
        if ran > min(lengths):
            raise ValueError(
                f"The prompt has {seen} tokens and the text may grow to {ran + 1}. A relay "
                f"cannot cross {min(lengths)}, where the rotary angles of `{config.model_type}` "
                f"({name}) change. Use a smaller `max_new_tokens`, or `generate(exit_idx=...)`."
            )

"""Parts of a host's decoder, run as views of the backbone over views of the cache.

A view is a shallow copy of the backbone that holds other layers, another norm and a config cut to
match. Its modules are the backbone's own: nothing is copied, nothing is mutated.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    LinearAttentionCacheLayerMixin,
    StaticCache,
)
from transformers.utils.output_capturing import (
    install_all_output_capturing_hooks,
    maybe_install_capturing_hooks,
)

from .backbones import IDENTITY, OFF, ONE, ZERO, BackboneSpec, find_backbone_spec


@dataclass(frozen=True)
class Segment:
    """Consecutive layers to run in one pass of the host's own forward."""

    layers: Sequence[nn.Module]  # the backbone's or private ones
    start: int  # depth at which they stand: number of layers before them
    norm: nn.Module | None  # applied to their output; `None` returns the tap
    slots: Sequence[int]  # index of each layer's slot in the family's cache


class HostDecoder:
    """A host's decoder, the backbone, and where it keeps its parts."""

    def __init__(self, module: Any, spec: BackboneSpec | None = None) -> None:
        self.module, self.config = module, module.config
        self.spec = spec = spec or find_backbone_spec(module)
        self.owner = module.get_submodule(spec.host.owner)
        self.layers: nn.ModuleList = getattr(self.owner, spec.layers)

    @property
    def norm(self) -> nn.Module:
        """`nn.Module`: The final norm, an identity if the host has none."""
        return nn.Identity() if self.spec.norm is None else getattr(self.owner, self.spec.norm)

    def run(self, segment: Segment, past_key_values: Cache | None = None, **inputs: Any) -> Any:
        """Run one segment through the host's forward, on slots of the family's cache.

        For `segment.start > 0`, the inputs are the tap of shape `(batch, seq, hidden)` as
        `inputs_embeds`, and `position_ids`. Slots of different numbers of tokens raise.
        """
        inputs = self.spec.accepted(inputs)
        # a view that installed them itself would install them twice on the layers it shares
        self.hook(inputs)
        view = self.view(segment)
        if past_key_values is not None:
            check_lengths(past_key_values, segment.slots)
            inputs[self.spec.cache] = cache_view(past_key_values, segment)
        return view(**inputs)

    def run_whole(self, past_key_values: Cache | None = None, **inputs: Any) -> Any:
        """Run the host's own forward, untouched: the deepest exit is the dense model."""
        inputs = self.spec.accepted(inputs)
        if past_key_values is not None:
            depth = min(len(past_key_values.layers), self.config.num_hidden_layers)
            check_lengths(past_key_values, range(depth))
            inputs[self.spec.cache] = past_key_values
        self.hook(inputs)
        return self.module(**inputs)

    def hook(self, inputs: dict[str, Any]) -> None:
        """Let hidden states, attentions or the like be captured, if inputs or config ask for it."""
        names = [f"output_{name}" for name in self.module._can_record_outputs or {}]
        if any(inputs.get(name, getattr(self.config, name, False)) for name in names):
            _install_hooks(self.module)

    def hook_private(self, segment: Segment, inputs: dict[str, Any]) -> None:
        """Let private layers be captured like the backbone's own, if asked for; once is enough."""
        first: Any = segment.layers[0]
        asked = any(value for name, value in inputs.items() if name.startswith("output_"))
        if asked and not getattr(first, "_output_capturing_hooks_installed", False):
            install_all_output_capturing_hooks(self.view(segment))
            first._output_capturing_hooks_installed = True

    def view(self, segment: Segment) -> Any:
        """Return a shallow copy of the backbone that holds only the segment."""
        spec, host = self.spec, self.spec.host
        config = slice_config(self.config, segment.start, segment.start + len(segment.layers))
        if host.keep_depth:
            set_depth(config, self.config.num_hidden_layers)
        root = view = shallow_copy(self.module, config=config)
        for name in filter(None, host.owner.split(".")):
            view._modules[name] = view = shallow_copy(view._modules[name], config=config)
        view._modules[spec.layers] = nn.ModuleList(segment.layers)
        if spec.norm is not None:
            final: Any = view._modules[spec.norm]
            norm = _NoNorm(final) if segment.norm is None else segment.norm
            if host.entry_norm:
                norm = _InTurn(_NoNorm(final) if segment.start else final, norm)
            view._modules[spec.norm] = norm
        if segment.start > 0:
            for name, kind in spec.entry_only.items():
                _neutralise(view, name, kind)
        return root


@torch.compiler.assume_constant_result
def _install_hooks(backbone: Any) -> bool:
    """Install the host's hooks, at the time of tracing: a compiler cannot enter their lock."""
    maybe_install_capturing_hooks(backbone)
    return True


class SegmentRunner:
    """A segment on a cache, to be run many times: its views are made once."""

    def __init__(self, decoder: HostDecoder, segment: Segment, cache: Cache) -> None:
        self.decoder, self.segment = decoder, segment
        self.layers = [cache.layers[slot] for slot in segment.slots]
        self._cache = cache_view(cache, segment)
        self._view = decoder.view(segment)

    def __call__(self, **inputs: Any) -> torch.Tensor:
        """Run it, inputs as in `HostDecoder.run`; return the tap, or what the norm makes of it."""
        spec = self.decoder.spec
        # a view with two norms under one name lives for one pass
        view = self.decoder.view(self.segment) if spec.host.entry_norm else self._view
        if all(map(_has_started, self.layers)):
            # purely recurrent layers mask the padding of a prompt only, never of what follows
            inputs.pop("attention_mask", None)
        inputs = spec.accepted(inputs)
        inputs[spec.cache] = self._cache
        return view(**inputs, use_cache=True).last_hidden_state


def _has_started(layer: Any) -> bool:
    """Return whether a cache layer is recurrent and has a state, or keeps nothing."""
    if isinstance(layer, DummyLayer):
        return True
    return not isinstance(layer, CacheLayerMixin) and any(layer.has_previous_state.values())


def shallow_copy(module: nn.Module, **attributes: Any) -> Any:
    """Return a module of the same class that shares everything, in containers of its own."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for name in ("_modules", "_parameters", "_buffers"):
        twin.__dict__[name] = dict(module.__dict__[name])
    # accelerate binds `forward` to the original module: a copy must use its class's
    for name in ("forward", "_hf_hook", "_old_forward"):
        twin.__dict__.pop(name, None)
    twin.__dict__.update(attributes)
    return twin


class _NoNorm(nn.Module):
    """Lets the tap through, with the weight whose dtype some hosts ask for."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = getattr(norm, "weight", None)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class _InTurn(nn.Module):
    """Two modules under one name: the first call goes to the first, the next to the second."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.turns = [first, second]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.turns.pop(0)(hidden_states)


class _Zeros(nn.Module):
    """Stands where an embedding of positions stood: adds nothing."""

    def forward(self, positions: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros((), device=positions.device)


_NEUTRAL_MODULES = {ZERO: _Zeros, IDENTITY: nn.Identity}
_NEUTRAL_TENSORS = {ZERO: torch.zeros_like, ONE: torch.ones_like}
_NEUTRAL_NUMBERS = {IDENTITY: 0.0, ZERO: 0.0, ONE: 1.0, OFF: False}


def _neutralise(view: Any, name: str, kind: str) -> None:
    """Switch off what the forward does once, before the first layer, if this host does it."""
    if view._modules.get(name) is not None:
        view._modules[name] = _NEUTRAL_MODULES[kind]()
    for holder in (view._parameters, view._buffers, view.__dict__, view.config.__dict__):
        if isinstance(holder.get(name), torch.Tensor):
            holder[name] = _NEUTRAL_TENSORS[kind](holder[name])
        elif isinstance(holder.get(name), (int, float)):
            holder[name] = _NEUTRAL_NUMBERS[kind]


def slice_config(config: Any, start: int, stop: int) -> Any:
    """Return the config of layers `[start, stop)`; beyond the last, what holds for it repeats."""
    depth = config.num_hidden_layers
    sliced = copy.copy(config)
    sliced.__dict__ = dict(config.__dict__)
    for name in per_layer_lists(config):
        values = list(config.__dict__[name])
        values += values[-1:] * max(0, stop - depth)
        sliced.__dict__[name] = values[start:stop]
    for name, value in config.__dict__.items():
        if name.endswith("_layer_indices") and value is not None:
            sliced.__dict__[name] = [i - start for i in value if start <= i < stop]
        elif name.endswith("_layer_offset"):
            # counted in a period: layer `start` of the whole is layer 0 here
            period = config.__dict__[name.removesuffix("offset") + "period"]
            sliced.__dict__[name] = (value - start) % period
    set_depth(sliced, stop - start)
    return sliced


def set_depth(config: Any, depth: int) -> None:
    """Write a config's number of layers, under the host's own name for it."""
    config.__dict__[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = depth


def per_layer_lists(config: Any) -> list[str]:
    """Return the names of the config's fields that hold one entry per layer."""
    return [
        name
        for name, value in config.__dict__.items()
        if isinstance(value, (list, tuple))
        and len(value) == config.num_hidden_layers
        and ("layer" in name or name.endswith("_types"))
    ]


class UnusedLayer(DummyLayer):
    """A slot that no exit has used yet, in a cache that must not reach it."""


def cache_view(cache: Cache, segment: Segment) -> Cache:
    """Return a cache that shows a segment's slots where its layers look for them, and no others."""
    hidden: list[Any] = [DummyLayer() for _ in range(segment.start)]
    layers = hidden + [cache.layers[slot] for slot in segment.slots]
    attends = any(isinstance(layer, CacheLayerMixin) for layer in layers)
    return Cache(layers=layers) if attends else _RecurrentCache(layers=layers)


class _RecurrentCache(Cache):
    """The cache of a segment without attention. It has no length, so masks span new tokens only."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


def grow_cache(cache: Cache, slots: Collection[int], sources: Sequence[tuple[Any, int]]) -> None:
    """Give a cache slots that it lacks, of its own kind, given config and index of their layers."""
    for slot, (config, layer_idx) in enumerate(sources[: 1 + max(slots)]):
        missing = slot >= len(cache.layers)
        if missing or (slot in slots and isinstance(cache.layers[slot], UnusedLayer)):
            cache.layers[slot : slot + 1] = [_new_slot(cache, config, layer_idx, 1 + max(slots))]


def _new_slot(cache: Cache, config: Any, layer_idx: int, wanted: int) -> Any:
    if cache.layer_class_to_replicate is not None:
        return cache.layer_class_to_replicate()
    if isinstance(cache, StaticCache):
        length = max(getattr(layer, "max_cache_len", 0) for layer in cache.layers)
        return StaticCache(config=config, max_cache_len=length).layers[layer_idx]
    if isinstance(cache, DynamicCache):
        return DynamicCache(config=config).layers[layer_idx]
    raise ValueError(
        f"a `{type(cache).__name__}` of {len(cache.layers)} layers cannot be extended to the "
        f"{wanted} that this exit needs; use a `DynamicCache` or a `StaticCache`."
    )


def hide_unused(cache: DynamicCache, slots: Collection[int]) -> None:
    """Put placeholders into a cache's empty slots that are not needed; `grow_cache` fills them."""
    # what the host does to every slot, such as cropping, would fail on one that was never filled
    for slot, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            used = any(layer.has_previous_state.values())
        else:
            used = isinstance(layer, DummyLayer) or layer.is_initialized
        if slot not in slots and not used:
            cache.layers[slot] = UnusedLayer()


def is_recurrent(cache: Cache) -> bool:
    """Return whether a cache holds recurrent states only, which count no tokens."""
    return bool(cache.layers) and not any(
        isinstance(layer, (CacheLayerMixin, DummyLayer)) for layer in cache.layers
    )


def cache_lengths(layers: Iterable[Any]) -> set[int]:
    """Return the numbers of tokens that the attention layers of a cache hold."""
    return {int(la.get_seq_length()) for la in layers if isinstance(la, CacheLayerMixin)}


def check_lengths(cache: Cache, slots: Sequence[int]) -> None:
    """Raise if some slots have seen fewer positions: a plain forward would be silently wrong."""
    if torch.compiler.is_compiling():
        return
    layers = [cache.layers[slot] for slot in slots]
    recurrent = [la for la in layers if isinstance(la, LinearAttentionCacheLayerMixin)]
    lengths = cache_lengths(layers)
    started = {any(layer.has_previous_state.values()) for layer in recurrent}
    if len(lengths) > 1 or len(started) > 1:
        raise ValueError(
            "`past_key_values` holds different numbers of tokens per layer "
            f"({sorted(lengths or started)}): a shallower exit ran on it before. Keep one cache "
            "per exit, or run the missing positions through the deeper layers first."
        )


@dataclass(frozen=True)
class Members:
    """The members of a family, as segments of its backbone."""

    config: Any
    decoder: HostDecoder
    exits: Any

    def norm(self, exit_idx: int) -> nn.Module:
        """Return the norm that an exit reads its tap with."""
        own = self.exits[exit_idx].norm if exit_idx < len(self.exits) else None
        return self.decoder.norm if own is None else own

    def segment(self, start: int, stop: int) -> Segment:
        """Return the backbone's layers `[start, stop)`, from tap to tap."""
        return Segment(list(self.decoder.layers[start:stop]), start, None, range(start, stop))

    def member_segment(self, exit_idx: int) -> Segment:
        """Return all layers of a member, from the embedding to its norm."""
        layers = list(self.decoder.layers[: self.config.exits[exit_idx]])
        if exit_idx < len(self.exits):
            layers += self.exits[exit_idx].layers
        return Segment(layers, 0, self.norm(exit_idx), self.slots(exit_idx))

    def private_segment(self, exit_idx: int) -> Segment:
        """Return the private layers of an early exit and its norm, to be run on its tap."""
        layers, depth = list(self.exits[exit_idx].layers), self.config.exits[exit_idx]
        return Segment(layers, depth, self.norm(exit_idx), self.slots(exit_idx)[depth:])

    def slots(self, exit_idx: int) -> list[int]:
        """Return the cache slots of a member: the backbone's up to its depth, then private ones."""
        slots = list(range(self.config.exits[exit_idx]))
        if exit_idx < len(self.exits):
            count = self.config.num_exit_layers
            first = self.config.num_hidden_layers + exit_idx * count
            slots += range(first, first + count)
        return slots

    def grow(self, cache: Cache, exits: Iterable[int]) -> None:
        """Give a cache every slot that these exits write to; raise for a kind that cannot grow."""
        slots = {slot for exit_idx in exits for slot in self.slots(exit_idx)}
        if max(slots) < len(cache.layers) and not any(
            isinstance(cache.layers[slot], UnusedLayer) for slot in slots
        ):
            return
        config, count = self.decoder.config, self.config.num_exit_layers
        sources = [(config, i) for i in range(config.num_hidden_layers)]
        for depth in self.config.exits[:-1]:
            member = slice_config(config, 0, depth + count)
            sources += [(member, depth + j) for j in range(count)]
        grow_cache(cache, slots, sources)

"""Segments, and the shallow copies (views) of backbone and cache that run them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, DynamicCache, StaticCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin as RecurrentLayer
from transformers.utils import output_capturing

from .backbones import IDENTITY, OFF, ONE, ZERO, BackboneSpec, find_backbone_spec


@dataclass(frozen=True)
class Segment:
    """Consecutive layers that run in one pass of the backbone's own forward."""

    layers: Sequence[nn.Module]  # of the backbone, or private
    start: int  # number of layers below
    norm: nn.Module | None  # applied to the output, or `None` to return the tap
    slots: Sequence[int]  # index of each layer in the family's cache


class HostDecoder:
    """A backbone whose list of layers and final norm have been found."""

    def __init__(self, module: Any, spec: BackboneSpec | None = None) -> None:
        self.module, self.config = module, module.config
        self.spec = spec = spec or find_backbone_spec(module)
        self.owner = module.get_submodule(spec.host.owner)
        self.layers: nn.ModuleList = getattr(self.owner, spec.layers)

    @property
    def norm(self) -> nn.Module:
        """`nn.Module`: The final norm, or an identity if the backbone has none."""
        return nn.Identity() if self.spec.norm is None else getattr(self.owner, self.spec.norm)

    def run(self, segment: Segment, past_key_values: Cache | None = None, **inputs: Any) -> Any:
        """Run one segment through the backbone's forward, with its slots of the family's cache.

        A segment with `start > 0` needs the tap `(batch, seq, hidden)` as `inputs_embeds`.
        """
        inputs = self.spec.accepted(inputs)
        # first, because a view would install hooks a second time on the layers that it shares
        self.hook(inputs)
        view = self.view(segment)
        if past_key_values is not None:
            check_lengths(past_key_values, segment.slots)
            inputs[self.spec.cache] = cache_view(past_key_values, segment)
        return view(**inputs)

    def run_whole(self, past_key_values: Cache | None = None, **inputs: Any) -> Any:
        """Run the backbone's forward without a view, so that the deepest exit is exact."""
        inputs = self.spec.accepted(inputs)
        if past_key_values is not None:
            depth = min(len(past_key_values.layers), self.config.num_hidden_layers)
            check_lengths(past_key_values, range(depth))
            inputs[self.spec.cache] = past_key_values
        self.hook(inputs)
        return self.module(**inputs)

    def hook(self, inputs: dict[str, Any]) -> None:
        """Install hooks for hidden states, attentions and so on, if inputs or config need them."""
        names = [f"output_{name}" for name in self.module._can_record_outputs or {}]
        if any(inputs.get(name, getattr(self.config, name, False)) for name in names):
            _install_hooks(self.module)

    def hook_private(self, segment: Segment, inputs: dict[str, Any]) -> None:
        """Install the hooks of `hook` once on private layers, if the inputs need them."""
        first: Any = segment.layers[0]
        asked = any(value for name, value in inputs.items() if name.startswith("output_"))
        if asked and not getattr(first, "_output_capturing_hooks_installed", False):
            output_capturing.install_all_output_capturing_hooks(self.view(segment))
            first._output_capturing_hooks_installed = True

    def view(self, segment: Segment) -> Any:
        """Build a shallow copy of the backbone with the layers, norm and config of a segment."""
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


@torch.compiler.assume_constant_result  # a compiler cannot trace the lock of these hooks
def _install_hooks(backbone: Any) -> bool:
    output_capturing.maybe_install_capturing_hooks(backbone)
    return True


class SegmentRunner:
    """A segment with its cache, for many runs. It builds its views only once."""

    def __init__(self, decoder: HostDecoder, segment: Segment, cache: Cache) -> None:
        self.decoder, self.segment = decoder, segment
        self.layers = [cache.layers[slot] for slot in segment.slots]
        self._cache = cache_view(cache, segment)
        self._view = decoder.view(segment)

    def __call__(self, **inputs: Any) -> torch.Tensor:
        """Run the segment with the inputs of `HostDecoder.run`. Return the tap or normed states."""
        spec = self.decoder.spec
        # a view with an `_InTurn` norm works for one pass only
        view = self.decoder.view(self.segment) if spec.host.entry_norm else self._view
        if all(map(_has_started, self.layers)):
            # purely recurrent layers mask padding in the prompt only
            inputs.pop("attention_mask", None)
        inputs = spec.accepted(inputs)
        inputs[spec.cache] = self._cache
        return view(**inputs, use_cache=True).last_hidden_state


def _has_started(layer: Any) -> bool:
    """Return whether a cache layer is a dummy, or is recurrent and has a state."""
    recurrent = not isinstance(layer, (CacheLayerMixin, DummyLayer))
    return isinstance(layer, DummyLayer) or (recurrent and any(layer.has_previous_state.values()))


def shallow_copy(module: nn.Module, **attributes: Any) -> Any:
    """Return a copy of a module that shares all tensors and submodules but not their dicts."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for name in ("_modules", "_parameters", "_buffers"):
        twin.__dict__[name] = dict(module.__dict__[name])
    # accelerate binds `forward` to the original module, so drop it to use that of the class
    for name in ("forward", "_hf_hook", "_old_forward"):
        twin.__dict__.pop(name, None)
    twin.__dict__.update(attributes)
    return twin


class _NoNorm(nn.Module):
    """An identity with the norm's `weight`, because some hosts read its dtype."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = getattr(norm, "weight", None)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class _InTurn(nn.Module):
    """Two modules under one name. The first call runs the first, the second call the second."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.turns = [first, second]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.turns.pop(0)(hidden_states)


class _Zeros(nn.Module):
    """A replacement for position embeddings that adds zero."""

    def forward(self, positions: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros((), device=positions.device)


_NEUTRAL_MODULES = {ZERO: _Zeros, IDENTITY: nn.Identity}
_NEUTRAL_TENSORS = {ZERO: torch.zeros_like, ONE: torch.ones_like}
_NEUTRAL_NUMBERS = {IDENTITY: 0.0, ZERO: 0.0, ONE: 1.0, OFF: False}


def _neutralise(view: Any, name: str, kind: str) -> None:
    """Replace an attribute that acts before the first layer, if the host has it."""
    if view._modules.get(name) is not None:
        view._modules[name] = _NEUTRAL_MODULES[kind]()
    for holder in (view._parameters, view._buffers, view.__dict__, view.config.__dict__):
        if isinstance(holder.get(name), torch.Tensor):
            holder[name] = _NEUTRAL_TENSORS[kind](holder[name])
        elif isinstance(holder.get(name), (int, float)):
            holder[name] = _NEUTRAL_NUMBERS[kind]


def slice_config(config: Any, start: int, stop: int) -> Any:
    """Return the config of layers `[start, stop)`. Layers beyond the end are like the last one."""
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
            # the pattern repeats with this period, and layer `start` becomes layer 0
            period = config.__dict__[name.removesuffix("offset") + "period"]
            sliced.__dict__[name] = (value - start) % period
    set_depth(sliced, stop - start)
    return sliced


def set_depth(config: Any, depth: int) -> None:
    """Set the number of layers in a config, under the host's name for it."""
    config.__dict__[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = depth


def per_layer_lists(config: Any) -> list[str]:
    """Return the names of the config's fields that are lists with one entry per layer."""
    return [
        name
        for name, value in config.__dict__.items()
        if isinstance(value, (list, tuple))
        and len(value) == config.num_hidden_layers
        and ("layer" in name or name.endswith("_types"))
    ]


class UnusedLayer(DummyLayer):
    """A placeholder in a cache for a slot that no exit has used yet."""


def cache_view(cache: Cache, segment: Segment) -> Cache:
    """Return a cache that contains only a segment's slots, at the indices of its layers."""
    hidden: list[Any] = [DummyLayer() for _ in range(segment.start)]
    layers = hidden + [cache.layers[slot] for slot in segment.slots]
    attends = any(isinstance(layer, CacheLayerMixin) for layer in layers)
    return Cache(layers=layers) if attends else _RecurrentCache(layers=layers)


class _RecurrentCache(Cache):
    """A cache without attention layers. It has no length, so masks cover the new tokens only."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


def grow_cache(cache: Cache, slots: Collection[int], sources: Sequence[tuple[Any, int]]) -> None:
    """Add missing slots to a cache. `sources` are the config and the layer index of each slot."""
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
        f"`past_key_values` must be a `DynamicCache` or a `StaticCache`, got {type(cache).__name__}"
        f" with {len(cache.layers)} layers. This exit needs {wanted}."
    )


def hide_unused(cache: DynamicCache, slots: Collection[int]) -> None:
    """Replace empty slots other than `slots` by placeholders. `grow_cache` restores them."""
    # Transformers processes every slot (for example, crops it) and would fail on an empty one
    for slot, layer in enumerate(cache.layers):
        if isinstance(layer, RecurrentLayer):
            used = any(layer.has_previous_state.values())
        else:
            used = isinstance(layer, DummyLayer) or layer.is_initialized
        if slot not in slots and not used:
            cache.layers[slot] = UnusedLayer()


def is_recurrent(cache: Cache) -> bool:
    """Return whether a cache has recurrent states only. Such a cache has no length."""
    return bool(cache.layers) and not any(
        isinstance(layer, (CacheLayerMixin, DummyLayer)) for layer in cache.layers
    )


def cache_lengths(layers: Iterable[Any]) -> set[int]:
    """Return the different lengths of the attention layers of a cache."""
    return {int(la.get_seq_length()) for la in layers if isinstance(la, CacheLayerMixin)}


def check_lengths(cache: Cache, slots: Sequence[int]) -> None:
    """Raise if some slots have fewer tokens, because a plain forward would be silently wrong."""
    if torch.compiler.is_compiling():
        return
    layers = [cache.layers[slot] for slot in slots]
    recurrent = [la for la in layers if isinstance(la, RecurrentLayer)]
    started = {any(layer.has_previous_state.values()) for layer in recurrent}
    lengths = cache_lengths(layers)
    if len(lengths) > 1 or len(started) > 1:
        raise ValueError(
            "`past_key_values` must have the same number of tokens in every layer, got "
            f"{sorted(lengths or started)}, because a shallower exit ran on it before. Use one "
            "cache per exit, or a `RelayCache`."
        )


@dataclass(frozen=True)
class Members:
    """The members of a family as segments of its backbone."""

    config: Any
    decoder: HostDecoder
    exits: Any

    def norm(self, exit_idx: int) -> nn.Module:
        """Return the norm of an exit, its own or the backbone's."""
        own = self.exits[exit_idx].norm if exit_idx < len(self.exits) else None
        return self.decoder.norm if own is None else own

    def segment(self, start: int, stop: int) -> Segment:
        """Return the backbone's layers `[start, stop)`, without a norm."""
        return Segment(list(self.decoder.layers[start:stop]), start, None, range(start, stop))

    def member_segment(self, exit_idx: int) -> Segment:
        """Return all layers of a member and its norm."""
        layers = list(self.decoder.layers[: self.config.exits[exit_idx]])
        if exit_idx < len(self.exits):
            layers += self.exits[exit_idx].layers
        return Segment(layers, 0, self.norm(exit_idx), self.slots(exit_idx))

    def private_segment(self, exit_idx: int) -> Segment:
        """Return the private layers of an early exit and its norm. They run on its tap."""
        layers, depth = list(self.exits[exit_idx].layers), self.config.exits[exit_idx]
        return Segment(layers, depth, self.norm(exit_idx), self.slots(exit_idx)[depth:])

    def slots(self, exit_idx: int) -> list[int]:
        """Return the cache slots of a member's backbone layers and then of its private layers."""
        slots = list(range(self.config.exits[exit_idx]))
        if exit_idx < len(self.exits):
            count = self.config.num_exit_layers
            first = self.config.num_hidden_layers + exit_idx * count
            slots += range(first, first + count)
        return slots

    def grow(self, cache: Cache, exits: Iterable[int]) -> None:
        """Add the slots of these exits to a cache. Raise if it is of a kind that cannot grow."""
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

"""Running part of a host's decoder: views of the backbone over views of the cache.

A view is a shallow copy of the backbone that holds other layers, another norm and a config cut to
match; its modules are the backbone's own, so nothing is copied and nothing is mutated. No other
file knows how a view is made.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
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

from .contract import Contract
from .families import IDENTITY, OFF, ONE, ZERO


class UnusedLayer(DummyLayer):
    """A slot that no exit has used yet, in a cache that must not reach it."""


@dataclass(frozen=True)
class Segment:
    """Consecutive layers to run in one pass of the host's own forward.

    Attributes:
        layers (`Sequence[nn.Module]`): The layers; the backbone's or private ones.
        start (`int`): Depth at which they stand: number of layers before them.
        norm (`nn.Module`, *optional*): Applied to their output; `None` returns the tap.
        slots (`Sequence[int]`): Index of each layer's slot in the family's cache.
    """

    layers: Sequence[nn.Module]
    start: int
    norm: nn.Module | None
    slots: Sequence[int]


def run_segment(
    backbone: Any,
    contract: Contract,
    segment: Segment,
    past_key_values: Cache | None = None,
    **inputs: Any,
) -> Any:
    """Run one segment through the host's forward.

    Args:
        backbone (`PreTrainedModel`): The host's decoder.
        contract ([`Contract`]): Where it keeps its parts.
        segment ([`Segment`]): What to run.
        past_key_values ([`Cache`], *optional*): The family's cache, long enough for the segment's
            slots (see `grow_cache`). Updated in place.
        **inputs: What the backbone's forward takes. For `segment.start > 0`: `inputs_embeds`, the
            tap of shape `(batch, seq, hidden)`, and `position_ids`.

    Returns:
        `ModelOutput`: As the host returns it; what it says of the cache is the view's.

    Raises:
        ValueError: If the segment's slots hold different numbers of tokens.
    """
    inputs = contract.accepted(inputs)
    # a view that installed them itself would install them twice on the layers it shares
    hook_backbone(backbone, inputs)
    view = segment_view(backbone, contract, segment)
    if past_key_values is not None:
        check_lengths(past_key_values, segment.slots)
        inputs[contract.cache] = cache_view(past_key_values, segment)
    return view(**inputs)


class SegmentRunner:
    """One segment on one cache, to be run many times: its views are made once.

    Args:
        backbone (`PreTrainedModel`): The host's decoder.
        contract ([`Contract`]): Where it keeps its parts.
        segment ([`Segment`]): What to run.
        cache ([`Cache`]): The family's cache, long enough for the segment's slots.
    """

    def __init__(self, backbone: Any, contract: Contract, segment: Segment, cache: Cache) -> None:
        self.backbone, self.contract, self.segment = backbone, contract, segment
        self.layers = [cache.layers[slot] for slot in segment.slots]
        self._cache = cache_view(cache, segment)
        self._view = segment_view(backbone, contract, segment)

    def __call__(self, **inputs: Any) -> torch.Tensor:
        """Run it; inputs as in `run_segment`.

        Returns:
            `torch.Tensor` of shape `(batch, seq, hidden)`: The tap, or what the norm makes of it.
        """
        view = self._view
        if self.contract.entry_norm:  # such a view lives for one pass
            view = segment_view(self.backbone, self.contract, self.segment)
        if self._started():
            # purely recurrent layers mask the padding of a prompt only, never of what follows
            inputs.pop("attention_mask", None)
        inputs = self.contract.accepted(inputs)
        inputs[self.contract.cache] = self._cache
        return view(**inputs, use_cache=True).last_hidden_state

    def _started(self) -> bool:
        """Whether all its layers are recurrent, and have a state."""
        return all(
            not isinstance(layer, CacheLayerMixin) and any(layer.has_previous_state.values())
            for layer in self.layers
            if not isinstance(layer, DummyLayer)  # keeps nothing, as that of a lone MLP
        )


def hook_backbone(backbone: Any, inputs: dict[str, Any]) -> None:
    """Let hidden states, attentions or the like be captured, if inputs or config ask for any."""
    names = [f"output_{name}" for name in backbone._can_record_outputs or {}]
    if any(inputs.get(name, getattr(backbone.config, name, False)) for name in names):
        _install_hooks(backbone)


@torch.compiler.assume_constant_result
def _install_hooks(backbone: Any) -> bool:
    """Install the host's hooks, at the time of tracing: a compiler cannot enter their lock."""
    maybe_install_capturing_hooks(backbone)
    return True


def hook_private_layers(backbone: Any, contract: Contract, segment: Segment) -> None:
    """Let private layers be captured like the backbone's own; once is enough."""
    first: Any = segment.layers[0]
    if not getattr(first, "_output_capturing_hooks_installed", False):
        install_all_output_capturing_hooks(segment_view(backbone, contract, segment))
        first._output_capturing_hooks_installed = True


def segment_view(backbone: Any, contract: Contract, segment: Segment) -> Any:
    """A shallow copy of the backbone that holds only the segment."""
    config = slice_config(backbone.config, segment.start, segment.start + len(segment.layers))
    if contract.keep_depth:
        set_depth(config, backbone.config.num_hidden_layers)
    root = view = _shallow(backbone, config)
    for name in contract.owner.split(".") if contract.owner else []:
        view._modules[name] = view = _shallow(view._modules[name], config)
    view._modules[contract.layers] = nn.ModuleList(segment.layers)
    if contract.norm is not None:
        view._modules[contract.norm] = _norms(view._modules[contract.norm], contract, segment)
    if segment.start > 0:
        for name, kind in contract.once.items():
            _neutralise(view, name, kind)
    return root


def _shallow(module: nn.Module, config: Any) -> Any:
    """A module of the same class that shares everything, in containers of its own."""
    view = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    for name in ("_modules", "_parameters", "_buffers"):
        view.__dict__[name] = dict(module.__dict__[name])
    # accelerate binds `forward` to the original module: a view must use its class's
    for name in ("forward", "_hf_hook", "_old_forward"):
        view.__dict__.pop(name, None)
    view.__dict__["config"] = config
    return view


def _norms(final: nn.Module, contract: Contract, segment: Segment) -> nn.Module:
    """What stands for the final norm: the segment's own, or nothing."""
    norm = segment.norm if segment.norm is not None else _NoNorm(final)
    if not contract.entry_norm:
        return norm
    return _InTurn(final if segment.start == 0 else _NoNorm(final), norm)


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
        # a view lives for one forward pass, so the turns start anew with each
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
    """The config of a model made of the layers `[start, stop)` of this one.

    Every per-layer list is cut to match; beyond the depth of the original its last entry repeats.
    Lists of layer indices and offsets in a period of layers are counted from `start`.

    Args:
        config (`PreTrainedConfig`): Config of the backbone; not changed.
        start (`int`): First layer.
        stop (`int`): One past the last layer; may exceed the depth of the backbone.

    Returns:
        `PreTrainedConfig`: A shallow copy.
    """
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
    """Names of the config's fields that hold one entry per layer."""
    return [
        name
        for name, value in config.__dict__.items()
        if isinstance(value, (list, tuple))
        and len(value) == config.num_hidden_layers
        and ("layer" in name or name.endswith("_types"))
    ]


def cache_view(cache: Cache, segment: Segment) -> Cache:
    """A cache that shows one segment's slots where its layers look for them, and no others."""
    hidden: list[Any] = [DummyLayer() for _ in range(segment.start)]
    layers = hidden + [cache.layers[slot] for slot in segment.slots]
    attends = any(isinstance(layer, CacheLayerMixin) for layer in layers)
    return Cache(layers=layers) if attends else _RecurrentCache(layers=layers)


class _RecurrentCache(Cache):
    """Of a segment without attention, which counts no tokens: its masks span the new ones only."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


def grow_cache(cache: Cache, slots: Collection[int], sources: Sequence[tuple[Any, int]]) -> None:
    """Give a cache the slots that it lacks.

    Args:
        cache ([`Cache`]): Grown in place, with empty slots of its own kind.
        slots (`Collection[int]`): The slots it must have; those before them are added too.
        sources (`Sequence[tuple[PreTrainedConfig, int]]`): For each slot, a config and the index in
            it of the layer that the slot serves.

    Raises:
        ValueError: If it is neither a dynamic nor a static cache.
    """
    for slot, (config, layer_idx) in enumerate(sources[: 1 + max(slots)]):
        missing = slot >= len(cache.layers)
        if missing or (slot in slots and isinstance(cache.layers[slot], UnusedLayer)):
            cache.layers[slot : slot + 1] = [_new_slot(cache, config, layer_idx, 1 + max(slots))]


def _new_slot(cache: Cache, config: Any, layer_idx: int, wanted: int) -> Any:
    """An empty slot of a cache's own kind."""
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
    """Put placeholders into a cache's empty slots that are not needed; `grow_cache` fills them.

    What the host does to every slot, such as cropping, would fail on a slot that was never filled.
    """
    for slot, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            used = any(layer.has_previous_state.values())
        else:
            used = isinstance(layer, DummyLayer) or layer.is_initialized
        if slot not in slots and not used:
            cache.layers[slot] = UnusedLayer()


def past_length(cache: Cache | None) -> int:
    """Number of tokens a cache has seen; 0 if it holds only recurrent states, which count none."""
    return 0 if cache is None or is_recurrent(cache) else cache.get_seq_length()


def is_recurrent(cache: Cache) -> bool:
    """Whether a cache holds recurrent states only, in every layer."""
    return bool(cache.layers) and not any(
        isinstance(layer, (CacheLayerMixin, DummyLayer)) for layer in cache.layers
    )


def check_lengths(cache: Cache, slots: Sequence[int]) -> None:
    """Refuse a cache in which some layers have seen fewer positions than others.

    A plain forward on such a cache reads its masks from one layer and is silently wrong.

    Args:
        cache ([`Cache`]): The family's cache.
        slots (`Sequence[int]`): The slots that are about to be used together.

    Raises:
        ValueError: Naming the lengths found.
    """
    if torch.compiler.is_compiling():
        return
    lengths = {
        slot: int(cache.layers[slot].get_seq_length())
        for slot in slots
        if isinstance(cache.layers[slot], CacheLayerMixin)
    }
    started = {
        any(cache.layers[slot].has_previous_state.values())
        for slot in slots
        if isinstance(cache.layers[slot], LinearAttentionCacheLayerMixin)
    }
    if len(set(lengths.values())) > 1 or len(started) > 1:
        raise ValueError(
            "`past_key_values` holds different numbers of tokens per layer "
            f"({lengths or started}): a shallower exit ran on it before. Keep one cache per exit, "
            "or run the missing positions through the deeper layers first."
        )


def as_list(indices: Any) -> list[int]:
    """Indices of hidden states as the host takes them: none, one or several."""
    if indices is None or isinstance(indices, bool):
        return []
    return [indices] if isinstance(indices, int) else list(indices)

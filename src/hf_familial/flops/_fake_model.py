"""A family of fake tensors: it runs like a real model, but only computes shapes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.cache_utils import CacheLayerMixin

from ..models import is_family_config
from ..models.familial import FamilialConfig, FamilialForCausalLM
from .counting import Flops, FlopTally


# Backbones that process positions one by one, which is too slow for long sequences. Their FLOPs are
# a quadratic function of the length, so counts at three short lengths determine it.
RECURRENT = frozenset({"falcon_mamba", "jamba", "mamba", "recurrent_gemma", "zamba"})
SHORT = (8, 16, 24)

T = TypeVar("T")


@dataclass(frozen=True)
class Keyed(Generic[T]):
    """A cache key with a value. Two keys are equal if their `text` is equal."""

    text: str
    value: T = field(compare=False)


def config_of(model_or_config: Any) -> FamilialConfig:
    """Return the config of a family from its model, or from the config itself."""
    config = getattr(model_or_config, "config", model_or_config)
    if not is_family_config(config):
        raise TypeError(
            "`model_or_config` must be a FamilialForCausalLM or a FamilialConfig, got "
            f"{type(model_or_config).__name__}."
        )
    return config


def keyed_config(model_or_config: Any) -> Keyed[FamilialConfig]:
    """Return the config of a family as a cache key, equal to keys of configs with the same JSON."""
    config = config_of(model_or_config)
    return Keyed(config.to_json_string(use_diff=False), config)


def fake_model(config: FamilialConfig) -> FamilialForCausalLM:
    """Return a family on the meta device, with kernels whose shapes do not depend on data."""
    config = copy.deepcopy(config)
    for part in (config, config.text_config):
        part._attn_implementation = "eager"
        part._experts_implementation = "batched_mm"
    with torch.device("meta"):
        return FamilialForCausalLM(config).train()


@contextmanager
def fake_tensors(family: nn.Module) -> Iterator[None]:
    """Replace the meta tensors of a model by fake tensors inside a `with` block.

    With fake tensors a backbone detects that it is traced.
    """
    logger, seen = logging.getLogger("torch._subclasses.fake_tensor"), {}
    disabled, logger.disabled = logger.disabled, True
    try:
        with FakeTensorMode(), torch.device("cpu"):
            for module in family.modules():
                holders: tuple[Any, Any] = (module._parameters, module._buffers)
                for tensors in holders:
                    for name, tensor in tensors.items():
                        if tensor is not None and id(tensor) not in seen:
                            # also keep the original, so that its id is not used again
                            seen[id(tensor)] = (_faked(tensor), tensor)
                        if tensor is not None:
                            tensors[name] = seen[id(tensor)][0]
            yield
    finally:
        logger.disabled = disabled


def _faked(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    trained = isinstance(tensor, nn.Parameter)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if trained else empty


def is_walked(config: FamilialConfig, length: int) -> bool:
    """Return whether the backbone processes positions one by one and `length` is too long."""
    return config.text_config.model_type in RECURRENT and length > SHORT[-1]


def quadratic(counts: list[int], length: int) -> int:
    """Return the value at `length` of the quadratic through `counts` at the lengths `SHORT`."""
    first, second, third = counts
    steps = (length - SHORT[0]) / (SHORT[1] - SHORT[0])
    slope, curve = second - first, third - 2 * second + first
    return round(first + steps * slope + steps * (steps - 1) / 2 * curve)


def filled_cache(family: FamilialForCausalLM, length: int) -> Any:
    """Return the KV cache of a fake model after `length` tokens, with the layers of all exits.

    The result is `None` if the backbone has no cache that Transformers supports.
    """
    walked = is_walked(family.config, length)
    ids = torch.zeros((1, SHORT[0] if walked else length), dtype=torch.long)
    cache = family(input_ids=ids, use_cache=True, output_exits=True).past_key_values
    for layer in cache.layers if walked and cache is not None else []:
        if isinstance(layer, CacheLayerMixin) and layer.is_initialized:
            more = length - SHORT[0]
            parts = (layer.keys, layer.values)
            layer.update(*(p.new_empty((*p.shape[:2], more, p.shape[-1])) for p in parts))
    return cache


def flops_by_module(
    family: FamilialForCausalLM, tokens: int, cache: Any = None
) -> dict[int | None, Flops]:
    """Run new tokens, and return the FLOPs of each layer, private layer and head of a fake model.

    Keys are the `id()` of the modules. The key `None` has the FLOPs outside of these modules. The
    tokens are added to the cache.
    """
    tally = FlopTally([*family.parameters(), *family.buffers()])
    ids = torch.zeros((1, tokens), dtype=torch.long)
    early: Any = family.model.exits
    private = [layer for e in early for layer in e.layers]
    heads = [family.head(k) for k in range(family.config.num_exits)]
    modules = {id(m): m for m in (*family.model.decoder.layers, *private, *heads)}

    def enter(module: nn.Module, *_: Any) -> None:
        tally.place = id(module)

    def leave(*_: Any) -> None:
        tally.place = None

    handles = [m.register_forward_pre_hook(enter) for m in modules.values()]
    handles += [m.register_forward_hook(leave) for m in modules.values()]
    inputs = {"past_key_values": cache, "use_cache": cache is not None, "output_exits": True}
    try:
        with tally:
            family(input_ids=ids, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {place: tally.at(place) for place in (None, *modules)}

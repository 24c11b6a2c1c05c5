"""FLOPs of a model with fake weights, booked where they arise: in a layer, a head, or outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin

from ..models.familial import FamilialForCausalLM
from .counting import Flops, FlopTally
from .phantom import SHORT, walks


def tally(family: FamilialForCausalLM, tokens: int, cache: Any = None) -> dict[Any, Flops]:
    """FLOPs at every place of a model with fake weights; the cache grows."""
    booked = FlopTally([*family.parameters(), *family.buffers()])
    ids = torch.zeros((1, tokens), dtype=torch.long)
    with _placed(family, booked), booked:
        family(input_ids=ids, past_key_values=cache, use_cache=cache is not None, output_exits=True)
    return {place: booked.at(place) for place in (None, *places_of(family))}


def filled(family: FamilialForCausalLM, length: int) -> Any:
    """The cache of a model with fake weights after so many tokens, with every exit's slots.

    Returns:
        `Cache`, *optional*: `None` if the host has none of transformers' kinds.
    """
    walked = walks(family.config, length)
    ids = torch.zeros((1, SHORT[0] if walked else length), dtype=torch.long)
    cache = family(input_ids=ids, use_cache=True, output_exits=True).past_key_values
    for layer in cache.layers if walked and cache is not None else []:
        if isinstance(layer, CacheLayerMixin) and layer.is_initialized:
            more = length - SHORT[0]
            parts = (layer.keys, layer.values)
            layer.update(*(p.new_empty((*p.shape[:2], more, p.shape[-1])) for p in parts))
    return cache


def places_of(family: FamilialForCausalLM) -> dict[int, list[nn.Module]]:
    """Modules whose FLOPs are booked apart, by identity: layers, private layers, heads."""
    early: Any = family.model.exits
    private = [layer for e in early for layer in e.layers]
    heads = [family.head(k) for k in range(family.config.num_exits)]
    return {id(m): [m] for m in (*family.model.decoder.layers, *private, *heads)}


@contextmanager
def _placed(family: FamilialForCausalLM, booked: FlopTally) -> Iterator[None]:
    """Hooks that tell a tally in which layer or head it is."""

    def enter(module: nn.Module, *_: Any) -> None:
        booked.place = id(module)

    def leave(*_: Any) -> None:
        booked.place = None

    handles = []
    for (module,) in places_of(family).values():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""The cost of running one member: FLOPs of reading and of writing a token, and the cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..models.familial import FamilialConfig, FamilialForCausalLM
from ._fake_model import (
    Keyed,
    config_of,
    fake_model,
    fake_tensors,
    filled_cache,
    keyed_config,
)
from .forward import ForwardFlops, forward_flops
from .parameters import ParameterCount, family_parameters


@dataclass(frozen=True)
class CacheSize:
    """The cache of one member after a text.

    Attributes:
        bytes (`int`): Keys, values and states; not its counters.
        per_token (`int`): Growth by one more token; 0 where every window is full or all is state.
        exact (`bool`): Whether it was looked at, not estimated.
    """

    bytes: int
    per_token: int
    exact: bool


@dataclass(frozen=True)
class MemberFlops:
    """The cost of one member at one length of text, for a batch of one.

    Attributes:
        parameters ([`ParameterCount`]): Its size by every convention.
        layers (`int`): Layers that every token passes, private ones among them.
        prefill_flops_per_token (`float`): Mean over a text of the given length, without a cache
            before it; the head reads every position.
        decode_flops_per_token (`float`, *optional*): Of one more token after it; `None` if the host
            has no cache of transformers' kinds.
        cache ([`CacheSize`], *optional*): After the text; `None` likewise.
        exact (`bool`): Whether every operation was counted, not estimated from sizes.
    """

    parameters: ParameterCount
    layers: int
    prefill_flops_per_token: float
    decode_flops_per_token: float | None
    cache: CacheSize | None
    exact: bool


def member_flops(
    model_or_config: FamilialForCausalLM | FamilialConfig,
    context: int,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[MemberFlops, ...]:
    """Count what every member costs to run, from the config alone.

    Args:
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family.
        context (`int`): Tokens of text.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): Of the cache.

    Returns:
        `tuple[MemberFlops, ...]`: Shallowest first.

    Raises:
        TypeError: If it is not a family.
        ValueError: If `context` is not positive, or the family cannot be built.

    Example:
        >>> [m.decode_flops_per_token for m in member_flops(config, context=4096)]
    """
    config = config_of(model_or_config)
    prefill = forward_flops(config, context)
    caches = cache_sizes(config, context, dtype)
    decode: ForwardFlops | None = forward_flops(config, 1, past=context) if caches else None
    sizes = family_parameters(config).members
    return tuple(
        MemberFlops(
            parameters=sizes[k],
            layers=prefill.layer_passes(k) // context,
            prefill_flops_per_token=prefill.member(k).total / context,
            decode_flops_per_token=float(decode.member(k).total) if decode else None,
            cache=caches[k] if caches else None,
            exact=prefill.exact and (decode is None or decode.exact),
        )
        for k in range(config.num_exits)
    )


def cache_sizes(
    model_or_config: FamilialForCausalLM | FamilialConfig,
    context: int,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[CacheSize, ...] | None:
    """Return the size of every member's cache after a text, for one row, from the config alone.

    The host's own cache is looked at: sliding windows, latent keys and values, recurrent states.
    With full attention that is `2 kv_heads head_dim` values for each layer and token (Pope et al.
    2022, arXiv:2211.05102, section 2.1).

    Args:
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family.
        context (`int`): Tokens of text.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): Of the cache.

    Returns:
        `tuple[CacheSize, ...]`, *optional*: Shallowest first; `None` if the host has no cache of
        transformers' kinds. Kept for the next call with equal arguments.

    Raises:
        TypeError: If it is not a family.
        ValueError: If `context` is not positive.
    """
    config = keyed_config(model_or_config)
    if context < 1:
        raise ValueError(f"`context` must be 1 or more, got {context}.")
    return _measure(config, context, dtype)


@cache
def _measure(
    keyed: Keyed[FamilialConfig], context: int, dtype: torch.dtype
) -> tuple[CacheSize, ...] | None:
    config = keyed.value
    with torch.inference_mode(False), torch.no_grad():
        family = fake_model(config).to(dtype).eval()
        if not family.model.spec.cache:
            return None
        slots = [family.model.members.slots(k) for k in range(config.num_exits)]
        try:
            with fake_tensors(family):
                cache = filled_cache(family, context)
                if cache is None:
                    return None
                before = [_bytes_of(vars(layer)) for layer in cache.layers]
                ids = torch.zeros((1, 1), dtype=torch.long)
                family(input_ids=ids, past_key_values=cache, use_cache=True, output_exits=True)
                after = [_bytes_of(vars(layer)) for layer in cache.layers]
        except Exception:
            # whatever a host's forward raises where it wants to look at values
            return _estimate(config, context, dtype, [len(own) for own in slots])
    sizes = [(sum(before[i] for i in own), sum(after[i] for i in own)) for own in slots]
    return tuple(CacheSize(old, new - old, exact=True) for old, new in sizes)


def _bytes_of(value: Any) -> int:
    """Return the bytes of all floating-point tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.nbytes if value.is_floating_point() else 0
    if isinstance(value, dict):
        return sum(map(_bytes_of, value.values()))
    return sum(map(_bytes_of, value)) if isinstance(value, (list, tuple)) else 0


def _estimate(
    config: FamilialConfig, context: int, dtype: torch.dtype, layers: list[int]
) -> tuple[CacheSize, ...]:
    """Return the size of keys and values of every layer in full."""
    sizes = config.text_config
    heads = getattr(sizes, "num_attention_heads", None) or 1
    width = getattr(sizes, "head_dim", None) or sizes.hidden_size // heads
    kept = 2 * (getattr(sizes, "num_key_value_heads", None) or heads) * width * dtype.itemsize
    return tuple(CacheSize(context * kept * n, kept * n, exact=False) for n in layers)

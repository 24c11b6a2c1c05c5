"""The cost of running one member: FLOPs of prefill and decoding per token, and KV cache size."""

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
    """The size of one member's KV cache after a text.

    Attributes:
        bytes (`int`): Bytes of keys, values and recurrent states.
        per_token (`int`): Bytes that one more token adds. It is 0 if all layers have full sliding
            windows or recurrent states.
        exact (`bool`): `True` if the size was measured, `False` if it was estimated.
    """

    bytes: int
    per_token: int
    exact: bool


@dataclass(frozen=True)
class MemberFlops:
    """The cost of one member for one text of a given length.

    Attributes:
        parameters ([`ParameterCount`]): The number of parameters by each convention.
        layers (`int`): The number of layers that a token runs through, private layers included.
        prefill_flops_per_token (`float`): Mean FLOPs per token of one pass over the text, with the
            head at all positions.
        decode_flops_per_token (`float`, *optional*): FLOPs of the next token after the text. It is
            `None` if the backbone has no cache that Transformers supports.
        cache ([`CacheSize`], *optional*): The size of the KV cache after the text, or `None` for
            such a backbone.
        exact (`bool`): `True` if the operations were counted, `False` if they were estimated.
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
    """Return the parameters, FLOPs and cache size of each member, from the config alone.

    Args:
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family.
        context (`int`): The length of the text in tokens.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): The dtype of the cache.

    Returns:
        `tuple[MemberFlops, ...]`: The cost of each member, shallowest first.

    Raises:
        TypeError: If `model_or_config` is not a family.
        ValueError: If `context` is below 1, or if the family cannot be built.

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
    """Return the KV cache size of each member after a text of one row, from the config alone.

    The size is measured on the backbone's own cache, with its sliding windows, latent keys and
    values, and recurrent states. With full attention it is `2 kv_heads head_dim` values per layer
    and token (Pope et al. 2022, arXiv:2211.05102, section 2.1).

    Args:
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family.
        context (`int`): The length of the text in tokens.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): The dtype of the cache.

    Returns:
        `tuple[CacheSize, ...]`, *optional*: The size for each member, shallowest first. It is
        `None` if the backbone has no cache that Transformers supports. The result is cached for
        equal arguments.

    Raises:
        TypeError: If `model_or_config` is not a family.
        ValueError: If `context` is below 1.

    Example:
        >>> [size.bytes for size in cache_sizes(config, context=4096)]
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
            # a backbone may raise any error when it needs real values
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
    """Estimate the cache size as keys and values of all positions in each layer."""
    sizes = config.text_config
    heads = getattr(sizes, "num_attention_heads", None) or 1
    width = getattr(sizes, "head_dim", None) or sizes.hidden_size // heads
    kept = 2 * (getattr(sizes, "num_key_value_heads", None) or heads) * width * dtype.itemsize
    return tuple(CacheSize(context * kept * n, kept * n, exact=False) for n in layers)

"""What a relay cannot run on, refused before anything runs."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)


def check_relay(model: Any) -> None:
    """Refuse a host whose layers cannot go on from a tap.

    Args:
        model ([`FamilialForCausalLM`]): The family.

    Raises:
        ValueError: With the reason.
    """
    contract, name = model.model.contract, model.config.text_config.model_type
    reason = contract.whole or ("" if contract.cache else "it has no cache of transformers' kinds")
    if reason:
        raise ValueError(
            f"`{name}` cannot be relayed: {reason}. `generate(exit_idx=...)` runs one member of it."
        )


def check_cache(cache: Any) -> None:
    """Refuse a cache that cannot be of different lengths, or taken back.

    Args:
        cache ([`Cache`]): What the caller or `generate` made.

    Raises:
        ValueError: If it is not a plain [`DynamicCache`].
    """
    plain = isinstance(cache, DynamicCache) and not getattr(cache, "offloading", False)
    kinds = (DynamicLayer, LinearAttentionCacheLayerMixin, DummyLayer)
    odd = [] if not plain else [la for la in cache.layers if not isinstance(la, kinds)]
    if not plain or odd:
        name = type(odd[0] if odd else cache).__name__
        raise ValueError(
            f"a relay needs a `DynamicCache` in the device's memory, got {name}: leave out "
            "`cache_implementation`, or give `past_key_values=DynamicCache(config=...)`."
        )


def past_positions(cache: DynamicCache) -> int:
    """Number of positions that every layer of a cache has seen.

    Args:
        cache ([`DynamicCache`]): Filled by a plain forward, or empty.

    Returns:
        `int`: 0 for a new cache.

    Raises:
        ValueError: If its layers differ.
    """
    lengths = {la.get_seq_length() for la in cache.layers if isinstance(la, CacheLayerMixin)}
    if len(lengths) > 1:
        raise ValueError(
            "a relay can go on from `past_key_values` only if every layer holds the same number of "
            f"tokens, got {sorted(lengths)}: use the cache of the deepest exit."
        )
    return lengths.pop() if lengths else 0

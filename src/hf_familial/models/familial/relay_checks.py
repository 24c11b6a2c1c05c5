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
    reason = contract.whole or ("" if contract.cache else "it has no cache")
    if reason:
        raise ValueError(
            f"`{name}` cannot be relayed: {reason}. `generate(exit_idx=...)` runs one member of it."
        )


def check_positions(config: Any, seen: int, ran: int) -> None:
    """Refuse a text that runs on past the length at which the host changes its rotary angles.

    There the angles of a position depend on how far the same pass goes. A relay runs positions in
    other groups than `generate` does, so its text would differ.

    Args:
        config (`PreTrainedConfig`): Config of the backbone.
        seen (`int`): Positions of the prompt, which run in one pass.
        ran (`int`): Positions that will have run at the end.

    Raises:
        ValueError: With the length.
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

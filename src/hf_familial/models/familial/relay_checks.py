"""What is checked before a relay runs: what it cannot run on, and what is no longer true."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)


# numbers of each weight that are looked at before a text, in search of changes
SAMPLES = 8


def follow_weights(model: Any) -> None:
    """Forget what relays learned of a model whose weights have changed since.

    Nothing is looked at after `model.freeze_weights()`.

    Args:
        model ([`FamilialForCausalLM`]): The family.
    """
    inner = model.model
    if inner.frozen:
        return
    stamp = weights_stamp(model)
    if inner.learned_of != stamp:
        # a new dict: a text that another thread is writing leaves what it learned in the old one
        inner.draft_lengths, inner.learned_of = {}, stamp


def weights_stamp(model: Any) -> int:
    """Return a number that changes when the weights of a model are trained, merged or replaced.

    It looks at where each weight lies, at its version, which usual changes in place raise, and at
    a few of its numbers, which fused optimisers and writes through `.data` change too. This takes a
    thousandth of a short text. A change of single numbers through `.data` may be missed, so it must
    not decide what a text says: only learned numbers that make it faster hang on it.

    Args:
        model (`nn.Module`): Any.

    Returns:
        `int`: Of this process alone.
    """
    marks: list[Any] = []
    samples: dict[Any, list[torch.Tensor]] = {}
    for parameter in model.parameters():
        tensor = parameter.detach()
        if type(tensor) is not torch.Tensor or tensor.is_meta:
            marks.append(id(parameter))  # sharded, quantised or offloaded
            continue
        version = 0 if parameter.is_inference() else parameter._version
        marks.append((tensor.data_ptr(), version, tensor.shape))
        some = tensor.reshape(-1)[:: max(1, tensor.numel() // SAMPLES)]
        samples.setdefault((tensor.dtype, tensor.device), []).append(some)
    for some in map(torch.cat, samples.values()):
        marks.append(some.view(torch.uint8).cpu().numpy().tobytes())
    return hash(tuple(marks))


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

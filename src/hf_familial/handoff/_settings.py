"""The fields of a `GenerationConfig` that travel with a text, and the values that each may have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import HandoffError


MAX_IDS = 10_000
MAX_TOKENS = 1 << 20  # more than any model has positions
MAX_NGRAM = 1 << 10  # a step compares as many tokens at every place of the text
MAX_FACTOR = 1e8  # logits times it, or over its inverse, stay far below the end of float32


def _whole(least: int = 0, most: int = (1 << 31) - 1) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


_count = _whole()


def _factor(value: Any) -> bool:
    # the host takes no whole number but 1
    known = type(value) is float or (type(value) is int and value == 1)
    return known and 1 / MAX_FACTOR <= value <= MAX_FACTOR


def _share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_IDS and all(map(_count, value))


def _lists_of_ids(value: Any) -> bool:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_IDS:
        return False
    return all(_ids(ids) and ids for ids in value) and sum(map(len, value)) <= MAX_IDS


# field of `GenerationConfig` -> a test of its value
SETTINGS: Mapping[str, Callable[[Any], bool]] = {
    "bad_words_ids": _lists_of_ids,
    "do_sample": lambda value: type(value) is bool,
    "eos_token_id": lambda value: _count(value) or (_ids(value) and bool(value)),
    "epsilon_cutoff": _share,
    "eta_cutoff": _share,
    "max_new_tokens": _whole(1, MAX_TOKENS),
    "min_new_tokens": _whole(0, MAX_TOKENS),
    "min_p": _share,
    "no_repeat_ngram_size": _whole(0, MAX_NGRAM),
    "pad_token_id": _count,
    "renormalize_logits": lambda value: type(value) is bool,
    "repetition_penalty": _factor,
    "suppress_tokens": _ids,
    "temperature": _factor,
    "top_h": lambda value: _share(value) and value > 0,
    "top_k": _count,
    "top_p": _share,
    "typical_p": lambda value: _share(value) and value > 0,
}
# these name tokens
IDS = ("bad_words_ids", "eos_token_id", "pad_token_id", "suppress_tokens")
# these count the tokens still to come
COUNTED = ("max_new_tokens", "min_new_tokens")


def check_settings(settings: Any) -> None:
    """Raise `HandoffError` for a name that is not in `SETTINGS`, or a value that no run can use."""
    if not isinstance(settings, Mapping):
        raise HandoffError(f"`settings` must be a mapping, got {type(settings).__name__}.")
    unknown = sorted(str(name) for name in settings if name not in SETTINGS)
    if unknown:
        raise HandoffError(
            f"`settings` cannot hold {unknown[0]!r:.60}; what travels is {', '.join(SETTINGS)}. "
            "Give the rest on the side that chooses the tokens."
        )
    wrong = [name for name, value in settings.items() if not SETTINGS[name](value)]
    if wrong:
        raise HandoffError(f"`{wrong[0]}` cannot be {settings[wrong[0]]!r:.60}.")


def check_length(settings: Mapping[str, Any], last: int, config: Any) -> None:
    """Raise `HandoffError` for a text that would grow beyond the positions of a model.

    `last` is the largest position of the text so far, `config` the family's.
    """
    limit = getattr(config.text_config, "max_position_embeddings", None)
    asked = settings.get("max_new_tokens", 0)
    if limit is None or last + max(1, asked) <= limit:
        return
    raise HandoffError(
        f"{last + 1} positions and `max_new_tokens={asked}` are more than the {limit} positions of "
        "this model. The side that chooses the tokens can set `max_new_tokens` itself."
    )


def remaining(settings: Mapping[str, Any], produced: int) -> dict[str, Any]:
    """Return the settings for the rest of a text, after `produced` tokens per row."""
    counted = {name: max(0, settings[name] - produced) for name in COUNTED if name in settings}
    return {**settings, **counted}


def largest_id(settings: Mapping[str, Any]) -> int:
    """Return the largest token id that checked settings name, or -1."""
    return max((_largest(settings[name]) for name in IDS if name in settings), default=-1)


def _largest(value: int | list[Any]) -> int:
    return value if isinstance(value, int) else max(map(_largest, value), default=-1)

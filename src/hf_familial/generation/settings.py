"""How tokens are chosen, as far as it travels: the fields of a `GenerationConfig` that may."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from .wire import RelayStateError


MAX_IDS = 10_000


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _flag(value: Any) -> bool:
    return type(value) is bool


def _ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_IDS and all(_count(v) for v in value)


def _id_or_ids(value: Any) -> bool:
    return _count(value) or (_ids(value) and bool(value))


def _lists_of_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_IDS and all(_ids(v) for v in value)


# field of `GenerationConfig` -> whether a value is one that it may have
SETTINGS: Mapping[str, Callable[[Any], bool]] = {
    "bad_words_ids": _lists_of_ids,
    "do_sample": _flag,
    "eos_token_id": _id_or_ids,
    "epsilon_cutoff": _number,
    "eta_cutoff": _number,
    "max_new_tokens": _count,
    "min_new_tokens": _count,
    "min_p": _number,
    "no_repeat_ngram_size": _count,
    "pad_token_id": _count,
    "renormalize_logits": _flag,
    "repetition_penalty": _number,
    "suppress_tokens": _ids,
    "temperature": _number,
    "top_h": _number,
    "top_k": _count,
    "top_p": _number,
    "typical_p": _number,
}
# these name tokens
IDS = ("bad_words_ids", "eos_token_id", "pad_token_id", "suppress_tokens")
# these count the tokens still to come
COUNTED = ("max_new_tokens", "min_new_tokens")


def check_settings(settings: Any) -> None:
    """Refuse settings that do not travel.

    Args:
        settings (`Mapping[str, Any]`): Fields of `GenerationConfig`.

    Raises:
        RelayStateError: If a name or the type of a value is none of `SETTINGS`.
    """
    if not isinstance(settings, Mapping):
        raise RelayStateError(f"`settings` must be a mapping, got {type(settings).__name__}.")
    unknown = sorted(str(name) for name in settings if name not in SETTINGS)
    if unknown:
        raise RelayStateError(
            f"`settings` cannot hold {unknown[0]!r:.60}; what travels is {', '.join(SETTINGS)}. "
            "Give the rest on the side that chooses the tokens."
        )
    wrong = [name for name, value in settings.items() if not SETTINGS[name](value)]
    if wrong:
        raise RelayStateError(f"`{wrong[0]}` cannot be {settings[wrong[0]]!r:.60}.")


def remaining(settings: Mapping[str, Any], produced: int) -> dict[str, Any]:
    """The same settings for the rest of a text.

    Args:
        settings (`Mapping[str, Any]`): As the text began.
        produced (`int`): Tokens made since, per row.

    Returns:
        `dict[str, Any]`: With fewer tokens to come.
    """
    counted = {name: max(0, settings[name] - produced) for name in COUNTED if name in settings}
    return {**settings, **counted}


def largest_id(settings: Mapping[str, Any]) -> int:
    """The largest token id that settings name.

    Args:
        settings (`Mapping[str, Any]`): As checked.

    Returns:
        `int`: -1 if there is none.
    """
    return max((_largest(settings[name]) for name in IDS if name in settings), default=-1)


def _largest(value: int | list[Any]) -> int:
    return value if isinstance(value, int) else max(map(_largest, value), default=-1)

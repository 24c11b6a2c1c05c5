"""The fields of `GenerationConfig` that are sent with a text, and the allowed values of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import HandoffError


MAX_IDS = 10_000
MAX_TOKENS = 1 << 20  # more than any model has positions
MAX_NGRAM = 1 << 10  # limits the work of a step: it compares n tokens at every column
MAX_FACTOR = 1e8  # logits multiplied or divided by this factor do not overflow float32


def _whole(least: int = 0, most: int = (1 << 31) - 1) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


_count = _whole()


def _factor(value: Any) -> bool:
    # Transformers accepts floats, and of the integers only 1
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


# field of `GenerationConfig` -> a function that returns whether a value is allowed
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
# fields that contain token ids
IDS = ("bad_words_ids", "eos_token_id", "pad_token_id", "suppress_tokens")
# fields that count tokens still to generate
COUNTED = ("max_new_tokens", "min_new_tokens")


def check_settings(settings: Any) -> None:
    """Raise `HandoffError` if a name is not in `SETTINGS`, or if its value is not allowed."""
    if not isinstance(settings, Mapping):
        raise HandoffError(f"`settings` must be a mapping, got {type(settings).__name__}.")
    unknown = sorted(str(name) for name in settings if name not in SETTINGS)
    if unknown:
        raise HandoffError(
            f"`settings` cannot contain {unknown[0]!r:.60}. The allowed names are "
            f"{', '.join(SETTINGS)}. Set other options on the side that chooses the tokens."
        )
    wrong = [name for name, value in settings.items() if not SETTINGS[name](value)]
    if wrong:
        raise HandoffError(f"`{wrong[0]}` cannot be {settings[wrong[0]]!r:.60}.")


def check_length(settings: Mapping[str, Any], last: int, config: Any) -> None:
    """Raise `HandoffError` if a text could grow beyond the positions of a model.

    Args:
        settings (`Mapping[str, Any]`): The settings of the text. Only `max_new_tokens` is used.
        last (`int`): The largest position of the text so far.
        config ([`FamilialConfig`]): The config of the family.
    """
    limit = getattr(config.text_config, "max_position_embeddings", None)
    asked = settings.get("max_new_tokens", 0)
    if limit is None or last + max(1, asked) <= limit:
        return
    raise HandoffError(
        f"{last + 1} positions plus `max_new_tokens={asked}` are more than the {limit} positions "
        "of this model. Set a smaller `max_new_tokens` on the side that chooses the tokens."
    )


def remaining(settings: Mapping[str, Any], produced: int) -> dict[str, Any]:
    """Return the settings for the rest of a text after `produced` new tokens per row."""
    counted = {name: max(0, settings[name] - produced) for name in COUNTED if name in settings}
    return {**settings, **counted}


def largest_id(settings: Mapping[str, Any]) -> int:
    """Return the largest token id in checked settings, or -1 if they contain none."""
    return max((_largest(settings[name]) for name in IDS if name in settings), default=-1)


def _largest(value: int | list[Any]) -> int:
    return value if isinstance(value, int) else max(map(_largest, value), default=-1)

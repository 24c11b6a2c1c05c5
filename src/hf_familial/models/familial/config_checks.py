"""Checks of values that a config may hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING


# The most layers, private ones counted: a config may come from anywhere, and building it takes time
# for every layer. The deepest decoders of transformers have some 130.
MAX_LAYERS = 4096


def check_exits(exits: Sequence[int], num_hidden_layers: int) -> None:
    """Check the depths of the exits.

    Args:
        exits (`Sequence[int]`): Depths, in layers.
        num_hidden_layers (`int`): Depth of the backbone.

    Raises:
        ValueError: If `exits` is empty, not made of integers, not strictly increasing, below 1, or
            does not end at `num_hidden_layers`.
    """
    right = (
        f"strictly increasing depths from 1 up, ending at `num_hidden_layers` ({num_hidden_layers})"
    )
    if not exits:
        raise ValueError(f"`exits` must be {right}, got none.")
    wrong = [depth for depth in exits if not is_int(depth)]
    if wrong:
        raise ValueError(f"`exits` must be integers, {right}, got {wrong[0]!r} in {list(exits)}.")
    increasing = all(a < b for a, b in zip(exits, exits[1:], strict=False))
    if exits[0] < 1 or not increasing or exits[-1] != num_hidden_layers:
        raise ValueError(f"`exits` must be {right}, got {list(exits)}.")


def check_layers(text_config: Mapping[str, Any]) -> None:
    """Check that a backbone has so many layers as can be built, before anything counts them.

    Args:
        text_config (`Mapping[str, Any]`): Fields of its config.

    Raises:
        ValueError: If it has more than `MAX_LAYERS`.
    """
    model_type = text_config.get("model_type")
    known = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None
    name = getattr(known, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    for field in {name, "num_hidden_layers"}:
        count = text_config.get(field, 0)
        if is_int(count) and count > MAX_LAYERS:
            raise ValueError(f"`{field}` must be {MAX_LAYERS} at most, got {count}.")


def plain(value: Any) -> Any:
    """Return a number or list of Python for one of numpy or torch; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def is_int(value: object) -> bool:
    """Return whether a value is an integer, which a boolean is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Check that a value is one of several names.

    Args:
        name (`str`): Name of the option, for the message.
        value (`Any`): What was given.
        choices (`Iterable[str]`): The names.

    Raises:
        ValueError: Naming the choices, and the nearest one.
    """
    known = list(choices)
    if value not in known:
        close = get_close_matches(str(value).lower(), known, 2)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        several = ", ".join(known[:12]) + (" or another" if len(known) > 12 else "")
        raise ValueError(f"`{name}` must be one of {several}, got {value!r}.{hint}")

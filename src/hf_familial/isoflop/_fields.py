"""Strict fields: what a file says is checked against the annotations of frozen dataclasses."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields
from difflib import get_close_matches
from typing import Any

from ..errors import DesignError


def near(name: object, known: Iterable[str]) -> str:
    """`; did you mean ...?` for a name close to a known one, else the known ones."""
    known = sorted(known)
    return nearest(name, known) or f"; known are {', '.join(f'`{k}`' for k in known)}."


def nearest(name: object, known: Iterable[str]) -> str:
    """`; did you mean ...?` for a name close to a known one, else nothing."""
    close = get_close_matches(str(name), list(known), n=2)
    return f"; did you mean {' or '.join(f'`{c}`' for c in close)}?" if close else ""


def read(cls: type, row: Any, where: str = "") -> Any:
    """A dataclass from a mapping, as YAML has it.

    Args:
        cls (`type`): A dataclass that checks its fields.
        row (`Any`): Should be a mapping of known fields, with all that have no default.
        where (`str`, *optional*): Name of the field that it stands in.

    Raises:
        DesignError: If a field is unknown, missing or wrong.
    """
    prefix = f"{where}." if where else ""
    if not isinstance(row, Mapping):
        what = f"`{where}`" if where else "a design"
        raise DesignError(f"{what} must be a mapping of fields, got {row!r}.", where)
    known = {field.name: field for field in fields(cls)}
    for name in row:
        if name not in known:
            hint = near(name, known)
            raise DesignError(f"`{prefix}{name}` is unknown{hint}", f"{prefix}{name}")
    for name, field in known.items():
        if name not in row and field.default is MISSING and field.default_factory is MISSING:
            raise DesignError(f"`{prefix}{name}` is missing.", f"{prefix}{name}")
    try:
        return cls(**row)
    except DesignError as error:
        if not where or error.field.startswith(prefix):
            raise
        message = str(error).replace(f"`{error.field}`", f"`{prefix}{error.field}`", 1)
        raise DesignError(message, prefix + error.field) from None


def check_fields(record: Any) -> None:
    """Check the fields of a frozen dataclass against its annotations, in `__post_init__`.

    Lists become tuples, mappings become inner dataclasses, and numbers in words, as YAML 1.1 reads
    `1e18`, become numbers.

    Raises:
        DesignError: Naming the field that is wrong, what it is, and what would be right.
    """
    for name, hint in typing.get_type_hints(type(record)).items():
        if typing.get_origin(hint) is typing.ClassVar:
            continue
        value = getattr(record, name)
        try:
            object.__setattr__(record, name, coerced(value, hint, name))
        except TypeError as error:
            raise DesignError(f"`{name}` must be {error}, got {value!r}.", name) from None


def coerced(value: Any, hint: Any, name: str = "") -> Any:
    """The value as its annotation has it; a TypeError that says what would be right."""
    if isinstance(hint, types.UnionType):
        return _one_of(value, typing.get_args(hint), name)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError("a list")
        try:
            return tuple(coerced(item, typing.get_args(hint)[0], name) for item in value)
        except TypeError as error:
            raise TypeError(f"a list, each item {error}") from None
    if typing.get_origin(hint) is not None:  # a mapping of the host's own names
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise TypeError("a mapping of names")
        inner = typing.get_args(hint)[1]
        return {k: _jsonable(v) if inner is Any else coerced(v, inner) for k, v in value.items()}
    if hasattr(hint, "__dataclass_fields__"):
        return value if isinstance(value, hint) else read(hint, value, name)
    return _plain(value, hint)


def _one_of(value: Any, hints: tuple[Any, ...], name: str) -> Any:
    if any(hasattr(h, "__dataclass_fields__") and isinstance(value, h) for h in hints):
        return value
    wanted = []
    for hint in hints:
        if hint is types.NoneType:
            if value is None:
                return None
            continue
        try:
            return coerced(value, hint, name)
        except TypeError as error:
            wanted.append(str(error))
    raise TypeError(" or ".join(wanted))


def _plain(value: Any, hint: Any) -> Any:
    if hint in (int, float) and isinstance(value, str):
        value = _number(value)
    if hint is int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if not whole or isinstance(value, bool):
            raise TypeError("an integer")
        return int(value)
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise TypeError("a finite number")
        return float(value)
    if not isinstance(value, hint):
        raise TypeError({str: "a string", bool: "true or false"}.get(hint, hint.__name__))
    return value


def _jsonable(value: Any) -> Any:
    """A copy of what JSON can say, so that it has a hash and a file."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        raise TypeError("a mapping of values that JSON has") from None


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def plain(record: Any) -> dict[str, Any]:
    """A dataclass as YAML and JSON have it: lists, mappings, numbers, strings."""
    return _listed(asdict(record))


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _listed(inner) for name, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def positive(record: Any, *names: str) -> None:
    """Reject fields that are not positive."""
    for name in names:
        values = getattr(record, name)
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, (int, float)) and not value > 0:
                raise DesignError(f"`{name}` must be positive, got {value}.", name)


def words_of_time(seconds: float) -> str:
    """Return seconds in words: `45 s`, `12.5 min`, `3.2 h`, `1.5 d`."""
    for size, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"

"""Frozen dataclasses that are read from JSON or YAML: checks of their fields, and plain JSON.

Each kind of file has one [`Fields`] object, with an error type and rules for numbers. Dataclasses
call `FIELDS.check(self)` in `__post_init__`. `FIELDS.read(cls, row)` builds one from a row.
"""

from __future__ import annotations

import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, NamedTuple

from ._wording import known_words


class Check(NamedTuple):
    """A check of one value: a fast test for valid values, and a conversion of all others.

    `convert` raises `TypeError` if it cannot convert the value.
    """

    right: Callable[[Any], bool]
    convert: Callable[[Any], Any]


# checks of numbers in files that people write


def _number(value: Any) -> Any:
    """Convert a string such as `1e18` to a number. YAML 1.1 reads `1e18` as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _integer(value: Any) -> int:
    value = _number(value)
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not whole or isinstance(value, bool):
        raise TypeError("an integer")
    return int(value)


def _finite(value: Any) -> float:
    value = _number(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise TypeError("a finite number")
    return float(value)


WRITTEN_BY_PEOPLE: Mapping[Any, Check] = {
    int: Check(lambda value: type(value) is int, _integer),
    float: Check(lambda value: type(value) is float and math.isfinite(value), _finite),
}


class Fields:
    """The rules for the dataclass fields of one kind of file.

    Args:
        error (`type[ValueError]`): Error type to raise. Its arguments are a message and the dotted
            name of the field.
        row (`str`): Name of a row in error messages, for example `"a run"`.
        checks (`Mapping[Any, Check]`): Check of each numeric annotation, such as `int` or
            `float | None`. Other annotations need no entry. Strings, booleans and instances stay
            unchanged, lists become tuples, and mappings become dataclasses or dicts.
    """

    def __init__(
        self, error: type[ValueError], row: str, checks: Mapping[Any, Check] = WRITTEN_BY_PEOPLE
    ) -> None:
        self.error: Any = error
        self.row, self.checks = row, checks
        self._checks_of = functools.cache(self._find_checks)

    def check(self, record: Any) -> None:
        """Check every field of a frozen dataclass, and convert values to the annotated types."""
        values = vars(record)
        cls: Any = type(record)
        for name, check in self._checks_of(cls):
            value = values[name]
            if check.right(value):
                continue
            try:
                object.__setattr__(record, name, check.convert(value))
            except TypeError as error:
                raise self.error(f"`{name}` must be {error}, got {value!r}.", name) from None
            except self.error as error:
                raise self.within(name, error) from None

    def read(self, cls: type, row: Any) -> Any:
        """Build a dataclass from a mapping of field names to values.

        Raise `self.error` if a field is unknown, missing or wrong.
        """
        if not isinstance(row, Mapping):
            raise self.error(f"{self.row} must be an object with fields, got {row!r}.", "")
        names, needed = _names(cls)
        if not needed <= row.keys() <= names.keys():
            unknown = [name for name in row if name not in names]
            for name in [*(name for name in names if name in needed - row.keys()), *unknown]:
                problem = f"unknown{known_words(name, names)}" if name in unknown else "missing."
                raise self.error(f"`{name}` is {problem}", str(name))
        return cls(**row)

    def convert(self, value: Any, hint: Any) -> Any:
        """Convert a value to the annotated type.

        Raise `TypeError` if that is impossible. Its text completes the sentence "must be ...".
        """
        check = self._check_of(hint)
        return value if check.right(value) else check.convert(value)

    def within(self, outer: str, error: Any) -> Any:
        """Return the error of a nested record with the field's full name, such as `rule.kind`."""
        name = f"{outer}.{error.field}"
        return self.error(str(error).replace(f"`{error.field}`", f"`{name}`", 1), name)

    def _find_checks(self, cls: type) -> list[tuple[str, Check]]:
        hints = typing.get_type_hints(cls)
        return [(field.name, self._check_of(hints[field.name])) for field in fields(cls)]

    def _check_of(self, hint: Any) -> Check:
        """Build the check for values of an annotation, once for all rows of a file."""
        if hint in self.checks:
            return self.checks[hint]
        inner = typing.get_args(hint)
        if isinstance(hint, types.UnionType):
            return _one_of([self._check_of(h) for h in inner if h is not types.NoneType], inner)
        if typing.get_origin(hint) is tuple:
            return _list_of(self._check_of(inner[0]))
        if typing.get_origin(hint) is not None:  # a mapping with any names
            item = Check(lambda value: False, _jsonable)
            return _dict_of(item if inner[1] is Any else self._check_of(inner[1]))
        return Check(lambda value: isinstance(value, hint), self._converter(hint))

    def _converter(self, hint: Any) -> Callable[[Any], Any]:
        words = {str: "a string", bool: "true or false"}.get(hint, f"a {hint.__name__}")
        if is_dataclass(hint):
            words = "an object with fields"

        def convert(value: Any) -> Any:
            if is_dataclass(hint) and isinstance(value, Mapping):
                return self.read(typing.cast(type, hint), value)
            raise TypeError(words)

        return convert


def _one_of(checks: list[Check], hints: tuple[Any, ...]) -> Check:
    optional = types.NoneType in hints

    first, *others = checks

    def right(value: Any) -> bool:
        if value is None:
            return optional
        return first.right(value) or any(check.right(value) for check in others)

    def convert(value: Any) -> Any:
        words = []
        for check in checks:
            try:
                return value if check.right(value) else check.convert(value)
            except TypeError as error:
                words.append(str(error))
        raise TypeError(" or ".join(words))

    return Check(right, convert)


def _list_of(item: Check) -> Check:
    def convert(value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise TypeError("a list")
        if all(map(item.right, value)):
            return tuple(value)
        try:
            return tuple(v if item.right(v) else item.convert(v) for v in value)
        except TypeError as error:
            raise TypeError(f"a list, each item {error}") from None

    return Check(lambda value: False, convert)


def _dict_of(item: Check) -> Check:
    def convert(value: Any) -> Any:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise TypeError("a mapping of names")
        return {k: v if item.right(v) else item.convert(v) for k, v in value.items()}

    return Check(lambda value: False, convert)


def _jsonable(value: Any) -> Any:
    """Return a copy of a value in plain JSON, so that it can be hashed and saved."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        raise TypeError("a mapping of JSON values") from None


@functools.cache
def _names(cls: type) -> tuple[dict[str, None], frozenset[str]]:
    """Return the names of all fields of a dataclass, and the names of those without a default."""
    found = fields(cls)
    needed = [f.name for f in found if f.default is MISSING and f.default_factory is MISSING]
    return dict.fromkeys(f.name for f in found), frozenset(needed)


def plain(record: Any) -> dict[str, Any]:
    """Convert a dataclass to lists, mappings, numbers and strings, for JSON or YAML."""
    return _listed(asdict(record), lambda number: number)


def without_nan(value: Any) -> Any:
    """Return the same value with `None` for every number that is NaN or infinite."""
    return _listed(value, lambda number: number if math.isfinite(number) else None)


def strict_json(value: Any) -> Any:
    """Return the same value for strict JSON. An infinite number becomes `{"number": "inf"}`."""
    return _listed(value, lambda x: x if math.isfinite(x) else {"number": str(x)})


def from_strict_json(row: dict[str, Any]) -> Any:
    """Convert `{"number": "inf"}` back to a number. Use this as `object_hook` of `json.loads`."""
    return float(row["number"]) if list(row) == ["number"] else row


def _listed(value: Any, number: Callable[[float], Any]) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _listed(inner, number) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_listed(inner, number) for inner in value]
    if type(value).__module__ == "numpy":
        return _listed(value.tolist(), number)
    return number(value) if isinstance(value, float) else value

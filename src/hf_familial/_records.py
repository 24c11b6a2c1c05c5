"""Frozen dataclasses and rows of JSON or YAML: checks of fields, values in plain JSON.

A kind of file has one [`Fields`]: its error type and the numbers that it accepts. A dataclass calls
`FIELDS.check(self)` in `__post_init__`, and `FIELDS.read(cls, row)` builds it from a mapping.
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
    """A check of one value: a quick test of what is right, and a conversion of everything else."""

    right: Callable[[Any], bool]
    convert: Callable[[Any], Any]


# numbers of files that people write


def _number(value: Any) -> Any:
    """Read a number in words, as YAML 1.1 has `1e18`."""
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
    """The fields of the dataclasses of one kind of file.

    Args:
        error (`type[ValueError]`): Raised with a message and the dotted name of the field.
        row (`str`): What messages call a row, as `"a run"`.
        checks (`Mapping[Any, Check]`): For annotations such as `int` or `float | None`. Of others,
            strings, booleans and instances are taken as they are; lists become tuples, mappings
            become dataclasses or dicts.
    """

    def __init__(
        self, error: type[ValueError], row: str, checks: Mapping[Any, Check] = WRITTEN_BY_PEOPLE
    ) -> None:
        self.error: Any = error
        self.row, self.checks = row, checks
        self._checks_of = functools.cache(self._find_checks)

    def check(self, record: Any) -> None:
        """Check every field of a frozen dataclass and store what its annotation has."""
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
        """Build a dataclass from a mapping that has its fields and no others.

        Raises the error type if a field is unknown, missing or wrong.
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
        """Return a value as an annotation has it; a `TypeError` completes "must be ..."."""
        check = self._check_of(hint)
        return value if check.right(value) else check.convert(value)

    def within(self, outer: str, error: Any) -> Any:
        """Return the error of an inner record with the name of its field below the outer one."""
        name = f"{outer}.{error.field}"
        return self.error(str(error).replace(f"`{error.field}`", f"`{name}`", 1), name)

    def _find_checks(self, cls: type) -> list[tuple[str, Check]]:
        hints = typing.get_type_hints(cls)
        return [(field.name, self._check_of(hints[field.name])) for field in fields(cls)]

    def _check_of(self, hint: Any) -> Check:
        """Return the check of an annotation, made once: files have a hundred thousand rows."""
        if hint in self.checks:
            return self.checks[hint]
        inner = typing.get_args(hint)
        if isinstance(hint, types.UnionType):
            return _one_of([self._check_of(h) for h in inner if h is not types.NoneType], inner)
        if typing.get_origin(hint) is tuple:
            return _list_of(self._check_of(inner[0]))
        if typing.get_origin(hint) is not None:  # a mapping of the host's own names
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
    """Return a copy of what JSON can say, so that it has a hash and a file."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        raise TypeError("a mapping of values that JSON has") from None


@functools.cache
def _names(cls: type) -> tuple[dict[str, None], frozenset[str]]:
    """Return the names of a dataclass's fields in order, and of those without a default."""
    found = fields(cls)
    needed = [f.name for f in found if f.default is MISSING and f.default_factory is MISSING]
    return dict.fromkeys(f.name for f in found), frozenset(needed)


def plain(record: Any) -> dict[str, Any]:
    """Return a dataclass as JSON and YAML have it: lists, mappings, numbers, strings."""
    return _listed(asdict(record), lambda number: number)


def without_nan(value: Any) -> Any:
    """Return the same value with null for every number that JSON does not have."""
    return _listed(value, lambda number: number if math.isfinite(number) else None)


def speakable(value: Any) -> Any:
    """Return the same value in strict JSON: infinities and NaN become `{"number": "inf"}`."""
    return _listed(value, lambda x: x if math.isfinite(x) else {"number": str(x)})


def spoken(row: dict[str, Any]) -> Any:
    """Undo `speakable`, as the `object_hook` of `json.loads`."""
    return float(row["number"]) if list(row) == ["number"] else row


def _listed(value: Any, number: Callable[[float], Any]) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _listed(inner, number) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_listed(inner, number) for inner in value]
    if type(value).__module__ == "numpy":
        return _listed(value.tolist(), number)
    return number(value) if isinstance(value, float) else value

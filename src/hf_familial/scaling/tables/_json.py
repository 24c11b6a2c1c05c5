"""Rows of JSON: one object per line, a list of them, and what pandas and other tools write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from ...errors import TableError
from ._names import is_variable


Rows = tuple[list[dict[str, Any]], list[int]]


def parse(text: str) -> Any:
    """Return the value of a text of JSON."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def whole(text: str) -> Any:
    """Return the value of a text that is one value of JSON, `None` if it is not."""
    try:
        return parse(text)
    except ValueError:
        return None


def lines_of(text: str) -> tuple[Rows, list[int]]:
    """Return the objects of a text, one per line, and the lines that are none."""
    rows: list[dict[str, Any]] = []
    lines, bad = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
            lines.append(number)
        else:
            bad.append(number)
    return (rows, lines), bad


def objects_of(items: Sequence[Any]) -> tuple[Rows, list[int]]:
    """Return the objects of a list with their places from 1, and the places of other things."""
    good = [i for i, item in enumerate(items, start=1) if isinstance(item, dict)]
    places = set(good)
    bad = [i for i in range(1, len(items) + 1) if i not in places]
    return ([items[i - 1] for i in good], good), bad


def unfolded(value: Mapping[str, Any]) -> list[Any] | None:
    """Return the rows of an object that holds a table, in the forms that pandas and people use."""
    names, data = value.get("columns"), value.get("data")
    if _is_list(names) and _is_list(data) and all(_is_list(row) for row in data):
        return [dict(zip(map(str, names), row, strict=False)) for row in data]
    parts = list(value.values())
    if len(parts) > 1 and all(_is_list(part) for part in parts):
        count = max(map(len, parts))
        if count and all(len(part) == count for part in parts):
            return [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)]
    lists = [part for part in parts if _is_list(part) and any(isinstance(i, dict) for i in part)]
    if len(lists) == 1 and lists[0] is not None:
        return list(lists[0])
    if parts and all(isinstance(part, dict) and part for part in parts):
        return _of_objects(value)
    return None


def _of_objects(value: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """By column if the inner keys are the numbers of rows, else one object per row."""
    keys = dict.fromkeys(key for part in value.values() for key in part)
    if all(key.lstrip("-").isdigit() for key in keys):
        return [{name: part.get(key) for name, part in value.items()} for key in keys]
    outer_are_rows = all(key.lstrip("-").isdigit() for key in value)
    scalars = [v for part in value.values() for v in part.values()]
    named = len(value) > 1 and not outer_are_rows and _is_by_column(value, keys)
    if named and not any(isinstance(v, dict) for v in scalars):
        return [{name: part.get(key) for name, part in value.items()} for key in keys]
    return [
        {"name": key, **part} if not outer_are_rows else dict(part) for key, part in value.items()
    ]


def _is_by_column(value: Mapping[str, Mapping[str, Any]], keys: Mapping[str, Any]) -> bool:
    """Whether the values of one part are of one kind: a column's are, a row's rarely."""
    return sum(map(is_variable, value)) > sum(map(is_variable, keys))


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def missing_table(source: str, value: Mapping[str, Any], names: str) -> TableError:
    """Return the error for an object that holds no table."""
    return TableError(
        f"{source} is one JSON object with {names}; runs come one object per line, or as a list "
        "of objects."
    )

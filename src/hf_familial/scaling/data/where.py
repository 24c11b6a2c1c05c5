"""Choose rows of a table by conditions such as `optimizer == adamw` or `D > 1e9`."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from ...errors import TableError
from .cells import is_missing, number_of


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
EXAMPLE = "write it as `--where 'optimizer == adamw'` or `--where 'D > 1e9'`"


def chosen(columns: Any, labels: Callable[[str], Sequence[Any]], condition: str) -> list[bool]:
    """Return which rows meet a condition.

    Args:
        columns (`Sequence[str]`): Names of the columns.
        labels (`Callable`): Gives the cells of a column.
        condition (`str`): A column, one of `== != < <= > >=`, and a value; several parted by `and`.

    Raises:
        TableError: If the condition is none, or its column is not there.
    """
    answer: list[bool] | None = None
    for part in re.split(r"\s+(?:and|&&)\s+", condition.strip()):
        met = _met(list(columns), labels, part)
        answer = met if answer is None else [a and b for a, b in zip(answer, met, strict=True)]
    return answer or []


def _met(names: list[str], labels: Callable[[str], Sequence[Any]], part: str) -> list[bool]:
    found = re.fullmatch(r"\s*(.+?)\s*(==|!=|<=|>=|<|>|=)\s*(.*?)\s*", part)
    if not found:
        raise TableError(f"{part!r} is no condition; {EXAMPLE}.")
    name, mark, value = found[1].strip("`\"'"), found[2], found[3].strip("\"'")
    if name not in names:
        known = {column.lower(): column for column in reversed(names)}
        near = difflib.get_close_matches(name.lower(), known, 1)
        hint = f"did you mean {known[near[0]]!r}? " if near else ""
        raise TableError(
            f"no column {name!r} for the condition {part!r}; {hint}it has {', '.join(names[:20])}."
        )
    compare, number = COMPARE[mark], number_of(value)
    if mark in ("==", "!=", "="):
        same = [_same(cell, value, number) for cell in labels(name)]
        return [not equal for equal in same] if mark == "!=" else same
    if number != number:
        raise TableError(f"{part!r} compares with no number; {EXAMPLE}.")
    return [bool(compare(number_of(cell), number)) for cell in labels(name)]


def _same(cell: Any, value: str, number: float) -> bool:
    """Whether a cell is a value, as text or as a number."""
    if is_missing(cell):
        return value == ""
    if isinstance(cell, bool):
        return value.lower() == str(cell).lower()
    return str(cell).strip() == value or (number == number and number_of(cell) == number)


__all__ = ["chosen"]

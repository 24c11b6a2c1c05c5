"""Conversion of table cells to numbers, such as `70M`, `1,000,000`, `2,85` and `1.2×10^21`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any, Literal


# the decimal mark of a table, "" if it is not known
Marks = Literal["", "point", "comma"]

MISSING = frozenset(
    "na n/a n.a. nan none null nil - -- – — ? tbd #n/a #na #value! #div/0! <na> missing nat".split()
)  # fmt: skip
SCALES = {
    **dict.fromkeys(("k", "thousand", "thousands"), 1e3),
    **dict.fromkeys(("m", "mm", "mn", "mio", "million", "millions"), 1e6),
    **dict.fromkeys(("b", "bn", "g", "billion", "billions"), 1e9),
    **dict.fromkeys(("t", "tn", "trillion", "trillions"), 1e12),
    **dict.fromkeys(("p",), 1e15),
}
PREFIXES = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18, "z": 1e21, "y": 1e24}
PETAFLOP_DAY = 8.64e19
WORDS = r"(?:params?|parameters|tokens?|toks?|nats?|flops?|weights|/ ?token)"
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
POWER = r"(?:\^|\*\*)\s*\(?([-+]?\d+)\)?"

_NUMBER = re.compile(
    rf"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*(?:(?:x|\*)\s*10{POWER})?\s*"
    rf"([a-z]*?)\s*({WORDS}|)(?:\s*(?:/|per)\s*token)?"
)
_POWER = re.compile(rf"([-+]?\d+){POWER}\s*{WORDS}?")
_FLOPS = re.compile(r"(.+?)\s*([kmgtpezy])\s*f(?:lops?)?")
_DAYS = re.compile(r"(.+?)\s*(?:pf|petaflops?)(?:/s)?[- ]?days?")
_ERROR = re.compile(r"\s*(?:±|\+/-|\+-|\\pm).*$|(?<=\d)\s*\(\d*\.?\d+\)$")
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?!\d)")
_DECORATION = re.compile(r"\\text\w+|\\math\w+|[${}~≈*†‡]+$|^[${~≈=]+|\\[,;! ]")


def is_missing(value: Any) -> bool:
    """Return whether a cell is empty, NaN, or a word for a missing value such as `n/a`."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return True
    return isinstance(value, str) and value.strip().lower() in ("", *MISSING)


def marks_of(texts: Iterable[str]) -> Marks:
    """Return the decimal mark of a table, from the cells that can be read in one way only."""
    found = set()
    for text in texts:
        plain = text.strip()
        if re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3}){2,}|[-+]?\d{1,3}(?:,\d{3})+\.\d+", plain):
            found.add("point")
        elif re.fullmatch(r"[-+]?(?:\d{1,3}(?:\.\d{3})+|\d*),\d+(?:[eE][-+]?\d+)?", plain) and not (
            re.fullmatch(r"[-+]?[1-9]\d{0,2},\d{3}", plain)
        ):
            found.add("comma")
        elif re.fullmatch(r"[-+]?\d{1,3}(?:\.\d{3}){2,}", plain):
            found.add("comma")
    return found.pop() if len(found) == 1 else ""  # type: ignore[return-value]


def number_of(value: Any, marks: Marks = "") -> float:
    """Return a cell as a number, or NaN if it is not a number."""
    if isinstance(value, str):
        try:
            # with decimal commas, a point can separate thousands
            return _from_text(value, marks) if marks == "comma" and "." in value else float(value)
        except ValueError:
            return _from_text(value, marks)
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
        item = getattr(value, "item", None)  # numpy scalars have this method
        return number_of(item(), marks) if callable(item) and not hasattr(value, "__len__") else (
            math.nan
        )  # fmt: skip
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]
    except ValueError:
        return math.nan


def _from_text(text: str, marks: Marks) -> float:
    word = text.translate(SUPERSCRIPTS) if any(c in text for c in "⁰¹²³⁴⁵⁶⁷⁸⁹") else text
    if word != text:
        word = re.sub(r"10([-+]?\d+)$", r"10^\1", word)
    word = _ERROR.sub("", _DECORATION.sub("", word.strip()).strip())
    word = re.sub(r"[−–](?=\d)", "-", word).replace("×", "x").replace("\\times", "x")
    word = word.replace("\\cdot", "x").replace("·", "x").lower().replace("{", "").replace("}", "")
    word = re.sub(r"(?<=\d)[\s\u00a0\u202f\u2009'’_](?=\d{3}(?!\d))", "", word.strip())
    if marks == "comma":
        if re.fullmatch(r"[-+]?\d{1,3}(?:\.\d{3})+", word) or "," in word:
            word = word.replace(".", "")
        word = word.replace(",", ".", 1)
    elif _GROUPED.match(word):
        word = word.replace(",", "")
    return _read(word.strip().strip("*").strip())


def _read(word: str) -> float:
    if power := _POWER.fullmatch(word):
        return _power(float(power[1]), int(power[2]))
    if word.endswith("%"):
        return _read(word[:-1].strip()) / 100
    if days := _DAYS.fullmatch(word):
        return _read(days[1]) * PETAFLOP_DAY
    if flops := _FLOPS.fullmatch(word):
        return _read(flops[1]) * PREFIXES[flops[2]]
    found = _NUMBER.fullmatch(word)
    if not found or found[3] and found[3] not in SCALES:
        return math.nan
    return float(found[1]) * _power(10.0, int(found[2] or 0)) * SCALES.get(found[3], 1.0)


def _power(base: float, exponent: int) -> float:
    try:
        return base**exponent
    except (OverflowError, ZeroDivisionError):
        return math.nan


def numbers_of(values: Sequence[Any], marks: Marks = "") -> list[float]:
    """Return the cells of a column as numbers, with NaN for cells that are not numbers."""
    try:
        if marks != "comma" and not any(isinstance(v, bool) for v in values):
            return [math.nan if v is None or v == "" else float(v) for v in values]
    except (TypeError, ValueError, OverflowError):
        pass
    return [number_of(value, marks) for value in values]

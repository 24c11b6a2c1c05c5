"""Text for numbers, sizes, durations and name suggestions in tables, pages and messages."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches


SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))
MISSING = "–"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def scientific(value: float, digits: int = 3) -> str:
    """Format a number with a power of ten: `5.76×10²³`, or `10²¹` without a factor of 1."""
    if not math.isfinite(value):
        return MISSING
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = "10" + str(int(exponent)).translate(SUPERSCRIPTS)
    return power if float(mantissa) == 1 else f"{mantissa}×{power}".replace("-", "−")


def count(value: float, digits: int = 3) -> str:
    """Format a number of parameters or tokens with k, M, B or T: `73.2B`."""
    if not math.isfinite(value):
        return MISSING
    rounded = float(f"{value:.{digits - 1}e}")
    if not 1 <= rounded < 1e16:
        return "0" if value == 0 else scientific(value, digits)
    size, suffix = next(pair for pair in SUFFIXES if rounded >= pair[0])
    return significant(rounded / size, digits) + suffix


def significant(value: float, digits: int = 4) -> str:
    """Format a number with `digits` significant digits, and very large or small ones as a power."""
    if not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
    if not -4 <= exponent < 6:
        return scientific(value, digits)
    return f"{value:.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def estimate(value: float, low: float, high: float) -> tuple[str, str]:
    """Format a value and its confidence interval: `("0.3473", "[0.319, 0.376]")`.

    The number of digits increases if the interval is narrow.
    """
    if math.isinf(low) or math.isinf(high):
        ends = (significant(x) if math.isfinite(x) else "∞" if x > 0 else "−∞" for x in (low, high))
        return significant(value), f"[{', '.join(ends)}]"
    if not high > low:
        return significant(value), MISSING
    size = max(abs(value), abs(low), abs(high))
    digits = min(max(math.ceil(math.log10(size / (high - low))) + 1, 3), 8)
    if not 1e-4 <= size < 1e6:
        return scientific(value, digits), f"[{scientific(low, digits)}, {scientific(high, digits)}]"
    places = max(0, digits - 1 - math.floor(math.log10(size)))
    words = [f"{number:.{places}f}".replace("-", "−") for number in (value, low, high)]
    return words[0], f"[{words[1]}, {words[2]}]"


def metric(number: float | None) -> str:
    """Format a number with three digits and a decimal prefix: `1.23G`. `None` becomes `-`."""
    return _scaled(number, ("k", "M", "G", "T", "P", "E"), 1000)


def size(nbytes: float | None) -> str:
    """Format bytes with three digits and a binary prefix: `1.23GiB`. `None` becomes `-`."""
    return _scaled(nbytes, ("KiB", "MiB", "GiB", "TiB", "PiB"), 1024)


def _scaled(number: float | None, prefixes: Sequence[str], step: int) -> str:
    if number is None:
        return "-"
    scaled, prefix = float(number), ""
    for prefix in ("", *prefixes):
        if scaled < 999.5 or prefix == prefixes[-1]:
            break
        scaled /= step
    # three digits, without an exponent
    return f"{scaled:.{max(0, 3 - len(str(int(scaled))))}f}{prefix}" if prefix else f"{scaled:g}"


def parse_size(words: str) -> int:
    """Return the number of bytes of a size such as `512MiB`, `2GB` or `1e9`.

    Args:
        words (`str`): Number with an optional unit. `k`, `M`, `G` and `T` are powers of 1000. `Ki`,
            `Mi`, `Gi` and `Ti` are powers of 1024.

    Raises:
        ValueError: If `words` is not a size.

    Example:
        >>> parse_size("2GB")  # 2000000000
    """
    match = re.fullmatch(r"\s*([\d.]+(?:[eE]\+?\d+)?)\s*([kKMGT]i?)?B?\s*", words)
    try:
        nbytes = round(float(match[1]) * UNITS[(match[2] or "").lower()]) if match else 0
    except (ValueError, OverflowError):
        nbytes = 0
    if not nbytes > 0:
        raise ValueError(f"a size must look like 2GB or 512MiB, got {words!r}.")
    return nbytes


def duration(seconds: float) -> str:
    """Format seconds in a suitable unit: `45 s`, `12.5 min`, `3.2 h`, `1.5 d`."""
    for unit, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def plural(number: int, word: str) -> str:
    """Format a count with its noun: `1 run`, `1,200 runs`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def near_words(name: object, known: Iterable[str], most: int = 2, cutoff: float = 0.6) -> str:
    """Return `; did you mean ...?` if a name is close to a known one, else an empty string."""
    close = get_close_matches(str(name), list(known), most, cutoff)
    return f"; did you mean {' or '.join(f'`{c}`' for c in close)}?" if close else ""


def known_words(name: object, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` if a name is close to a known one, else list all known names."""
    known = sorted(known)
    return near_words(name, known) or f". Choose from {', '.join(f'`{k}`' for k in known)}."

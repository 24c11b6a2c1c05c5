"""Numbers as people read them, in terminals, pictures and pages alike."""

from __future__ import annotations

import math


SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))
MISSING = "–"


def plural(number: int, word: str) -> str:
    """Count things, as in `1 run` or `1,084 runs`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def scientific(value: float, digits: int = 3) -> str:
    """Write a number with its power of ten, as `5.76×10²³`; a bare power is `10²¹`."""
    if not math.isfinite(value):
        return MISSING
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = "10" + str(int(exponent)).translate(SUPERSCRIPTS)
    return power if float(mantissa) == 1 else f"{mantissa}×{power}".replace("-", "−")


def count(value: float, digits: int = 3) -> str:
    """Write a number of parameters or tokens, as `73.2B`: k, M, B, T, then powers of ten."""
    if not math.isfinite(value):
        return MISSING
    rounded = float(f"{value:.{digits - 1}e}")
    if not 1 <= rounded < 1e16:
        return "0" if value == 0 else scientific(value, digits)
    size, suffix = next(pair for pair in SUFFIXES if rounded >= pair[0])
    return significant(rounded / size, digits) + suffix


def significant(value: float, digits: int = 4) -> str:
    """Write a number to so many significant digits, by a power of ten where that is shorter."""
    if not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
    if not -4 <= exponent < 6:
        return scientific(value, digits)
    return f"{value:.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def estimate(value: float, low: float, high: float) -> tuple[str, str]:
    """Write a value and its interval, as `("0.3473", "[0.319, 0.376]")`.

    Digits that the interval's width gives no meaning are left out.
    """
    if math.isinf(low) or math.isinf(high):
        return significant(value), f"[{_end(low)}, {_end(high)}]"
    if not high > low:
        return significant(value), MISSING
    size = max(abs(value), abs(low), abs(high))
    digits = min(max(math.ceil(math.log10(size / (high - low))) + 1, 3), 8)
    if not 1e-4 <= size < 1e6:
        return scientific(value, digits), f"[{scientific(low, digits)}, {scientific(high, digits)}]"
    places = max(0, digits - 1 - math.floor(math.log10(size)))
    words = [f"{number:.{places}f}".replace("-", "−") for number in (value, low, high)]
    return words[0], f"[{words[1]}, {words[2]}]"


def _end(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return significant(value)

"""Numbers and units as people read them, in terminals, pictures and pages alike."""

from __future__ import annotations

import math


SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))
MISSING = "–"


def scientific(value: float, digits: int = 3) -> str:
    """A number with its power of ten, such as `5.76×10²³`; `10²¹` for a bare power.

    Args:
        value (`float`): The number.
        digits (`int`): Significant digits.

    Returns:
        `str`
    """
    if not math.isfinite(value):
        return MISSING
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = "10" + str(int(exponent)).translate(SUPERSCRIPTS)
    return power if float(mantissa) == 1 else f"{mantissa}×{power}".replace("-", "−")


def count(value: float, digits: int = 3) -> str:
    """A number of parameters or tokens, such as `73.2B`.

    Args:
        value (`float`): The number.
        digits (`int`): Significant digits.

    Returns:
        `str`: With k, M, B or T for thousands to (short) trillions; a power of ten beyond them.
    """
    if not math.isfinite(value):
        return MISSING
    rounded = float(f"{value:.{digits - 1}e}")
    if not 1 <= rounded < 1e16:
        return "0" if value == 0 else scientific(value, digits)
    size, suffix = next(pair for pair in SUFFIXES if rounded >= pair[0])
    return significant(rounded / size, digits) + suffix


def significant(value: float, digits: int = 4) -> str:
    """A number to so many significant digits, by a power of ten where that is shorter.

    Args:
        value (`float`): The number.
        digits (`int`): Significant digits.

    Returns:
        `str`
    """
    if not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
    if not -4 <= exponent < 6:
        return scientific(value, digits)
    return f"{value:.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def estimate(value: float, low: float, high: float) -> tuple[str, str]:
    """A value and its interval, to the digits that the interval's width gives a meaning.

    Args:
        value (`float`): The estimate.
        low (`float`): Lower end of its interval.
        high (`float`): Upper end.

    Returns:
        `tuple[str, str]`: As `("0.3473", "[0.319, 0.376]")`.
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


def percent(value: float, digits: int = 3) -> str:
    """A share as a percentage, such as `7.10%`.

    Args:
        value (`float`): The share, 1 for the whole.
        digits (`int`): Significant digits.

    Returns:
        `str`
    """
    return MISSING if not math.isfinite(value) else f"{significant(100 * value, digits)}%"


__all__ = ["count", "estimate", "percent", "scientific", "significant"]

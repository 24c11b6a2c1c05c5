"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re


UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(words: str) -> int:
    """Bytes, from a number and a unit: `512MiB`, `2GB`, `1e9`.

    Args:
        words (`str`): The size; `k`, `M`, `G`, `T` are powers of 1000, with `i` of 1024.

    Returns:
        `int`: Bytes, rounded.

    Raises:
        ValueError: If it is no size.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:[eE]\+?\d+)?)\s*([kKMGT]i?)?B?\s*", words)
    try:
        number = float(match[1]) if match else 0.0
        bytes_ = round(number * UNITS[(match[2] or "").lower()]) if match else 0
    except (ValueError, OverflowError):
        bytes_ = 0
    if not bytes_ > 0:
        raise ValueError(f"a size must look like 2GB or 512MiB, got {words!r}.")
    return bytes_


__all__ = ["parse_size"]

"""Checks for the fields of designs, runs and messages between a sweep and its workers."""

from typing import Any

from .._records import Fields
from ..errors import DesignError


FIELDS = Fields(DesignError, "a design")


def check_positive(record: Any, *names: str) -> None:
    """Raise `DesignError` if a field, or a number in it, is not positive."""
    for name in names:
        values = getattr(record, name)
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, (int, float)) and not value > 0:
                raise DesignError(f"`{name}` must be positive, got {value}.", name)

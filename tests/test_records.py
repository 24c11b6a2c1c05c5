"""Records: fields checked against annotations, and what JSON lacks."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from hf_familial._records import Fields, from_strict_json, plain, strict_json, without_nan
from hf_familial.errors import DesignError


FIELDS = Fields(DesignError, "a thing")


@dataclass(frozen=True)
class Inner:
    size: int
    name: str = "x"

    def __post_init__(self) -> None:
        FIELDS.check(self)


@dataclass(frozen=True)
class Outer:
    inner: Inner | float
    sizes: tuple[float, ...] = ()
    more: Mapping[str, Any] | None = None
    on: bool = False

    def __post_init__(self) -> None:
        FIELDS.check(self)


def test_values_take_the_type_of_their_field():
    found = FIELDS.read(Outer, {"inner": {"size": "1e3"}, "sizes": [1, "2"], "more": {"a": (1,)}})
    assert found == Outer(Inner(1000), (1.0, 2.0), {"a": [1]})
    assert type(found.inner.size) is int
    assert type(found.sizes[0]) is float
    assert plain(found)["sizes"] == [1.0, 2.0]
    assert FIELDS.read(Outer, plain(found)) == found


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        ({}, "inner", "`inner` is missing"),
        ({"inner": 1, "onn": 1}, "onn", "`onn` is unknown; did you mean `on`"),
        ({"inner": {"size": 1.5}}, "inner.size", "`inner.size` must be an integer, got 1.5"),
        ({"inner": {"siz": 1}}, "inner.size", "`inner.size` is missing"),
        ({"inner": 1, "sizes": [1, "a"]}, "sizes", "a list, each item a finite number"),
        ({"inner": 1, "on": 1}, "on", "`on` must be true or false, got 1"),
        ({"inner": 1, "more": {"a": {1}}}, "more", "of JSON values"),
        ([], "", "a thing must be an object"),
    ],
)
def test_a_wrong_field_is_named(row, field, message):
    with pytest.raises(DesignError, match=message) as caught:
        FIELDS.read(Outer, row)
    assert caught.value.field == field


def test_numbers_that_json_lacks():
    row = {"a": [math.inf, 1.5], "b": -math.inf}
    assert without_nan(row) == {"a": [None, 1.5], "b": None}
    text = json.dumps(strict_json(row), allow_nan=False)
    assert json.loads(text, object_hook=from_strict_json) == row

"""Sizes in bytes, as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_familial._wording import parse_size


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("1", 1),
        ("512MiB", 512 * 2**20),
        ("2GB", 2 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("1.001KiB", 1025),
        ("1e9", 10**9),
        ("1E+9", 10**9),
        ("10k", 10**4),
        ("10KiB", 10 * 2**10),
        ("10kiB", 10 * 2**10),
    ],
)
def test_sizes(words, expected):
    assert parse_size(words) == expected


@given(st.integers(1, 2**53))
def test_a_number_is_itself(size):
    assert parse_size(str(size)) == size


@pytest.mark.parametrize(
    "words", ["", "GB", "1.2.3", "-5", "0", "0.4", "2 apples", "1e", "1e999", "inf", "."]
)
def test_no_sizes(words):
    with pytest.raises(ValueError, match="a size must look like"):
        parse_size(words)

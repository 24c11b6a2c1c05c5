"""Numbers as people write them, and what says that there is none."""

import json
import math
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_familial.scaling._cells import is_missing, marks_of, number_of, numbers_of
from hf_familial.scaling.tables._columns import chosen
from hf_familial.scaling.tables._names import parse_unit, unit_in


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        ("70M", 7e7), ("1.4T tokens", 1.4e12), ("300B", 3e11), ("1.4 billion", 1.4e9),
        ("~70M", 7e7), ("70M†", 7e7), ("70m params", 7e7), ("1,000,000", 1e6),
        ("1,234.5", 1234.5), ("1 000 000", 1e6), ("1'000", 1e3), ("1_000_000", 1e6),
        ("1.2×10^21", 1.2e21), ("1.2 x 10^21", 1.2e21), ("$1.2\\times10^{21}$", 1.2e21),
        ("10²¹", 1e21), ("1.2·10²¹", 1.2e21), ("2**30", 2.0**30), ("2^30", 2.0**30),
        ("2.71 ± 0.02", 2.71), ("2.71(2)", 2.71), ("2.71 (0.03)", 2.71), ("**2.71**", 2.71),
        ("\\textbf{2.71}", 2.71), ("90%", 0.9), ("1.5 PF-days", 1.5 * 8.64e19),
        ("5.76 ZFLOPs", 5.76e21), ("1e18 FLOPs", 1e18), ("2.85 nats/token", 2.85), ("−2.5", -2.5),
        (Decimal("2.5"), 2.5), (np.float32(0.5), 0.5), (np.int64(3), 3.0), (10**400, math.inf),
    ],
)  # fmt: skip
def test_a_cell_is_the_number_that_it_says(cell, number):
    assert number_of(cell) == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize(
    "cell", ["", "pythia-70m", "12 abc", "6.3GB", "N/A", "0x10", "9" * 5 + "^9999", True, None, []]
)
def test_a_cell_that_is_no_number_is_none(cell):
    assert math.isnan(number_of(cell))


@pytest.mark.parametrize(
    ("cells", "marks"),
    [
        (["2,85"], "comma"), (["0,851"], "comma"), (["1,5e9"], "comma"), (["1.234,5"], "comma"),
        (["70.000.000"], "comma"), (["1,000,000"], "point"), (["1,234.5"], "point"),
        (["1,000"], ""), (["2,85", "1,000,000"], ""), (["text, with comma"], ""),
    ],
)  # fmt: skip
def test_marks_are_told_only_by_cells_that_can_be_read_in_one_way(cells, marks):
    assert marks_of(cells) == marks


@pytest.mark.parametrize(
    ("cell", "number"),
    [("2,85", 2.85), ("1.234,5", 1234.5), ("70.000.000", 7e7), ("1.500", 1500), ("3", 3.0)],
)
def test_decimal_commas(cell, number):
    assert number_of(cell, "comma") == number


@given(st.floats(1e-3, 1e15))
def test_a_number_comes_back_from_each_way_of_writing_it(number):
    plain = f"{number:.6e}"
    value = float(plain)
    mantissa, exponent = plain.split("e")
    for text, marks in (
        (plain, ""),
        (f"{mantissa} × 10^{int(exponent)}", ""),
        (f"${mantissa}\\times 10^{{{int(exponent)}}}$", ""),
        (plain.replace(".", ","), "comma"),
        (f"{plain} tokens", ""),
        (f"{value!r} ± {value / 10:.3g}", ""),
    ):
        assert number_of(text, marks) == pytest.approx(value, rel=1e-12), text


@given(st.integers(0, 10**15))
def test_thousands_are_read_in_any_grouping(number):
    for mark in (",", " ", "'", "_", "\u202f"):
        assert number_of(f"{number:,}".replace(",", mark)) == number
    assert number_of(f"{number:,}".replace(",", "."), "comma") == number


@given(st.lists(st.one_of(st.none(), st.booleans(), st.text(), st.floats(), st.integers())))
def test_numbers_of_anything_are_floats(values):
    found = numbers_of(values)
    assert len(found) == len(values)
    assert all(isinstance(number, float) for number in found)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=4))
def test_no_value_of_json_breaks_a_cell(value):
    number_of(json.loads(json.dumps(value)))
    is_missing(value)


@pytest.mark.parametrize("cell", [None, "", " ", "NA", "n/a", "nan", "None", "null", "-", math.nan])
def test_marks_of_missing_values(cell):
    assert is_missing(cell)


@pytest.mark.parametrize(
    ("column", "variable", "rest", "factor"),
    [
        ("params (M)", "N", "params", 1e6),
        ("Params [in millions]", "N", "Params", 1e6),
        ("tokens_B", "D", "tokens", 1e9),
        ("D (1e9)", "D", "D", 1e9),
        ("tokens (billions)", "D", "tokens", 1e9),
        ("FLOPs (1e18)", "C", "FLOPs", 1e18),
        ("C [EFLOP]", "C", "C", 1e18),
        ("compute (PF-days)", "C", "compute", 8.64e19),
        ("sparsity (%)", "S", "sparsity", 0.01),
        ("loss (nats/token)", "loss", "loss", 1.0),
        ("loss_bits", "loss", "loss", math.log(2)),
    ],
)
def test_a_name_tells_its_unit(column, variable, rest, factor):
    found, unit = unit_in(column, variable)
    assert found == rest
    assert (unit.kind, unit.factor) == ("scale", pytest.approx(factor))


@pytest.mark.parametrize("column", ["N_total", "loss_2", "val_loss", "N_active", "eval_loss_mean"])
def test_a_name_without_a_unit_tells_none(column):
    assert unit_in(column, "loss" if "loss" in column else "N")[1] is None


@pytest.mark.parametrize(
    ("word", "kind", "factor"),
    [
        ("1e6", "scale", 1e6), ("M", "scale", 1e6), ("B", "scale", 1e9), ("10^9", "scale", 1e9),
        ("1", "scale", 1.0), ("log10", "log10", 1.0), ("ln", "ln", 1.0), ("-1", "scale", -1.0),
    ],
)  # fmt: skip
def test_units_that_users_give(word, kind, factor):
    unit = parse_unit(word, "N")
    assert (unit.kind, unit.factor) == (kind, factor)


def test_conditions():
    table = {"opt": ["adam", "sgd", None], "D": ["1e9", "2B", ""]}
    for condition, met in {
        "opt == adam": [True, False, False],
        "opt != 'adam'": [False, True, True],
        "D > 1.5e9": [False, True, False],
        "D >= 1e9 and opt = sgd": [False, True, False],
        "D == 2000000000": [False, True, False],
        'opt == ""': [False, False, True],
    }.items():
        assert chosen(list(table), table.__getitem__, condition) == met, condition

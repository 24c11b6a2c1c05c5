"""Rows from any table: copied, checked, recorded when left out."""

import numpy as np
import pytest

from hf_familial.errors import BadRowsError, MissingColumnError, ScalingError, TooFewError
from hf_familial.scaling import RunTable, get_law


COLUMNS = {"N": [1e8, 2e8, 3e8], "D": [2e9, 4e9, 9e9], "loss": [3.1, 2.9, 2.7]}


def records():
    return [dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)]


def record_array():
    table = np.zeros(3, dtype=[("N", "f4"), ("D", "i8"), ("loss", "f8")])
    for name, values in COLUMNS.items():
        table[name] = values
    return table


def read_only():
    table = {name: np.array(values) for name, values in COLUMNS.items()}
    for values in table.values():
        values.flags.writeable = False
    return table


def pandas_frame(**options):
    frame = pytest.importorskip("pandas").DataFrame(COLUMNS, index=["x", "y", "z"])
    return frame.convert_dtypes() if options else frame


def polars_frame():
    return pytest.importorskip("polars").DataFrame(COLUMNS)


class Table:
    columns = COLUMNS


@pytest.mark.parametrize(
    "table",
    [
        lambda: COLUMNS, records, record_array, read_only, pandas_frame,
        lambda: pandas_frame(nullable=True), polars_frame, Table,
        lambda: {name: tuple(map(str, values)) for name, values in COLUMNS.items()},
    ],
    ids=[
        "mapping", "records", "record-array", "read-only", "pandas", "pandas-nullable", "polars",
        "object", "text",
    ],
)  # fmt: skip
def test_any_table_is_read(table):
    data = RunTable.read(table())
    assert len(data) == 3
    assert data.columns["N"] == pytest.approx(COLUMNS["N"])
    assert data.loss.tolist() == COLUMNS["loss"]
    assert data.weight.tolist() == [1, 1, 1]
    assert data.run_id.tolist() == [0, 1, 2]
    assert data.rows.tolist() == [0, 1, 2]
    for values in (*data.columns.values(), data.loss, data.weight, data.run_id):
        assert not values.flags.writeable
    assert data.columns["D"].dtype == np.float64
    assert RunTable.read(data) is data


def test_what_was_given_is_copied():
    table = {name: np.array(values) for name, values in COLUMNS.items()}
    data = RunTable.read(table)
    table["N"][0] = -1
    assert data.columns["N"][0] == 1e8
    with pytest.raises(ValueError, match="read-only"):
        data.columns["N"][0] = 1


@pytest.mark.parametrize("table", [3.0, "runs.csv", [], [1, 2], None])
def test_what_is_no_table_is_refused(table):
    with pytest.raises(ScalingError, match="must be a mapping"):
        RunTable.read(table)


def test_columns_are_chosen_by_name():
    table = {**COLUMNS, "eval": [1.0, 2.0, 3.0], "w": [1, 2, 3], "run": ["a", "b", "a"]}
    data = RunTable.read(table, loss="eval", weight="w", run_id="run")
    assert data.loss.tolist() == [1, 2, 3]
    assert data.weight.tolist() == [1, 2, 3]
    assert data.run_id.tolist() == [0, 1, 0]
    assert data.run_names == ("a", "b")
    assert data.runs == 2
    assert "w" not in data.columns
    assert "loss" in data.columns
    with pytest.raises(MissingColumnError, match="perplexity"):
        RunTable.read(table, loss="perplexity")


def test_columns_without_numbers_are_left_out_unless_needed():
    table = {**COLUMNS, "name": ["x", "y", "z"], "C": [1.0, None, 3.0]}
    data = RunTable.read(table)
    assert set(data.columns) == {"N", "D"}
    with pytest.raises(BadRowsError, match="row 1: a number is missing"):
        RunTable.read(table, needed=["C"])
    left = RunTable.read(table, needed=["C"], bad_rows="drop")
    assert left.columns["C"].tolist() == [1, 3]
    assert left.rows.tolist() == [0, 2]
    assert [(row.row, row.reason) for row in left.dropped] == [(1, "a number is missing")]
    with pytest.raises(ScalingError, match="`name` must have one number"):
        RunTable.read(table, needed=["name"])
    with pytest.raises(ScalingError, match="same length"):
        RunTable.read({**COLUMNS, "C": [1.0]})


def test_nothing_left_is_refused():
    with pytest.raises(TooFewError, match="No row is left"):
        RunTable.read({**COLUMNS, "loss": [0.0, -1.0, 0.0]}, bad_rows="drop")


def test_copies_of_rows():
    table = {name: [*values, values[1]] for name, values in COLUMNS.items()}
    with pytest.raises(BadRowsError, match="row 3: copy of row 1") as error:
        RunTable.read(table)
    assert error.value.rows == (3,)
    assert len(RunTable.read(table, duplicates="keep")) == 4
    assert RunTable.read(table, duplicates="drop").weight.tolist() == [1, 1, 1]
    merged = RunTable.read(table, duplicates="merge")
    assert merged.weight.tolist() == [1, 2, 1]
    assert merged.dropped[0].reason == "copy of row 1"
    # the same numbers from two runs are two observations
    assert len(RunTable.read({**table, "run": [0, 1, 2, 3]}, run_id="run")) == 4
    with pytest.raises(BadRowsError):
        RunTable.read({**table, "run": [0, 1, 0, 1]}, run_id="run")
    # and so are other seeds of the same setting
    assert len(RunTable.read({**table, "seed": [0, 0, 0, 1]})) == 4


def test_parts_of_rows():
    data = RunTable.read({**COLUMNS, "run": ["a", "b", "a"]}, run_id="run")
    part = data.take(np.array([2, 1]))
    assert part.loss.tolist() == [2.7, 2.9]
    assert part.rows.tolist() == [2, 1]
    assert part.run_names == ("a", "b")
    assert data.take(np.array([False, True, False])).run_names == ("b",)
    more = data.with_columns(G=[1, 2, 4])
    assert more.columns["G"].tolist() == [1, 2, 4]
    assert "G" not in data.columns
    with pytest.raises(ScalingError, match="3 values each"):
        data.with_columns(G=[1])


def test_a_law_judges_its_variables():
    data = RunTable.read({**COLUMNS, "G": [1.0, 0.5, 2.0]})
    with pytest.raises(BadRowsError, match="row 1: `G` must be >= 1 and finite"):
        data.for_law(get_law("familial"))
    left = data.for_law(get_law("familial"), "drop")
    assert left.rows.tolist() == [0, 2]
    with pytest.raises(MissingColumnError, match=r"missing: \['S'\]"):
        data.for_law(get_law("hossain"))
    assert data.for_law(get_law("hoffmann")) is data


def test_json_keeps_every_bit():
    data = RunTable.read(
        {**COLUMNS, "run": ["a", "b", "a"], "C": [1 / 3, None, 2 / 3]},
        run_id="run", needed=["C"], bad_rows="drop",
    )  # fmt: skip
    back = RunTable.from_dict(data.to_dict())
    assert back.to_dict() == data.to_dict()
    assert (back.columns["C"] == data.columns["C"]).all()
    assert back.run_names == data.run_names
    assert back.dropped == data.dropped

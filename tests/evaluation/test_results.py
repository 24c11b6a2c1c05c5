"""The table and the dict of an evaluation."""

import json
import math

import pytest

from hf_familial.evaluation import ExitEvaluation, ExitRow


def evaluation(flops, bits_per_byte=1.0):
    """An evaluation with exits of these costs."""
    count = len(flops)
    rows = tuple(
        ExitRow(
            exit_idx=k,
            depth=2 * k + 2,
            flops_per_token=cost,
            loss=3.2 - 0.8 * (k + 1) / count,
            perplexity=math.exp(3.2 - 0.8 * (k + 1) / count),
            bits_per_byte=bits_per_byte,
            accuracy=0.3 + 0.1 * k / count,
            agreement=1 - 0.5 * (1 - (k + 1) / count),
            expected_calibration_error=0.08 - 0.05 * k / count,
        )
        for k, cost in enumerate(flops)
    )
    return ExitEvaluation(rows, 1000, 10, 128, 15, 4.0, "llama")


def test_table():
    table = evaluation([1e6, 2e6]).to_pandas()
    assert list(table.columns) == [
        "exit_idx", "depth", "flops_per_token", "loss", "perplexity", "bits_per_byte", "accuracy",
        "agreement", "expected_calibration_error",
    ]  # fmt: skip
    assert table["depth"].tolist() == [2, 4]
    assert table.attrs["num_tokens"] == 1000
    assert table.attrs.keys().isdisjoint({"rows"})


def test_table_without_bytes():
    column = evaluation([1e6, 2e6], bits_per_byte=None).to_pandas()["bits_per_byte"]
    assert column.dtype == float
    assert column.isna().all()


def test_dict_survives_json():
    found = evaluation([1e6, 2e6], bits_per_byte=None)
    fields = json.loads(json.dumps(found.to_dict()))
    rows = tuple(ExitRow(**row) for row in fields.pop("rows"))
    assert ExitEvaluation(rows=rows, **fields) == found


@pytest.mark.parametrize("bits_per_byte", [1.25, None])
def test_an_evaluation_prints_as_a_table_of_80_columns(bits_per_byte):
    found = evaluation([1e6, 3e6, 2.5e12], bits_per_byte)
    lines = str(found).splitlines()
    assert len(lines) == 2 + 3
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == [
        *("exit", "depth", "loss", "perplexity", "bits/byte"),
        *("accuracy", "agreement", "calibration", "FLOPs"),
    ]
    for line, row in zip(lines[2:], found.rows, strict=True):
        cells = line.split()
        assert cells[:3] == [str(row.exit_idx), str(row.depth), f"{row.loss:.4f}"]
        assert cells[4] == ("-" if bits_per_byte is None else "1.2500")
    assert "ExitRow(" not in str(found)
    assert "<table" in found._repr_html_()
    assert repr(found).startswith("ExitEvaluation(")

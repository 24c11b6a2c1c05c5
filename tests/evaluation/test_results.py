"""Calibration by hand, the table, the dict and the picture."""

import json
import math

import numpy as np
import pytest

from hf_familial.evaluation import ExitEvaluation, ExitRow, expected_calibration_error, plot_exits
from hf_familial.evaluation._plots import spread


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


def test_calibration_by_hand():
    confidences, correct = [0.95, 0.85, 0.55, 0.6, 0.2], [1, 0, 1, 1, 0]
    # five bins: (0, .2] one, 0 right of .2; (.4, .6] two, 2 right of 1.15; (.8, 1] two, 1 of 1.8
    expected = (abs(0 - 0.2) + abs(2 - 1.15) + abs(1 - 1.8)) / 5
    found = expected_calibration_error(confidences, correct, num_bins=5)
    assert found == pytest.approx(expected, abs=1e-12)


def test_calibration_of_one_bin_is_the_gap_of_the_means():
    found = expected_calibration_error([0.9, 0.1, 0.8], [0, 1, 1], num_bins=1)
    assert found == pytest.approx(2 / 3 - 0.6)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 0.1, 0.7])
def test_calibration_at_the_edges(confidence):
    found = expected_calibration_error([confidence], [True], num_bins=10)
    assert found == pytest.approx(1 - confidence)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(([], []), "at least one prediction", id="none"),
        pytest.param(([0.5], [1, 0]), "of one length", id="lengths"),
        pytest.param(([1.5], [1]), "between 0 and 1, got 1.5", id="range"),
        pytest.param(([0.5], [1], 0), "`num_bins` must be 1 or more", id="bins"),
    ],
)
def test_calibration_refuses(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        expected_calibration_error(*arguments)


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


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_is_written(tmp_path, suffix):
    path = tmp_path / f"exits.{suffix}"
    plot_exits(evaluation([1e6, 2e6]), path)
    assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    "flops",
    [
        pytest.param([2.5e9], id="one"),
        pytest.param(np.linspace(1e8, 8e8, 8).tolist(), id="eight"),
        pytest.param([1e8, 1.01e8, 1.02e8, 1.03e8, 9e8, 9.9e8, 9.95e8, 1e9], id="crowded"),
        pytest.param(np.linspace(1e8, 28e8, 28).tolist(), id="twenty-eight"),
    ],
)
def test_no_label_lies_on_another(flops):
    figure = plot_exits(evaluation(flops))
    figure.set_dpi(150)  # as it is saved
    figure.draw_without_rendering()
    names = [axes.yaxis.label for axes in figure.axes]
    texts = [*figure.axes[0].texts, figure._suptitle, *names]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == len(flops) + 1 + 3
    canvas = figure.bbox
    for i, box in enumerate(boxes):
        assert canvas.x0 <= box.x0, texts[i]
        assert box.x1 <= canvas.x1, texts[i]
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_spread_moves_no_more_than_needed():
    assert spread([0.1, 0.5, 0.9], gap=0.2).tolist() == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.4, 0.4, 0.9], gap=0.2).tolist() == pytest.approx([0.3, 0.5, 0.9])
    assert spread([0.95, 1.0], gap=0.2).tolist() == pytest.approx([0.8, 1.0])
    assert spread([0.5] * 3, gap=0.9).tolist() == pytest.approx([0.0, 0.5, 1.0])


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

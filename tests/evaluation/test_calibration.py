"""The expected calibration error by hand."""

import pytest

from hf_familial.evaluation import expected_calibration_error


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
        pytest.param(([0.5], [1, 0]), "must have the same shape", id="lengths"),
        pytest.param(([1.5], [1]), "between 0 and 1, got 1.5", id="range"),
        pytest.param(([0.5], [1], 0), "`num_bins` must be 1 or more", id="bins"),
    ],
)
def test_calibration_refuses(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        expected_calibration_error(*arguments)

"""Expected calibration error, as a metric of the `evaluate` library."""

from typing import Any

import datasets
import evaluate
import numpy as np

from hf_familial.evaluation.calibration import expected_calibration_error


INPUTS = """
Args:
    predictions (`list[int]`): The most probable token or class at each position.
    references (`list[int]`): The true token or class at each position.
    confidences (`list[float]`): The probability of each prediction, from 0 to 1.
    num_bins (`int`, *optional*, defaults to 15): The number of bins, all of equal width.

Returns:
    `dict`: `expected_calibration_error`, from 0 (calibrated) to 1.
"""


class ExpectedCalibrationError(evaluate.Metric):
    """Mean distance between accuracy and confidence, over confidence bins of equal width."""

    def _info(self) -> evaluate.MetricInfo:
        token, number = datasets.Value("int64"), datasets.Value("float64")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="Guo et al. 2017, On Calibration of Modern Neural Networks, ICML",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": token, "references": token, "confidences": number}
            ),
            reference_urls=["https://arxiv.org/abs/1706.04599"],
        )

    def _compute(
        self, predictions: Any, references: Any, confidences: Any, num_bins: int = 15
    ) -> dict[str, float]:
        correct = np.asarray(predictions) == np.asarray(references)
        error = expected_calibration_error(confidences, correct, num_bins)
        return {"expected_calibration_error": error}

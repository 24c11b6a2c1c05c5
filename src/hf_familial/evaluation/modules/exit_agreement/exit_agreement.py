"""Agreement of an exit with the deepest exit, as a metric of the `evaluate` library."""

from typing import Any

import datasets
import evaluate
import numpy as np


INPUTS = """
Args:
    predictions (`list[int]`): The most probable token of an exit at each position.
    references (`list[int]`): The most probable token of the deepest exit at the same positions.

Returns:
    `dict`: `exit_agreement`, the share of positions where both are the same token, from 0 to 1.
"""


class ExitAgreement(evaluate.Metric):
    """Share of positions where an exit and the deepest exit predict the same token."""

    def _info(self) -> evaluate.MetricInfo:
        token = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="Schuster et al. 2022, Confident Adaptive Language Modeling, NeurIPS",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": token, "references": token}),
            reference_urls=["https://arxiv.org/abs/2207.07061"],
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        agreed = np.asarray(predictions) == np.asarray(references)
        return {"exit_agreement": float(agreed.mean())}

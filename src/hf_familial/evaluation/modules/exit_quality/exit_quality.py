"""Quality and cost of all exits of a family, as a measurement of the `evaluate` library."""

from typing import Any

import datasets
import evaluate

from hf_familial.evaluation.evaluator import evaluate_exits


INPUTS = """
Args:
    input_ids (`list[list[int]]`): Sequences of token ids.
    model (`FamilialForCausalLM`): The family.
    **kwargs: Arguments of `hf_familial.evaluation.evaluate_exits`: `batch_size`, `max_batches`,
        `bytes_per_token`, `num_bins`.

Returns:
    `dict`: One list for each of `exit_idx`, `depth`, `flops_per_token`, `loss`, `perplexity`,
    `bits_per_byte`, `accuracy`, `agreement` and `expected_calibration_error`. Each list has one
    value per exit, shallowest first.
"""


class ExitQuality(evaluate.Measurement):
    """Loss, perplexity, bits per byte, agreement, calibration error and FLOPs of each exit."""

    def _info(self) -> evaluate.MeasurementInfo:
        tokens = datasets.List(datasets.Value("int64"))
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=self.__doc__,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"input_ids": tokens}),
        )

    def _compute(self, input_ids: Any, model: Any, **kwargs: Any) -> dict[str, list[Any]]:
        dataset = [{"input_ids": ids} for ids in input_ids]
        rows = evaluate_exits(model, dataset, **kwargs).to_dict()["rows"]
        return {name: [row[name] for row in rows] for name in rows[0]}

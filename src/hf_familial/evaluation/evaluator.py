"""The evaluation of all exits of a family on a dataset, in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ..flops import measure_flops_per_token
from ..models import is_family
from ..models.backbone_verification import evaluation_mode
from ..models.familial import FamilialForCausalLM
from ..models.familial.losses import IGNORE_INDEX
from ._batches import Collator, Row, iter_batches
from ._predictions import Predictions, predict_batches
from .calibration import CalibrationBins
from .results import ExitEvaluation, ExitRow


def evaluate_exits(
    model: FamilialForCausalLM,
    dataset: Iterable[Row],
    batch_size: int = 8,
    max_batches: int | None = None,
    bytes_per_token: float | None = None,
    num_bins: int = 15,
    data_collator: Collator | None = None,
) -> ExitEvaluation:
    """Measure the quality and the cost of each exit in one pass over a dataset.

    Each batch runs through the backbone once. Then the logits of one exit after another are
    computed in chunks of rows, so memory does not grow with the number of exits. The model runs in
    evaluation mode on its device and in its dtype. Afterwards each module returns to its mode.

    Args:
        model ([`FamilialForCausalLM`]): The family.
        dataset (`datasets.Dataset` or `Iterable`): Rows with `input_ids`, one sequence each. A row
            may also have an `attention_mask` and `labels`. Labels are not shifted, and -100 means
            no target. They default to the tokens that are not masked.
        batch_size (`int`, *optional*, defaults to 8): The number of sequences in a batch.
        max_batches (`int`, *optional*): The largest number of batches to read. Defaults to all.
        bytes_per_token (`float`, *optional*): UTF-8 bytes of the dataset's text per token. It is
            needed for bits per byte.
        num_bins (`int`, *optional*, defaults to 15): The number of bins of the calibration error.
        data_collator (`Callable`, *optional*): A function that turns a list of rows into a batch, a
            mapping of tensors. By default rows are padded on the right, and padding has no target.

    Returns:
        [`ExitEvaluation`]: Loss, perplexity, bits per byte, accuracy, agreement with the deepest
        exit, expected calibration error and FLOPs per token of each exit. [`ExitRow`] defines them.

    Raises:
        TypeError: If `model` is not a family.
        ValueError: If the dataset is empty, has no `input_ids` or no token to predict, or if a
            number is out of range.

    Example:
        >>> evaluation = evaluate_exits(model, [{"input_ids": block} for block in blocks])
        >>> evaluation.to_pandas()[["depth", "loss", "agreement", "flops_per_token"]]
        >>> plot_exits(evaluation, "exits.png")
    """
    _check(model, batch_size, max_batches, bytes_per_token)
    tallies = [_ExitTally(num_bins) for _ in model.config.exits]
    num_sequences = seq_length = 0
    with evaluation_mode(model), torch.no_grad():
        batches = iter_batches(dataset, batch_size, max_batches, data_collator)
        for found in predict_batches(model, batches):
            num_sequences += found.num_sequences
            seq_length = max(seq_length, found.seq_length)
            # `found.exits` is empty for a batch without targets
            for tally, predictions in zip(tallies, found.exits, strict=False):
                tally.add(predictions, found.targets, found.exits[-1].tokens)
        if not num_sequences:
            raise ValueError("`dataset` is empty. It must contain at least one row.")
        if not tallies[-1].count:
            raise ValueError(
                f"`dataset` has no token to predict in {num_sequences} sequences. At least one "
                f"needs two tokens and a label that is not {IGNORE_INDEX} after its first position."
            )
        rows = tuple(
            tally.row(model, k, seq_length, bytes_per_token) for k, tally in enumerate(tallies)
        )
    return ExitEvaluation(
        rows=rows,
        num_tokens=tallies[-1].count,
        num_sequences=num_sequences,
        seq_length=seq_length,
        num_bins=num_bins,
        bytes_per_token=bytes_per_token,
        backbone=model.config.text_config.model_type,
    )


class _ExitTally:
    """The running float64 sums over all predictions of one exit."""

    def __init__(self, num_bins: int) -> None:
        self.count, self.loss, self.correct, self.agreed = 0, 0.0, 0, 0
        self.bins = CalibrationBins(num_bins)

    def add(self, predictions: Predictions, targets: np.ndarray, deepest: np.ndarray) -> None:
        """Add predictions.

        Args:
            predictions ([`Predictions`]): The predictions of this exit.
            targets (`numpy.ndarray` of shape `(rows,)`): The true tokens.
            deepest (`numpy.ndarray` of shape `(rows,)`): The deepest exit's most probable tokens.
        """
        correct = predictions.tokens == targets
        self.count += len(targets)
        self.loss += float(predictions.losses.sum(dtype=np.float64))
        self.correct += int(correct.sum())
        self.agreed += int((predictions.tokens == deepest).sum())
        self.bins.add(predictions.confidences, correct)

    def row(
        self, model: Any, exit_idx: int, seq_length: int, bytes_per_token: float | None
    ) -> ExitRow:
        """Return the row of this exit: means over all predictions, and FLOPs."""
        loss = self.loss / self.count
        return ExitRow(
            exit_idx=exit_idx,
            depth=model.config.exits[exit_idx],
            flops_per_token=measure_flops_per_token(model, exit_idx, seq_length),
            loss=loss,
            # `math.exp` raises OverflowError for a larger loss
            perplexity=math.inf if loss > 700 else math.exp(loss),
            bits_per_byte=None if bytes_per_token is None else loss / math.log(2) / bytes_per_token,
            accuracy=self.correct / self.count,
            agreement=self.agreed / self.count,
            expected_calibration_error=self.bins.error(),
        )


def _check(
    model: object, batch_size: int, max_batches: int | None, bytes_per_token: float | None
) -> None:
    if not is_family(model):
        raise TypeError(
            f"`model` must be a FamilialForCausalLM, got a {type(model).__name__}. If it is a "
            "wrapper, pass the inner model, for example `model.get_base_model()` of a PEFT model."
        )
    for name, value in {"batch_size": batch_size, "max_batches": max_batches}.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be 1 or more, got {value}.")
    if bytes_per_token is not None and not 0 < bytes_per_token < math.inf:
        raise ValueError(f"`bytes_per_token` must be a positive number, got {bytes_per_token}.")

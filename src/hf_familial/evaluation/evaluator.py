"""Every exit of a family over a dataset, in one pass."""

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
    """Measure the quality and the cost of every exit, in one pass over the data.

    Every batch runs through the backbone once; exits are then read one after the other, a chunk of
    rows at a time, so that the memory for logits does not grow with their number. The model runs
    in evaluation mode, on its device and in its dtype; each module gets its own mode back.

    Args:
        model ([`FamilialForCausalLM`]): The family.
        dataset (`datasets.Dataset` or `Iterable`): Rows with `input_ids`, one sequence each, and
            perhaps `labels` (not shifted, -100 where there is no target; default to the tokens that
            are not masked) and `attention_mask`.
        batch_size (`int`, *optional*, defaults to 8): Sequences run at once.
        max_batches (`int`, *optional*): Most batches to read; all by default.
        bytes_per_token (`float`, *optional*): UTF-8 bytes of the dataset's text per token. Without
            it there are no bits per byte.
        num_bins (`int`, *optional*, defaults to 15): Bins of the calibration error.
        data_collator (`Callable`, *optional*): Makes a batch, a mapping of tensors, from a list of
            rows. By default rows are padded on the right and padding is no target.

    Returns:
        [`ExitEvaluation`]: Of every exit: loss, perplexity, bits per byte, accuracy, agreement with
        the deepest exit, expected calibration error and FLOPs per token, each defined at
        [`ExitRow`].

    Raises:
        TypeError: If `model` is not a family.
        ValueError: If the dataset is empty, has no `input_ids` or no token to predict, or a number
            is out of its range.

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
            # a batch without targets has no exits
            for tally, predictions in zip(tallies, found.exits, strict=False):
                tally.add(predictions, found.targets, found.exits[-1].tokens)
        if not num_sequences:
            raise ValueError("`dataset` is empty: there is nothing to evaluate.")
        if not tallies[-1].count:
            raise ValueError(
                f"`dataset` has no token to predict in {num_sequences} sequences: all labels "
                f"after the first position are {IGNORE_INDEX}, or no sequence has two tokens."
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
    """Sums over the predictions of one exit, a batch at a time, in float64."""

    def __init__(self, num_bins: int) -> None:
        self.count, self.loss, self.correct, self.agreed = 0, 0.0, 0, 0
        self.bins = CalibrationBins(num_bins)

    def add(self, predictions: Predictions, targets: np.ndarray, deepest: np.ndarray) -> None:
        """Add predictions, given the right tokens and the deepest exit's top tokens."""
        correct = predictions.tokens == targets
        self.count += len(targets)
        self.loss += float(predictions.losses.sum(dtype=np.float64))
        self.correct += int(correct.sum())
        self.agreed += int((predictions.tokens == deepest).sum())
        self.bins.add(predictions.confidences, correct)

    def row(
        self, model: Any, exit_idx: int, seq_length: int, bytes_per_token: float | None
    ) -> ExitRow:
        """Return the means of the exit, and its FLOPs."""
        loss = self.loss / self.count
        return ExitRow(
            exit_idx=exit_idx,
            depth=model.config.exits[exit_idx],
            flops_per_token=measure_flops_per_token(model, exit_idx, seq_length),
            loss=loss,
            # a diverged loss is shown as such rather than as an overflow
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
            f"`model` must be a FamilialForCausalLM, got a {type(model).__name__}; pass what is "
            "inside a wrapper, such as `model.get_base_model()` of an adapter."
        )
    for name, value in {"batch_size": batch_size, "max_batches": max_batches}.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be 1 or more, got {value}.")
    if bytes_per_token is not None and not 0 < bytes_per_token < math.inf:
        raise ValueError(f"`bytes_per_token` must be a positive number, got {bytes_per_token}.")

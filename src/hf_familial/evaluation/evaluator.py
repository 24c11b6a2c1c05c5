"""Every exit of a family over a dataset, in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..flops import measure_flops_per_token
from ..models import is_family
from ..models.familial import FamilialForCausalLM
from ..models.familial.backbones import LogitTransform
from ..models.familial.losses import IGNORE_INDEX
from .batches import Collator, Row, iter_batches, model_inputs, shifted_labels
from .reading import ExitTally, read_predictions
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
        >>> evaluation.plot("exits.png")
    """
    _check(model, batch_size, max_batches, bytes_per_token)
    seen = _Seen([ExitTally(num_bins) for _ in model.config.exits])
    with evaluation_mode(model), torch.no_grad():
        for batch in iter_batches(dataset, batch_size, max_batches, data_collator):
            _evaluate_batch(model, batch, seen)
        seen.check()
        rows = tuple(_row(model, k, seen, bytes_per_token) for k in range(model.config.num_exits))
    return ExitEvaluation(
        rows=rows,
        num_tokens=seen.tallies[-1].count,
        num_sequences=seen.num_sequences,
        seq_length=seen.seq_length,
        num_bins=num_bins,
        bytes_per_token=bytes_per_token,
        backbone=model.config.text_config.model_type,
    )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own again.

    Args:
        model (`nn.Module`): With modules in either mode.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@dataclass
class _Seen:
    """What was read so far."""

    tallies: list[ExitTally]
    num_sequences: int = 0
    seq_length: int = 0

    def check(self) -> None:
        """Refuse a dataset that says nothing."""
        if not self.num_sequences:
            raise ValueError("`dataset` is empty: there is nothing to evaluate.")
        if not self.tallies[-1].count:
            raise ValueError(
                f"`dataset` has no token to predict in {self.num_sequences} sequences: all labels "
                f"after the first position are {IGNORE_INDEX}, or no sequence has two tokens."
            )


def _evaluate_batch(model: FamilialForCausalLM, batch: Mapping[str, Any], seen: _Seen) -> None:
    """Run a batch through the backbone once and read every exit, the deepest first."""
    inputs = model_inputs(batch, model.device)
    seen.num_sequences += len(inputs["input_ids"])
    shifted = shifted_labels(batch).flatten()
    positions = torch.nonzero(shifted != IGNORE_INDEX).squeeze(1)
    if not len(positions):
        return
    targets = shifted[positions]
    seen.seq_length = max(seen.seq_length, inputs["input_ids"].shape[1])
    outputs = model.model(**inputs, use_cache=False, output_exits=True)
    transform, deepest = LogitTransform.of(model.config.text_config), None
    for k in reversed(range(model.config.num_exits)):
        hidden = outputs.exit_hidden_states[k].flatten(0, 1)
        predictions = read_predictions(hidden, model.head(k), transform, positions, targets)
        deepest = predictions.tokens if deepest is None else deepest
        seen.tallies[k].add(predictions, targets.cpu().numpy(), deepest)


def _row(
    model: FamilialForCausalLM, exit_idx: int, seen: _Seen, bytes_per_token: float | None
) -> ExitRow:
    """Means of one exit, and its FLOPs."""
    tally = seen.tallies[exit_idx]
    loss = tally.loss / tally.count
    return ExitRow(
        exit_idx=exit_idx,
        depth=model.config.exits[exit_idx],
        flops_per_token=measure_flops_per_token(model, exit_idx, seen.seq_length),
        loss=loss,
        # a diverged loss is shown as such rather than as an overflow
        perplexity=math.inf if loss > 700 else math.exp(loss),
        bits_per_byte=None if bytes_per_token is None else loss / math.log(2) / bytes_per_token,
        accuracy=tally.correct / tally.count,
        agreement=tally.agreed / tally.count,
        expected_calibration_error=tally.bins.error(),
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

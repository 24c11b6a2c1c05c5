"""Predictions of all exits from one backbone pass, with logits for one chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..models.familial.backbones import LogitTransform
from ..models.familial.losses import IGNORE_INDEX, chunk_rows
from ._batches import model_inputs, shifted_labels


# a confidence measure: maps float32 logits of shape `(rows, vocab)` to one number per row
Measure = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Predictions:
    """The predictions of one exit at some positions.

    Attributes:
        losses (`numpy.ndarray` of shape `(rows,)`): Cross entropy in nats, float32.
        tokens (`numpy.ndarray` of shape `(rows,)`): The most probable token.
        confidences (`numpy.ndarray` of shape `(rows,)`): The probability of that token, or another
            confidence measure, float32.
    """

    losses: np.ndarray
    tokens: np.ndarray
    confidences: np.ndarray


@dataclass(frozen=True)
class BatchPredictions:
    """The predictions of all exits at the positions of a batch that have a target.

    Attributes:
        num_sequences (`int`): The number of rows of the batch.
        seq_length (`int`): The number of columns, or 0 if the batch has no targets.
        sequences (`numpy.ndarray` of shape `(positions,)`): The row of each position.
        targets (`numpy.ndarray` of shape `(positions,)`): The token that follows each position.
        exits (`tuple[Predictions, ...]`): The predictions by exit, shallowest first. It is empty if
            the batch has no targets.
    """

    num_sequences: int
    seq_length: int
    sequences: np.ndarray
    targets: np.ndarray
    exits: tuple[Predictions, ...]


def predict_batches(
    model: Any, batches: Iterable[Mapping[str, Any]], measure: Measure | None = None
) -> Iterator[BatchPredictions]:
    """Run each batch through the backbone once and yield the predictions of all exits.

    The backbone does not run for a batch without targets.
    """
    transform = LogitTransform.of(model.config.text_config)
    for batch in batches:
        inputs, labels = model_inputs(batch, model.device), shifted_labels(batch)
        num_sequences, seq_length = inputs["input_ids"].shape
        rows, columns = torch.nonzero(labels != IGNORE_INDEX, as_tuple=True)
        targets = labels[rows, columns]
        exits: tuple[Predictions, ...] = ()
        if len(rows):
            positions = rows * seq_length + columns
            outputs = model.model(**inputs, use_cache=False, output_exits=True)
            exits = tuple(
                _predictions(
                    states.flatten(0, 1), model.head(k), transform, positions, targets, measure
                )
                for k, states in enumerate(outputs.exit_hidden_states)
            )
        yield BatchPredictions(
            num_sequences,
            seq_length if len(rows) else 0,
            rows.cpu().numpy(),
            targets.cpu().numpy(),
            exits,
        )


def _predictions(
    hidden_states: torch.Tensor,
    head: nn.Module,
    transform: LogitTransform,
    positions: torch.Tensor,
    targets: torch.Tensor,
    measure: Measure | None,
) -> Predictions:
    """Return the predictions of one exit from its hidden states `(rows, hidden)` after the norm."""
    device = hidden_states.device
    rows = chunk_rows(head.out_features, device)  # type: ignore[arg-type]
    chunks = zip(positions.to(device).split(rows), targets.split(rows), strict=True)
    read = [
        _read_chunk(transform.read(hidden_states[at], head), wanted, measure)
        for at, wanted in chunks
    ]
    return Predictions(*(np.concatenate(part) for part in zip(*read, strict=True)))


def _read_chunk(
    logits: torch.Tensor, targets: torch.Tensor, measure: Measure | None
) -> tuple[np.ndarray, ...]:
    """Return losses, top tokens and confidences, from logits of shape `(rows, vocab)`."""
    logits = logits.float()
    targets = targets.to(logits.device).unsqueeze(1)
    normaliser = logits.logsumexp(dim=1)
    losses = normaliser - logits.gather(1, targets).squeeze(1)
    largest, tokens = logits.max(dim=1)
    # rounding can make a probability slightly larger than 1
    confidences = (largest - normaliser).exp().clamp(max=1) if measure is None else measure(logits)
    return tuple(tensor.cpu().numpy() for tensor in (losses, tokens, confidences))

"""What an exit predicts, read from its hidden states a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..models.familial.backbones import LogitTransform
from ..models.familial.losses import chunk_rows
from .calibration import CalibrationBins


@dataclass(frozen=True)
class Predictions:
    """What one exit predicts at some positions.

    Attributes:
        losses (`numpy.ndarray` of shape `(rows,)`): Cross entropy, in nats, float32.
        tokens (`numpy.ndarray` of shape `(rows,)`): The most probable token.
        confidences (`numpy.ndarray` of shape `(rows,)`): Its probability, or another measure of
            confidence, float32.
    """

    losses: np.ndarray
    tokens: np.ndarray
    confidences: np.ndarray


def read_predictions(
    hidden_states: torch.Tensor,
    head: nn.Module,
    transform: LogitTransform,
    positions: torch.Tensor,
    targets: torch.Tensor,
    measure: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Predictions:
    """Read an exit at some positions; its logits exist a chunk of rows at a time.

    Args:
        hidden_states (`torch.Tensor` of shape `(rows, hidden)`): After the exit's norm.
        head (`nn.Module`): Its output head.
        transform ([`LogitTransform`]): What the host does around its head.
        positions (`torch.Tensor` of shape `(n,)`): Rows to read, one or more.
        targets (`torch.Tensor` of shape `(n,)`): Token that follows each.
        measure (`Callable`, *optional*): Another measure of confidence, from float32 logits of
            shape `(rows, vocab)`; by default the probability of the most probable token.

    Returns:
        [`Predictions`]: At the positions.
    """
    device = hidden_states.device
    rows = chunk_rows(head.out_features, device)  # type: ignore[arg-type]
    chunks = zip(positions.to(device).split(rows), targets.split(rows), strict=True)
    read = [
        _read_chunk(transform.read(hidden_states[at], head), wanted, measure)
        for at, wanted in chunks
    ]
    losses, tokens, confidences = (np.concatenate(part) for part in zip(*read, strict=True))
    return Predictions(losses, tokens, confidences)


def _read_chunk(
    logits: torch.Tensor,
    targets: torch.Tensor,
    measure: Callable[[torch.Tensor], torch.Tensor] | None,
) -> tuple[np.ndarray, ...]:
    """Losses, top tokens and confidences, from logits of shape `(rows, vocab)`."""
    logits = logits.float()
    targets = targets.to(logits.device).unsqueeze(1)
    normaliser = logits.logsumexp(dim=1)
    losses = normaliser - logits.gather(1, targets).squeeze(1)
    largest, tokens = logits.max(dim=1)
    # rounding may put a certain prediction a hair above 1
    confidences = (largest - normaliser).exp().clamp(max=1) if measure is None else measure(logits)
    return tuple(tensor.cpu().numpy() for tensor in (losses, tokens, confidences))


class ExitTally:
    """Sums over the predictions of one exit, a batch at a time, in float64.

    Args:
        num_bins (`int`): Bins of the calibration error.
    """

    def __init__(self, num_bins: int) -> None:
        self.count, self.loss, self.correct, self.agreed = 0, 0.0, 0, 0
        self.bins = CalibrationBins(num_bins)

    def add(self, predictions: Predictions, targets: np.ndarray, deepest: np.ndarray) -> None:
        """Add predictions.

        Args:
            predictions ([`Predictions`]): Of the exit.
            targets (`numpy.ndarray` of shape `(rows,)`): The right tokens.
            deepest (`numpy.ndarray` of shape `(rows,)`): The deepest exit's top tokens.
        """
        correct = predictions.tokens == targets
        self.count += len(targets)
        self.loss += float(predictions.losses.sum(dtype=np.float64))
        self.correct += int(correct.sum())
        self.agreed += int((predictions.tokens == deepest).sum())
        self.bins.add(predictions.confidences, correct)

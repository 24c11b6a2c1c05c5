"""What a run trains on: positions that it computes, tokens that it sees, targets among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..models.familial.losses import IGNORE_INDEX


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a run so far, over all processes.

    Attributes:
        computed (`int`): Positions that the model ran, padding included.
        seen (`int`): Of these, the ones that are no padding (`attention_mask` is not 0).
        targets (`int`): Positions that have a loss.
        longest (`int`): Positions of the longest sequence, padding included.
    """

    computed: int = 0
    seen: int = 0
    targets: int = 0
    longest: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(
            self.computed + other.computed,
            self.seen + other.seen,
            self.targets + other.targets,
            max(self.longest, other.longest),
        )


def main_input(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return a tensor of shape `(batch, seq)` that stands for the positions of a batch."""
    ids: Any = inputs.get("input_ids")
    return inputs["inputs_embeds"][..., 0] if ids is None else ids


def count_targets(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return the number of targets of a batch, of shape `()`, as the loss reads them."""
    given = inputs.get("shift_labels")
    targets = inputs["labels"][..., 1:] if given is None else given
    return (targets != IGNORE_INDEX).sum()


def count_tokens(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Count the tokens of one batch on its own device, without waiting for it.

    Args:
        inputs (`Mapping[str, Any]`): What the model is given, with `labels`.

    Returns:
        `torch.Tensor` of shape `(4,)`: The fields of [`TokenCounts`].
    """
    ids, mask = main_input(inputs), inputs.get("attention_mask")
    computed = ids.new_full((), ids.numel(), dtype=torch.int64)
    seen = computed
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
        seen = torch.count_nonzero(mask)
    labelled = inputs.get("labels") is not None or inputs.get("shift_labels") is not None
    targets = count_targets(inputs) if labelled else torch.zeros_like(computed)
    longest = torch.full_like(computed, ids.shape[1])
    return torch.stack((computed, seen, targets.to(computed), longest))


def add_counts(rows: torch.Tensor) -> torch.Tensor:
    """Sum counts of shape `(n, 4)`; of the last column the largest stays."""
    return torch.cat((rows[:, :3].sum(0), rows[:, 3:].amax(0)))

"""The mean loss of each exit since the last log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerState
from transformers.trainer_pt_utils import nested_gather


class ExitLosses:
    """Sums of the losses of each exit since the last log, and the optimiser steps in each sum."""

    def __init__(self, num_exits: int) -> None:
        self._sums: list[Any] = [0.0] * num_exits
        self._steps: list[set[int]] = [set() for _ in range(num_exits)]

    def add(self, losses: Mapping[int, torch.Tensor], scale: float, state: TrainerState) -> None:
        """Add the losses of some exits, times `scale`, to those of the current optimiser step."""
        for k, loss in losses.items():
            self._sums[k] = self._sums[k] + loss.detach().float().reshape(()) * scale
            self._steps[k].add(state.global_step)

    def means(self, parallel_mode: Any) -> dict[str, float]:
        """Return `exit_<k>_loss`, a mean over steps and processes, and reset the sums.

        An exit that no step has drawn has no entry.
        """
        seen = [k for k, steps in enumerate(self._steps) if steps]
        if not seen:
            return {}
        sums = torch.stack([self._sums[k] / len(self._steps[k]) for k in seen])
        means = nested_gather(sums, parallel_mode).view(-1, len(seen)).mean(0).tolist()
        self.clear()
        return {f"exit_{k}_loss": mean for k, mean in zip(seen, means, strict=True)}

    def clear(self) -> None:
        """Drop all sums."""
        self.__init__(len(self._sums))  # type: ignore[misc]

"""The relay cache of a server: it goes on from taps that a device made."""

from __future__ import annotations

from typing import Any

import torch

from ..models.familial.relay_cache import RelayCache


class UpperCache(RelayCache):
    """A relay cache from an exit, which is not read here, to the deepest exit."""

    def __init__(self, model: Any, exit_idx: int) -> None:
        super().__init__(model, [exit_idx, -1])
        self._branches[0] = None  # nobody reads that exit, so its private layers need not run

    def push(
        self, taps: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> None:
        """Take taps of new columns, `(batch, new, hidden)`; they become pending.

        The first segment never runs for them, and its keys and values stay empty. `positions` and
        `mask` have the shape `(batch, new)`; by default positions count on and nothing is padding.
        """
        new = self._extend(taps, positions, mask)
        self._keep(0, taps)
        self._done[0] += new

"""Positions and padding of the columns that a relay has seen."""

from __future__ import annotations

from typing import Any

import torch


class Columns:
    """Position ids and attention mask, as far as they differ from counting and from ones.

    Args:
        first (`int`): Columns that the cache held at the start, which count from 0.

    Attributes:
        position_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*): From `first` on;
            `None` while all rows count on from the first position.
        attention_mask (`torch.Tensor` of shape `(batch, first + seq)`, *optional*): 0 for padding.
    """

    def __init__(self, first: int) -> None:
        self.first = self._length = first
        self.position_ids: torch.Tensor | None = None
        self.attention_mask: torch.Tensor | None = None

    def extend(
        self,
        given: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> None:
        """Add columns.

        Args:
            given (`torch.Tensor` of shape `(batch, new, ...)`): What stands in them.
            position_ids (`torch.LongTensor` of shape `(batch, new)`, *optional*): By default they
                count on.
            attention_mask (`torch.Tensor` of shape `(batch, new)` or of all columns, *optional*):
                By default there is no padding.
        """
        batch, new = given.shape[:2]
        length, old = self._length, self.position_ids
        if old is not None or position_ids is not None:
            counted = torch.arange(length, length + new, device=given.device).expand(batch, new)
            if position_ids is None:
                assert old is not None
                position_ids = counted - length + old[:, -1:] + 1
            if old is None and not torch.equal(position_ids.expand(batch, new), counted):
                old = torch.arange(self.first, length, device=given.device).expand(batch, -1)
            if old is not None:
                self.position_ids = torch.cat((old, position_ids.expand(batch, new)), 1)
        if attention_mask is None and self.attention_mask is not None:
            attention_mask = self.attention_mask.new_ones((batch, new))
        if attention_mask is not None and attention_mask.shape[1] == new:
            seen = self.attention_mask
            if seen is None:
                seen = attention_mask.new_ones((batch, length))
            attention_mask = torch.cat((seen, attention_mask), 1)
        self.attention_mask = attention_mask
        self._length += new

    def crop(self, count: int) -> None:
        """Forget the last columns."""
        self._length -= count
        if count and self.position_ids is not None:
            self.position_ids = self.position_ids[:, :-count]
        if count and self.attention_mask is not None:
            self.attention_mask = self.attention_mask[:, :-count]

    def inputs(self, start: int, new: int, device: torch.device) -> dict[str, Any]:
        """Positions and mask for a pass over `new` columns from `start` on, and all before."""
        if self.position_ids is None:
            positions = torch.arange(start, start + new, device=device).unsqueeze(0)
        else:
            positions = self.position_ids[:, start - self.first : start - self.first + new]
        inputs: dict[str, Any] = {"position_ids": positions}
        if self.attention_mask is not None:
            inputs["attention_mask"] = self.attention_mask[:, : start + new]
        return inputs

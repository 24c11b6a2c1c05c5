"""FLOPs of the passes of a multi-exit loss, of its references and of generation."""

from __future__ import annotations

from typing import Any

import torch

from ..flops import forward_flops
from ..models.familial import FamilialConfig, FamilialModel
from .budget import flops_per_token
from .run_record import count_tokens, main_input


LENGTHS = (16, 32)  # tokens; FLOPs per token are linear in the length


class PassMeter:
    """A counter of the FLOPs and tokens that a trainer's families run between two steps.

    A pass that learns costs the FLOPs of `training_flops_per_token`. Every other pass costs its
    forward FLOPs. They are estimated from two lengths, with attention quadratic in the length.
    """

    def __init__(self, learning: Any) -> None:
        self._learning = learning  # the model that is trained, with its adapters
        self._costs: dict[tuple[int, int | None], tuple[float, float]] = {}
        self.clear()

    def clear(self) -> None:
        """Drop all counts."""
        self._flops = 0.0
        self._tokens: list[torch.Tensor] = []

    def add(
        self, model: FamilialModel, inputs: dict[str, Any], exit_idx: int | None, learns: bool
    ) -> None:
        """Count one pass up to `exit_idx`, or to all exits if it is `None`."""
        ids = main_input(inputs)
        rows, length = ids.shape
        cache_of = inputs.get("past_key_values")
        past = 0 if cache_of is None else int(cache_of.get_seq_length())
        if not learns:
            self._flops += rows * self._forward(model.config, exit_idx, length, past)
            return
        share = 1.0
        if exit_idx is not None:
            ends = (self._forward(model.config, k, length, past) for k in (exit_idx, None))
            share = next(ends) / next(ends)
        self._flops += share * flops_per_token(self._learning, length) * ids.numel()
        self._tokens.append(count_tokens(inputs))

    def take(self) -> tuple[float, list[torch.Tensor]]:
        """Return the FLOPs of all passes and the token counts of those that learn. Reset both."""
        taken = self._flops, self._tokens
        self.clear()
        return taken

    def _forward(
        self, config: FamilialConfig, exit_idx: int | None, length: int, past: int
    ) -> float:
        """Return the forward FLOPs of one row of `length` tokens after `past` others."""
        key = id(config), exit_idx
        if key not in self._costs:
            self._costs[key] = _line(*(_whole_row(config, exit_idx, n) for n in LENGTHS))
        slope, offset = self._costs[key]
        return (offset + slope * (length + past)) * length


def _whole_row(config: FamilialConfig, exit_idx: int | None, length: int) -> float:
    """Return the forward FLOPs per token of one row, up to one exit or to all exits."""
    flops = forward_flops(config, length)
    return (flops.all_exits if exit_idx is None else flops.member(exit_idx)).total / length


def _line(short: float, long: float) -> tuple[float, float]:
    """Return slope and offset of the line through the values at both lengths."""
    slope = (long - short) / (LENGTHS[1] - LENGTHS[0])
    return slope, short - slope * LENGTHS[0]

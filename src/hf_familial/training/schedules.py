"""The weight of each exit's loss, a function of the optimiser step alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..models.familial.configuration_familial import check_choice


# Weight of an exit before normalisation, from its depth in layers.
SCHEMES: Mapping[str, Callable[[int], float]] = {
    "uniform": lambda depth: 1.0,
    "linear": float,
    "sqrt": math.sqrt,
    "inverse": lambda depth: 1.0 / depth,
    "sum": lambda depth: depth * (depth + 1) / 2,
}
SCHEDULES = ("constant", "warmup", "decay", "rotating", "gradual")


def exit_weights(scheme: str | Sequence[float], depths: Sequence[int]) -> tuple[float, ...]:
    """Return the weights of the exits' losses, scaled to sum to 1.

    Args:
        scheme (`str` or `Sequence[float]`): `"uniform"`, 1/G each (arXiv:2512.23407); `"linear"`,
            `"sqrt"` or `"inverse"` in the depth (the loss scales of torchtune's early-exit recipe);
            `"sum"`, the sum of all depths up to it (LayerSkip, arXiv:2404.16710); or one number of
            0 or more per exit.
        depths (`Sequence[int]`): Depth of every exit, in layers.

    Returns:
        `tuple[float, ...]`: One weight per exit, shallowest first.

    Raises:
        ValueError: If the scheme is unknown, or its numbers are not one per exit, or not weights.
    """
    if isinstance(scheme, str):
        check_choice("exit_weights", scheme, [*SCHEMES, "a list of numbers"])
        weights = [SCHEMES[scheme](depth) for depth in depths]
    else:
        weights = [float(weight) for weight in scheme]
    if len(weights) != len(depths):
        raise ValueError(
            f"`exit_weights` must hold one number for each of the {len(depths)} exits, got "
            f"{len(weights)}: {weights}."
        )
    total = sum(weights)
    if not all(0 <= weight < math.inf for weight in weights) or total == 0:
        raise ValueError(f"`exit_weights` must be 0 or more, and not all 0, got {weights}.")
    return tuple(weight / total for weight in weights)


@dataclass(frozen=True)
class ExitSchedule:
    """Weights of the exits' losses at every optimiser step; they always sum to 1.

    The deepest exit is always trained. Of the early exits:

    - `"constant"`: all are, from the first step to the last;
    - `"warmup"`: their weight grows linearly from 0 over the first `fraction` of the steps;
    - `"decay"`: it falls linearly to 0 over the last `fraction` (the idea of Ruyi2,
      arXiv:2602.22543);
    - `"rotating"`: one at a time, in turn (LayerSkip's rotational curriculum, arXiv:2404.16710);
    - `"gradual"`: the deeper join first, evenly over the first `fraction` (LayerSkip's too).

    Raises:
        ValueError: If the kind is unknown, or the fraction is not within (0, 1].
    """

    weights: tuple[float, ...]  # of all exits, see `exit_weights`
    kind: str = "constant"
    total_steps: int = 0  # optimiser steps of the whole run
    fraction: float = 0.5  # share of the steps over which the weights change

    def __post_init__(self) -> None:
        check_choice("exit_schedule", self.kind, SCHEDULES)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"`exit_schedule_fraction` must lie in (0, 1], got {self.fraction}.")
        if self.kind != "constant" and self.weights[-1] == 0:
            raise ValueError(
                f"the deepest exit must have a weight under the {self.kind!r} schedule, got 0."
            )

    def at(self, step: int) -> tuple[float, ...]:
        """Return the weights after `step` optimiser steps; 0 for an exit that is not trained."""
        early = len(self.weights) - 1
        scaled = [w * self._scale(k, early, step) for k, w in enumerate(self.weights[:-1])]
        scaled.append(self.weights[-1])
        total = sum(scaled)
        return tuple(weight / total for weight in scaled)

    def _scale(self, exit_idx: int, early: int, step: int) -> float:
        """Return the factor of an early exit's weight, between 0 and 1."""
        span = max(1.0, self.fraction * self.total_steps)
        if self.kind == "warmup":
            return min(1.0, step / span)
        if self.kind == "decay":
            return min(1.0, max(0.0, (self.total_steps - step) / span))
        if self.kind == "rotating":
            return float(step % early == exit_idx)
        if self.kind == "gradual":
            # the deepest early exit joins at once, each shallower one a share of the span later
            return float(step >= span * (early - 1 - exit_idx) / early)
        return 1.0

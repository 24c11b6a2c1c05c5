"""Weights of the exits in the loss, and their change over the optimiser steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..models.familial.configuration_familial import check_choice


# weight of an exit as a function of its depth in layers, before the weights are scaled
SCHEMES: Mapping[str, Callable[[int], float]] = {
    "uniform": lambda depth: 1.0,
    "linear": float,
    "sqrt": math.sqrt,
    "inverse": lambda depth: 1.0 / depth,
    "sum": lambda depth: depth * (depth + 1) / 2,
}
SCHEDULES = ("constant", "warmup", "decay", "rotating", "gradual")


def exit_weights(scheme: str | Sequence[float], depths: Sequence[int]) -> tuple[float, ...]:
    """Return the weights of the exits in the loss, scaled so that their sum is 1.

    | scheme | weight of an exit at depth d, before scaling |
    |---|---|
    | `"uniform"` | 1 (arXiv:2512.23407) |
    | `"linear"`, `"sqrt"`, `"inverse"` | d, sqrt(d), 1/d (torchtune's early-exit recipe) |
    | `"sum"` | 1 + 2 + ... + d (LayerSkip, arXiv:2404.16710) |

    Args:
        scheme (`str` or `Sequence[float]`): Name of a scheme of the table, or one number per exit,
            shallowest first. Each number must be 0 or more.
        depths (`Sequence[int]`): Depth of each exit, in layers.

    Returns:
        `tuple[float, ...]`: One weight per exit, shallowest first.

    Raises:
        ValueError: If the scheme is unknown, if there is not one number per exit, if a number is
            negative or not finite, or if all numbers are 0.

    Example:
        >>> exit_weights("linear", [8, 16, 24])  # (1/6, 2/6, 3/6)
    """
    if isinstance(scheme, str):
        check_choice("exit_weights", scheme, [*SCHEMES, "a list of numbers"])
        weights = [SCHEMES[scheme](depth) for depth in depths]
    else:
        weights = [float(weight) for weight in scheme]
    if len(weights) != len(depths):
        raise ValueError(
            f"`exit_weights` must have one number for each of the {len(depths)} exits, got "
            f"{len(weights)}: {weights}."
        )
    total = sum(weights)
    if not all(0 <= weight < math.inf for weight in weights) or total == 0:
        raise ValueError(f"`exit_weights` must be 0 or more, and not all 0, got {weights}.")
    return tuple(weight / total for weight in weights)


@dataclass(frozen=True)
class ExitSchedule:
    """Weights of the exits in the loss at every optimiser step. Their sum is always 1.

    The deepest exit is trained at every step. `kind` sets when the early exits are trained:

    - `"constant"`: All early exits are trained at every step.
    - `"warmup"`: Their weights grow linearly from 0 during the first `fraction` of the steps.
    - `"decay"`: Their weights fall linearly to 0 during the last `fraction` of the steps (an idea
      of Ruyi2, arXiv:2602.22543).
    - `"rotating"`: Each step trains one early exit, in turn (rotational curriculum of LayerSkip,
      arXiv:2404.16710).
    - `"gradual"`: The early exits start one after another, the deepest first, spread evenly over
      the first `fraction` of the steps (also from LayerSkip).

    Raises:
        ValueError: If `kind` is unknown, if `fraction` is not in (0, 1], or if the deepest exit has
            the weight 0 and `kind` is not `"constant"`.

    Example:
        >>> ExitSchedule((0.5, 0.5), "warmup", total_steps=100).at(25)  # (1/3, 2/3)
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
                f"The deepest exit must have a weight above 0 with the schedule {self.kind!r}, "
                "because in some steps it is the only exit trained."
            )

    def at(self, step: int) -> tuple[float, ...]:
        """Return the weights after `step` optimiser steps. An exit with 0 is not trained."""
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
            # the deepest early exit starts at step 0, each shallower one span / early steps later
            return float(step >= span * (early - 1 - exit_idx) / early)
        return 1.0

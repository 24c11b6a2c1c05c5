"""Relay policies of the package, beside those that travel with a family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..models.familial.relay_policies import RelayPolicy, confidence


@dataclass(frozen=True)
class HandoffRelay(RelayPolicy):
    """A shallow member answers until a rule says "too hard"; a deeper one writes on from there.

    Decided for each row; what was handed over does not come back.

    Attributes:
        from_exit (`int`): The shallow exit.
        to_exit (`int`): The deep exit.
        after (`int`, *optional*): Hand over after this many tokens.
        below (`float`, *optional*): Hand over when the mean confidence of the last `window` tokens
            falls below this.
        window (`int`): Number of tokens of that mean; at least one, and no rule before it is full.
        measure (`str`): `"max_prob"`, `"margin"` or `"entropy"`, see `confidence`.

    Raises:
        ValueError: If there is no rule, or a number is out of range.
    """

    from_exit: int = 0
    to_exit: int = -1
    after: int | None = None
    below: float | None = None
    window: int = 4
    measure: str = "max_prob"

    def __post_init__(self) -> None:
        if self.after is None and self.below is None:
            raise ValueError("`HandoffRelay` needs a rule: `after` or `below`, got neither.")
        if self.window < 1 or (self.after is not None and self.after < 0):
            raise ValueError(
                "`window` must be 1 or more and `after` 0 or more, got "
                f"`window={self.window}`, `after={self.after}`."
            )
        confidence(torch.zeros(2), self.measure)

    def exits(self, num_exits: int) -> tuple[int, ...]:
        """Return the shallow and the deep exit."""
        return self.from_exit, self.to_exit

    def new_state(self, batch_size: int) -> dict[str, Any]:
        """Return a record of recent confidences, and of the rows handed over."""
        return {"recent": [], "count": 0, "over": torch.zeros(batch_size, dtype=torch.bool)}

    def reads(self, exit_idx: int, state: dict[str, Any]) -> bool:
        """Return whether some row is not handed over yet."""
        return not bool(state["over"].all())

    def leaves(self, exit_idx: int, logits: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        """Return the rows that the shallow member still answers."""
        state["recent"] = [*state["recent"], confidence(logits, self.measure)][-self.window :]
        state["over"] = over = state["over"].to(logits.device)
        if self.after is not None and state["count"] >= self.after:
            over |= True
        if self.below is not None and len(state["recent"]) == self.window:
            over |= torch.stack(state["recent"]).mean(0) < self.below
        state["count"] += 1
        return ~over

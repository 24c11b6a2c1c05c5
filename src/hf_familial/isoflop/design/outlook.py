"""What is expected of a design before it runs: where optima are, what it takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .plans import RunPlan
from .rules import ExpectedLaw


@dataclass(frozen=True)
class Bracket:
    """One curve of constant FLOPs, and whether its lowest point is expected inside.

    Attributes:
        budget (`float`): FLOPs.
        G (`int`): Number of exits.
        sizes (`tuple[int, ...]`): N of its runs, rising.
        best (`int`): N of the run whose loss is expected to be lowest, at its true cost.
        brackets (`bool`): Whether that is neither the smallest nor the largest of three or more.
    """

    budget: float
    G: int
    sizes: tuple[int, ...]
    best: int
    brackets: bool

    @property
    def advice(self) -> str:
        """What to change, if anything."""
        if self.brackets:
            return "brackets its expected optimum"
        if len(self.sizes) < 3:
            return "needs three sizes or more"
        return f"add sizes {'below' if self.best == self.sizes[0] else 'above'} {self.best:,}"


def brackets(runs: Iterable[RunPlan], law: ExpectedLaw) -> tuple[Bracket, ...]:
    """Look where every curve of constant FLOPs is expected to be lowest.

    The law is read at the N and D of the runs themselves, heads paid for, so no `C = 6ND` enters.

    Args:
        runs (`Iterable[RunPlan]`): Of a design.
        law ([`ExpectedLaw`]): What is expected.

    Returns:
        `tuple[Bracket, ...]`: By budget, then G.
    """
    curves: dict[tuple[float, int], dict[int, int]] = {}
    for run in runs:
        curves.setdefault((run.budget, run.G), {})[run.N] = run.tokens
    found = []
    for (budget, G), curve in sorted(curves.items()):
        sizes = tuple(sorted(curve))
        best = min(sizes, key=lambda N: law.reducible(N, curve[N]))
        inside = best not in (sizes[0], sizes[-1])
        found.append(Bracket(budget, G, sizes, best, inside))
    return tuple(found)

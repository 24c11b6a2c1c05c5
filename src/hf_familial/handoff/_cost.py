"""What a hand-over cost the side that had to compute something anew."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recomputed:
    """What it cost to compute keys and values anew that did not travel.

    Attributes:
        positions (`int`): Positions that were run, padding included, over all rows.
        layers (`int`): Layers that each of them ran through.
        flops (`int`): Of every matmul and attention, a multiply-add as two, causal attention
            counted in full.
        seconds (`float`): Wall time.
        tap_error (`float`): Largest difference of the taps that came from those computed here, as
            a share of the largest of these: what rounding on the way did, if it is small.
    """

    positions: int
    layers: int
    flops: int
    seconds: float
    tap_error: float

    @property
    def layer_passes(self) -> int:
        """Positions times layers."""
        return self.positions * self.layers

"""What a hand-over cost the side that had to compute something anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from ..flops import FORMULAS


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


class FlopTally(TorchDispatchMode):
    """Counts FLOPs in a `with` block by torch's formulas, and follows no modules.

    `FlopCounterMode` does, and fails without gradients in hosts that pass parts of a parameter to a
    module.

    Attributes:
        total (`int`): FLOPs so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        own = {packet: shape_wrapper(formula) for packet, formula in FORMULAS.items()}
        self._formulas: Mapping[Any, Callable[..., int]] = {**flop_registry, **own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=found)
        return found

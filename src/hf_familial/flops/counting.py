"""FLOP counters with torch's own formulas, and formulas for operations that torch lacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    conv_flop_count,
    flop_registry,
    shape_wrapper,
)


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """Return the FLOPs of two matmuls (scores and values) over all pairs of positions."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[-2] * (width + v[-1])


def _addmm_flops(total: torch.Size, a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _conv_backward_flops(
    grad_out: torch.Size,
    x: torch.Size,
    weight: torch.Size,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Count the forward FLOPs once per computed gradient. Torch's formula ignores the groups."""
    transposed, output_mask = args[4], args[7]
    forward = conv_flop_count(list(x), list(weight), list(grad_out), transposed)
    return forward * sum(output_mask[:2])


# torch has formulas for the attention kernels of accelerators, but not for that of the CPU
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
FORMULAS = CPU_ATTENTION | {
    torch.ops.aten.addmm_: _addmm_flops,
    torch.ops.aten.convolution_backward: _conv_backward_flops,
}


def counter() -> FlopCounterMode:
    """Return torch's FLOP counter with the additional `FORMULAS`."""
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


@dataclass(frozen=True)
class Flops:
    """FLOPs of a part of a model. A multiply-add counts as two.

    Attributes:
        matmul (`int`): FLOPs of products of activations with weights, convolutions included. They
            are 2 per weight and token (Kaplan et al. 2020, arXiv:2001.08361, table 1).
        attention (`int`): FLOPs of products of activations with activations. Attention scores and
            values are 2 x 2 x width per pair of positions and head, over all pairs (Hoffmann et al.
            2022, arXiv:2203.15556, appendix F). Products with states of linear attention count too.
    """

    matmul: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        """The sum of `matmul` and `attention`."""
        return self.matmul + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.matmul + other.matmul, self.attention + other.attention)


class FlopTally(TorchDispatchMode):
    """A FLOP counter for a `with` block that separates matmuls with weights from attention.

    FLOPs are recorded under the current key `place`. A tensor computed only from `weights` counts
    as a weight, for example one expert's slice of stacked experts. Torch's `FlopCounterMode` tracks
    modules instead. Without gradients it fails for backbones that pass parts of a parameter to a
    module.
    """

    def __init__(self, weights: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.place: object = None
        self._booked: Counter[tuple[object, bool]] = Counter()
        # keep the storages alive, so that no other tensor gets the same address
        self._weights = {_address(weight): weight.untyped_storage() for weight in weights}
        own = {packet: shape_wrapper(formula) for packet, formula in FORMULAS.items()}
        self._formulas: Mapping[Any, Callable[..., int]] = {**flop_registry, **own}

    @property
    def total(self) -> int:
        """The FLOPs so far."""
        return sum(self._booked.values())

    def at(self, place: object) -> Flops:
        """Return the FLOPs recorded under the key `place`."""
        return Flops(self._booked[place, True], self._booked[place, False])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = self._formulas.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        found = func(*args, **kwargs)
        floats = [t for t in tree_leaves((args, kwargs)) if _is_float(t)]
        known = [_address(t) in self._weights for t in floats]
        if formula is not None:
            self._booked[self.place, any(known)] += formula(*args, **kwargs, out_val=found)
        elif known and all(known) and func._overloadpacket is not torch.ops.aten.embedding:
            made = [t for t in tree_leaves(found) if _is_float(t)]
            self._weights.update({_address(t): t.untyped_storage() for t in made})
        return found


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _address(tensor: torch.Tensor) -> int:
    """Return the identity of a tensor's storage, which its views share."""
    return tensor.untyped_storage()._cdata

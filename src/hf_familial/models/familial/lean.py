"""A lean pass through Llama-shaped layers, for the few tokens of a decoding step.

The host's forward spends much of a small step on modules, masks and copies. A lean pass computes
the same from fused weights. Nothing is taken on trust: a backbone's layers must have the right
structure (`lean_layers.py`), and each one's lean pass must agree with the host's own once, on near
and on far positions; else there is no lean pass and the host's forward runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from .contract import Contract
from .exits import read_out
from .lean_cache import GrowingLayer
from .lean_layers import (
    Projection,
    is_linear,
    is_llama_shaped,
    is_plain,
    is_rms_norm,
    read_layer,
    read_norm,
)
from .lean_pass import LeanHead, LeanRunner, Reading, RotaryTable
from .segments import Segment, run_segment, slice_config


# Tokens at once above which the host's own pass is as fast: a prompt.
MAX_TOKENS = 16

# Largest difference from the host's pass, relative to the largest value: far above rounding, far
# below what any other arithmetic would give.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# Kinds of rotary embedding whose frequencies depend on the length of the text.
_CHANGING_ROTARY = ("dynamic", "longrope")

# Where a config says how far positions go.
_POSITIONS = ("max_position_embeddings", "original_max_position_embeddings")

# What a caller may want to see of a pass, which a lean pass does not show.
_SHOWN = ("output_attentions", "output_hidden_states")


class Lean:
    """The lean passes of one model: asked for by segment and by head, built when first used.

    Keep one with the model. It holds copies of weights (`nbytes`), follows every change of them,
    and copies or pickles as an empty one.
    """

    def __init__(self) -> None:
        self._readings: dict[nn.Module, tuple[list[Any], Reading]] = {}

    def __reduce__(self) -> tuple[type[Lean], tuple[()]]:
        return Lean, ()

    @property
    def nbytes(self) -> int:
        """`int`: Bytes of all copies of weights."""
        return sum(reading.nbytes for _, reading in self._readings.values())

    def clear(self) -> None:
        """Give the memory back; what is asked for next is built anew."""
        self._readings.clear()

    def runner(
        self,
        backbone: Any,
        contract: Contract,
        segment: Segment,
        cache_layers: Sequence[Any],
    ) -> LeanRunner | None:
        """The lean pass of a segment, if there is one.

        Ask again for every generation: modules may have been hooked, wrapped or moved since. The
        first time a layer is asked for, its pass is compared with the host's.

        Args:
            backbone (`PreTrainedModel`): The host's decoder.
            contract ([`Contract`]): Where it keeps its parts.
            segment ([`Segment`]): What to run; its `norm` is not applied.
            cache_layers (`Sequence[DynamicLayer]`): The segment's slots in the cache.

        Returns:
            [`LeanRunner`], or `None` where the host's own pass must be used: layers of another
            shape, windows, hooks, adapters, quantised weights, training mode, gradients, autocast,
            attentions or hidden states asked for, a device or a cache of another kind.
        """
        layers = list(segment.layers)
        if not _allowed(backbone, segment) or not all(map(is_full_attention, cache_layers)):
            return None
        owner = backbone.get_submodule(contract.owner)
        rotary: Any = getattr(owner, "rotary_emb", None)
        if not all(map(is_llama_shaped, layers)) or not _is_rotary(rotary, layers):
            return None
        readings = [self._reading(layer, read_layer) for layer in layers]
        table = self._reading(rotary, RotaryTable)
        if len({reading.fresh().groups for reading in readings}) > 1:
            return None
        for depth, (layer, reading) in enumerate(zip(layers, readings, strict=True), segment.start):
            if depth not in reading.agrees:
                alone = LeanRunner([reading], table)
                reading.agrees[depth] = _agrees(backbone, contract, layer, depth, alone)
            if not reading.agrees[depth]:
                return None
        return LeanRunner(readings, table)

    def head(self, norm: Any, head: Any, ops: tuple[tuple[str, float], ...]) -> LeanHead | None:
        """An exit's norm and output head as one lean call, if there is one.

        Args:
            norm (`nn.Module`): The exit's norm.
            head (`nn.Module`): Its output head.
            ops (`tuple[tuple[str, float], ...]`): What the host does around it, see `logit_ops`.

        Returns:
            [`LeanHead`], or `None` where the modules themselves must be called.
        """
        plain = is_plain(norm) and is_plain(head) and is_rms_norm(norm) and is_linear(head)
        if not plain or _watched(head.weight.device.type):
            return None
        of_norm = self._reading(norm, read_norm)
        of_head = self._reading(head, lambda module: Projection([module]))
        lean, key = LeanHead(of_norm, of_head, ops), (of_norm, ops)
        if key not in of_head.agrees:
            taps = _noise((3, head.in_features), head.weight)
            right = read_out(norm(taps), head, ops)
            of_head.agrees[key] = _close(lean(taps), right) and _close(lean(taps[:1]), right[:1])
        return lean if of_head.agrees[key] else None

    def _reading(self, module: nn.Module, read: Callable[[Any], Any]) -> Reading:
        """What was read of a module, or a new reading if more than values has changed in it."""
        signature, reading = self._readings.get(module, (None, None))
        found = _signature(module)
        if reading is None or signature != found:
            tensors = [*module.parameters(), *module.buffers()]
            reading = Reading(tensors, lambda: read(module))
            self._readings[module] = found, reading
        reading.fresh()  # parameters may have moved, which a step does not look for
        return reading


def _signature(module: nn.Module) -> list[Any]:
    """The classes, parameters and plain settings of a module and of those in it."""
    found: list[Any] = [id(tensor) for tensor in (*module.parameters(), *module.buffers())]
    for part in module.modules():
        found.append(type(part))
        found += [value for value in part.__dict__.values() if isinstance(value, (int, float, str))]
    return found


def is_full_attention(cache_layer: Any) -> bool:
    """Whether a slot of a cache shows all tokens it was given, and nothing else."""
    return type(cache_layer) in (DynamicLayer, GrowingLayer)


def _allowed(backbone: Any, segment: Segment) -> bool:
    """Whether nothing around the layers asks for the host's own pass."""
    config = slice_config(backbone.config, segment.start, segment.start + len(segment.layers))
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "layer_types", None) is None and getattr(
        config, "sliding_window", None
    )
    return (
        types == {"full_attention"}
        and not windowed
        and config._attn_implementation in ("sdpa", "eager")
        and not any(getattr(config, name, False) for name in _SHOWN)
        and is_plain(backbone)
        and not _watched(backbone.device.type)
    )


def _watched(device: str) -> bool:
    """Whether gradients or autocast want to see every operation."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled(device)


def _is_rotary(rotary: Any, layers: Sequence[Any]) -> bool:
    """Whether positions turn all of every head, by the same angles whatever the text's length."""
    kind, angles = getattr(rotary, "rope_type", None), getattr(rotary, "inv_freq", None)
    return (
        isinstance(kind, str)
        and kind not in _CHANGING_ROTARY
        and isinstance(angles, torch.Tensor)
        and all(layer.self_attn.head_dim == 2 * angles.numel() for layer in layers)
        and is_plain(rotary)
    )


def _agrees(
    backbone: Any, contract: Contract, layer: nn.Module, depth: int, lean: LeanRunner
) -> bool:
    """Whether a lean pass gives what the host's does, near the start and beyond its positions.

    One layer at a time: over many, rounding alone grows past any tolerance that would tell.
    """
    config, embedding = backbone.config, backbone.get_input_embeddings()
    segment = Segment([layer], depth, None, [0])
    for first in (0, _far(config)):
        slots, hosts = [GrowingLayer()], Cache(layers=[DynamicLayer()])
        for start, stop in ((0, 5), (5, 6), (6, 9)):
            positions = torch.arange(first + start, first + stop, device=backbone.device)[None]
            if depth == 0:
                ids = positions % embedding.num_embeddings
                taps, entry = embedding(ids), {"input_ids": ids}
            else:
                taps = _noise((1, stop - start, config.hidden_size), embedding.weight)
                entry = {"inputs_embeds": taps}
            entry |= {"position_ids": positions, "use_cache": True}
            right = run_segment(backbone, contract, segment, hosts, **entry).last_hidden_state
            if not _close(lean(taps, slots, positions if first else None), right):
                return False
    return True


def _far(config: Any) -> int:
    """A position beyond all that a config says of positions."""
    rope = getattr(config, "rope_parameters", None) or {}
    places = [config.__dict__, rope]
    limits = [place.get(name) for place in places for name in _POSITIONS]
    return 3 + 2 * max(limit or 0 for limit in limits)


def _noise(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Normal numbers, always the same, from a generator of their own."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def _close(found: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two results are the same but for rounding; never if one is not finite."""
    if found.shape != right.shape:
        return False
    largest, difference = right.float().abs().max(), (found.float() - right.float()).abs().max()
    return bool(difference <= _TOLERANCE[right.dtype] * largest)

"""Fused passes through Llama-shaped layers, for the few tokens of a decoding step.

The host's forward spends much of a small step on modules, masks and copies. A fused pass computes
the same straight from the layers' own parameters. It copies none of them, so it misses no change of
a weight. A backbone's layers must have the right structure (`_fused_layers.py`), and each layer's
fused pass must agree once with the host's own pass, at near and at far positions. Otherwise the
host's forward runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from ..models.familial.segments import HostDecoder, Segment, slice_config
from ._fused_layers import (
    Projection,
    RootMeanSquare,
    is_linear,
    is_llama_shaped,
    is_plain,
    is_rms_norm,
    read_layer,
    read_norm,
)
from ._fused_pass import FusedHead, FusedPass, RotaryTable
from ._growing_cache import GrowingLayer


# Largest difference from the host's pass, relative to the largest value: far above rounding, far
# below what any other arithmetic would give.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# Kinds of rotary embedding whose frequencies depend on the length of the text.
_CHANGING_ROTARY = ("dynamic", "longrope")

# Where a config says how far positions go.
_POSITIONS = ("max_position_embeddings", "original_max_position_embeddings")

# Outputs of a pass that a fused pass does not have.
_SHOWN = ("output_attentions", "output_hidden_states")


@dataclass
class _ModuleRecord:
    """A record of a module as it was read.

    Attributes:
        signature (`list[Any]`): Of the module when it was read.
        value (`Any`): The fused form; it refers to the module's own parameters.
        agrees (`dict[int, bool]`): For each depth at which it was compared with the module, whether
            they agreed. Both ran on noise for weights, so the answer outlives a change of weights.
    """

    signature: list[Any]
    value: Any
    agrees: dict[int, bool] = field(default_factory=dict)


class FusedPasses:
    """The fused passes of one model, by segment and by head; each is made when first asked for."""

    def __init__(self) -> None:
        self._records: dict[nn.Module, _ModuleRecord] = {}

    def __reduce__(self) -> tuple[type[FusedPasses], tuple[()]]:
        return FusedPasses, ()  # what was read belongs to these modules, not to a copy of them

    @property
    def nbytes(self) -> int:
        """`int`: Bytes kept beside the weights: tables of rotary angles."""
        values = [record.value for record in self._records.values()]
        return sum(value.nbytes for value in values if isinstance(value, RotaryTable))

    def clear(self) -> None:
        """Forget everything that was read and compared."""
        self._records.clear()

    def runner(
        self,
        decoder: HostDecoder,
        segment: Segment,
        cache_layers: Sequence[Any],
    ) -> FusedPass | None:
        """Return the fused pass of a segment, or `None` where the host's own pass must run.

        That is so for layers of another shape, windows, hooks, adapters, quantised weights,
        training mode, gradients, autocast, attentions or hidden states asked for, and a device or
        a cache of another kind. Ask again for every text: modules may have been hooked, wrapped or
        moved since. A layer's first pass is compared with the host's.

        Args:
            decoder ([`HostDecoder`]): The backbone.
            segment ([`Segment`]): Its `norm` is not applied.
            cache_layers (`Sequence[DynamicLayer]`): The segment's slots in the cache.
        """
        layers = list(segment.layers)
        if not _allowed(decoder, segment) or not all(map(is_full_attention, cache_layers)):
            return None
        rotary: Any = getattr(decoder.owner, "rotary_emb", None)
        if not all(map(is_llama_shaped, layers)) or not _is_rotary(rotary, layers):
            return None
        records = [self._record(layer, read_layer) for layer in layers]
        table = self._record(rotary, RotaryTable).value.fresh()
        if len({record.value.groups for record in records}) > 1:
            return None
        noise: dict[Any, nn.Parameter] = {}
        kinds: list[list[Any]] = []
        # the first layer of all comes last: what enters it is not noise, so it tells less
        for i in sorted(range(len(layers)), key=lambda i: segment.start + i == 0):
            depth, layer, record = segment.start + i, layers[i], records[i]
            if depth not in record.agrees:
                twin = _twin(layer, noise)
                of_twin: Any = read_layer(twin)
                kind = _signature(twin, but="layer_idx")
                brief = kind in kinds
                alone = FusedPass([of_twin], table)
                record.agrees[depth] = _agrees(decoder, twin, depth, alone, brief)
                kinds.append(kind)
            if not record.agrees[depth]:
                return None
        return FusedPass([record.value for record in records], table)

    def norm(self, norm: Any) -> RootMeanSquare | None:
        """Return an exit's norm as a fused call, or `None` where the module must be called."""
        if not is_plain(norm) or not is_rms_norm(norm) or _watched(norm.weight.device.type):
            return None
        record = self._record(norm, read_norm)
        if not record.agrees:
            twin, taps = _twin(norm, {}), _noise((3, norm.weight.numel()), norm.weight)
            record.agrees[0] = _close(read_norm(twin)(taps), twin(taps))
        return record.value if record.agrees[0] else None

    def head(self, head: Any) -> FusedHead | None:
        """Return an output head as a fused call, or `None` where the module must be called."""
        if not is_plain(head) or not is_linear(head) or _watched(head.weight.device.type):
            return None
        return self._record(head, lambda module: FusedHead(Projection([module]))).value

    def _record(self, module: nn.Module, read: Callable[[Any], Any]) -> _ModuleRecord:
        """Return the record of a module, made anew if more than values has changed in it."""
        record, signature = self._records.get(module), _signature(module)
        if record is None or record.signature != signature:
            record = self._records[module] = _ModuleRecord(signature, read(module))
        return record


def _signature(module: nn.Module, but: str = "") -> list[Any]:
    """Return the classes, parameters and plain settings in a module, all but one setting."""
    found: list[Any] = [
        (id(tensor), tensor.dtype, tensor.device, tensor.shape)
        for tensor in (*module.parameters(), *module.buffers())
    ]
    for part in module.modules():
        found.append(type(part))
        found += [
            value
            for name, value in part.__dict__.items()
            if isinstance(value, (int, float, str)) and name != but
        ]
    return found


def is_full_attention(cache_layer: Any) -> bool:
    """Return whether a slot of a cache shows all tokens it was given, and nothing else."""
    return type(cache_layer) in (DynamicLayer, GrowingLayer)


def _allowed(decoder: HostDecoder, segment: Segment) -> bool:
    """Return whether nothing around the layers asks for the host's own pass."""
    backbone = decoder.module
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
        and backbone.device.type != "meta"  # offloaded
        and not _watched(backbone.device.type)
        and (segment.start > 0 or not _adds_at_entry(decoder))
    )


def _adds_at_entry(decoder: HostDecoder) -> bool:
    """Return whether something else than the embedding has weights before the first layer."""
    backbone, owner, embedding = (
        decoder.module,
        decoder.owner,
        decoder.module.get_input_embeddings(),
    )
    known = {
        embedding,
        owner,
        *(owner._modules.get(decoder.spec.layers), owner._modules.get(decoder.spec.norm)),
    }
    others = {*backbone.children(), *owner.children()} - known
    return any(True for module in others for _ in module.parameters()) or any(
        parameter is not None for m in (backbone, owner) for parameter in m._parameters.values()
    )


def _watched(device: str) -> bool:
    """Return whether gradients or autocast must see every operation."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled(device)


def _is_rotary(rotary: Any, layers: Sequence[Any]) -> bool:
    """Return whether positions turn whole heads, by angles that no text length changes."""
    kind, angles = getattr(rotary, "rope_type", None), getattr(rotary, "inv_freq", None)
    return (
        isinstance(kind, str)
        and kind not in _CHANGING_ROTARY
        and isinstance(angles, torch.Tensor)
        and all(layer.self_attn.head_dim == 2 * angles.numel() for layer in layers)
        and is_plain(rotary)
    )


def _agrees(
    decoder: HostDecoder,
    layer: nn.Module,
    depth: int,
    fused: FusedPass,
    brief: bool,
) -> bool:
    """Return whether a fused pass agrees with the host's, near the start and beyond its positions.

    Only one layer at a time tells: over many, rounding alone grows past any tolerance. For a layer
    that is like one compared before, but for its index, one `brief` pass is enough.
    """
    config, embedding = decoder.config, decoder.module.get_input_embeddings()
    segment = Segment([layer], depth, None, [0])
    for starts in [[0, _far(config)]] if brief else [[0], [_far(config)]]:
        slots, hosts = [GrowingLayer()], Cache(layers=[DynamicLayer()])
        firsts = torch.tensor(starts, device=decoder.module.device)[:, None]
        for start, stop in ((0, 3), (3, 4), (4, 6)) if starts == [0] else ((0, 3),):
            positions = firsts + torch.arange(start, stop, device=firsts.device)
            if depth == 0:
                ids = positions % embedding.num_embeddings
                taps, entry = embedding(ids), {"input_ids": ids}
                if not taps.any():  # nothing can be told from it
                    return False
            else:
                taps = _noise((len(starts), stop - start, config.hidden_size), embedding.weight)
                entry = {"inputs_embeds": taps}
            entry |= {"position_ids": positions, "use_cache": True}
            right = decoder.run(segment, hosts, **entry).last_hidden_state
            if not _close(fused(taps, slots, None if starts == [0] else positions), right):
                return False
    return True


def _far(config: Any) -> int:
    """Return a position beyond all that a config says of positions."""
    rope = getattr(config, "rope_parameters", None) or {}
    places = [config.__dict__, rope]
    limits = [place.get(name) for place in places for name in _POSITIONS]
    return 3 + 2 * max(limit or 0 for limit in limits)


def _twin(module: nn.Module, noise: dict[Any, nn.Parameter], path: str = "") -> Any:
    """Return a module that computes the same with noise for weights, and shares all else.

    Layers that agree on weights that happen to be zero may differ once these are trained.

    Args:
        module (`nn.Module`): Left as it is.
        noise (`dict`): Noise made so far, for the twins of other layers; added to.
        path (`str`, *optional*): Of the module in what is copied.
    """
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    parameters: dict[str, Any] = dict(module._parameters)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            key = (path, name, parameter.shape, parameter.dtype, parameter.device)
            if key not in noise:
                noise[key] = _noise_like(parameter, len(noise))
            parameters[name] = noise[key]
    modules = {k: m and _twin(m, noise, f"{path}.{k}") for k, m in module._modules.items()}
    twin.__dict__.update(_parameters=parameters, _modules=modules)
    return twin


def _noise_like(parameter: nn.Parameter, number: int) -> nn.Parameter:
    """Return noise of the size of usual weights: around one in a norm, by inputs in a matrix."""
    period = _noise((4099,), parameter).roll(number)  # prime: no two rows are alike
    noise = period.repeat(parameter.numel() // len(period) + 1)[: parameter.numel()]
    noise = noise.view(parameter.shape)
    flat = parameter.dim() < 2
    return nn.Parameter(1 + 0.1 * noise if flat else noise * parameter.shape[-1] ** -0.5, False)


def _noise(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Return normal numbers, always the same, from a generator of their own."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def _close(found: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two results are finite and the same but for rounding."""
    if found.shape != right.shape:
        return False
    largest, difference = right.float().abs().max(), (found.float() - right.float()).abs().max()
    return bool(difference <= _TOLERANCE[right.dtype] * largest)

"""Fused passes through Llama-shaped layers, for the few tokens of a decoding step.

In a small step, the backbone's own `forward` needs much time for modules, masks and copies. A fused
pass computes the same result directly from the parameters of the layers. It does not copy them, so
changed weights take effect at once.

A fused pass runs only if the layers have the right structure (`_fused_layers.py`). Each layer's
fused pass must also agree once with the backbone's own pass, at small and at large positions.
Otherwise the backbone's `forward` runs.
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


# Largest allowed difference from the backbone's pass, relative to the largest value. It is far
# above rounding errors and far below the difference of a wrong computation.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# Kinds of rotary embedding whose frequencies depend on the length of the text.
_CHANGING_ROTARY = ("dynamic", "longrope")

# Fields of a config that limit the positions.
_POSITIONS = ("max_position_embeddings", "original_max_position_embeddings")

# Config fields that request outputs which a fused pass does not compute.
_SHOWN = ("output_attentions", "output_hidden_states")


@dataclass
class _ModuleRecord:
    """The fused form of a module, and the results of its comparisons.

    Attributes:
        signature (`list[Any]`): The signature of the module when its fused form was built.
        value (`Any`): The fused form. It uses the module's own parameters.
        agrees (`dict[int, bool]`): Whether the fused form agreed with the module, by depth. Both
            ran with noise in place of weights, so the result stays valid when weights change.
    """

    signature: list[Any]
    value: Any
    agrees: dict[int, bool] = field(default_factory=dict)


class FusedPasses:
    """The fused passes, norms and heads of one model. Each is built at its first use."""

    def __init__(self) -> None:
        self._records: dict[nn.Module, _ModuleRecord] = {}

    def __reduce__(self) -> tuple[type[FusedPasses], tuple[()]]:
        return FusedPasses, ()  # a copy starts empty, because the records belong to these modules

    @property
    def nbytes(self) -> int:
        """`int`: Bytes of memory in addition to the weights, for tables of rotary angles."""
        values = [record.value for record in self._records.values()]
        return sum(value.nbytes for value in values if isinstance(value, RotaryTable))

    def clear(self) -> None:
        """Clear all fused forms and results of comparisons."""
        self._records.clear()

    def runner(
        self,
        decoder: HostDecoder,
        segment: Segment,
        cache_layers: Sequence[Any],
    ) -> FusedPass | None:
        """Return the fused pass of a segment, or `None` if the backbone's own pass must run.

        The result is `None` for layers that are not Llama-shaped, sliding windows, hooks, adapters,
        quantised weights, training mode, gradients and autocast. It is also `None` if attentions or
        hidden states are requested, and for other devices or caches. Call this method again for
        each text, because modules may have changed.

        Args:
            decoder ([`HostDecoder`]): The backbone.
            segment ([`Segment`]): The segment. Its `norm` is not applied.
            cache_layers (`Sequence[DynamicLayer]`): The cache layers of the segment.
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
        # layer 0 comes last: its inputs are embeddings instead of noise, a weaker comparison
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
        """Return the fused form of an exit's norm, or `None` if the module itself must run."""
        if not is_plain(norm) or not is_rms_norm(norm) or _watched(norm.weight.device.type):
            return None
        record = self._record(norm, read_norm)
        if not record.agrees:
            twin, taps = _twin(norm, {}), _noise((3, norm.weight.numel()), norm.weight)
            record.agrees[0] = _close(read_norm(twin)(taps), twin(taps))
        return record.value if record.agrees[0] else None

    def head(self, head: Any) -> FusedHead | None:
        """Return the fused form of an output head, or `None` if the module itself must run."""
        if not is_plain(head) or not is_linear(head) or _watched(head.weight.device.type):
            return None
        return self._record(head, lambda module: FusedHead(Projection([module]))).value

    def _record(self, module: nn.Module, read: Callable[[Any], Any]) -> _ModuleRecord:
        """Return the record of a module. Build a new one unless only weight values have changed."""
        record, signature = self._records.get(module), _signature(module)
        if record is None or record.signature != signature:
            record = self._records[module] = _ModuleRecord(signature, read(module))
        return record


def _signature(module: nn.Module, but: str = "") -> list[Any]:
    """Return the classes, parameters and plain settings of a module, except the setting `but`."""
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
    """Return whether a cache layer keeps the keys and values of all tokens, and nothing else."""
    return type(cache_layer) in (DynamicLayer, GrowingLayer)


def _allowed(decoder: HostDecoder, segment: Segment) -> bool:
    """Return whether config, backbone and torch state allow a fused pass of a segment."""
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
    """Return whether any module except the embedding has weights before the first layer."""
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
    """Return whether gradients or autocast are enabled, which need every operation."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled(device)


def _is_rotary(rotary: Any, layers: Sequence[Any]) -> bool:
    """Return whether rotary angles cover whole heads and do not depend on the text length."""
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
    """Return whether the fused pass of one layer agrees with the backbone's pass.

    It compares positions at the start and beyond the limit of the config. Layers are compared one
    at a time, because over many layers rounding errors exceed the tolerance. A `brief` comparison
    with one pass is enough if the layer differs from a compared one only in its index.
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
                if not taps.any():  # zeros agree in any computation
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
    """Return a position beyond every position limit in a config."""
    rope = getattr(config, "rope_parameters", None) or {}
    places = [config.__dict__, rope]
    limits = [place.get(name) for place in places for name in _POSITIONS]
    return 3 + 2 * max(limit or 0 for limit in limits)


def _twin(module: nn.Module, noise: dict[Any, nn.Parameter], path: str = "") -> Any:
    """Return a copy of a module with noise in place of its weights. It shares everything else.

    The comparison needs noise because layers can agree only by chance, for example if some weights
    are zero before training.

    Args:
        module (`nn.Module`): The module. It is not changed.
        noise (`dict`): The noise used so far, shared by all twins. New noise is added.
        path (`str`, *optional*): The path of the module inside the outermost module.
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
    """Return noise of usual size: around 1 for vectors, scaled by the input width for matrices."""
    period = _noise((4099,), parameter).roll(number)  # 4099 is prime, so all rows differ
    noise = period.repeat(parameter.numel() // len(period) + 1)[: parameter.numel()]
    noise = noise.view(parameter.shape)
    flat = parameter.dim() < 2
    return nn.Parameter(1 + 0.1 * noise if flat else noise * parameter.shape[-1] ** -0.5, False)


def _noise(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Return the same normal random numbers at each call, without use of the global generator."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def _close(found: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two results are finite and equal up to rounding."""
    if found.shape != right.shape:
        return False
    largest, difference = right.float().abs().max(), (found.float() - right.float()).abs().max()
    return bool(difference <= _TOLERANCE[right.dtype] * largest)

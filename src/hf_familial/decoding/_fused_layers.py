"""The fused form of a Llama-shaped layer, for passes over few rows.

A layer must have exactly the modules of a Llama layer. If it has another part, a hook, an
unexpected bias or an additional parameter, the backbone's own `forward` runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


# number of rows -> input width up to which `weight @ rows.T` is faster than `F.linear`, for float32
# on a CPU. A single row is passed twice, because torch runs a product with one column by a slower
# routine. This product needs no transposed copy of the weights, which would become stale.
_LEFT_WIDTH = {1: 1024, 2: 1 << 30, 3: 1 << 30} | dict.fromkeys(range(4, 9), 768)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NORM_EPS = ("variance_epsilon", "eps")
_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_QK_NORMS = {"q_norm", "k_norm"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_CAPTURING = "transformers.utils.output_capturing"


class Projection:
    """Several linear maps of the same input, without a copy of their weights.

    A call maps rows of shape `(rows, in)` to `(rows, out)`, with all outputs concatenated.
    """

    def __init__(self, linears: Sequence[Any]) -> None:
        self._maps = [(linear.weight, linear.bias) for linear in linears]
        self.weight = linears[0].weight

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        count, width = rows.shape
        left = self.weight.dtype is torch.float32 and self.weight.device.type == "cpu"
        if not left or width > _LEFT_WIDTH.get(count, 0):
            outs = [F.linear(rows, weight, bias) for weight, bias in self._maps]
            return outs[0] if len(outs) == 1 else torch.cat(outs, -1)
        columns = (rows if count > 1 else torch.cat((rows, rows))).t()
        outs = [torch.mm(weight, columns) for weight, _ in self._maps]
        for out, (_, bias) in zip(outs, self._maps, strict=True):
            if bias is not None:
                out.add_(bias[:, None])
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out.t()[:count].contiguous()

    def add_to(self, residual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the mapped rows plus `residual` of shape `(rows, out)`."""
        return self(rows).add_(residual)


class RootMeanSquare:
    """RMSNorm over the last dimension with the rounding of Llama's (arXiv:1910.07467)."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight = weight
        self._share = 1 / weight.shape[-1]
        self.eps = torch.tensor(eps, dtype=torch.float32, device=weight.device)

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension. The shape does not change."""
        full = hidden_states if hidden_states.dtype is torch.float32 else hidden_states.float()
        norm = torch.linalg.vector_norm(full, 2, -1, True)
        normed = full * torch.addcmul(self.eps, norm, norm, value=self._share).rsqrt_()
        if full is hidden_states:
            return normed.mul_(self.weight)
        return self.weight * normed.to(hidden_states.dtype)


class HeadNorms:
    """Two RMSNorms: one for each query head, the other for each key head."""

    def __init__(
        self, queries: RootMeanSquare, keys: RootMeanSquare, counts: tuple[int, int]
    ) -> None:
        self._queries, self._keys, self._counts = queries, keys, counts

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        """Normalise heads of shape `(batch, seq, queries + keys, head_dim)`."""
        queries, keys = heads.split_with_sizes(self._counts, 2)
        return torch.cat((self._queries(queries), self._keys(keys)), 2)


@dataclass(frozen=True)
class FusedLayer:
    """The fused form of a decoder layer: its weights and settings."""

    input_norm: RootMeanSquare
    qkv: Projection  # queries, keys and values concatenated
    qk_norm: HeadNorms | None
    out: Projection
    mlp_norm: RootMeanSquare
    gate_up: Projection
    down: Projection
    queries: int
    keys: int
    groups: int
    head_dim: int
    scale: float
    rotary: bool


def read_layer(layer: Any) -> FusedLayer | None:
    """Return the fused form of a decoder layer, or `None` if it is not Llama-shaped."""
    if not is_llama_shaped(layer):
        return None
    attention, mlp = layer.self_attn, layer.mlp
    head_dim = attention.head_dim
    queries = attention.q_proj.out_features // head_dim
    keys = attention.k_proj.out_features // head_dim
    return FusedLayer(
        input_norm=read_norm(layer.input_layernorm),
        qkv=Projection([attention.q_proj, attention.k_proj, attention.v_proj]),
        qk_norm=_read_qk_norm(attention, queries, keys),
        out=Projection([attention.o_proj]),
        mlp_norm=read_norm(layer.post_attention_layernorm),
        gate_up=Projection([mlp.gate_proj, mlp.up_proj]),
        down=Projection([mlp.down_proj]),
        queries=queries,
        keys=keys,
        groups=queries // keys,
        head_dim=head_dim,
        scale=attention.scaling,
        rotary=bool(getattr(attention, "use_rope", True)),
    )


def read_norm(norm: Any) -> RootMeanSquare:
    """Return the fused form of an RMSNorm. See `is_rms_norm`."""
    eps = next(getattr(norm, name) for name in _NORM_EPS if hasattr(norm, name))
    return RootMeanSquare(norm.weight, eps)


def _read_qk_norm(attention: Any, queries: int, keys: int) -> HeadNorms | None:
    """Return the norms of query and key heads, or `None` if the attention has none."""
    if not hasattr(attention, "q_norm"):
        return None
    return HeadNorms(read_norm(attention.q_norm), read_norm(attention.k_norm), (queries, keys))


def is_llama_shaped(layer: Any) -> bool:
    """Return whether a layer has exactly the parts of a Llama layer and is in evaluation mode.

    Layers with hooked, replaced, quantised or sharded parts do not qualify.
    """
    if set(layer._modules) != _LAYER_PARTS or not all(is_plain(m) for m in layer.modules()):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    parts, mlp_parts = set(attention._modules), set(mlp._modules)
    if parts not in (_ATTENTION_PARTS, _ATTENTION_PARTS | _QK_NORMS) or mlp_parts != _MLP_PARTS:
        return False
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    head_norms = [getattr(attention, name) for name in sorted(parts & _QK_NORMS)]
    linears = [attention.get_submodule(name) for name in sorted(_ATTENTION_PARTS)]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    width = getattr(attention, "head_dim", None)
    return (
        not any(module._parameters for module in (layer, attention, mlp, mlp.act_fn))
        and all(is_rms_norm(norm) for norm in norms + head_norms)
        and all(norm.weight.shape == (width,) for norm in head_norms)
        and all(is_linear(linear) for linear in linears)
        and _biases_match(attention.q_proj, attention.k_proj, attention.v_proj)
        and _biases_match(mlp.gate_proj, mlp.up_proj)
        and isinstance(getattr(attention, "scaling", None), float)
        and getattr(attention, "sliding_window", None) is None
    )


def is_plain(module: Any) -> bool:
    """Return whether a call of a module runs only the `forward` of its class, in eval mode."""
    # hooks that Transformers' capture of hidden states leaves behind have no effect
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return (
        not module.training
        and "forward" not in module.__dict__
        and not hasattr(module, "_hf_hook")
        and all(hook.__module__ == _CAPTURING for hook in hooks)
        and all(_is_own(p) for p in module._parameters.values() if p is not None)
    )


def _is_own(parameter: torch.Tensor) -> bool:
    """Return whether a parameter is complete in this process: not sharded and not on meta."""
    return type(parameter) is nn.Parameter and not parameter.is_meta


def is_rms_norm(norm: Any) -> bool:
    """Return whether a module has exactly the parts of an RMSNorm."""
    weight = norm._parameters.get("weight")
    return (
        set(norm._parameters) == {"weight"}
        and not norm._modules
        and weight is not None
        and weight.dim() == 1
        and weight.dtype in _DTYPES
        and any(isinstance(getattr(norm, name, None), float) for name in _NORM_EPS)
    )


def is_linear(linear: Any) -> bool:
    """Return whether a module is an `nn.Linear` with a supported device and dtype."""
    return (
        type(linear) is nn.Linear
        and linear.weight.device.type in ("cpu", "cuda")
        and linear.weight.dtype in _DTYPES
    )


def _biases_match(*linears: nn.Linear) -> bool:
    return len({linear.bias is None for linear in linears}) == 1

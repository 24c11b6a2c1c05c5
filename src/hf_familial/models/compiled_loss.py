"""The chunked loss as one operator, because a compiler cannot trace its chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .familial.backbones import LogitTransform
from .familial.losses import Distillation, LossPlan, chunk_rows, sum_losses


NAME = "hf_familial::linear_cross_entropy"
FIELDS = tuple(LogitTransform.__dataclass_fields__)
SCHEMA = (
    "(Tensor[] tensors, bool[] needs, Tensor targets, Tensor denominator, int[] heads, "
    "float[] weights, float[] transform, ScalarType dtype, int ignore_index, float? teaching, "
    "float temperature) -> (Tensor, Tensor, Tensor[])"
)


def compiled_cross_entropy(
    hidden_states: Sequence[torch.Tensor],
    heads: Sequence[nn.Linear],
    targets: torch.Tensor,
    denominator: torch.Tensor,
    weights: Sequence[float],
    transform: LogitTransform,
    ignore_index: int = -100,
    distillation: Distillation | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `linear_cross_entropy` in a compiled graph. The arguments are the same."""
    unique: list[nn.Linear] = []
    for head in heads:
        if not any(head is other for other in unique):
            unique.append(head)
    tensors = list(hidden_states)
    for head in unique:
        tensors += [head.weight, head.weight.new_empty(0) if head.bias is None else head.bias]
    device_type = targets.device.type
    autocast = torch.is_autocast_enabled(device_type)
    loss, exit_losses, _ = _operator(
        tensors,
        [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors],
        targets,
        denominator,
        [i for head in heads for i, other in enumerate(unique) if other is head],
        [float(weight) for weight in weights],
        # 0 stands for `None`
        [float(getattr(transform, name) or 0.0) for name in FIELDS],
        torch.get_autocast_dtype(device_type) if autocast else unique[0].weight.dtype,
        ignore_index,
        distillation.weight if distillation else None,
        distillation.temperature if distillation else 1.0,
    )
    return loss, exit_losses.detach()


@torch.library.custom_op(NAME, mutates_args=(), schema=SCHEMA)
def _operator(
    tensors: Any,
    needs: Any,
    targets: Any,
    denominator: Any,
    heads: Any,
    weights: Any,
    transform: Any,
    dtype: Any,
    ignore_index: Any,
    teaching: Any,
    temperature: Any,
) -> Any:
    count = len(heads)
    numbers = dict(zip(FIELDS, (number or None for number in transform), strict=True))
    if numbers["vocab_size"]:
        numbers["vocab_size"] = int(numbers["vocab_size"])
    plan = LossPlan(
        heads=tuple(heads),
        weights=tuple(weights),
        transform=LogitTransform(**numbers),
        rows=chunk_rows(tensors[count].shape[0], targets.device),
        dtype=dtype,
        distillation=None if teaching is None else Distillation(teaching, temperature),
    )
    kept = torch.nonzero(targets != ignore_index).squeeze(1)
    # an operator's list cannot contain `None`, so an empty tensor stands for it
    given = [t if i < count or t.numel() else None for i, t in enumerate(tensors)]
    with torch.autocast(targets.device.type, enabled=False):
        sums, gradients = sum_losses(plan, kept, targets[kept], given, needs)
    cross_entropies, objectives = sums / denominator
    loss = (objectives * objectives.new_tensor(plan.weights)).sum()
    empty = targets.new_empty
    return loss, cross_entropies.clone(), [empty(0) if g is None else g for g in gradients]


@_operator.register_fake
def _shapes(tensors: Any, needs: Any, targets: Any, denominator: Any, heads: Any, *_: Any) -> Any:
    gradients = [
        torch.empty_like(t, dtype=torch.float32 if i >= len(heads) else None)
        if need
        else targets.new_empty(0)
        for i, (t, need) in enumerate(zip(tensors, needs, strict=True))
    ]
    return denominator.new_empty(()), denominator.new_empty(len(heads)), gradients


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    tensors, ctx.needs, _, denominator, *_ = inputs
    ctx.dtypes = [tensor.dtype for tensor in tensors]
    ctx.save_for_backward(denominator, *output[2])


def _backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    denominator, *gradients = ctx.saved_tensors
    # without targets both may be 0, and 0 / 0 would put NaN into every weight
    scale = grad_loss / torch.where(denominator == 0, 1.0, denominator)
    scaled = [
        (gradient * scale).to(dtype) if need else None
        for gradient, dtype, need in zip(gradients, ctx.dtypes, ctx.needs, strict=True)
    ]
    return scaled, *(None,) * 10


_operator.register_autograd(_backward, setup_context=_keep)

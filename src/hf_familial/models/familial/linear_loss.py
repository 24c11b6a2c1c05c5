"""Cross entropy of several exits straight from their hidden states; logits exist a chunk at a time.

Forward computes the gradients as well: exits are taken one after the other, rows in chunks, and
every head has one gradient accumulator, so memory does not grow with the number of exits that share
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


# logits made at once, rows times vocabulary: a CPU wants them in its caches, a GPU wants more
CPU_CHUNK, ACCELERATOR_CHUNK = 2**23, 2**27
MIN_ROWS, MAX_ROWS = 128, 4096


@dataclass(frozen=True)
class Distillation:
    """Self-distillation: early exits also learn the deepest exit's distribution.

    Adds `weight * temperature**2 * KL(deepest || exit)` to each early exit's loss, summed over
    the same tokens and divided by the same number; the deepest exit gets no gradient from it.

    Attributes:
        weight (`float`): Of the divergence, beside the cross entropy's 1.
        temperature (`float`): Divides the logits of both.

    Reference: Hinton et al., arXiv:1503.02531; between exits: Zhang et al., arXiv:1905.08094.
    """

    weight: float
    temperature: float = 1.0


@dataclass(frozen=True)
class LossPlan:
    """What stays fixed over one loss.

    Attributes:
        heads (`tuple[int, ...]`): For each exit, the index of its head among the heads given.
        weights (`tuple[float, ...]`): Weight of each exit's loss in the sum.
        ops (`tuple[tuple[str, float], ...]`): What the host does around its head, see `logit_ops`.
        rows (`int`): Rows of logits made at once.
        dtype (`torch.dtype`): Of the matmuls.
        distillation ([`Distillation`], *optional*): What the last exit teaches the others.
    """

    heads: tuple[int, ...]
    weights: tuple[float, ...]
    ops: tuple[tuple[str, float], ...]
    rows: int
    dtype: torch.dtype
    distillation: Distillation | None


def linear_cross_entropy(
    hidden_states: Sequence[torch.Tensor],
    heads: Sequence[nn.Linear],
    targets: torch.Tensor,
    denominator: torch.Tensor,
    weights: Sequence[float],
    ops: tuple[tuple[str, float], ...] = (),
    ignore_index: int = -100,
    row_weights: torch.Tensor | None = None,
    distillation: Distillation | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of several exits over the same targets, without their logits.

    Args:
        hidden_states (`Sequence[torch.Tensor]`, each of shape `(rows, hidden)`): After each exit's
            norm.
        heads (`Sequence[nn.Linear]`): Head of each exit; the same object where it is shared.
        targets (`torch.Tensor` of shape `(rows,)`): Token ids, already shifted; rows with
            `ignore_index`, or of weight 0, are left out before the matmul; if that leaves none,
            gradients are 0 whatever the denominator.
        denominator (`torch.Tensor` of shape `()`): What the summed losses are divided by, in
            tokens.
        weights (`Sequence[float]`): Weight of each exit in the sum.
        ops (`tuple[tuple[str, float], ...]`, *optional*): What the host does around its head.
        ignore_index (`int`, *optional*, defaults to -100): Target of a row that has none.
        row_weights (`torch.Tensor` of shape `(rows,)`, *optional*): Weight of each row's loss.
        distillation ([`Distillation`], *optional*): What the last exit teaches the others.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The weighted sum, of shape `()`, to call `backward` on
        once; and the loss of every exit, of shape `(exits,)`, float32, without a graph.
    """
    read = targets != ignore_index
    if row_weights is not None:
        read &= row_weights != 0
    kept = torch.nonzero(read).squeeze(1)
    unique = list(dict.fromkeys(heads))
    device = hidden_states[0].device
    dtype = unique[0].weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    plan = LossPlan(
        heads=tuple(unique.index(head) for head in heads),
        weights=tuple(float(weight) for weight in weights),
        ops=tuple(ops),
        rows=chunk_rows(unique[0].weight.shape[0], device),
        dtype=dtype,
        distillation=distillation,
    )
    if row_weights is not None:
        row_weights = row_weights[kept].float()
    parameters = [p for head in unique for p in (head.weight, head.bias)]
    with torch.autocast(device.type, enabled=False):
        return _LinearCrossEntropy.apply(
            plan, kept, targets[kept], denominator, row_weights, *hidden_states, *parameters
        )


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits to make at once.

    Args:
        vocab_size (`int`): Columns of a row.
        device (`torch.device`): Where they are made.

    Returns:
        `int`: Rows of a chunk.
    """
    chunk = CPU_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK
    return min(MAX_ROWS, max(MIN_ROWS, chunk // vocab_size))


def sum_losses(
    plan: LossPlan,
    kept: torch.Tensor,
    targets: torch.Tensor,
    row_weights: torch.Tensor | None,
    tensors: Sequence[torch.Tensor | None],
    needs: Sequence[bool],
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Sum cross entropies and objectives of the kept rows, shape `(2, exits)`, with gradients.

    `tensors` are the hidden states of every exit, then weight and bias, or `None`, of every head.
    """
    count = len(plan.heads)
    hidden, parameters = tensors[:count], tensors[count:]
    gradients = [
        torch.zeros_like(t, dtype=torch.float32 if i >= count else None)
        if need and t is not None
        else None
        for i, (t, need) in enumerate(zip(tensors, needs, strict=True))
    ]
    heads = [_Head.of(parameters, gradients[count:], head, plan) for head in plan.heads]
    scratch = _Scratch.of(heads[0], plan, min(plan.rows, len(kept)))
    sums = torch.zeros((2, count), device=kept.device)
    for first in range(0, len(kept), plan.rows):
        chunk = slice(first, first + plan.rows)
        weights = None if row_weights is None else row_weights[chunk]
        rows = _Rows(plan, scratch, kept[chunk], targets[chunk], weights)
        # the deepest first, for it teaches
        for k in reversed(range(count)):
            states = hidden[k]
            assert states is not None
            sums[:, k] += rows.run(states, gradients[k], heads[k], plan.weights[k])
    return sums, gradients


class _LinearCrossEntropy(torch.autograd.Function):
    """Losses and gradients in one pass over the chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: LossPlan,
        kept: torch.Tensor,
        targets: torch.Tensor,
        denominator: torch.Tensor,
        row_weights: torch.Tensor | None,
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs = ctx.needs_input_grad[5:]
        sums, gradients = sum_losses(plan, kept, targets, row_weights, tensors, needs)
        # of the summed, not the mean loss: in half precision the mean's would vanish
        ctx.gradients = gradients
        # of no rows, both may be 0, and 0 / 0 would be NaN in every weight
        ctx.denominator = denominator if len(kept) else torch.ones_like(denominator)
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        cross_entropies, objectives = sums / denominator
        ctx.mark_non_differentiable(cross_entropies)
        return (objectives * objectives.new_tensor(plan.weights)).sum(), cross_entropies

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the multi-exit loss frees its gradients in the first `backward`; compute the loss "
                "again to call it a second time."
            )
        gradients, ctx.gradients = ctx.gradients, None
        scale = grad_outputs[0] / ctx.denominator
        scaled = [
            None if g is None else g.mul_(scale).to(dtype)
            for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (None,) * 5 + tuple(scaled)


@dataclass(frozen=True)
class _Head:
    """An output head in the matmuls' dtype, and where its gradient goes."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    weight_gradient: torch.Tensor | None
    bias_gradient: torch.Tensor | None

    @classmethod
    def of(
        cls,
        parameters: Sequence[torch.Tensor | None],
        gradients: Sequence[torch.Tensor | None],
        head: int,
        plan: LossPlan,
    ) -> _Head:
        """The head at one place among the parameters given."""
        pair = slice(2 * head, 2 * head + 2)
        weight, bias = (None if p is None else p.to(plan.dtype) for p in parameters[pair])
        assert weight is not None
        return cls(weight, bias, *gradients[pair])

    def logits(self, inputs: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
        """Float32 logits in the scratch, for inputs of shape `(rows, hidden)`."""
        made = scratch.product[: len(inputs)]
        if self.bias is None:
            torch.mm(inputs, self.weight.T, out=made)
        else:
            torch.addmm(self.bias, inputs, self.weight.T, out=made)
        logits = scratch.logits[: len(inputs)]
        return logits if logits.dtype == made.dtype else logits.copy_(made)

    def collect(
        self, slope: torch.Tensor, inputs: torch.Tensor, weight: float, scratch: _Scratch
    ) -> None:
        """Add one chunk's gradient, from the slope at its logits, shape `(rows, columns)`."""
        columns = slope.shape[1]
        if self.weight_gradient is not None:
            into = self.weight_gradient[:columns]
            if slope.dtype == into.dtype:
                into.addmm_(slope.T, inputs, alpha=weight)
            else:
                into.add_(torch.mm(slope.T, inputs, out=scratch.step(into, slope)), alpha=weight)
        if self.bias_gradient is not None:
            self.bias_gradient[:columns].add_(slope.sum(0, dtype=torch.float32), alpha=weight)


@dataclass
class _Scratch:
    """Memory that all chunks of all exits use in turn; new memory costs a page fault a page.

    Attributes:
        product (`torch.Tensor` of shape `(rows, vocab)`): In the matmuls' dtype.
        logits (`torch.Tensor` of shape `(rows, vocab)`): Float32, the same memory if it can be.
        slope (`torch.Tensor` of shape `(rows, columns)`, *optional*): Float32, where slopes cannot
            be written over their logits.
        update (`torch.Tensor` of shape `(columns, hidden)`, *optional*): In the matmuls' dtype.
    """

    product: torch.Tensor
    logits: torch.Tensor
    slope: torch.Tensor | None = None
    update: torch.Tensor | None = None

    @classmethod
    def of(cls, head: _Head, plan: LossPlan, rows: int) -> _Scratch:
        """Memory for the logits of some rows."""
        product = head.weight.new_empty(rows, head.weight.shape[0])
        whole = product.dtype == torch.float32
        logits = product if whole else product.new_empty(product.shape, dtype=torch.float32)
        scratch = cls(product, logits)
        if plan.distillation or any(kind.startswith("softcap") for kind, _ in plan.ops):
            scratch.slope = torch.empty_like(_kept_columns(logits, plan.ops))
        return scratch

    def slope_of(self, logits: torch.Tensor) -> torch.Tensor:
        """A copy of transformed logits, or themselves if nobody reads them again."""
        return logits if self.slope is None else self.slope[: len(logits)].copy_(logits)

    def for_matmuls(self, slope: torch.Tensor) -> torch.Tensor:
        """A slope in the matmuls' dtype."""
        if slope.dtype == self.product.dtype:
            return slope
        return self.product[: slope.shape[0], : slope.shape[1]].copy_(slope)

    def step(self, into: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """Memory for what one chunk adds to the gradient of a head."""
        if self.update is None:
            self.update = slope.new_empty(into.shape)
        return self.update


@dataclass
class _Rows:
    """One chunk of rows, read by one exit after the other, the deepest first."""

    plan: LossPlan
    scratch: _Scratch
    kept: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None
    teacher: tuple[torch.Tensor, torch.Tensor] | None = None

    def run(
        self, states: torch.Tensor, gradient: torch.Tensor | None, head: _Head, weight: float
    ) -> torch.Tensor:
        """Summed cross entropy and objective, of shape `(2,)`; gradients into their places."""
        plan = self.plan
        inputs = _scaled(states[self.kept].to(plan.dtype), plan.ops)
        logits = _transform(head.logits(inputs, self.scratch), plan.ops)
        slope = self.scratch.slope_of(logits)
        loss = _softmax_loss(slope, self.targets)
        objective = self.distil(logits, loss, slope)
        if self.weights is not None:
            loss, objective = loss * self.weights, objective * self.weights
            slope.mul_(self.weights.unsqueeze(1))
        wanted = (gradient, head.weight_gradient, head.bias_gradient)
        if weight and any(g is not None for g in wanted):
            slope = self.scratch.for_matmuls(_transform_slope(slope, logits, plan.ops))
            if gradient is not None:
                into = _scaled(slope @ head.weight[: slope.shape[1]], plan.ops)
                gradient[self.kept] = into.to(gradient.dtype).mul_(weight)
            head.collect(slope, inputs, weight, self.scratch)
        return torch.stack((loss.sum(), objective.sum()))

    def distil(self, logits: torch.Tensor, loss: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """Add the divergence from the deepest exit to loss and slope; the first call is its own."""
        how = self.plan.distillation
        if how is None:
            return loss
        cold = torch.log_softmax(logits / how.temperature, dim=1)
        if self.teacher is None:
            self.teacher = cold, cold.exp()
            return loss
        teacher, probabilities = self.teacher
        divergence = (teacher - cold).mul_(probabilities).sum(1)
        slope.add_(cold.exp_().sub_(probabilities), alpha=how.weight * how.temperature)
        return loss + how.weight * how.temperature**2 * divergence


def _scaled(states: torch.Tensor, ops: tuple[tuple[str, float], ...]) -> torch.Tensor:
    """Hidden states as the head sees them; the same factor takes gradients back."""
    for kind, number in ops:
        if kind == "scale_hidden":
            states = states / number
    return states


def _transform(logits: torch.Tensor, ops: tuple[tuple[str, float], ...]) -> torch.Tensor:
    """What the host does after its head; overwrites the logits."""
    for kind, number in ops:
        if kind == "multiply":
            logits.mul_(number)
        elif kind == "divide":
            logits.div_(number)
        elif kind.startswith("softcap"):
            logits.div_(number).tanh_().mul_(number)
    return _kept_columns(logits, ops)


def _kept_columns(logits: torch.Tensor, ops: tuple[tuple[str, float], ...]) -> torch.Tensor:
    """The columns that are tokens."""
    for kind, number in ops:
        if kind == "keep":
            logits = logits[:, : int(number)]
    return logits


def _transform_slope(
    slope: torch.Tensor, logits: torch.Tensor, ops: tuple[tuple[str, float], ...]
) -> torch.Tensor:
    """From the slope at the logits to the slope at the head's output; overwrites it."""
    for kind, number in reversed(ops):
        if kind == "multiply":
            slope.mul_(number)
        elif kind == "divide":
            slope.div_(number)
        elif kind.startswith("softcap"):
            slope.mul_(1 - (logits / number).square_())
    return slope


def _softmax_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss of every row; overwrites logits with their slope: softmax minus one at the target."""
    at = targets.unsqueeze(1)
    target_logits = logits.gather(1, at)
    largest = logits.amax(dim=1, keepdim=True)
    normaliser = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
    logits.div_(normaliser).scatter_add_(1, at, logits.new_full(at.shape, -1.0))
    return (largest - target_logits + normaliser.log()).squeeze(1)

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


# rows of logits made at once; on a CPU they should stay in its caches, an accelerator wants more
CPU_ROWS, ACCELERATOR_ROWS = 512, 4096


@dataclass(frozen=True)
class LossPlan:
    """What stays fixed over one loss.

    Attributes:
        heads (`tuple[int, ...]`): For each exit, the index of its head among the heads given.
        weights (`tuple[float, ...]`): Weight of each exit's loss in the sum.
        ops (`tuple[tuple[str, float], ...]`): What the host does around its head, see `logit_ops`.
        rows (`int`): Rows of logits made at once.
        dtype (`torch.dtype`): Of the matmuls.
    """

    heads: tuple[int, ...]
    weights: tuple[float, ...]
    ops: tuple[tuple[str, float], ...]
    rows: int
    dtype: torch.dtype


def linear_cross_entropy(
    hidden_states: Sequence[torch.Tensor],
    heads: Sequence[nn.Linear],
    targets: torch.Tensor,
    denominator: torch.Tensor,
    weights: Sequence[float],
    ops: tuple[tuple[str, float], ...] = (),
    ignore_index: int = -100,
    row_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of several exits over the same targets, without their logits.

    Args:
        hidden_states (`Sequence[torch.Tensor]`, each of shape `(rows, hidden)`): After each exit's
            norm.
        heads (`Sequence[nn.Linear]`): Head of each exit; the same object where it is shared.
        targets (`torch.Tensor` of shape `(rows,)`): Token ids, already shifted; rows with
            `ignore_index` are left out before the matmul.
        denominator (`torch.Tensor` of shape `()`): What the summed losses are divided by, in
            tokens.
        weights (`Sequence[float]`): Weight of each exit in the sum.
        ops (`tuple[tuple[str, float], ...]`, *optional*): What the host does around its head.
        ignore_index (`int`, *optional*, defaults to -100): Target of a row that has none.
        row_weights (`torch.Tensor` of shape `(rows,)`, *optional*): Weight of each row's loss.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The weighted sum, of shape `()`, to call `backward` on
        once; and the loss of every exit, of shape `(exits,)`, float32, without a graph.
    """
    kept = torch.nonzero(targets != ignore_index).squeeze(1)
    unique = list(dict.fromkeys(heads))
    device = hidden_states[0].device
    dtype = unique[0].weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    plan = LossPlan(
        heads=tuple(unique.index(head) for head in heads),
        weights=tuple(float(weight) for weight in weights),
        ops=tuple(ops),
        rows=CPU_ROWS if device.type == "cpu" else ACCELERATOR_ROWS,
        dtype=dtype,
    )
    if row_weights is not None:
        row_weights = row_weights[kept].float()
    parameters = [p for head in unique for p in (head.weight, head.bias)]
    with torch.autocast(device.type, enabled=False):
        return _LinearCrossEntropy.apply(
            plan, kept, targets[kept], denominator, row_weights, *hidden_states, *parameters
        )


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
        count = len(plan.heads)
        hidden, parameters = tensors[:count], tensors[count:]
        needs = ctx.needs_input_grad[5:]
        accumulators = [
            torch.zeros_like(p, dtype=torch.float32) if need and p is not None else None
            for p, need in zip(parameters, needs[count:], strict=True)
        ]
        losses, gradients = [], []
        for k, states in enumerate(hidden):
            assert states is not None
            head = slice(2 * plan.heads[k], 2 * plan.heads[k] + 2)
            chunks = _Chunks(plan, states, kept, targets, row_weights, parameters[head])
            loss, gradient = chunks.run(plan.weights[k], needs[k], accumulators[head])
            losses.append(loss / denominator)
            gradients.append(gradient)
        # of the summed, not the mean loss: in half precision the mean's would vanish
        ctx.gradients, ctx.denominator = [*gradients, *accumulators], denominator
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        exit_losses = torch.stack(losses)
        total = (exit_losses * exit_losses.new_tensor(plan.weights)).sum()
        ctx.mark_non_differentiable(exit_losses)
        return total, exit_losses

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
class _Chunks:
    """One exit's rows, taken a chunk at a time."""

    plan: LossPlan
    states: torch.Tensor
    kept: torch.Tensor
    targets: torch.Tensor
    row_weights: torch.Tensor | None
    head: Sequence[torch.Tensor | None]

    def run(
        self, weight: float, needs_grad: bool, accumulators: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Summed loss; gradient of the states, and of the head into the accumulators."""
        plan = self.plan
        matrix, bias = (None if p is None else p.to(plan.dtype) for p in self.head)
        assert matrix is not None
        total = torch.zeros((), dtype=torch.float32, device=self.states.device)
        gradient = torch.zeros_like(self.states) if needs_grad else None
        for first in range(0, len(self.kept), plan.rows):
            rows = self.kept[first : first + plan.rows]
            inputs = _scaled(self.states[rows].to(plan.dtype), plan.ops)
            loss, slope = self.slope(nn.functional.linear(inputs, matrix, bias).float(), first)
            total += loss.sum()
            if gradient is None and accumulators[0] is None and accumulators[1] is None:
                continue
            slope = slope.mul_(weight).to(plan.dtype)
            columns = slope.shape[1]
            if gradient is not None:
                gradient[rows] = _scaled(slope @ matrix[:columns], plan.ops).to(gradient.dtype)
            if accumulators[0] is not None:
                _accumulate(accumulators[0][:columns], slope, inputs)
            if accumulators[1] is not None:
                accumulators[1][:columns] += slope.sum(0, dtype=torch.float32)
        return total, gradient

    def slope(self, logits: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of every row of a chunk, and its slope at the head's output."""
        chunk = slice(first, first + self.plan.rows)
        logits = _transform(logits, self.plan.ops)
        loss, slope = _softmax_loss(logits, self.targets[chunk])
        if self.row_weights is not None:
            loss = loss * self.row_weights[chunk]
            slope.mul_(self.row_weights[chunk].unsqueeze(1))
        return loss, _transform_slope(slope, logits, self.plan.ops)


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
        elif kind == "keep":
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


def _softmax_loss(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of every row, and its slope at the logits: softmax minus one at the target."""
    target_logits = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    largest, where = logits.max(dim=1)
    slope = torch.softmax(logits, dim=1)
    # the largest probability never underflows, so the normaliser comes without a second pass of exp
    normaliser = largest - slope.gather(1, where.unsqueeze(1)).squeeze(1).log()
    slope.scatter_add_(1, targets.unsqueeze(1), slope.new_full((len(targets), 1), -1.0))
    return normaliser - target_logits, slope


def _accumulate(accumulator: torch.Tensor, slope: torch.Tensor, inputs: torch.Tensor) -> None:
    """Add `slope.T @ inputs`, shape `(vocab, hidden)`, in float32."""
    if slope.dtype == accumulator.dtype:
        accumulator.addmm_(slope.T, inputs)
    else:
        accumulator += slope.T @ inputs

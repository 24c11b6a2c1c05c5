"""The multi-exit loss: the cross entropy of each exit, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from .backbones import LogitTransform
from .configuration_familial import extension


IGNORE_INDEX = -100

# Size of one chunk of logits, rows times vocabulary. On a CPU it should fit into the caches.
CPU_CHUNK, ACCELERATOR_CHUNK = 2**23, 2**27
MIN_ROWS, MAX_ROWS = 128, 4096


@dataclass(frozen=True)
class Distillation:
    """Settings of self-distillation, in which the deepest exit teaches the early exits.

    The loss of each early exit increases by `weight * temperature**2 * KL(deepest || exit)`, over
    the same tokens as its cross entropy. The deepest exit gets no gradient from this term.

    Args:
        weight (`float`): Factor of the term.
        temperature (`float`, *optional*, defaults to 1.0): Divides the logits of both exits.

    Example:
        >>> model(**inputs, labels=inputs["input_ids"], distillation=Distillation(weight=0.5))

    Reference: Hinton et al., arXiv:1503.02531. Zhang et al., arXiv:1905.08094, for exits.
    """

    weight: float
    temperature: float = 1.0


@dataclass(frozen=True)
class ExitStates:
    """The normed hidden states of an exit, its head, and its logits if the forward returns them."""

    hidden_states: torch.Tensor
    head: nn.Module
    logits: torch.Tensor | None

    @property
    def linear(self) -> bool:
        """`bool`: Whether the loss can compute the logits of this head in chunks."""
        if _is_plain(self.head):
            return True
        return isinstance(self.head, nn.Linear) and _gathered([self.head], len) is not None


def _is_plain(head: Any) -> bool:
    """Return whether a head is a linear map with a complete plain weight and no hooks."""
    if type(head) is not nn.Linear or hasattr(head, "_hf_hook"):
        return False
    # A quantised weight is a tensor of another class. Tensor parallelism leaves only a part of the
    # weight in each process. In both cases only the head's own forward computes right logits.
    whole = type(head.weight) is nn.Parameter and not hasattr(head.weight, "full_tensor")
    return whole and not head._forward_hooks and not head._forward_pre_hooks


def _gathered(heads: Sequence[nn.Module], read: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a function that gathers sharded heads and calls `read`, or `None` if it cannot."""
    for head in dict.fromkeys(heads):
        gathered = read if _is_plain(head) else _extension().gathered(head, read)
        if gathered is None:
            return None
        read = gathered
    return read


_extension = torch.compiler.disable(extension)

_traceable_loss: Any = None  # the package's loss, one operator that a compiler can trace


@torch.compiler.assume_constant_result
def _has_traceable_loss() -> bool:
    """Import the traceable loss at trace time, since a compiler cannot trace the import."""
    global _traceable_loss
    _traceable_loss = extension().compiled_loss()
    return _traceable_loss is not None


def multi_exit_loss(
    exits: Mapping[int, ExitStates],
    transform: LogitTransform,
    loss_function: Callable[..., torch.Tensor],
    labels: torch.Tensor,
    exit_weights: Sequence[float] | None = None,
    distillation: Distillation | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss of every exit over the same tokens, and their weighted sum.

    If the forward does not return an exit's logits, they are computed in chunks of R rows
    (`chunk_rows`), one exit at a time, together with their gradients. A chunk takes 4 to 8 * R * V
    bytes, with vocabulary V. Gradients of the hidden states (2 or 4 * G * T * H bytes) and of each
    head (4 * V * H bytes) stay in memory until `backward`. G is the number of exits, T that of
    targets, H the width. Complete logits and their gradients would take 8 * G * T * V bytes.

    `exits` has exit indices as keys, shallowest first. `loss_function` computes the loss of exits
    with complete logits. The other arguments are those of [`FamilialForCausalLM.forward`]. Default
    weights are 1/G, as in arXiv:2512.23407. The results are the weighted sum, shape `()`, and the
    detached losses, shape `(len(exits),)`, both in nats per token.
    """
    shifted = kwargs.get("shift_labels")
    name, given = ("labels", labels) if shifted is None else ("shift_labels", shifted)
    shape = next(iter(exits.values())).hidden_states.shape[:-1]
    if given.shape != shape:  # check here, because the loss flattens the rows
        raise ValueError(
            f"`{name}` must have shape {tuple(shape)} (batch, seq), got {tuple(given.shape)}. "
            "With `logits_to_keep`, pass labels of the kept positions only."
        )
    targets, denominator, ignore_index = _targets(labels, **kwargs)
    if isinstance(count := kwargs.get("num_items_in_batch"), torch.Tensor):
        # DataParallel passes the shape `(1, 1)`
        kwargs["num_items_in_batch"] = count.reshape(())
    exit_weights = [1 / len(exits)] * len(exits) if exit_weights is None else exit_weights
    if len(exit_weights) != len(exits):
        raise ValueError(
            f"`exit_weights` must have one entry per exit ({len(exits)}), got {list(exit_weights)}."
        )
    weights = dict(zip(exits, exit_weights, strict=True))
    traced = torch.compiler.is_compiling()
    plain = loss_function is ForCausalLMLoss and (not traced or _has_traceable_loss())
    # distillation computes all exits together in chunks, even if the forward returns their logits
    taught = distillation if len(exits) > 1 else None
    chunked = [k for k, e in exits.items() if plain and e.linear and (taught or e.logits is None)]
    if taught and len(chunked) < len(exits):
        raise ValueError(
            "`distillation` needs unquantised linear heads with their full weight in each process, "
            "and the default loss function of Transformers. Pass `distillation=None`."
        )
    losses: dict[int, torch.Tensor] = {}
    total: Any = 0.0
    for k in (k for k in exits if k not in chunked):
        logits = exits[k].logits
        if logits is None:
            logits = transform.read(exits[k].hidden_states, exits[k].head)
        loss = loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        total, losses[k] = total + weights[k] * loss, loss.detach()
    if chunked:
        heads: list[Any] = [exits[k].head for k in chunked]

        def read(*hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            cross_entropy = _traceable_loss if traced else linear_cross_entropy
            options = [weights[k] for k in chunked], transform, ignore_index, taught
            return cross_entropy(hidden_states, heads, targets, denominator, *options)

        whole: Any = _gathered(heads, read)
        loss, found = whole(*(exits[k].hidden_states.flatten(0, -2) for k in chunked))
        total, losses = total + loss, losses | dict(zip(chunked, found, strict=True))
    return total, torch.stack([losses[k].float() for k in exits])


def _targets(
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return flat targets, the number that divides the summed losses, and `ignore_index`."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1)
    count = (targets != ignore_index).sum()
    if num_items_in_batch is None:
        return targets, count.float(), ignore_index
    denominator = torch.as_tensor(num_items_in_batch, device=labels.device, dtype=torch.float32)
    wrong = denominator.numel() != 1
    if not wrong and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        # skip this check on an accelerator, because it would synchronise
        wrong = not (denominator > 0 or (denominator == 0 and count == 0))
    if wrong:
        raise ValueError(
            "`num_items_in_batch` must be one positive number, the count of targets in the whole "
            f"accumulated batch, got {num_items_in_batch}."
        )
    return targets, denominator.reshape(()), ignore_index


def target_share(labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Return this batch's share of all targets in the accumulated batch, of shape `()`."""
    targets, denominator, ignore_index = _targets(labels, **kwargs)
    count = (targets != ignore_index).sum()
    return torch.where(count > 0, count / denominator, 0.0)


def linear_cross_entropy(
    hidden_states: Sequence[torch.Tensor],
    heads: Sequence[Any],
    targets: torch.Tensor,
    denominator: torch.Tensor,
    weights: Sequence[float],
    transform: LogitTransform,
    ignore_index: int = IGNORE_INDEX,
    distillation: Distillation | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the result of `multi_exit_loss` from states `(rows, hidden)` and shifted targets."""
    kept = torch.nonzero(targets != ignore_index).squeeze(1)
    unique = list(dict.fromkeys(heads))
    device = hidden_states[0].device
    dtype = unique[0].weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    plan = LossPlan(
        heads=tuple(unique.index(head) for head in heads),
        weights=tuple(float(weight) for weight in weights),
        transform=transform,
        rows=chunk_rows(unique[0].weight.shape[0], device),
        dtype=dtype,
        distillation=distillation,
    )
    parameters = [p for head in unique for p in (head.weight, head.bias)]
    with torch.autocast(device.type, enabled=False):
        return _LinearCrossEntropy.apply(
            plan, kept, targets[kept], denominator, *hidden_states, *parameters
        )


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Return the number of rows whose logits are computed at once on a device."""
    chunk = CPU_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK
    return min(MAX_ROWS, max(MIN_ROWS, chunk // vocab_size))


@dataclass(frozen=True)
class LossPlan:
    """The settings of one computation of the loss."""

    heads: tuple[int, ...]  # for each exit, the index of its head
    weights: tuple[float, ...]
    transform: LogitTransform
    rows: int  # rows in a chunk
    dtype: torch.dtype  # of the matmuls
    distillation: Distillation | None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: LossPlan,
        kept: torch.Tensor,
        targets: torch.Tensor,
        denominator: torch.Tensor,
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums, gradients = sum_losses(plan, kept, targets, tensors, ctx.needs_input_grad[4:])
        # keep gradients of the sum, because those of the mean underflow in half precision
        ctx.gradients = gradients
        # without targets both may be 0, and 0 / 0 would put NaN into every weight
        ctx.denominator = denominator if len(kept) else torch.ones_like(denominator)
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        cross_entropies, objectives = sums / denominator
        ctx.mark_non_differentiable(cross_entropies)
        return (objectives * objectives.new_tensor(plan.weights)).sum(), cross_entropies

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "`backward` can run only once on a multi-exit loss, because it frees its gradients."
                " Run the forward pass again before a second `backward`."
            )
        gradients, ctx.gradients = ctx.gradients, None
        scale = grad_outputs[0] / ctx.denominator
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return (None,) * 4 + tuple(None if g is None else g.mul_(scale).to(d) for g, d in pairs)


def sum_losses(
    plan: LossPlan,
    kept: torch.Tensor,
    targets: torch.Tensor,
    tensors: Sequence[Any],  # states of every exit, then weight and bias (or `None`) of every head
    needs: Sequence[bool],
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Return summed cross entropies and objectives, shape `(2, exits)`, and the gradients."""
    count = len(plan.heads)
    gradients: list[torch.Tensor | None] = [None] * len(tensors)
    for i, (tensor, need) in enumerate(zip(tensors, needs, strict=True)):
        if need and tensor is not None:
            gradients[i] = torch.zeros_like(tensor, dtype=torch.float32 if i >= count else None)
    heads: list[Any] = [None if p is None else p.to(plan.dtype) for p in tensors[count:]]
    pairs = [slice(2 * head, 2 * head + 2) for head in plan.heads]
    scratch = _Scratch(heads[0], plan, min(plan.rows, len(kept)))
    sums = torch.zeros((2, count), device=kept.device)
    for first in range(0, len(kept), plan.rows):
        chunk = slice(first, first + plan.rows)
        rows = _Rows(plan, scratch, kept[chunk], targets[chunk])
        # the deepest exit runs first, because its logits teach the others
        for k in reversed(range(count)):
            wanted = [gradients[k], *gradients[count:][pairs[k]]]
            head, bias = heads[pairs[k]]
            sums[:, k] += rows.run(tensors[k], head, bias, wanted, plan.weights[k])
    return sums, gradients


class _Scratch:
    """The buffers that all chunks of all exits share. New memory would cost page faults."""

    def __init__(self, weight: torch.Tensor, plan: LossPlan, rows: int) -> None:
        self.product = self.logits = weight.new_empty(rows, weight.shape[0])
        if self.product.dtype != torch.float32:
            self.logits = torch.empty_like(self.product, dtype=torch.float32)
        # gradients (slopes) overwrite the logits unless a later step needs the logits again
        again = plan.distillation is not None or plan.transform.capped
        self.slope = torch.empty_like(plan.transform.tokens(self.logits)) if again else None
        self._update: torch.Tensor | None = None

    def logits_of(self, inputs: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        """Return a head's float32 outputs for inputs of shape `(rows, hidden)`."""
        made = self.product[: len(inputs)]
        if bias is None:
            torch.mm(inputs, weight.T, out=made)
        else:
            torch.addmm(bias, inputs, weight.T, out=made)
        logits = self.logits[: len(inputs)]
        return logits if logits.dtype == made.dtype else logits.copy_(made)

    def add_product(
        self, into: torch.Tensor, slope: torch.Tensor, inputs: torch.Tensor, weight: float
    ) -> None:
        """Add the gradient of one chunk to the float32 gradient of a head."""
        if slope.dtype == into.dtype:
            into.addmm_(slope.T, inputs, alpha=weight)
            return
        if self._update is None:
            self._update = slope.new_empty(into.shape)
        into.add_(torch.mm(slope.T, inputs, out=self._update), alpha=weight)


@dataclass
class _Rows:
    """A chunk of rows. Each exit computes its loss on it, the deepest exit first."""

    plan: LossPlan
    scratch: _Scratch
    kept: torch.Tensor
    targets: torch.Tensor
    teacher: tuple[torch.Tensor, torch.Tensor] | None = None

    def run(
        self,
        states: torch.Tensor,
        head: torch.Tensor,
        bias: torch.Tensor | None,
        wanted: Sequence[torch.Tensor | None],
        weight: float,
    ) -> torch.Tensor:
        """Return summed cross entropy and objective, shape `(2,)`. Write gradients to `wanted`."""
        transform, scratch = self.plan.transform, self.scratch
        inputs = transform.hidden(states[self.kept].to(self.plan.dtype))
        logits = transform.logits_(scratch.logits_of(inputs, head, bias))
        slope = logits if scratch.slope is None else scratch.slope[: len(logits)].copy_(logits)
        loss = _softmax_loss(slope, self.targets)
        objective = self.distil(logits, loss, slope)
        if weight and any(g is not None for g in wanted):
            slope = transform.slope_(slope, logits)
            rows, columns = slope.shape
            of_states, of_head, of_bias = wanted
            if slope.dtype != scratch.product.dtype:
                slope = scratch.product[:rows, :columns].copy_(slope)
            if of_states is not None:
                into = transform.hidden(slope @ head[:columns])
                of_states[self.kept] = into.to(of_states.dtype).mul_(weight)
            if of_head is not None:
                scratch.add_product(of_head[:columns], slope, inputs, weight)
            if of_bias is not None:
                of_bias[:columns].add_(slope.sum(0, dtype=torch.float32), alpha=weight)
        return torch.stack((loss.sum(), objective.sum()))

    def distil(self, logits: torch.Tensor, loss: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """Add the divergence from the deepest exit to loss and slope. Run that exit first."""
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


def _softmax_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of every row. Overwrite logits with their gradient, softmax - onehot."""
    at = targets.unsqueeze(1)
    target_logits = logits.gather(1, at)
    largest = logits.amax(dim=1, keepdim=True)
    normaliser = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
    logits.div_(normaliser).scatter_add_(1, at, logits.new_full(at.shape, -1.0))
    return (largest - target_logits + normaliser.log()).squeeze(1)

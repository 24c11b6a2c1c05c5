"""The multi-exit loss: one token-correct cross entropy per exit, and their weighted mean."""

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

# logits made at once, rows times vocabulary: a CPU wants them in its caches, a GPU wants more
CPU_CHUNK, ACCELERATOR_CHUNK = 2**23, 2**27
MIN_ROWS, MAX_ROWS = 128, 4096


@dataclass(frozen=True)
class Distillation:
    """Self-distillation: early exits also learn the deepest exit's distribution.

    Adds `weight * temperature**2 * KL(deepest || exit)` to each early exit's loss, summed over the
    same tokens; the deepest exit gets no gradient from it. `temperature` divides both logits.

    Reference: Hinton et al., arXiv:1503.02531; between exits: Zhang et al., arXiv:1905.08094.
    """

    weight: float
    temperature: float = 1.0


@dataclass(frozen=True)
class ExitStates:
    """The normed states that an exit predicts from, and its logits if they are made anyway."""

    hidden_states: torch.Tensor
    head: nn.Module
    logits: torch.Tensor | None

    @property
    def linear(self) -> bool:
        """`bool`: Whether the head can be read in chunks."""
        if _is_plain(self.head):
            return True
        return isinstance(self.head, nn.Linear) and _gathered([self.head], len) is not None


def _is_plain(head: Any) -> bool:
    """Return whether a head is a linear map that nothing else takes part in."""
    if type(head) is not nn.Linear or hasattr(head, "_hf_hook"):
        return False
    # A quantised weight is a tensor of another class, whose own forward knows how to read it.
    # Tensor parallelism leaves a process a part of the weight: only its call gives all logits.
    whole = type(head.weight) is nn.Parameter and not hasattr(head.weight, "full_tensor")
    return whole and not head._forward_hooks and not head._forward_pre_hooks


def _gathered(heads: Sequence[nn.Module], read: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return `read` as a call in which all heads are whole; `None` if one cannot be gathered."""
    for head in dict.fromkeys(heads):
        gathered = read if _is_plain(head) else _extension().gathered(head, read)
        if gathered is None:
            return None
        read = gathered
    return read


_extension = torch.compiler.disable(extension)

_traceable_loss: Any = None  # one operator that a compiler can trace, if the package is there


@torch.compiler.assume_constant_result
def _has_traceable_loss() -> bool:
    """Look for the operator while tracing: a compiler cannot enter the import."""
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
    """Compute the cross entropy of every exit, each over the same tokens and denominator.

    Exits whose logits nobody wants are read in chunks, the others by the host's loss. The forward
    pass computes the gradients as well.

    Memory, with T target rows, width H, vocabulary V and R rows in a chunk (`chunk_rows`). Logits
    of G exits would take 4 * G * T * V bytes, and their gradient as much again. Instead:

    | alive | from, to | bytes |
    |---|---|---|
    | logits and slope of one chunk of one exit | the chunk's turn | 4 to 8 * R * V |
    | gradient of each exit's states | this call, `backward` | 2 or 4 * G * T * H |
    | gradient of each head, float32, one where it is shared | this call, `backward` | 4 * V * H |

    Only the second row grows with G. Gradients:

    | of | reach the weights |
    |---|---|
    | the loss of an early exit | its head, norm and private layers; the backbone below its tap |
    | the loss of the deepest exit | `lm_head`, the final norm, the whole backbone |
    | distillation | as the loss of the early exit; the deepest exit is a constant in it |
    | `aux_loss` | the routers that ran, weighted by the host's coefficient |

    `exits` are by index, shallowest first; `labels`, `exit_weights` (by default 1/G each,
    arXiv:2512.23407), `distillation` and `kwargs` are those of [`FamilialForCausalLM.forward`].

    Returned are the loss, of shape `()`, and the loss of every exit, of shape `(len(exits),)` and
    without a graph; both in nats per token. An argument that does not fit raises `ValueError`.
    """
    shifted = kwargs.get("shift_labels")
    name, given = ("labels", labels) if shifted is None else ("shift_labels", shifted)
    shape = next(iter(exits.values())).hidden_states.shape[:-1]
    if given.shape != shape:  # in chunks the rows are flat
        raise ValueError(
            f"`{name}` must have the shape of the positions that the loss reads, {tuple(shape)} "
            f"(batch, positions), got {tuple(given.shape)}. Give -100 where there is no target; "
            "with `logits_to_keep`, give the labels of the kept positions."
        )
    targets, denominator, ignore_index = _targets(labels, **kwargs)
    if isinstance(count := kwargs.get("num_items_in_batch"), torch.Tensor):
        # of shape `(1, 1)` in a replica of DataParallel
        kwargs["num_items_in_batch"] = count.reshape(())
    exit_weights = [1 / len(exits)] * len(exits) if exit_weights is None else exit_weights
    if len(exit_weights) != len(exits):
        raise ValueError(
            f"`exit_weights` must hold one weight for each of {len(exits)} exits, got "
            f"{list(exit_weights)}."
        )
    weights = dict(zip(exits, exit_weights, strict=True))
    traced = torch.compiler.is_compiling()
    plain = loss_function is ForCausalLMLoss and (not traced or _has_traceable_loss())
    # a teacher and its students are read together, whoever wants their logits as well
    teaches = distillation is not None and len(exits) > 1
    chunked = [k for k, e in exits.items() if plain and e.linear and (teaches or e.logits is None)]
    if teaches and len(chunked) < len(exits):
        raise ValueError(
            "distillation needs plain linear heads, whole in each process, and the host's own loss "
            "function."
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
            counted = [weights[k] for k in chunked], transform, ignore_index
            taught = distillation if teaches else None
            return cross_entropy(hidden_states, heads, targets, denominator, *counted, taught)

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
    """Return flat targets, what their summed losses are divided by, and `ignore_index`."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1)
    count = (targets != ignore_index).sum()
    if num_items_in_batch is None:
        return targets, count.float(), ignore_index
    denominator = torch.as_tensor(num_items_in_batch, device=labels.device, dtype=torch.float32)
    wrong = denominator.numel() != 1
    if not wrong and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        # an accelerator would have to be waited for
        wrong = not (denominator > 0 or (denominator == 0 and count == 0))
    if wrong:
        raise ValueError(
            "`num_items_in_batch` must be the number of targets of the whole accumulated batch, "
            f"one positive number, got {num_items_in_batch}."
        )
    return targets, denominator.reshape(()), ignore_index


def target_share(labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Return the share of the accumulated batch's targets that this batch has, of shape `()`."""
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
    """Compute what `multi_exit_loss` does, of states `(rows, hidden)` and shifted `targets`."""
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
    """Return the number of rows of logits to make at once on a device."""
    chunk = CPU_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK
    return min(MAX_ROWS, max(MIN_ROWS, chunk // vocab_size))


@dataclass(frozen=True)
class LossPlan:
    """The fixed facts of one loss: heads by index, `rows` of logits made at once, matmul dtype."""

    heads: tuple[int, ...]
    weights: tuple[float, ...]
    transform: LogitTransform
    rows: int
    dtype: torch.dtype
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
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return (None,) * 4 + tuple(None if g is None else g.mul_(scale).to(d) for g, d in pairs)


def sum_losses(
    plan: LossPlan,
    kept: torch.Tensor,
    targets: torch.Tensor,
    tensors: Sequence[Any],  # states of every exit, then weight and bias, or `None`, of every head
    needs: Sequence[bool],
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Sum cross entropies and objectives of the kept rows, shape `(2, exits)`, with gradients."""
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
        # the deepest first, for it teaches
        for k in reversed(range(count)):
            wanted = [gradients[k], *gradients[count:][pairs[k]]]
            head, bias = heads[pairs[k]]
            sums[:, k] += rows.run(tensors[k], head, bias, wanted, plan.weights[k])
    return sums, gradients


class _Scratch:
    """Memory that all chunks of all exits use in turn; new memory costs a page fault a page."""

    def __init__(self, weight: torch.Tensor, plan: LossPlan, rows: int) -> None:
        self.product = self.logits = weight.new_empty(rows, weight.shape[0])
        if self.product.dtype != torch.float32:
            self.logits = torch.empty_like(self.product, dtype=torch.float32)
        # whether logits are read again, so that slopes cannot be written over them
        again = plan.distillation is not None or plan.transform.capped
        self.slope = torch.empty_like(plan.transform.tokens(self.logits)) if again else None
        self._update: torch.Tensor | None = None

    def logits_of(self, inputs: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        """Return float32 outputs of a head for inputs of shape `(rows, hidden)`."""
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
        """Add one chunk's part to the float32 gradient of a head."""
        if slope.dtype == into.dtype:
            into.addmm_(slope.T, inputs, alpha=weight)
            return
        if self._update is None:
            self._update = slope.new_empty(into.shape)
        into.add_(torch.mm(slope.T, inputs, out=self._update), alpha=weight)


@dataclass
class _Rows:
    """A chunk of rows, read by one exit after the other, the deepest first."""

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
        """Return summed cross entropy and objective, of shape `(2,)`; gradients go to `wanted`."""
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


def _softmax_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return every row's loss; overwrite logits with their slope, softmax - onehot."""
    at = targets.unsqueeze(1)
    target_logits = logits.gather(1, at)
    largest = logits.amax(dim=1, keepdim=True)
    normaliser = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
    logits.div_(normaliser).scatter_add_(1, at, logits.new_full(at.shape, -1.0))
    return (largest - target_logits + normaliser.log()).squeeze(1)

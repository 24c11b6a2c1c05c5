"""The passes of one batch through the backbone, which the losses of all exits read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..models.familial import FamilialModel, FamilialModelOutput
from ._pass_flops import PassMeter


@dataclass(frozen=True)
class ActiveExit:
    """The exit that calls of a family without `exit_idx` run."""

    exit_idx: int
    meter: PassMeter | None = None

    def run(self, model: FamilialModel, inputs: dict[str, Any]) -> Any:
        """Run the model up to the exit."""
        if self.meter is not None:
            self.meter.add(model, inputs, self.exit_idx, _learns(model))
        return model.forward(**inputs, exit_idx=self.exit_idx)

    def head(self, family: Any) -> torch.nn.Module:
        """Return the head of the exit. Raise if an adapter changes the head."""
        head = family.head(self.exit_idx)
        if hasattr(head, "base_layer"):
            raise ValueError(
                "The trainer reads the weight of each output head, so an adapter on `exit_heads` "
                'would never learn. Add `exclude_modules=r".*exit_heads.*"` to the config of the '
                "adapter."
            )
        return head


@contextmanager
def active(model: FamilialModel, runner: Any) -> Iterator[None]:
    """Make `runner`, such as an [`ActiveExit`], run all calls without `exit_idx`."""
    before = model.active_exit
    model.active_exit = runner
    try:
        yield
    finally:
        model.active_exit = before


@dataclass
class SharedPasses:
    """The passes of one batch, each run once for all exits.

    The loss of the first exit runs them. The loss of every further exit makes the same calls, in
    the same order, and reads its own hidden states from the passes that are stored. Each exit reads
    detached copies, so that the graph of its loss ends there. `leaves` maps them to the tensors of
    the pass. A call with a KV cache, or with other inputs than the first exit's, is run directly.
    """

    meter: PassMeter | None = None
    exit_idx: int = 0
    leaves: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _passes: list[tuple[dict[str, Any], bool, Any]] = field(default_factory=list)
    _next: int = 0

    def start(self, exit_idx: int) -> None:
        """Start the loss of an exit."""
        self.exit_idx, self._next = exit_idx, 0
        self.leaves.clear()

    def head(self, family: Any) -> torch.nn.Module:
        """Return the head of the exit."""
        return self._direct().head(family)

    def _direct(self) -> ActiveExit:
        return ActiveExit(self.exit_idx, self.meter)

    @torch.compiler.disable
    def run(self, model: FamilialModel, inputs: dict[str, Any]) -> Any:
        """Return the output of a call for the exit, from a stored pass if there is one."""
        if inputs.get("past_key_values") is not None or inputs.get("use_cache"):
            return self._direct().run(model, inputs)
        index, graph = self._next, torch.is_grad_enabled()
        self._next += 1
        if index == len(self._passes):
            if self.meter is not None:
                self.meter.add(model, inputs, None, _learns(model))
            output = model.forward(**inputs | {"use_cache": False}, output_exits=True)
            self._passes.append((inputs, graph, output))
        stored, had_graph, output = self._passes[index]
        if graph is not had_graph or not _same(inputs, stored):
            return self._direct().run(model, inputs)
        fields = dict(output) | {"last_hidden_state": output.exit_hidden_states[self.exit_idx]}
        del fields["exit_hidden_states"]
        return FamilialModelOutput(**self._detached(fields))

    def _detached(self, value: Any) -> Any:
        """Replace every tensor that has a graph by a leaf with the same values."""
        if isinstance(value, Mapping):
            return {name: self._detached(part) for name, part in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(self._detached(part) for part in value)
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            return value
        leaf = value.detach().requires_grad_()
        self.leaves[id(leaf)] = (leaf, value)
        return leaf


def _learns(model: FamilialModel) -> bool:
    return model.training and torch.is_grad_enabled()


def _same(inputs: dict[str, Any], stored: dict[str, Any]) -> bool:
    return inputs.keys() == stored.keys() and all(_equal(inputs[n], stored[n]) for n in inputs)


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return _same(dict(one), dict(other))
    return type(one) is type(other) and bool(one == other)


class GradientSum:
    """The gradients of several losses, computed one after the other and summed.

    A loss is freed before the next one is computed. `carried` then returns the sum of the losses as
    one tensor. Its `backward` passes the gradients on, so hooks of DDP or FSDP see one backward.
    `scale` multiplies the losses while gradients are computed, so that float16 does not underflow.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.value: Any = 0.0
        self._targets: dict[int, torch.Tensor] = {}
        self._gradients: dict[int, torch.Tensor] = {}

    def add(
        self,
        loss: torch.Tensor,
        weight: float,
        leaves: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """Add `weight` times a loss of shape `()`. Gradients of `leaves` go to their originals."""
        self.value = self.value + weight * loss.detach()
        if not loss.requires_grad or not weight:
            return
        reached = list(leaf_tensors(loss))
        gradients = torch.autograd.grad(loss * (weight * self.scale), reached, allow_unused=True)
        for tensor, gradient in zip(reached, gradients, strict=True):
            if gradient is None:
                continue
            _, target = leaves.get(id(tensor), (tensor, tensor))
            before = self._gradients.get(id(target))
            self._targets[id(target)] = target
            self._gradients[id(target)] = gradient if before is None else before.add_(gradient)

    def carried(self) -> torch.Tensor:
        """Return the sum of the losses, of shape `()`."""
        if not self._targets:
            return self.value
        gradients = [self._gradients[key] for key in self._targets]
        return _Carried.apply(self.value, self.scale, gradients, *self._targets.values())


def touch_all(loss: torch.Tensor, parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """Return the loss, changed so that parameters it does not reach get gradients of zero."""
    reached = {id(tensor) for tensor in leaf_tensors(loss)}
    rest = [p for p in parameters if p.requires_grad and id(p) not in reached]
    if not rest:
        return loss
    zeros = [torch.zeros_like(parameter) for parameter in rest]
    return loss + _Carried.apply(loss.detach().new_zeros(()), 1.0, zeros, *rest)


class _Carried(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: torch.Tensor,
        scale: float,
        gradients: list[torch.Tensor],
        *targets: torch.Tensor,
    ) -> torch.Tensor:
        ctx.scale, ctx.gradients = scale, gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradients of a multi-exit loss can be used once only.")
        factor = slope / ctx.scale
        return None, None, None, *(g.mul_(factor.to(g.device)) for g in gradients)


def leaf_tensors(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the leaf tensors that a tensor's graph reaches, each once."""
    if value.grad_fn is None:
        yield value
        return
    nodes, seen = [value.grad_fn], {value.grad_fn}
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)

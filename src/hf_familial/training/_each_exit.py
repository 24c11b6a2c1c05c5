"""A mix-in that computes a trainer's own loss once for each exit of a family."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer

from ..models import is_family
from ._shared_passes import ActiveExit, GradientSum, SharedPasses, active, touch_all
from .schedules import exit_weights


_Base: Any = Trainer if TYPE_CHECKING else object


@dataclass(frozen=True)
class MultiExitOptions:
    """The options of [`multi_exit`]."""

    exits: str = "all"
    exit_weights: str | tuple[float, ...] = "uniform"
    generation_exit: int = -1
    reference_exit: int | None = None

    def __post_init__(self) -> None:
        if self.exits not in ("all", "sample"):
            raise ValueError(f'`exits` must be "all" or "sample", got {self.exits!r}.')


class EachExitMixin(_Base):
    """The part of a multi-exit trainer that runs the trainer's own `compute_loss` once per exit."""

    multi_exit_options = MultiExitOptions()
    _meter: Any = None  # a [`PassMeter`] once the trainer is built

    def _family(self) -> Any:
        """Return the family inside adapters and wrappers. Raise `TypeError` if there is none."""
        model: Any = self.accelerator.unwrap_model(self.model)
        family = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not is_family(family):
            raise TypeError(
                f"A multi-exit trainer needs a FamilialForCausalLM, got a {type(family).__name__}. "
                "Create one with `FamilialForCausalLM.from_backbone(model, exits=[...])`."
            )
        return family

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(EachExitMixin)]
        for base in before:
            if issubclass(base, Trainer) and not issubclass(base, EachExitMixin):
                raise TypeError(
                    f"{base.__name__} comes before the multi-exit trainer among the bases of "
                    f"{cls.__name__}, so its loss would train one exit. Use "
                    f"`hf_familial.multi_exit({base.__name__})`, or swap the bases."
                )

    def _host_computes_loss(self) -> bool:
        """Return whether the trainer class uses `Trainer.compute_loss`."""
        classes = type(self).__mro__
        after = classes[classes.index(EachExitMixin) + 1 :]
        return next(c for c in after if "compute_loss" in vars(c)) is Trainer

    def _has_host_loss(self) -> bool:
        """Return whether the loss is the family's own, so that one call computes all exits."""
        return self._host_computes_loss() and self.compute_loss_func is None

    def _draws(self) -> bool:
        return self.multi_exit_options.exits == "sample"

    def _step_weights(self) -> tuple[float, ...]:
        """Return the weight of each exit in the loss of this optimiser step. The sum is 1."""
        given = self.multi_exit_options.exit_weights
        return exit_weights(given, self._family().config.exits)

    def _drawn_exit(self) -> int:
        """Draw an exit by weight, once per optimiser step or once for all steps of a generation."""
        args: Any = self.args
        generated = getattr(args, "steps_per_generation", None) or 1
        generated *= getattr(args, "num_iterations", None) or 1
        steps = max(1, generated // args.gradient_accumulation_steps)
        draw = np.random.default_rng([args.seed, self.state.global_step // steps])
        weights = np.asarray(self._step_weights())
        return int(draw.choice(len(weights), p=weights / weights.sum()))

    @contextlib.contextmanager
    def _exit_outside_loss(self) -> Iterator[None]:
        """Run code outside the loss, such as generation, with one exit."""
        if self._has_host_loss():  # the host generates nothing
            yield
            return
        draws = self._draws() and self._family().training
        with self._running(self._drawn_exit() if draws else None):
            yield

    @contextlib.contextmanager
    def _running(self, exit_idx: int | None) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for each, named in self._exits_of_models(exit_idx):
                stack.enter_context(active(each.model, ActiveExit(named, self._meter)))
            yield

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a training step of the trainer class. If it generates texts, one exit does so."""
        self.model.train()
        self._meter.clear()  # passes of an evaluation do not belong to the training
        with self._exit_outside_loss():
            return super().training_step(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run an evaluation step of the trainer class. If it generates texts, one exit does so."""
        with self._exit_outside_loss():
            return super().prediction_step(*args, **kwargs)

    def _loss_by_exit(
        self, compute: Callable[..., Any], model: nn.Module, inputs: Any, wants_outputs: bool
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor], Any]:
        """Run `compute(model, inputs)` once per exit. Calls of the model in it run that exit.

        Returns:
            The loss to train on, of shape `()`, the detached loss of each exit that ran, and the
            outputs of the deepest of them, or `None`.
        """
        family = self._family()
        self._check_batch(inputs)
        training = family.training and torch.is_grad_enabled()
        if self._draws() and training:
            return self._drawn_loss(compute, model, inputs, wants_outputs)
        if self.is_deepspeed_enabled:
            # its engine would count the backward pass of each exit as one of a micro-batch
            model = self.accelerator.unwrap_model(model)
        count = family.config.num_exits
        weights = self._step_weights() if training else [1 / count] * count
        records, total = _Bookkeeping(self), GradientSum(self._loss_scale())
        losses, outputs = {}, None
        with contextlib.ExitStack() as stack:
            shared = [SharedPasses(self._meter) for _ in self._exits_of_models(0)]
            for passes, (each, _) in zip(shared, self._exits_of_models(0), strict=True):
                stack.enter_context(active(each.model, passes))
            for k, weight in enumerate(weights):
                for passes, (_, named) in zip(shared, self._exits_of_models(k), strict=True):
                    passes.start(named)
                with records.of(k):
                    result = compute(model, _copied(inputs))
                loss, outputs = result if wants_outputs else (result, None)
                losses[k] = loss.detach()
                leaves = {key: pair for passes in shared for key, pair in passes.leaves.items()}
                total.add(loss, weight, leaves)
                del result, loss, leaves
        return total.carried(), losses, outputs

    def _drawn_loss(
        self, compute: Callable[..., Any], model: nn.Module, inputs: Any, wants_outputs: bool
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor], Any]:
        k = self._drawn_exit()
        with self._running(k), _Bookkeeping(self).of(k):
            result = compute(model, _copied(inputs))
        loss, outputs = result if wants_outputs else (result, None)
        # each parameter gets a gradient, as in the expectation over draws; DDP waits for all
        return touch_all(loss, self.model.parameters()), {k: loss.detach()}, outputs

    def _exits_of_models(self, exit_idx: int | None) -> list[tuple[Any, int]]:
        """Return the family that learns and its reference, each with the exit it runs.

        `exit_idx` is the exit that learns, or `None` before the loss. A reference (`ref_model`)
        runs `reference_exit`, else the exit that learns, else the deepest one.
        """
        options, family = self.multi_exit_options, self._family()
        learning = options.generation_exit if exit_idx is None else exit_idx
        found = [(family, family.config.resolve_exit(learning))]
        held = getattr(self, "ref_model", None)
        reference: Any = held and self.accelerator.unwrap_model(held)
        if reference is None or not is_family(reference):
            return found
        named = options.reference_exit
        if named is None:
            same = reference.config.num_exits == family.config.num_exits
            named = exit_idx if exit_idx is not None and same else -1
        return [*found, (reference, reference.config.resolve_exit(named))]

    def _check_batch(self, inputs: Any) -> None:
        """Raise under `DataParallel`, or if a batch has old log-probabilities of one exit only."""
        if self.args.n_gpu > 1:
            raise ValueError(
                "a multi-exit trainer does not support `nn.DataParallel`: start the script with "
                "`accelerate launch`, or make one GPU visible with `CUDA_VISIBLE_DEVICES`."
            )
        named = inputs if isinstance(inputs, Mapping) else {}
        old = [n for n, v in named.items() if n.startswith("old_") and v is not None]
        if old and not self._draws() and self._family().config.num_exits > 1:
            raise ValueError(
                f"the batch has old log-probabilities (`{old[0]}`) of the exit that generated it, "
                "so the ratios of the other exits would be wrong. Use "
                '`multi_exit(..., exits="sample")`, which generates and trains with the same exit.'
            )

    def _loss_scale(self) -> float:
        scaler = getattr(self.accelerator, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0


def _copied(inputs: Any) -> Any:
    """Return a shallow copy of a batch, because a trainer may change the batch."""
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


class _Bookkeeping:
    """The counters and lists of metrics that a trainer changes while it computes a loss.

    Counters that are attributes of the trainer count a batch once. Numbers that the loss of an exit
    adds to a list in a dictionary of metrics also go into `exit_<k>_<name>` of the same dictionary.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._counters = {n: v for n, v in vars(trainer).items() if isinstance(v, int | float)}

    @contextlib.contextmanager
    def of(self, exit_idx: int) -> Iterator[None]:
        """Record the metrics of one exit, while the `with` block computes its loss."""
        vars(self._trainer).update(self._counters)
        before = {(id(d), name): (values, len(values)) for d, name, values in self._lists()}
        yield
        for metrics, name, values in list(self._lists()):
            kept, length = before.get((id(metrics), name), (values, 0))
            if name.startswith("exit_") or not all(_is_number(v) for v in values):
                continue
            if kept is not values:  # a counter, replaced each time
                for k in range(exit_idx):
                    metrics.pop(f"exit_{k}_{name}", None)
            elif len(values) > length:
                metrics.setdefault(f"exit_{exit_idx}_{name}", []).extend(values[length:])

    def _lists(self) -> Iterator[tuple[dict[str, Any], str, list[Any]]]:
        stack = [value for value in vars(self._trainer).values() if isinstance(value, dict)]
        seen: set[int] = set()  # a dictionary may contain itself
        while stack:
            holder = stack.pop()
            if id(holder) in seen:
                continue
            seen.add(id(holder))
            for name, value in holder.items():
                if isinstance(value, dict):
                    stack.append(value)
                elif isinstance(value, list) and isinstance(name, str):
                    yield holder, name, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, torch.Tensor) and value.numel() == 1
    )

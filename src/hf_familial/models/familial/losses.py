"""The multi-exit loss: one token-correct cross entropy per exit, and their weighted mean."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from .configuration_familial import extension
from .linear_loss import Distillation, linear_cross_entropy


IGNORE_INDEX = -100


@dataclass(frozen=True)
class Reading:
    """What an exit predicts from: logits that exist already, or what it takes to make them.

    Attributes:
        hidden_states (`torch.Tensor` of shape `(batch, seq, hidden)`): After the exit's norm.
        head (`nn.Module`): Its output head.
        make_logits (`Callable`): Gives its logits, shape `(batch, seq, vocab)`.
        wanted (`bool`): Whether the caller wants the logits as well, so that they exist anyway.
    """

    hidden_states: torch.Tensor
    head: nn.Module
    make_logits: Callable[[], torch.Tensor]
    wanted: bool

    @property
    def linear(self) -> bool:
        """`bool`: Whether the head can be read in chunks."""
        if _is_plain(self.head):
            return True
        sharded = isinstance(self.head, nn.Linear)
        return sharded and _gather([self.head], lambda: None) is not None


def _gather(heads: Sequence[nn.Module], read: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return `read` as a call in which all heads are whole; `None` if one cannot be gathered."""
    gathered: Callable[..., Any] | None = read
    for head in dict.fromkeys(heads):
        if gathered is not None and not _is_plain(head):
            gathered = _extension_of_heads().gathered(head, gathered)
    return gathered


@torch.compiler.disable
def _extension_of_heads() -> Any:
    return extension()


# the loss as one operator that a compiler can trace, where the package has one
_traceable_loss: Any = None


@torch.compiler.assume_constant_result
def _has_traceable_loss() -> bool:
    """Look for it at the time of tracing: a compiler cannot enter the import."""
    global _traceable_loss
    _traceable_loss = extension().compiled_loss()
    return _traceable_loss is not None


def _is_plain(head: Any) -> bool:
    """Return whether a head is a linear map that nothing takes part in."""
    if type(head) is not nn.Linear or hasattr(head, "_hf_hook"):
        return False
    # A quantised weight is a tensor of another class, whose own forward knows how to read it.
    # Tensor parallelism leaves a process a part of the weight: only its call gives all logits.
    whole = type(head.weight) is nn.Parameter and not hasattr(head.weight, "full_tensor")
    return whole and not head._forward_hooks and not head._forward_pre_hooks


def multi_exit_loss(
    readings: Mapping[int, Reading],
    ops: tuple[tuple[str, float], ...],
    loss_function: Callable[..., torch.Tensor],
    labels: torch.Tensor,
    exit_weights: Sequence[float] | None = None,
    distillation: Distillation | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of every exit, each over the same tokens and the same denominator.

    Without `exit_weights` the loss is their mean, weights 1/G (arXiv:2512.23407). Exits whose
    logits nobody wants are read in chunks (`linear_loss.py`), the others by the host's loss.

    Args:
        readings (`Mapping[int, Reading]`): By index of the exit, shallowest first.
        ops (`tuple[tuple[str, float], ...]`): What the host does around its head, see `logit_ops`.
        loss_function (`Callable`): The host's causal-LM loss.
        labels (`torch.Tensor` of shape `(batch, seq)`): Token ids, -100 where there is no target;
            shifted here unless `shift_labels` is among `kwargs`.
        exit_weights (`Sequence[float]`, *optional*): Weight of each exit's loss in the sum.
        distillation ([`Distillation`], *optional*): What the deepest exit teaches the others.
        **kwargs: For the loss function: `num_items_in_batch`, the number of targets over all
            accumulated batches, `shift_labels`, `ignore_index`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The loss, of shape `()`, and the loss of every exit, of
        shape `(len(readings),)` and without a graph; both in nats per token.

    Raises:
        ValueError: If the targets have another shape than the states, `num_items_in_batch` cannot
            be a number of targets, there is not one weight per exit, or distillation is asked for
            with heads that cannot be read in chunks.
    """
    for reading in readings.values():
        _check_shape(reading.hidden_states.shape[:-1], labels, **kwargs)
    targets, denominator, ignore_index = _targets(labels, **kwargs)
    if isinstance(count := kwargs.get("num_items_in_batch"), torch.Tensor):
        # of shape `(1, 1)` in a replica of DataParallel
        kwargs["num_items_in_batch"] = count.reshape(())
    if exit_weights is None:
        exit_weights = [1 / len(readings)] * len(readings)
    if len(exit_weights) != len(readings):
        raise ValueError(
            f"`exit_weights` must hold one weight for each of {len(readings)} exits, got "
            f"{list(exit_weights)}."
        )
    weights = dict(zip(readings, exit_weights, strict=True))
    traced = torch.compiler.is_compiling()
    plain = loss_function is ForCausalLMLoss and (not traced or _has_traceable_loss())
    # a teacher and its students are read together, whoever wants their logits as well
    whole = distillation is not None and len(readings) > 1
    fused = [
        k
        for k, reading in readings.items()
        if plain and reading.linear and (whole or not reading.wanted)
    ]
    if whole and len(fused) < len(readings):
        raise ValueError(
            "distillation needs plain linear heads, whole in each process, and the host's own loss "
            "function."
        )
    losses: dict[int, torch.Tensor] = {}
    total: Any = 0.0
    for k, reading in readings.items():
        if k not in fused:
            logits = reading.make_logits()
            loss = loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs
            )
            total, losses[k] = total + weights[k] * loss, loss.detach()
    if fused:
        heads: list[Any] = [readings[k].head for k in fused]

        def read(*hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            cross_entropy = _traceable_loss if traced else linear_cross_entropy
            return cross_entropy(
                hidden_states,
                heads,
                targets,
                denominator,
                [weights[k] for k in fused],
                ops,
                ignore_index,
                distillation=distillation if whole else None,
            )

        hidden_states = [readings[k].hidden_states.flatten(0, -2) for k in fused]
        gathered = _gather(heads, read)
        assert gathered is not None
        loss, exit_losses = gathered(*hidden_states)
        total = total + loss
        losses |= dict(zip(fused, exit_losses, strict=True))
    return total, torch.stack([losses[k].float() for k in readings])


def _check_shape(
    shape: torch.Size, labels: torch.Tensor, shift_labels: torch.Tensor | None = None, **_: Any
) -> None:
    """Raise if the targets are not one for each position; in chunks the rows are flat."""
    name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    if given.shape != shape:
        raise ValueError(
            f"`{name}` must have the shape of the positions that the loss reads, {tuple(shape)} "
            f"(batch, positions), got {tuple(given.shape)}. Give -100 where there is no target; "
            "with `logits_to_keep`, give the labels of the kept positions."
        )


def _targets(
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Flat targets and what their summed losses are divided by, as the host's loss has them."""
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
    """Return the share of the accumulated batch's targets that this batch has, of shape `()`.

    It is 1 where the batch is the whole, and 0 where it has no target. Over the batches that are
    accumulated, in all processes, the shares sum to 1.

    Args:
        labels (`torch.Tensor` of shape `(batch, seq)`): As in [`multi_exit_loss`].
        **kwargs: As there: `num_items_in_batch`, `shift_labels`, `ignore_index`.
    """
    targets, denominator, ignore_index = _targets(labels, **kwargs)
    count = (targets != ignore_index).sum()
    return torch.where(count > 0, count / denominator, 0.0)


# under which names hosts keep the number of experts, of those chosen, and the weight of the loss
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_top_k")
WEIGHT = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")


def balances(config: Any, router_logits: Sequence[torch.Tensor] | None) -> bool:
    """Return whether there is a load-balancing loss: the host has one, and routers ran.

    Args:
        config (`PreTrainedConfig`): Config of the backbone.
        router_logits (`Sequence[torch.Tensor]`, *optional*): Empty where all layers are dense.

    Returns:
        `bool`: Also `True` for a host that transformers does not know.
    """
    return bool(router_logits) and _balance_function(config) is not None


def _balance_function(config: Any) -> Callable[..., torch.Tensor] | None:
    """The host's own function, in the module of its causal LM; `None` where it has none."""
    host = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if host is None:
        return load_balancing_loss_func
    return getattr(sys.modules[host.__module__], "load_balancing_loss_func", None)


def _field(config: Any, names: Sequence[str]) -> Any:
    """The first of these that a config has, or the config of its experts."""
    configs = (config, getattr(config, "ffn_config", None))
    found = (getattr(c, name, None) for c in configs for name in names)
    return next((value for value in found if value is not None), None)


def balance_loss(
    config: Any, router_logits: Sequence[torch.Tensor], attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, float]:
    """Load-balancing loss of a mixture of experts, as the hosts compute it, and its weight.

    Args:
        config (`PreTrainedConfig`): Config of the backbone.
        router_logits (`Sequence[torch.Tensor]`, each of shape `(batch * seq, experts)`): Per layer.
        attention_mask (`torch.Tensor` of shape `(batch, seq)`, *optional*): 0 for padding.

    Returns:
        `tuple[torch.Tensor, float]`: The loss, of shape `()`, and the coefficient it enters with.

    Reference: Switch Transformers, arXiv:2101.03961, equations 4 to 6.
    """
    num_experts = _field(config, EXPERTS)
    if num_experts is None:
        raise ValueError(
            f"`{config.model_type}` has router logits but none of {EXPERTS} in its config: train "
            "it with `output_router_logits=False`."
        )
    function = _balance_function(config) or load_balancing_loss_func
    known = {
        "num_experts": num_experts,
        "num_keys": math.isqrt(num_experts),  # of doge, which finds experts by two keys
        "top_k": _field(config, CHOSEN),
        "attention_mask": attention_mask,
    }
    taken = inspect.signature(function).parameters.keys()
    loss = function(tuple(router_logits), **{n: v for n, v in known.items() if n in taken})
    return loss, _field(config, WEIGHT) or 0.0

"""FLOPs of a training step of a family: all of it, its exits only, or LoRA."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from ..models.familial import FamilialConfig, FamilialForCausalLM
from ._fake_model import Keyed, config_of, fake_model, fake_tensors, keyed_config
from ._lengths import LengthCounts
from .counting import counter
from .forward import estimated
from .parameters import family_parameters


if TYPE_CHECKING:
    from peft import LoraConfig


# values of `train`, apart from adapters
TRAINED = ("all", "exits")


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of a training step.

    Attributes:
        per_token (`float`): FLOPs per token.
        exact (`bool`): Whether every operation was counted, not estimated from sizes.
    """

    per_token: float
    exact: bool


def training_flops_per_token(
    model_or_config: FamilialForCausalLM | FamilialConfig,
    seq_length: int,
    train: str | LoraConfig = "all",
) -> FlopCount:
    """Count the FLOPs of a training step per token, from the config alone.

    A family without weights runs forward and backward once, and torch's `FlopCounterMode` counts
    every layer and every head. Every position has a target, attention is counted in full, and of
    routed experts those that a token is sent to. Recomputed activations and the optimiser do not
    count. A matmul costs as much again for each gradient that is wanted: of its weights, and of its
    input (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).

    Args:
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family.
        seq_length (`int`): Tokens in a sequence.
        train (`str` or `peft.LoraConfig`, *optional*, defaults to `"all"`): What learns: all
            parameters; `"exits"`, the modules that only early exits have, so that the backbone runs
            forward alone; or the adapters of a LoRA (Hu et al. 2021, arXiv:2106.09685).

    Returns:
        [`FlopCount`]: The first two lengths of a family take some counts, which are kept; every
        other length follows at once. See `prepare_training_flops`.

    Raises:
        TypeError: If it is not a family, or `train` is something else.
        ValueError: If `seq_length` is not positive, `train` is unknown or leaves nothing to learn,
            or the family cannot be built.

    Example:
        >>> count = training_flops_per_token(model, seq_length=2048)
        >>> step = count.per_token * tokens_per_step  # FLOPs
    """
    config = config_of(model_or_config)
    if seq_length < 1:
        raise ValueError(f"`seq_length` must be 1 or more, got {seq_length}.")
    counts, heads = _counts_of(config, train)
    total = counts.lengths.at(seq_length)
    return FlopCount(total / seq_length + heads, exact=counts.exact)


def prepare_training_flops(
    model_or_config: FamilialForCausalLM | FamilialConfig, train: str | LoraConfig = "all"
) -> None:
    """Count now what `training_flops_per_token` needs, so that it is quick at every length.

    It takes a few passes of a family without weights, seconds on a model of 30 layers.

    Args:
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family.
        train (`str` or `peft.LoraConfig`, *optional*, defaults to `"all"`): What learns.

    Raises:
        TypeError, ValueError: As from `training_flops_per_token`.

    Example:
        >>> prepare_training_flops(model)
        >>> costs = [training_flops_per_token(model, length) for length in range(1, 4097)]
    """
    _counts_of(config_of(model_or_config), train)[0].lengths.prepare()


def _check_train(train: Any) -> None:
    right = f"`train` must be one of {', '.join(TRAINED)}, or a peft LoraConfig"
    if not isinstance(train, str) and getattr(train, "peft_type", None) != "LORA":
        raise TypeError(f"{right}, got {type(train).__name__}.")
    if isinstance(train, str) and train not in TRAINED:
        raise ValueError(f"{right}, got {train!r}.")


def _keyed_train(train: str | LoraConfig) -> Keyed[str | LoraConfig]:
    if isinstance(train, str):
        return Keyed(train, train)
    # sets have no order of their own
    fields = json.dumps(train.to_dict(), sort_keys=True, default=lambda v: sorted(map(str, v)))
    return Keyed(fields, train)


def _dense(config: FamilialConfig) -> FamilialConfig:
    """Return the family of the deepest exit alone, on the same backbone."""
    fields = {"exits": [config.num_hidden_layers], "exit_head": "shared", "default_exit": -1}
    return FamilialConfig.from_dict(config.to_dict() | fields)


class _Counts:
    """FLOPs of one sequence of a family, by its length."""

    def __init__(self, config: FamilialConfig, train: str | LoraConfig) -> None:
        self.config, self.train, self.exact = config, train, True
        self.lengths = LengthCounts(config, self._count)

    def _count(self, seq_length: int) -> int:
        # the caller may be evaluating
        with torch.inference_mode(False), torch.enable_grad():
            family: Any = _learning(fake_model(self.config), self.train)
            try:
                with fake_tensors(family):
                    return _run(family, seq_length)
            except Exception:
                # whatever a host's forward raises where it wants to look at values
                self.exact = False
                return _estimate(self.config, seq_length, self.train)


@cache
def _kept_counts(config: Keyed[FamilialConfig], train: Keyed[str | LoraConfig]) -> _Counts:
    # the caller may change its config
    return _Counts(copy.deepcopy(config.value), copy.deepcopy(train.value))


def _counts_of(config: FamilialConfig, train: str | LoraConfig) -> tuple[_Counts, int]:
    """Return counts of the same backbone, and FLOPs per token of the heads they leave out."""
    _check_train(train)
    heads = 0
    if train == "all" and config.num_exits > 1 and not config.num_exit_layers:
        # Exits without layers cost a head each, forward and for both gradients. So families on one
        # backbone are counted once.
        num_heads, config = config.num_exits - 1, _dense(config)
        heads = num_heads * 3 * family_parameters(config).head_flops
    return _kept_counts(keyed_config(config), _keyed_train(train)), heads


def _learning(family: FamilialForCausalLM, train: str | LoraConfig) -> FamilialForCausalLM:
    """Return the same family, of which only the parameters that learn require a gradient."""
    if not isinstance(train, str):
        from peft import inject_adapter_in_model  # takes a second to import

        train = copy.deepcopy(train)  # peft writes into it
        train.init_lora_weights = False  # some ways to start look at weights
        with torch.device("meta"):
            inject_adapter_in_model(train, family, low_cpu_mem_usage=True)
    elif train == "exits":
        names = family.exit_module_names()
        if not names:
            raise ValueError(
                "`train='exits'` leaves nothing to learn: the early exits of this family have no "
                "module of their own."
            )
        family.requires_grad_(False)
        for name in names:
            family.get_submodule(name).requires_grad_(True)
    return family


def _run(family: FamilialForCausalLM, seq_length: int) -> int:
    """Count forward and backward through every exit's logits, for one sequence."""
    ids = torch.zeros((1, seq_length), dtype=torch.long)
    with counter() as count:
        outputs = family(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            output_exits=True,
        )
        sum(logits.sum() for logits in outputs.exit_logits).backward()
    return count.get_total_flops()


def _estimate(config: FamilialConfig, seq_length: int, train: str | LoraConfig) -> int:
    """Estimate forward, and as much again for each kind of gradient."""
    forward = estimated(fake_model(config), seq_length, 0)
    if train == "all":
        return 3 * forward.all_exits.total
    if train == "exits":
        heads = 2 if config.exit_head == "own" else 1
        early = sum(2 * f.total for f in forward.private)
        return forward.all_exits.total + early + sum(heads * h.total for h in forward.heads[:-1])
    # adapters are small beside what they adapt, whose inputs alone need gradients
    return 2 * forward.all_exits.total

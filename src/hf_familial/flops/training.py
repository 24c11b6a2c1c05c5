"""FLOPs of a training step, with all parameters trained, only the exits, or LoRA adapters."""

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


# string values of `train`
TRAINED = ("all", "exits")


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of a training step.

    Attributes:
        per_token (`float`): FLOPs per token, forward and backward.
        exact (`bool`): `True` if the operations were counted, `False` if they were estimated.
    """

    per_token: float
    exact: bool


def training_flops_per_token(
    model_or_config: FamilialForCausalLM | FamilialConfig,
    seq_length: int,
    train: str | LoraConfig = "all",
) -> FlopCount:
    """Return the FLOPs per token of a training step, from the config alone.

    A model of fake tensors runs forward and backward, and torch's `FlopCounterMode` counts all
    layers and heads. All positions have a target. Attention counts in full. Routed experts count
    only if a token uses them. Recomputed activations and the optimiser do not count.

    A matmul costs its forward FLOPs again for the gradient of its weights, and again for that of
    its input (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).

    The first two lengths of a family are slow. See [`prepare_training_flops`].

    Args:
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family.
        seq_length (`int`): The number of tokens in a sequence.
        train (`str` or `peft.LoraConfig`, *optional*, defaults to `"all"`): The trained parameters.

            - `"all"`: All parameters.
            - `"exits"`: Only modules that belong to early exits. The backbone then has no backward
              pass.
            - A `LoraConfig`: Only the LoRA adapters (Hu et al. 2021, arXiv:2106.09685).

    Returns:
        [`FlopCount`]: The FLOPs per token.

    Raises:
        TypeError: If `model_or_config` is not a family, or if `train` has another type.
        ValueError: If `seq_length` is below 1, if `train` is unknown or leaves nothing to train, or
            if the family cannot be built.

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
    """Prepare `training_flops_per_token` for a family, so that it is fast at all lengths.

    The preparation runs a few passes with fake tensors. It needs seconds for a model of 30 layers.

    Args:
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family.
        train (`str` or `peft.LoraConfig`, *optional*, defaults to `"all"`): The trained parameters,
            as in [`training_flops_per_token`].

    Raises:
        TypeError: If `model_or_config` is not a family, or if `train` has another type.
        ValueError: If `train` is unknown or leaves nothing to train, or if the family cannot be
            built.

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
    # sort sets, because their order is not stable
    fields = json.dumps(train.to_dict(), sort_keys=True, default=lambda v: sorted(map(str, v)))
    return Keyed(fields, train)


def _dense(config: FamilialConfig) -> FamilialConfig:
    """Return the config of a family with only the deepest exit on the same backbone."""
    fields = {"exits": [config.num_hidden_layers], "exit_head": "shared", "default_exit": -1}
    return FamilialConfig.from_dict(config.to_dict() | fields)


class _Counts:
    """The FLOPs of one training sequence of a family, by length."""

    def __init__(self, config: FamilialConfig, train: str | LoraConfig) -> None:
        self.config, self.train, self.exact = config, train, True
        self.lengths = LengthCounts(config, self._count)

    def _count(self, seq_length: int) -> int:
        # the caller may have disabled gradients
        with torch.inference_mode(False), torch.enable_grad():
            family: Any = _learning(fake_model(self.config), self.train)
            try:
                with fake_tensors(family):
                    return _run(family, seq_length)
            except Exception:
                # a backbone may raise any error when it needs real values
                self.exact = False
                return _estimate(self.config, seq_length, self.train)


@cache
def _kept_counts(config: Keyed[FamilialConfig], train: Keyed[str | LoraConfig]) -> _Counts:
    # copies, because the caller may change its config
    return _Counts(copy.deepcopy(config.value), copy.deepcopy(train.value))


def _counts_of(config: FamilialConfig, train: str | LoraConfig) -> tuple[_Counts, int]:
    """Return the counts of a backbone, and FLOPs per token of heads that are not in them."""
    _check_train(train)
    heads = 0
    if train == "all" and config.num_exits > 1 and not config.num_exit_layers:
        # An exit without private layers only adds a head: its forward pass and two gradients. So
        # all such families on one backbone share the counts.
        num_heads, config = config.num_exits - 1, _dense(config)
        heads = num_heads * 3 * family_parameters(config).head_flops
    return _kept_counts(keyed_config(config), _keyed_train(train)), heads


def _learning(family: FamilialForCausalLM, train: str | LoraConfig) -> FamilialForCausalLM:
    """Return the family with `requires_grad` set only on the trained parameters."""
    if not isinstance(train, str):
        from peft import inject_adapter_in_model  # takes a second to import

        train = copy.deepcopy(train)  # because peft changes it
        train.init_lora_weights = False  # some initialisations need real weights
        with torch.device("meta"):
            inject_adapter_in_model(train, family, low_cpu_mem_usage=True)
    elif train == "exits":
        names = family.exit_module_names()
        if not names:
            raise ValueError(
                "`train='exits'` leaves nothing to learn, because the early exits of this family "
                "have no norm, private layers or head of their own. Use `train='all'`."
            )
        family.requires_grad_(False)
        for name in names:
            family.get_submodule(name).requires_grad_(True)
    return family


def _run(family: FamilialForCausalLM, seq_length: int) -> int:
    """Return the FLOPs of one sequence, forward and backward through the logits of all exits."""
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
    """Estimate the FLOPs of one sequence. Each gradient costs as much as the forward pass."""
    forward = estimated(fake_model(config), seq_length, 0)
    if train == "all":
        return 3 * forward.all_exits.total
    if train == "exits":
        heads = 2 if config.exit_head == "own" else 1
        early = sum(2 * f.total for f in forward.private)
        return forward.all_exits.total + early + sum(heads * h.total for h in forward.heads[:-1])
    # adapters themselves are small; the adapted layers only need gradients of their inputs
    return 2 * forward.all_exits.total

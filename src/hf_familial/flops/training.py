"""FLOPs of a training step of a family: all of it, its exits only, or LoRA."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..models.familial import FamilialConfig, FamilialForCausalLM
from ..models.familial.configuration_familial import check_choice
from .counting import counter
from .forward import estimated
from .lengths import LengthCounts
from .parameters import CONVENTIONS, family_parameters
from .phantom import config_of, fake, phantom


if TYPE_CHECKING:
    from peft import LoraConfig


# what learns, apart from adapters
TRAINED = ("all", "exits")


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of a training step.

    Attributes:
        per_token (`float`): FLOPs per token.
        exact (`bool`): Whether every operation was counted; otherwise it is an estimate from the
            parameters that a token meets, and attention over all pairs of positions.
    """

    per_token: float
    exact: bool


@dataclass(frozen=True)
class Approximation:
    """FLOPs of a run by C = 6ND, beside the exact count.

    Attributes:
        flops (`float`): 6ND.
        exact_flops (`float`): What the run costs.
        convention (`str`): How N was counted; see [`ParameterCount`].
    """

    flops: float
    exact_flops: float
    convention: str

    @property
    def relative_error(self) -> float:
        """`flops / exact_flops - 1`: negative where 6ND says too little."""
        return self.flops / self.exact_flops - 1

    def __str__(self) -> str:
        return (
            f"6ND = {self.flops:.3e} FLOPs with N = {self.convention}, {self.relative_error:+.1%} "
            f"against {self.exact_flops:.3e} counted"
        )


_COUNTS: dict[tuple[str, str], _Counts] = {}


def training_flops_per_token(
    model_or_config: FamilialForCausalLM | FamilialConfig,
    seq_length: int,
    train: str | LoraConfig = "all",
) -> FlopCount:
    """Count the FLOPs of a training step per token, from the config alone.

    A family without weights runs forward and backward once, and torch's `FlopCounterMode` counts: a
    multiply-add is two FLOPs; the backbone, every exit's private layers and every exit's head
    count; every position has a target; attention is counted in full, without the savings of causal,
    windowed or recomputing kernels; of routed experts, those that a token is sent to. Recomputed
    activations and the optimiser do not count. A matmul costs as much again for each gradient that
    is wanted: of its weights, and of its input (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).

    Args:
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family.
        seq_length (`int`): Tokens in a sequence.
        train (`str` or `peft.LoraConfig`, *optional*, defaults to `"all"`): What learns: all
            parameters; `"exits"`, the modules that only early exits have, so that the backbone runs
            forward alone; or the adapters of a LoRA (Hu et al. 2021, arXiv:2106.09685).

    Returns:
        [`FlopCount`]: The first length of a family is counted, the second takes a few counts more,
        and from then on every length follows at once; see `prepare_training_flops`.

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
        TypeError: If it is not a family, or `train` is something else.
        ValueError: If `train` is unknown or leaves nothing to learn, or the family cannot be built.

    Example:
        >>> prepare_training_flops(model)
        >>> costs = [training_flops_per_token(model, length) for length in range(1, 4097)]
    """
    _counts_of(config_of(model_or_config), train)[0].lengths.prepare()


def approximate_training_flops(
    model_or_config: FamilialForCausalLM | FamilialConfig,
    tokens: float,
    seq_length: int,
    convention: str = "non_embedding",
) -> Approximation:
    """The usual C = 6ND, and how far it is from the count.

    Attention and heads are left out (or, if N counts them, the head once and the embedding, which
    is no matmul, as one): at small widths that is most of the cost, and it grows with the number
    of exits.

    Args:
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family.
        tokens (`float`): Training tokens D.
        seq_length (`int`): Tokens in a sequence, for the exact count.
        convention (`str`, *optional*, defaults to `"non_embedding"`): How N is counted: a field of
            [`ParameterCount`].

    Returns:
        [`Approximation`]: It prints with its error.

    Raises:
        ValueError: If `convention` is unknown or `tokens` is not positive.

    Reference: Kaplan et al. 2020, arXiv:2001.08361, section 2.1.
    """
    check_choice("convention", convention, CONVENTIONS)
    if not tokens > 0:
        raise ValueError(f"`tokens` must be positive, got {tokens}.")
    size = getattr(family_parameters(model_or_config).family, convention)
    exact = training_flops_per_token(model_or_config, seq_length).per_token * tokens
    return Approximation(6.0 * size * tokens, exact, convention)


def _check_train(train: Any) -> None:
    right = f"`train` must be one of {', '.join(TRAINED)}, or a peft LoraConfig"
    if not isinstance(train, str) and getattr(train, "peft_type", None) != "LORA":
        raise TypeError(f"{right}, got {type(train).__name__}.")
    if isinstance(train, str) and train not in TRAINED:
        raise ValueError(f"{right}, got {train!r}.")


def _key(train: str | LoraConfig) -> str:
    if isinstance(train, str):
        return train
    # sets have no order of their own
    return json.dumps(train.to_dict(), sort_keys=True, default=lambda v: sorted(map(str, v)))


def _dense(config: FamilialConfig) -> FamilialConfig:
    """The family of the deepest exit alone, on the same backbone."""
    fields = {"exits": [config.num_hidden_layers], "exit_head": "shared", "default_exit": -1}
    return FamilialConfig.from_dict(config.to_dict() | fields)


def _head(config: FamilialConfig) -> int:
    """FLOPs per token of a head, forward and for both gradients."""
    sizes = family_parameters(_dense(config))
    return 3 * sizes.head_flops


class _Counts:
    """FLOPs of one sequence of a family, by its length."""

    def __init__(self, config: FamilialConfig, train: str | LoraConfig) -> None:
        self.config, self.train, self.exact = config, train, True
        self.lengths = LengthCounts(config, self._count)

    def _count(self, seq_length: int) -> int:
        # the caller may be evaluating
        with torch.inference_mode(False), torch.enable_grad():
            family: Any = _learning(phantom(self.config), self.train)
            try:
                with fake(family):
                    return _run(family, seq_length)
            except Exception:
                # whatever a host's forward raises where it wants to look at values
                self.exact = False
                return _estimate(self.config, seq_length, self.train)


def _counts_of(config: FamilialConfig, train: str | LoraConfig) -> tuple[_Counts, int]:
    """Counts of the same backbone, and FLOPs per token of the heads that these leave out."""
    _check_train(train)
    heads = 0
    if train == "all" and config.num_exits > 1 and not config.num_exit_layers:
        # exits without layers cost a head each: families on one backbone are counted once
        config, heads = _dense(config), (config.num_exits - 1) * _head(config)
    key = (config.to_json_string(use_diff=False), _key(train))
    if key not in _COUNTS:
        # the caller may change its config
        _COUNTS[key] = _Counts(copy.deepcopy(config), copy.deepcopy(train))
    return _COUNTS[key], heads


def _learning(family: FamilialForCausalLM, train: str | LoraConfig) -> FamilialForCausalLM:
    """The same family; of its parameters those that learn require a gradient."""
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
    """FLOPs of forward and backward through every exit's logits, for one sequence."""
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
    """Forward, and as much again for each kind of gradient."""
    forward = estimated(phantom(config), seq_length, 0)
    if train == "all":
        return 3 * forward.all_exits.total
    if train == "exits":
        heads = 2 if config.exit_head == "own" else 1
        early = sum(2 * f.total for f in forward.private)
        return forward.all_exits.total + early + sum(heads * h.total for h in forward.heads[:-1])
    # adapters are small beside what they adapt, whose inputs alone need gradients
    return 2 * forward.all_exits.total

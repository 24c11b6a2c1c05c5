"""Parameter counts of a family and its members, from the config alone, in four conventions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from torch import nn

from ..models.familial import FamilialConfig, FamilialForCausalLM
from ._fake_model import Keyed, fake_model, keyed_config


# Names of the config fields for the number of routed experts, and for the experts per token.
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class ParameterCount:
    """The size N of a model in four conventions. Each shared parameter counts once.

    Attributes:
        total (`int`): All parameters.
        non_embedding (`int`): All parameters except the token embedding and output heads (Kaplan et
            al. 2020, arXiv:2001.08361, section 2.1).
        active (`int`): The parameters that one token uses. Routed experts count only if the
            token uses them. In a dense backbone it equals `total`.
        layers_and_head (`int`): Decoder layers and one output head, tied or not. The size labels
            1.7B, 8B and 14B of TeleAI's Ruyi2 follow this convention (arXiv:2602.22543, table 1).
    """

    total: int
    non_embedding: int
    active: int
    layers_and_head: int


# the conventions to count N: the fields of `ParameterCount`
CONVENTIONS = tuple(ParameterCount.__dataclass_fields__)


@dataclass(frozen=True)
class FamilyParameters:
    """The parameter counts of a family by member, segment and exit.

    Attributes:
        family ([`ParameterCount`]): The counts of the whole family. Its `layers_and_head` includes
            all private layers.
        members (`tuple[ParameterCount, ...]`): The counts of each member, shallowest first.
        segments (`tuple[int, ...]`): Parameters of the layers between two depths. The first segment
            starts after the embedding.
        exits (`tuple[int, ...]`): Parameters that only one exit has: private layers, norm and own
            head. The deepest exit has 0, because its norm and head belong to the backbone.
        head_flops (`int`): FLOPs per token of the deepest exit's head.
    """

    family: ParameterCount
    members: tuple[ParameterCount, ...]
    segments: tuple[int, ...]
    exits: tuple[int, ...]
    head_flops: int


def family_parameters(model_or_config: FamilialForCausalLM | FamilialConfig) -> FamilyParameters:
    """Count the parameters of a family, its members, segments and exits, from the config alone.

    Args:
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family. Its model may
            be sharded.

    Returns:
        [`FamilyParameters`]: The counts. The result is cached for equal configs.

    Raises:
        TypeError: If `model_or_config` is not a family.
        ValueError: If the family cannot be built.

    Example:
        >>> family_parameters(config).members[0].layers_and_head
    """
    return _count(keyed_config(model_or_config))


def count_family(model_or_config: FamilialForCausalLM | FamilialConfig) -> dict[str, int]:
    """Count the parameters of a whole family, from the config alone. Shared ones count once.

    Args:
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family. Its model may
            be sharded.

    Returns:
        `dict[str, int]`: `total`, `non_embedding` and `active`, as in [`ParameterCount`].

    Raises:
        TypeError: If `model_or_config` is not a family.

    Example:
        >>> count_family(model)["total"]
    """
    counts = asdict(family_parameters(model_or_config).family)
    return {name: counts[name] for name in ("total", "non_embedding", "active")}


def member_parameters(model: FamilialForCausalLM, exit_idx: int) -> Iterator[nn.Parameter]:
    """Iterate over the parameters of one member, head included, each once."""
    parts = (model.model.member_view(exit_idx), model.head(exit_idx))
    return iter({p: None for part in parts for p in part.parameters()})


def count_parameters(model: FamilialForCausalLM, exit_idx: int) -> dict[str, int]:
    """Count the parameters of one member. Shared tensors count once.

    Args:
        model ([`FamilialForCausalLM`]): The family.
        exit_idx (`int`): The exit where the member ends.

    Returns:
        `dict[str, int]`: `total` has all parameters of the member. `non_embedding` leaves out the
        token embedding and the output head.

    Example:
        >>> count_parameters(model, exit_idx=0)["total"]
    """
    exit_idx = model.config.resolve_exit(exit_idx)
    parts = {id(p): p.numel() for p in member_parameters(model, exit_idx)}
    ends = (model.get_input_embeddings(), model.head(exit_idx))
    outer = {id(p) for module in ends for p in module.parameters()}
    total = sum(parts.values())
    return {"total": total, "non_embedding": total - sum(parts[i] for i in outer)}


@cache
def _count(keyed: Keyed[FamilialConfig]) -> FamilyParameters:
    family = fake_model(keyed.value)
    config, members = family.config, family.model.members
    shares = active_shares(family)
    exits = range(config.num_exits)
    early: Any = family.model.exits
    private = [layer for part in early for layer in part.layers]
    owned = [_size([part]) for part in early]
    for k, head in enumerate(family.exit_heads):
        owned[k] += _size([head])
    heads = [_size([family.head(k)]) for k in exits]
    starts = (0, *config.exits)
    return FamilyParameters(
        family=_parameter_count(
            shares,
            shares,
            _outer(family, exits),
            _size([*members.decoder.layers, *private]) + heads[-1],
        ),
        members=tuple(
            _parameter_count(
                [id(p) for p in member_parameters(family, k)],
                shares,
                _outer(family, [k]),
                _size(members.member_segment(k).layers) + heads[k],
            )
            for k in exits
        ),
        segments=tuple(
            _size(members.decoder.layers[a:b]) for a, b in zip(starts, config.exits, strict=False)
        ),
        exits=(*owned, 0),
        head_flops=sum(2 * p.numel() for p in family.head(-1).parameters() if p.ndim > 1),
    )


def _parameter_count(
    ids: Iterable[int],
    shares: dict[int, tuple[nn.Parameter, float]],
    outer: set[int],
    layers_and_head: int,
) -> ParameterCount:
    kept = {i: (shares[i][0].numel(), shares[i][1]) for i in ids}
    return ParameterCount(
        total=sum(size for size, _ in kept.values()),
        non_embedding=sum(size for i, (size, _) in kept.items() if i not in outer),
        active=round(sum(size * share for size, share in kept.values())),
        layers_and_head=layers_and_head,
    )


def _size(modules: Iterable[nn.Module]) -> int:
    return sum({id(p): p.numel() for m in modules for p in m.parameters()}.values())


def _outer(family: FamilialForCausalLM, exits: Iterable[int]) -> set[int]:
    """Return the `id()` of each parameter of the token embedding and the output heads."""
    ends = [family.get_input_embeddings(), *(family.head(k) for k in exits)]
    return {id(p) for module in ends for p in module.parameters()}


def active_shares(family: FamilialForCausalLM) -> dict[int, tuple[nn.Parameter, float]]:
    """Return each parameter and the share of it that one token uses, by `id()`.

    The share is below 1 only for routed experts.
    """
    config = family.config.text_config
    holders = (config, getattr(config, "ffn_config", None))
    count = _first(holders, NUM_EXPERTS)
    share = (_first(holders, TOP_K) or 1) / count if count else 1.0
    return {
        id(p): (p, share if count and _is_experts(name, p, count) else 1.0)
        for name, p in family.named_parameters()
    }


def _first(holders: Iterable[Any], names: Iterable[str]) -> int | None:
    """Return the first attribute in `names` that one of the holders has."""
    found = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in found if value), None)


def _is_experts(name: str, parameter: nn.Parameter, count: int) -> bool:
    """Return whether a parameter contains the weights of all routed experts."""
    stacked = parameter.ndim == 3 and parameter.shape[0] == count
    return stacked or ("experts" in name.split(".") and parameter.shape[0] % count == 0)

"""Parameters of a family and its members, from the config alone, in every convention in use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from torch import nn

from ..models.familial import FamilialConfig, FamilialForCausalLM
from ._fake_model import Keyed, fake_model, keyed_config


# Names under which configs keep the number of routed experts, and how many a token is sent to.
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class ParameterCount:
    """The size N of a model by every convention, each shared parameter counted once.

    Attributes:
        total (`int`): All parameters.
        non_embedding (`int`): Without the token embedding and output heads (Kaplan et al. 2020,
            arXiv:2001.08361, section 2.1).
        active (`int`): Of the total, those that take part in one token: of routed experts, as many
            as a token is sent to. Equal to `total` in a dense backbone.
        layers_and_head (`int`): Decoder layers and one output head, tied or not. The size labels
            of TeleAI's Ruyi models obey it: 1.7B, 8B and 14B of Ruyi2 (arXiv:2602.22543, table 1).
    """

    total: int
    non_embedding: int
    active: int
    layers_and_head: int


# the ways to count N, as `ParameterCount` names them
CONVENTIONS = tuple(ParameterCount.__dataclass_fields__)


@dataclass(frozen=True)
class FamilyParameters:
    """The parameters of a family by member, segment and exit.

    Attributes:
        family ([`ParameterCount`]): Of the whole; `layers_and_head` counts all private layers.
        members (`tuple[ParameterCount, ...]`): Of every member, shallowest first.
        segments (`tuple[int, ...]`): Layers between two depths, the first from the embedding on.
        exits (`tuple[int, ...]`): What each exit has for itself: private layers, norm, own head;
            of the deepest, nothing: its norm and head are the backbone's.
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
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family; sharded or
            not.

    Returns:
        [`FamilyParameters`]: Kept for the next call with an equal config.

    Raises:
        TypeError: If it is not a family.
        ValueError: If the family cannot be built.

    Example:
        >>> family_parameters(config).members[0].layers_and_head
    """
    return _count(keyed_config(model_or_config))


def count_family(model_or_config: FamilialForCausalLM | FamilialConfig) -> dict[str, int]:
    """Count the parameters of a whole family, each shared one once, from the config alone.

    Args:
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family; sharded or
            not.

    Returns:
        `dict[str, int]`: `total`, `non_embedding` and `active`, as in [`ParameterCount`].

    Raises:
        TypeError: If it is not a family.
    """
    counts = asdict(family_parameters(model_or_config).family)
    return {name: counts[name] for name in ("total", "non_embedding", "active")}


def count_parameters(model: FamilialForCausalLM, exit_idx: int) -> dict[str, int]:
    """Count the parameters of one member, each shared tensor once.

    Args:
        model ([`FamilialForCausalLM`]): The family.
        exit_idx (`int`): Exit at which the member ends.

    Returns:
        `dict[str, int]`: `total`, all that the member needs; `non_embedding`, without the token
        embedding and the output head: layers, private layers, norms, position embeddings.
    """
    exit_idx = model.config.resolve_exit(exit_idx)
    parts = {id(p): p.numel() for p in model.member_parameters(exit_idx)}
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
                [id(p) for p in family.member_parameters(k)],
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
    """Count the parameters of modules, each shared one once."""
    return sum({id(p): p.numel() for m in modules for p in m.parameters()}.values())


def _outer(family: FamilialForCausalLM, exits: Iterable[int]) -> set[int]:
    """Return the identities of the parameters of the token embedding and of output heads."""
    ends = [family.get_input_embeddings(), *(family.head(k) for k in exits)]
    return {id(p) for module in ends for p in module.parameters()}


def active_shares(family: FamilialForCausalLM) -> dict[int, tuple[nn.Parameter, float]]:
    """Return each parameter and the share of it that meets a token: less than 1 for experts."""
    config = family.config.text_config
    holders = (config, getattr(config, "ffn_config", None))
    count = _first(holders, NUM_EXPERTS)
    share = (_first(holders, TOP_K) or 1) / count if count else 1.0
    return {
        id(p): (p, share if count and _is_experts(name, p, count) else 1.0)
        for name, p in family.named_parameters()
    }


def _first(holders: Iterable[Any], names: Iterable[str]) -> int | None:
    """Return the first of several attributes that some holder has."""
    found = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in found if value), None)


def _is_experts(name: str, parameter: nn.Parameter, count: int) -> bool:
    """Return whether a parameter holds the weights of all routed experts."""
    stacked = parameter.ndim == 3 and parameter.shape[0] == count
    return stacked or ("experts" in name.split(".") and parameter.shape[0] % count == 0)

"""Parameters and FLOPs: forward of every member of a family, and a training step of the whole."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from .models.familial import FamilialConfig, FamilialForCausalLM


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """Two matmuls, scores and values, over all pairs of positions."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[-2] * (width + v[-1])


def _addmm_flops(total: torch.Size, a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """One matmul, added in place."""
    return 2 * a[0] * a[1] * b[1]


def _conv_backward_flops(
    grad_out: torch.Size,
    x: torch.Size,
    weight: torch.Size,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """As much as forward for each gradient; torch's own formula forgets the groups."""
    transposed, output_mask = args[4], args[7]
    forward = conv_flop_count(list(x), list(weight), list(grad_out), transposed)
    return forward * sum(output_mask[:2])


# torch counts the attention kernels of accelerators, but not the CPU's
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
FORMULAS = CPU_ATTENTION | {
    torch.ops.aten.addmm_: _addmm_flops,
    torch.ops.aten.convolution_backward: _conv_backward_flops,
}

# Hosts that walk over the positions one by one, too slow at the length of training. Their FLOPs are
# a quadratic in the length, so three short sequences tell them all.
RECURRENT = frozenset({"falcon_mamba", "jamba", "mamba", "recurrent_gemma", "zamba"})
SHORT = (8, 16, 24)

# Names under which configs keep the number of routed experts, and how many a token is sent to.
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k_experts")


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


def measure_flops_per_token(model: FamilialForCausalLM, exit_idx: int, seq_length: int) -> float:
    """Count the FLOPs of one member's forward pass, per token, by running it.

    Args:
        model ([`FamilialForCausalLM`]): The family.
        exit_idx (`int`): Exit at which the member ends.
        seq_length (`int`): Number of tokens in the sequence; attention grows with it.

    Returns:
        `float`: FLOPs per token: every matmul and attention as torch's `FlopCounterMode` counts
        them (a multiply-add is two), the head included, causal attention counted in full.
    """
    ids = torch.zeros((1, seq_length), dtype=torch.long, device=model.device)
    with torch.no_grad(), _counter() as counter:
        model(input_ids=ids, exit_idx=exit_idx, use_cache=False)
    return counter.get_total_flops() / seq_length


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


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


_COUNTS: dict[tuple[str, int], FlopCount] = {}
_SIZES: dict[str, dict[str, int]] = {}


def training_flops_per_token(
    model_or_config: FamilialForCausalLM | FamilialConfig, seq_length: int
) -> FlopCount:
    """Count the FLOPs of a training step per token, from the config alone.

    A family without weights runs forward and backward once, and torch's `FlopCounterMode` counts: a
    multiply-add is two FLOPs; the backbone, every exit's private layers and every exit's head
    count; every parameter is trained; every position has a target; attention is counted in full,
    without the savings of causal, windowed or recomputing kernels; of routed experts, those that a
    token is sent to. Recomputed activations do not count.

    Args:
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family.
        seq_length (`int`): Tokens in a sequence.

    Returns:
        [`FlopCount`]: Kept for the next call with an equal config and length.

    Raises:
        TypeError: If it is not a family.
        ValueError: If `seq_length` is not positive, or the family cannot be built.

    Example:
        >>> count = training_flops_per_token(model, seq_length=2048)
        >>> step = count.per_token * tokens_per_step  # FLOPs
    """
    config = _config_of(model_or_config)
    if seq_length < 1:
        raise ValueError(f"`seq_length` must be 1 or more, got {seq_length}.")
    key = (config.to_json_string(use_diff=False), seq_length)
    if key not in _COUNTS:
        _COUNTS[key] = _count_step(config, seq_length)
    return _COUNTS[key]


def count_family(model_or_config: FamilialForCausalLM | FamilialConfig) -> dict[str, int]:
    """Count the parameters of a whole family, each shared one once, from the config alone.

    Args:
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family; sharded or
            not.

    Returns:
        `dict[str, int]`: `total`; `non_embedding`, without token embedding and output heads;
        `active`, of the total those that take part in one token: of routed experts, as many as a
        token is sent to.

    Raises:
        TypeError: If it is not a family.
    """
    config = _config_of(model_or_config)
    key = config.to_json_string(use_diff=False)
    if key not in _SIZES:
        _SIZES[key] = _count_family(_phantom(config))
    return dict(_SIZES[key])


def _config_of(model_or_config: Any) -> FamilialConfig:
    config = getattr(model_or_config, "config", model_or_config)
    if not isinstance(config, FamilialConfig):
        raise TypeError(
            "FLOPs and parameters are counted for a familial model or its config, got "
            f"{type(model_or_config).__name__}."
        )
    return config


def _phantom(config: FamilialConfig) -> FamilialForCausalLM:
    """The family on the meta device, with kernels whose shapes do not depend on data."""
    config = copy.deepcopy(config)
    for part in (config, config.text_config):
        part._attn_implementation = "eager"
        part._experts_implementation = "batched_mm"
    with torch.device("meta"):
        return FamilialForCausalLM(config).train()


def _count_step(config: FamilialConfig, seq_length: int) -> FlopCount:
    # the caller may be evaluating
    with torch.inference_mode(False), torch.enable_grad():
        family = _phantom(config)
        recurrent = config.text_config.model_type in RECURRENT and seq_length > SHORT[-1]
        try:
            with _fake(family):
                total = _extrapolated(family, seq_length) if recurrent else _run(family, seq_length)
        except Exception:
            # whatever a host's forward raises where it wants to look at values
            return FlopCount(_estimate(family, seq_length), exact=False)
    return FlopCount(total / seq_length, exact=True)


@contextmanager
def _fake(family: FamilialForCausalLM) -> Iterator[None]:
    """Gives a model on the meta device fake tensors, with which a host sees that it is traced."""
    logger, seen = logging.getLogger("torch._subclasses.fake_tensor"), {}
    disabled, logger.disabled = logger.disabled, True
    try:
        with FakeTensorMode(), torch.device("cpu"):
            for module in family.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in tensors.items():
                        if tensor is not None and id(tensor) not in seen:
                            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                            trained = isinstance(tensor, nn.Parameter)
                            # kept beside the original, whose id must not be given to another
                            seen[id(tensor)] = (nn.Parameter(fake) if trained else fake, tensor)
                        if tensor is not None:
                            tensors[name] = seen[id(tensor)][0]
            yield
    finally:
        logger.disabled = disabled


def _run(family: FamilialForCausalLM, seq_length: int) -> int:
    """FLOPs of forward and backward through every exit's logits, for one sequence."""
    ids = torch.zeros((1, seq_length), dtype=torch.long)
    with _counter() as counter:
        outputs = family(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            output_exits=True,
        )
        sum(logits.sum() for logits in outputs.exit_logits).backward()
    return counter.get_total_flops()


def _extrapolated(family: FamilialForCausalLM, seq_length: int) -> int:
    """The quadratic in the length that goes through the FLOPs of short sequences."""
    first, second, third = (_run(family, length) for length in SHORT)
    step = SHORT[1] - SHORT[0]
    steps = (seq_length - SHORT[0]) / step
    slope, curve = second - first, third - 2 * second + first
    return round(first + steps * slope + steps * (steps - 1) / 2 * curve)


def _estimate(family: FamilialForCausalLM, seq_length: int) -> float:
    """Forward and twice as much backward: active matrices, and attention in every layer."""
    config, exits = family.config.text_config, range(family.config.num_exits)
    tables = [m for m in family.modules() if isinstance(m, nn.Embedding)]
    tables_and_vectors = {id(p) for table in tables for p in table.parameters()}
    tables_and_vectors |= {id(p) for p in family.parameters() if p.ndim == 1}
    shares = _active_shares(family).values()
    matrices = sum(p.numel() * share for p, share in shares if id(p) not in tables_and_vectors)
    # a head is used by every exit that shares it, and may be the embedding
    matrices -= sum(p.numel() for p, _ in shares if id(p) in _heads(family) - tables_and_vectors)
    matrices += sum(p.numel() for k in exits for p in family.head(k).parameters() if p.ndim > 1)
    layers = config.num_hidden_layers + family.config.num_exit_layers * (len(exits) - 1)
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 4 * seq_length * heads * width * layers
    return 3 * (2 * matrices + attention)


def _count_family(family: FamilialForCausalLM) -> dict[str, int]:
    shares = _active_shares(family)
    outer = {id(p) for p in family.get_input_embeddings().parameters()} | _heads(family)
    return {
        "total": sum(p.numel() for p, _ in shares.values()),
        "non_embedding": sum(p.numel() for i, (p, _) in shares.items() if i not in outer),
        "active": round(sum(p.numel() * share for p, share in shares.values())),
    }


def _heads(family: FamilialForCausalLM) -> set[int]:
    """Identities of the parameters of all output heads."""
    exits = range(family.config.num_exits)
    return {id(p) for k in exits for p in family.head(k).parameters()}


def _active_shares(family: FamilialForCausalLM) -> dict[int, tuple[nn.Parameter, float]]:
    """Each parameter once, and what part of it meets a token: less than 1 of routed experts."""
    config = family.config.text_config
    holders = (config, getattr(config, "ffn_config", None))
    count = _first(holders, NUM_EXPERTS)
    share = (_first(holders, TOP_K) or 1) / count if count else 1.0
    return {
        id(p): (p, share if count and _is_experts(name, p, count) else 1.0)
        for name, p in family.named_parameters()
    }


def _first(holders: Iterable[Any], names: Iterable[str]) -> int | None:
    """The first of several attributes that some holder has."""
    found = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in found if value), None)


def _is_experts(name: str, parameter: nn.Parameter, count: int) -> bool:
    """Whether a parameter holds the weights of all routed experts."""
    stacked = parameter.ndim == 3 and parameter.shape[0] == count
    return stacked or ("experts" in name.split(".") and parameter.shape[0] % count == 0)

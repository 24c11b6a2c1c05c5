"""Parameters and forward FLOPs of every member of a family."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .models.familial import FamilialForCausalLM


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """Two matmuls, scores and values, over all pairs of positions."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[-2] * (width + v[-1])


# torch counts the attention kernels of accelerators, but not the CPU's
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


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
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)

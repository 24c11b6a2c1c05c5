"""FLOPs from the sizes of matrices alone, for hosts that cannot run without data."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models.familial import FamilialForCausalLM
from .counting import Flops
from .parameters import active_shares


def estimate_forward(
    family: FamilialForCausalLM, tokens: int, past: int = 0
) -> dict[int | None, Flops]:
    """FLOPs of a forward pass at every layer, private layer and head; `None` is what is left over.

    Two for each active entry of a matrix and each token (Kaplan et al. 2020, arXiv:2001.08361,
    table 1); attention in every layer over all positions, `4 tokens (past + tokens) heads width`
    (Hoffmann et al. 2022, arXiv:2203.15556, appendix F).

    Args:
        family ([`FamilialForCausalLM`]): Without weights.
        tokens (`int`): Positions to run.
        past (`int`, *optional*, defaults to 0): Positions in the cache before them.

    Returns:
        `dict[int | None, Flops]`: By the identity of the module; a shared head as one exit runs it.
    """
    config = family.config.text_config
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 4 * tokens * (past + tokens) * heads * width
    shares = active_shares(family)
    tables = {
        id(p) for m in family.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    seen: set[int] = set()

    def matmul(module: nn.Module, tied: set[int]) -> int:
        found = {id(p): p for p in module.parameters() if p.ndim > 1 and id(p) not in tied}
        seen.update(found)
        return round(sum(2 * tokens * p.numel() * shares[i][1] for i, p in found.items()))

    early: Any = family.model.exits
    layers = [*family.model.decoder.layers, *(layer for e in early for layer in e.layers)]
    places: dict[int | None, Flops] = {id(m): Flops(matmul(m, tables), attention) for m in layers}
    # a tied head is a matrix all the same
    readers = [family.head(k) for k in range(family.config.num_exits)]
    places |= {id(head): Flops(matmul(head, set())) for head in readers}
    places[None] = Flops(matmul(family, tables | seen))
    return places

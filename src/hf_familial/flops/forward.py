"""FLOPs of a forward pass by layer, private layer and head, and so of members and relays."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from ..models.familial import FamilialConfig, FamilialForCausalLM
from ._fake_model import (
    SHORT,
    Keyed,
    fake_model,
    fake_tensors,
    filled_cache,
    flops_by_module,
    is_walked,
    keyed_config,
    quadratic,
)
from .counting import Flops, counter
from .parameters import active_shares


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one pass over one sequence through every layer and every exit, by module.

    Attributes:
        tokens (`int`): Positions that were run.
        past (`int`): Positions in the cache before them.
        depths (`tuple[int, ...]`): Depth of every exit.
        num_exit_layers (`int`): Private layers of each early exit.
        entry ([`Flops`]): What stands outside of layers and heads, such as a projection of the
            token embedding; none in most hosts.
        layers (`tuple[Flops, ...]`): Every layer of the backbone.
        private (`tuple[Flops, ...]`): Private layers of every exit; none of the deepest.
        heads (`tuple[Flops, ...]`): The head of every exit, read at every position.
        exact (`bool`): Whether every operation was counted, not estimated.
    """

    tokens: int
    past: int
    depths: tuple[int, ...]
    num_exit_layers: int
    entry: Flops
    layers: tuple[Flops, ...]
    private: tuple[Flops, ...]
    heads: tuple[Flops, ...]
    exact: bool

    @property
    def all_exits(self) -> Flops:
        """FLOPs of every layer once and every exit, as in training."""
        return sum((*self.layers, *self.private, *self.heads), self.entry)

    def segment(self, start: int, stop: int) -> Flops:
        """Return the FLOPs of the backbone's layers `[start, stop)`, from tap to tap."""
        return sum(self.layers[start:stop], Flops())

    def member(self, exit_idx: int) -> Flops:
        """Return the FLOPs of one member, from the token ids to its logits.

        Raises:
            IndexError: If there is no such exit.
        """
        return self.entry + self.segment(0, self.depths[exit_idx]) + self._exit(exit_idx)

    def relay(self, from_exit: int, to_exit: int) -> Flops:
        """Return the FLOPs of going on from the taps of one exit to the logits of a deeper one.

        Args:
            from_exit (`int`): Exit whose taps are kept.
            to_exit (`int`): Deeper exit.

        Raises:
            IndexError: If there is no such exit.
            ValueError: If `to_exit` is not deeper.
        """
        start, stop = self.depths[from_exit], self.depths[to_exit]
        if start >= stop:
            raise ValueError(
                f"`to_exit` must be deeper than `from_exit`, got depths {stop} and {start}."
            )
        return self.segment(start, stop) + self._exit(to_exit)

    def layer_passes(self, exit_idx: int, from_exit: int | None = None) -> int:
        """Return positions times layers that they run through, private ones among them.

        Args:
            exit_idx (`int`): Exit that is read.
            from_exit (`int`, *optional*): Exit whose taps are kept; by default none are.
        """
        start = 0 if from_exit is None else self.depths[from_exit]
        early = exit_idx % len(self.depths) < len(self.depths) - 1
        layers = self.depths[exit_idx] - start + (self.num_exit_layers if early else 0)
        return self.tokens * layers

    def _exit(self, exit_idx: int) -> Flops:
        return self.private[exit_idx] + self.heads[exit_idx]


def forward_flops(
    model_or_config: FamilialForCausalLM | FamilialConfig, tokens: int, past: int = 0
) -> ForwardFlops:
    """Count the FLOPs of a forward pass, from the config alone.

    A family without weights runs (fake tensors). Attention counts every pair of a new position and
    one that the host's cache holds; of routed experts, those that a token is sent to count.
    Elementwise operations do not count.

    Args:
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family.
        tokens (`int`): Positions to run: a whole prompt, one token when decoding, the drafts when
            verifying.
        past (`int`, *optional*, defaults to 0): Positions in the cache before them.

    Returns:
        [`ForwardFlops`]: Kept for the next call with equal arguments.

    Raises:
        TypeError: If it is not a family.
        ValueError: If `tokens` is not positive, `past` is negative, or the host has no cache.

    Example:
        >>> prefill = forward_flops(config, tokens=1024)
        >>> prefill.member(0).total, prefill.relay(0, -1).total  # draft; then verify all of them
    """
    config = keyed_config(model_or_config)
    if tokens < 1:
        raise ValueError(f"`tokens` must be 1 or more, got {tokens}.")
    if past < 0:
        raise ValueError(f"`past` must be 0 or more, got {past}.")
    return _count(config, tokens, past)


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
    with torch.no_grad(), counter() as count:
        model(input_ids=ids, exit_idx=exit_idx, use_cache=False)
    return count.get_total_flops() / seq_length


@cache
def _count(keyed: Keyed[FamilialConfig], tokens: int, past: int) -> ForwardFlops:
    config = keyed.value
    with torch.inference_mode(False), torch.no_grad():
        family = fake_model(config).eval()
        if past and not family.model.spec.cache:
            raise ValueError(
                f"`past` must be 0: a `{config.text_config.model_type}` has no cache, got {past}."
            )
        try:
            with fake_tensors(family):
                return _counted(family, tokens, past)
        except Exception:
            # whatever a host's forward raises where it wants to look at values
            return estimated(fake_model(config), tokens, past)


def _counted(family: FamilialForCausalLM, tokens: int, past: int) -> ForwardFlops:
    if past or not is_walked(family.config, tokens):
        cache = filled_cache(family, past) if past else None
        return _result(family, tokens, past, flops_by_module(family, tokens, cache), exact=True)
    runs = [flops_by_module(family, length) for length in SHORT]
    found = {
        module: Flops(
            quadratic([run[module].matmul for run in runs], tokens),
            quadratic([run[module].attention for run in runs], tokens),
        )
        for module in runs[0]
    }
    return _result(family, tokens, past, found, exact=True)


def estimated(family: FamilialForCausalLM, tokens: int, past: int) -> ForwardFlops:
    """Return the FLOPs that follow from the sizes of matrices, for hosts that need data to run.

    Two for each active entry of a matrix and each token (Kaplan et al. 2020, arXiv:2001.08361,
    table 1); attention in every layer over all positions, `4 tokens (past + tokens) heads width`
    (Hoffmann et al. 2022, arXiv:2203.15556, appendix F).
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

    def matmul(module: nn.Module, left_out: set[int]) -> int:
        found = {id(p): p for p in module.parameters() if p.ndim > 1 and id(p) not in left_out}
        seen.update(found)
        return round(sum(2 * tokens * p.numel() * shares[i][1] for i, p in found.items()))

    early: Any = family.model.exits
    layers = [*family.model.decoder.layers, *(layer for e in early for layer in e.layers)]
    found: dict[int | None, Flops] = {id(m): Flops(matmul(m, tables), attention) for m in layers}
    # a tied head is a matrix all the same
    readers = [family.head(k) for k in range(family.config.num_exits)]
    found |= {id(head): Flops(matmul(head, set())) for head in readers}
    found[None] = Flops(matmul(family, tables | seen))
    return _result(family, tokens, past, found, exact=False)


def _result(
    family: FamilialForCausalLM,
    tokens: int,
    past: int,
    found: dict[int | None, Flops],
    exact: bool,
) -> ForwardFlops:
    """Sort the FLOPs of modules, by identity, into layers, private layers and heads."""
    config = family.config
    readers = [id(family.head(k)) for k in range(config.num_exits)]
    # a shared head was counted once for every exit that reads it, and estimated once
    times = Counter(readers) if exact else Counter(set(readers))
    early: Any = family.model.exits
    private = [sum((found[id(m)] for m in e.layers), Flops()) for e in early]
    return ForwardFlops(
        tokens=tokens,
        past=past,
        depths=tuple(config.exits),
        num_exit_layers=config.num_exit_layers,
        entry=found[None],
        layers=tuple(found[id(m)] for m in family.model.decoder.layers),
        private=(*private, Flops()),
        heads=tuple(Flops(found[i].matmul // times[i]) for i in readers),
        exact=exact,
    )

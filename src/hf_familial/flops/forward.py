"""FLOPs of a forward pass by layer, private layer and head, and of members and relays."""

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
    """FLOPs of one pass over one sequence through all layers and exits, by module.

    Attributes:
        tokens (`int`): The number of positions that run.
        past (`int`): The number of earlier positions in the KV cache.
        depths (`tuple[int, ...]`): The depth of each exit.
        num_exit_layers (`int`): The number of private layers of each early exit.
        entry ([`Flops`]): FLOPs outside of layers and heads, such as a projection of the token
            embedding. They are 0 in most backbones.
        layers (`tuple[Flops, ...]`): FLOPs of each backbone layer.
        private (`tuple[Flops, ...]`): FLOPs of the private layers of each exit. The deepest exit
            has none.
        heads (`tuple[Flops, ...]`): FLOPs of each exit's head at all positions.
        exact (`bool`): `True` if the operations were counted, `False` if they were estimated.
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
        """FLOPs of all layers and all exits, as in the forward pass of training."""
        return sum((*self.layers, *self.private, *self.heads), self.entry)

    def segment(self, start: int, stop: int) -> Flops:
        """Return the FLOPs of the backbone layers `[start, stop)`."""
        return sum(self.layers[start:stop], Flops())

    def member(self, exit_idx: int) -> Flops:
        """Return the FLOPs of one member, from token ids to logits.

        Raises:
            IndexError: If the family does not have this exit.
        """
        return self.entry + self.segment(0, self.depths[exit_idx]) + self._exit(exit_idx)

    def relay(self, from_exit: int, to_exit: int) -> Flops:
        """Return the FLOPs from the taps of one exit to the logits of a deeper exit.

        Args:
            from_exit (`int`): The exit whose taps are available.
            to_exit (`int`): The deeper exit.

        Raises:
            IndexError: If the family does not have one of these exits.
            ValueError: If `to_exit` is not deeper than `from_exit`.
        """
        start, stop = self.depths[from_exit], self.depths[to_exit]
        if start >= stop:
            raise ValueError(
                f"`to_exit` must be deeper than `from_exit`, got depths {stop} and {start}."
            )
        return self.segment(start, stop) + self._exit(to_exit)

    def layer_passes(self, exit_idx: int, from_exit: int | None = None) -> int:
        """Return the number of positions times the number of layers that each runs through.

        Private layers count.

        Args:
            exit_idx (`int`): The exit where the pass ends.
            from_exit (`int`, *optional*): The exit whose taps are available. By default the pass
                starts at the token ids.
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
    """Count the FLOPs of a forward pass through all exits, from the config alone.

    A model of fake tensors runs, and its matmuls and attention are counted. Attention counts all
    pairs of a new position and a position in the cache. Routed experts count only if a
    token uses them. Elementwise operations do not count.

    Args:
        model_or_config ([`FamilialForCausalLM`] or [`FamilialConfig`]): The family.
        tokens (`int`): The number of positions to run: the length of a prompt, 1 for decoding, or
            the number of drafts for verifying.
        past (`int`, *optional*, defaults to 0): The number of earlier positions in the KV cache.

    Returns:
        [`ForwardFlops`]: The FLOPs by module. The result is cached for equal arguments.

    Raises:
        TypeError: If `model_or_config` is not a family.
        ValueError: If `tokens` is below 1, if `past` is negative, or if `past` is positive and the
            backbone has no cache.

    Example:
        >>> flops = forward_flops(config, tokens=1024)
        >>> flops.member(0).total  # the shallowest member
        >>> flops.relay(0, -1).total  # from the taps of exit 0 to the deepest exit
    """
    config = keyed_config(model_or_config)
    if tokens < 1:
        raise ValueError(f"`tokens` must be 1 or more, got {tokens}.")
    if past < 0:
        raise ValueError(f"`past` must be 0 or more, got {past}.")
    return _count(config, tokens, past)


def measure_flops_per_token(model: FamilialForCausalLM, exit_idx: int, seq_length: int) -> float:
    """Run one member on one sequence, and return its FLOPs per token.

    Args:
        model ([`FamilialForCausalLM`]): The family.
        exit_idx (`int`): The exit where the member ends.
        seq_length (`int`): The number of tokens in the sequence. The cost of attention grows with
            it.

    Returns:
        `float`: FLOPs per token of all matmuls and attention, the head included. A multiply-add
        counts as two, and causal attention counts in full. Torch's `FlopCounterMode` counts them.

    Example:
        >>> measure_flops_per_token(model, exit_idx=0, seq_length=512)
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
                f"`past` must be 0, because `{config.text_config.model_type}` has no cache, got "
                f"{past}."
            )
        try:
            with fake_tensors(family):
                return _counted(family, tokens, past)
        except Exception:
            # a backbone may raise any error when it needs real values
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
    """Estimate the FLOPs from the sizes of matrices, for backbones that need real data to run.

    Each active entry of a matrix counts 2 per token (Kaplan et al. 2020, arXiv:2001.08361, table
    1). Attention counts `4 tokens (past + tokens) heads width` in each layer (Hoffmann et al. 2022,
    arXiv:2203.15556, appendix F).
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
    # a tied head counts too, although its weight is the embedding table
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
    """Return the result from the FLOPs of modules by `id()`."""
    config = family.config
    readers = [id(family.head(k)) for k in range(config.num_exits)]
    # a count includes a shared head once per exit, an estimate includes it once
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

"""FLOPs of a forward pass by place: layers, private layers, heads; and so of members and relays."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from ..models.familial import FamilialConfig, FamilialForCausalLM
from .booking import filled, tally
from .counting import Flops, counter
from .estimate import estimate_forward
from .phantom import SHORT, config_of, fake, phantom, quadratic, walks


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one pass over one sequence through every layer and every exit, by place.

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
        """Every layer once and every exit, as in training."""
        return sum((*self.layers, *self.private, *self.heads), self.entry)

    def segment(self, start: int, stop: int) -> Flops:
        """The backbone's layers `[start, stop)`, from tap to tap."""
        return sum(self.layers[start:stop], Flops())

    def member(self, exit_idx: int) -> Flops:
        """One member, from the token ids to its logits.

        Raises:
            IndexError: If there is no such exit.
        """
        return self.entry + self.segment(0, self.depths[exit_idx]) + self._exit(exit_idx)

    def relay(self, from_exit: int, to_exit: int) -> Flops:
        """Going deeper: from the taps of one exit to the logits of a deeper one.

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
        """Positions times layers that they run through, private ones among them.

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


_PASSES: dict[tuple[str, int, int], ForwardFlops] = {}


def forward_flops(
    model_or_config: FamilialForCausalLM | FamilialConfig, tokens: int, past: int = 0
) -> ForwardFlops:
    """Count the FLOPs of a forward pass, from the config alone.

    A family without weights runs (fake tensors). Causal and windowed attention counts every pair
    of a new position and one that the host's cache holds; of routed experts, those that a token is
    sent to. Norms, activations and other elementwise operations do not count.

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
    config = config_of(model_or_config)
    if tokens < 1:
        raise ValueError(f"`tokens` must be 1 or more, got {tokens}.")
    if past < 0:
        raise ValueError(f"`past` must be 0 or more, got {past}.")
    key = (config.to_json_string(use_diff=False), tokens, past)
    if key not in _PASSES:
        _PASSES[key] = _count(config, tokens, past)
    return _PASSES[key]


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


def _count(config: FamilialConfig, tokens: int, past: int) -> ForwardFlops:
    with torch.inference_mode(False), torch.no_grad():
        family = phantom(config).eval()
        if past and not family.model.spec.cache:
            raise ValueError(
                f"`past` must be 0: a `{config.text_config.model_type}` has no cache, got {past}."
            )
        try:
            with fake(family):
                return _booked(family, tokens, past, exact=True)
        except Exception:
            # whatever a host's forward raises where it wants to look at values
            return estimated(phantom(config), tokens, past)


def estimated(family: FamilialForCausalLM, tokens: int, past: int) -> ForwardFlops:
    """The same from the sizes of matrices and full attention."""
    return _by_place(family, tokens, past, estimate_forward(family, tokens, past), exact=False)


def _booked(family: FamilialForCausalLM, tokens: int, past: int, exact: bool) -> ForwardFlops:
    if past or not walks(family.config, tokens):
        places = tally(family, tokens, filled(family, past) if past else None)
        return _by_place(family, tokens, past, places, exact)
    runs = [tally(family, length) for length in SHORT]
    places = {
        place: Flops(
            quadratic([run[place].matmul for run in runs], tokens),
            quadratic([run[place].attention for run in runs], tokens),
        )
        for place in runs[0]
    }
    return _by_place(family, tokens, past, places, exact)


def _by_place(
    family: FamilialForCausalLM, tokens: int, past: int, places: dict[Any, Flops], exact: bool
) -> ForwardFlops:
    config = family.config
    readers = [id(family.head(k)) for k in range(config.num_exits)]
    times = Counter(readers) if exact else Counter(set(readers))
    early: Any = family.model.exits
    private = [sum((places[id(m)] for m in e.layers), Flops()) for e in early]
    return ForwardFlops(
        tokens=tokens,
        past=past,
        depths=tuple(config.exits),
        num_exit_layers=config.num_exit_layers,
        entry=places[None],
        layers=tuple(places[id(m)] for m in family.model.decoder.layers),
        private=(*private, Flops()),
        # a shared head was booked once for every exit that reads it
        heads=tuple(Flops(places[i].matmul // times[i]) for i in readers),
        exact=exact,
    )

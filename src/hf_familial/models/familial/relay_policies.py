"""Relay policies: frozen dataclasses, given as `relay=`, that say when a text goes deeper.

A policy builds the decoder that makes its tokens; the loop in `relay.py` knows no policy by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .config_checks import check_choice
from .relay_cache import RelayCache


def _max_prob(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1).amax(-1)


def _margin(logits: torch.Tensor) -> torch.Tensor:
    best = logits.softmax(-1).topk(2).values
    return best[..., 0] - best[..., 1]


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    logs = logits.log_softmax(-1)
    largest = torch.tensor(logits.shape[-1], dtype=logits.dtype, device=logits.device).log()
    return 1 + (logs.exp() * logs.nan_to_num(neginf=0.0)).sum(-1) / largest


# each from float32 logits of shape (..., vocab) to a confidence in [0, 1] of shape (...)
MEASURES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "max_prob": _max_prob,
    "margin": _margin,
    "entropy": _entropy,
}


def confidence(logits: torch.Tensor, measure: str) -> torch.Tensor:
    """Measure how sure a distribution is of its next token.

    Args:
        logits (`torch.Tensor` of shape `(..., vocab)`): Float32, before any logits processor.
        measure (`str`): `"max_prob"`, the largest probability; `"margin"`, the largest less the
            second; `"entropy"`, 1 less the entropy over the logarithm of the vocabulary.

    Returns:
        `torch.Tensor` of shape `(...)`: Between 0 and 1.

    Raises:
        ValueError: If there is no such measure.

    Reference: Schuster et al., arXiv:2207.07061, section 3.5 (the first two).
    """
    check_choice("measure", measure, sorted(MEASURES))
    return MEASURES[measure](logits)


@dataclass
class NewTokens:
    """The tokens that one step of a decoder yields, at least one per row.

    Attributes:
        tokens (`torch.LongTensor` of shape `(batch, count)`): The same number in every row.
        sources (`torch.LongTensor` of shape `(batch, count)`): Exit that each came from.
        scores (`list[torch.Tensor]`): Of each, processed scores `(batch, vocab)`; empty unless
            the text wants them.
        logits (`list[torch.Tensor]`): Of each, logits `(batch, vocab)`; likewise.
    """

    tokens: torch.Tensor
    sources: torch.Tensor
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


class RelayDecoder:
    """The decoder of one text (or batch of texts), made anew by a policy for every call.

    Attributes:
        rounds (`int`): Checks of drafts; without drafts, steps.
        drafted (`int`): Drafted tokens that were checked, of one row.
        accepted (`int`): Those that every unfinished row accepted.
    """

    rounds = drafted = accepted = 0

    def step(self, **inputs: Any) -> NewTokens:
        """Make the next tokens.

        Args:
            **inputs: For [`RelayCache.feed`]: the tokens that have not run, positions, mask.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """Do what is left to do at the end of the text."""


class RelayPolicy:
    """The base of relay policies: which exits a relay reads, and which tokens leave at them.

    A subclass gives `exits` and `leaves`. What it must remember between tokens it keeps in what
    `new_state` returns. A policy that makes tokens in another way overrides `decoder`.

    Attributes:
        rolls_back (`bool`): Whether the decoder takes positions out of the cache again.

    Example:
        >>> class SureOfSpaces(RelayPolicy):
        ...     def exits(self, num_exits):
        ...         return (0, -1)
        ...     def leaves(self, exit_idx, logits, state):
        ...         return logits.argmax(-1) == 220
    """

    rolls_back = False

    def exits(self, num_exits: int) -> tuple[int, ...]:
        """Return the exits to read, shallowest first. At the last one every token leaves.

        Args:
            num_exits (`int`): G of the family.

        Returns:
            `tuple[int, ...]`: Indices, which may count from the end.
        """
        raise NotImplementedError

    def decoder(self, cache: RelayCache, text: Any) -> RelayDecoder:
        """Build the decoder that makes the tokens of one call.

        Args:
            cache ([`RelayCache`]): Over this policy's exits.
            text ([`GeneratedText`]): What is written so far, and how tokens are chosen.
        """
        return ThresholdDecoder(self, cache, text)

    def new_state(self, batch_size: int) -> Any:
        """Return what `leaves` remembers, for a batch of new texts."""
        return None

    def reads(self, exit_idx: int, state: Any) -> bool:
        """Return whether to read this exit for the next token. If not, `leaves` is not called.

        Args:
            exit_idx (`int`): Index of the exit, not negative.
            state: From `new_state`.
        """
        return True

    def leaves(self, exit_idx: int, logits: torch.Tensor, state: Any) -> torch.Tensor:
        """Return which rows take their next token from this exit.

        Args:
            exit_idx (`int`): Index of the exit, not negative.
            logits (`torch.Tensor` of shape `(batch, vocab)`): Float32, before any logits processor.
            state: From `new_state`; may be changed.

        Returns:
            `torch.Tensor` of shape `(batch,)`: Boolean. One row never decides for another. The
            answer for rows that left at a shallower exit is ignored.
        """
        raise NotImplementedError


class ThresholdDecoder(RelayDecoder):
    """Makes tokens one by one, each at the first exit where the policy lets it leave."""

    def __init__(self, relay: RelayPolicy, cache: RelayCache, text: Any) -> None:
        self.relay, self.cache, self.text = relay, cache, text
        self.state = relay.new_state(len(text.input_ids))

    def step(self, **inputs: Any) -> NewTokens:
        """Make one token for every row."""
        self.rounds += 1
        self.cache.feed(**inputs)
        open_rows, last = self.text.kept_rows, self.cache.exits[-1]
        logits = sources = None
        for k in self.cache.exits:
            if k != last and not self.relay.reads(k, self.state):
                continue
            self.cache.catch_up(k)
            here = self.cache.logits(k)[:, -1].float()
            leaving = open_rows
            if k != last:
                leaving = open_rows & self.relay.leaves(k, here, self.state)
            if logits is None or sources is None:
                logits, sources = here, torch.full_like(leaving, k, dtype=torch.long)
            else:
                logits = torch.where(leaving[:, None], here, logits)
                sources = sources.masked_fill(leaving, k)
            if k == last or not (open_rows := open_rows & ~leaving).any():
                break
        assert logits is not None
        assert sources is not None
        scores = self.text.process(self.text.input_ids, logits)
        tokens = self.text.choose(scores, self.text.input_ids.shape[1])
        return NewTokens(tokens, sources[:, None], [scores], [logits])


@dataclass(frozen=True)
class FixedExit(RelayPolicy):
    """Every token comes from one exit: plain decoding of that member.

    Attributes:
        exit_idx (`int`): The exit.
    """

    exit_idx: int = -1

    def exits(self, num_exits: int) -> tuple[int, ...]:
        """Return the one exit."""
        return (self.exit_idx,)


@dataclass(frozen=True)
class ConfidenceRelay(RelayPolicy):
    """A token leaves at the first exit that is sure enough.

    Keys and values of the layers above are completed later, exactly, when a token needs them.
    `hf_familial.calibrate` finds thresholds for a wanted agreement with the deepest exit.

    Attributes:
        threshold (`float` or `Mapping[int, float]`): Confidence, between 0 and 1, at which a token
            leaves (above 1: never); one for all early exits, or by index of the exit. Early exits
            without a threshold are not read.
        measure (`str`): `"max_prob"`, `"margin"` or `"entropy"`, see `confidence`.
        exit_idx (`int`): Exit that decides what no other was sure of.

    Raises:
        ValueError: If a threshold is no number, an exit is counted from the end, or there is no
            such measure.

    Reference: Schuster et al., arXiv:2207.07061.
    """

    threshold: float | Mapping[int, float] = 0.9
    measure: str = "max_prob"
    exit_idx: int = -1

    def __post_init__(self) -> None:
        threshold = self.threshold
        values = list(threshold.values()) if isinstance(threshold, Mapping) else [threshold]
        if not all(isinstance(v, (int, float)) and v == v for v in values):
            raise ValueError(
                f"`threshold` must be a number, or one by index of the exit, got {threshold!r}."
            )
        if isinstance(threshold, Mapping) and any(k < 0 for k in threshold):
            raise ValueError(f"`threshold` must count exits from 0, got {threshold!r}.")
        check_choice("measure", self.measure, sorted(MEASURES))

    def exits(self, num_exits: int) -> tuple[int, ...]:
        """Return the exits that may let a token leave, and the one that decides."""
        last = self.exit_idx % num_exits
        if isinstance(self.threshold, Mapping):
            return (*sorted(self.threshold), last)
        return tuple(range(last + 1))

    def leaves(self, exit_idx: int, logits: torch.Tensor, state: Any) -> torch.Tensor:
        """Return the rows whose confidence reaches the threshold."""
        threshold = self.threshold
        if isinstance(threshold, Mapping):
            threshold = threshold[exit_idx]
        return confidence(logits, self.measure) >= threshold


def check_chain(exits: Sequence[int], num_exits: int) -> tuple[int, ...]:
    """Return the indices of a policy's exits, none negative, or raise if it has no such exits."""
    for k in exits:
        if not -num_exits <= k < num_exits:
            raise IndexError(
                f"the relay asks for exit {k}; this family has exits 0 to {num_exits - 1}."
            )
    chain = tuple(k % num_exits for k in exits)
    if not chain or any(a >= b for a, b in zip(chain, chain[1:], strict=False)):
        raise ValueError(f"a relay's exits must go deeper one after the other, got {tuple(exits)}.")
    return chain

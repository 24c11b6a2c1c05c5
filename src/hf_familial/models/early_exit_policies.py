"""The relay policies that do not travel with a family: by confidence, and for good."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .familial.configuration_familial import check_choice
from .familial.relay_cache import RelayCache
from .familial.relay_policies import NewTokens, RelayDecoder, RelayPolicy


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


class EarlyExitRelay(RelayPolicy):
    """The base of policies that let tokens leave at early exits.

    A subclass gives `exits` and `leaves`. What it must remember between tokens it keeps in what
    `new_state` returns.

    Example:
        >>> class SpacesLeave(EarlyExitRelay):
        ...     def exits(self, num_exits):
        ...         return 0, -1  # at the last one every token leaves
        ...     def leaves(self, exit_idx, logits, state):
        ...         return logits.argmax(-1) == 220
    """

    def decoder(self, cache: RelayCache, text: Any) -> RelayDecoder:
        """Build an [`EarlyExitDecoder`]."""
        return EarlyExitDecoder(self, cache, text)

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


class EarlyExitDecoder(RelayDecoder):
    """A decoder that makes each token at the first exit where the policy lets it leave."""

    def __init__(self, relay: EarlyExitRelay, cache: RelayCache, text: Any) -> None:
        super().__init__(cache, text)
        self.relay, self.state = relay, relay.new_state(len(text.input_ids))

    def step(self, **inputs: Any) -> NewTokens:
        """Make one token for every row."""
        self.cache.feed(**inputs)
        open_rows, last = self.text.kept_rows, self.exits[-1]
        logits = sources = None
        for k in self.exits:
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
        return self.one_token(logits, sources)


@dataclass(frozen=True)
class ConfidenceRelay(EarlyExitRelay):
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


@dataclass(frozen=True)
class HandoffRelay(EarlyExitRelay):
    """A shallow member answers until a rule says "too hard"; a deeper one writes on from there.

    Decided for each row; what was handed over does not come back.

    Attributes:
        from_exit (`int`): The shallow exit.
        to_exit (`int`): The deep exit.
        after (`int`, *optional*): Hand over after this many tokens.
        below (`float`, *optional*): Hand over when the mean confidence of the last `window` tokens
            falls below this.
        window (`int`): Number of tokens of that mean; at least one, and no rule before it is full.
        measure (`str`): `"max_prob"`, `"margin"` or `"entropy"`, see `confidence`.

    Raises:
        ValueError: If there is no rule, or a number is out of range.
    """

    from_exit: int = 0
    to_exit: int = -1
    after: int | None = None
    below: float | None = None
    window: int = 4
    measure: str = "max_prob"

    def __post_init__(self) -> None:
        if self.after is None and self.below is None:
            raise ValueError("`HandoffRelay` needs a rule: `after` or `below`, got neither.")
        if self.window < 1 or (self.after is not None and self.after < 0):
            raise ValueError(
                "`window` must be 1 or more and `after` 0 or more, got "
                f"`window={self.window}`, `after={self.after}`."
            )
        confidence(torch.zeros(2), self.measure)

    def exits(self, num_exits: int) -> tuple[int, ...]:
        """Return the shallow and the deep exit."""
        return self.from_exit, self.to_exit

    def new_state(self, batch_size: int) -> dict[str, Any]:
        """Return a record of recent confidences, and of the rows handed over."""
        return {"recent": [], "count": 0, "over": torch.zeros(batch_size, dtype=torch.bool)}

    def reads(self, exit_idx: int, state: dict[str, Any]) -> bool:
        """Return whether some row is not handed over yet."""
        return not bool(state["over"].all())

    def leaves(self, exit_idx: int, logits: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        """Return the rows that the shallow member still answers."""
        state["recent"] = [*state["recent"], confidence(logits, self.measure)][-self.window :]
        state["over"] = over = state["over"].to(logits.device)
        if self.after is not None and state["count"] >= self.after:
            over |= True
        if self.below is not None and len(state["recent"]) == self.window:
            over |= torch.stack(state["recent"]).mean(0) < self.below
        state["count"] += 1
        return ~over

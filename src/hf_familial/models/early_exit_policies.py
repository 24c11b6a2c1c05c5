"""Relay policies with early exit. They need the installed package."""

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


# functions from float32 logits of shape (..., vocab) to a confidence in [0, 1] of shape (...)
MEASURES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "max_prob": _max_prob,
    "margin": _margin,
    "entropy": _entropy,
}


def confidence(logits: torch.Tensor, measure: str) -> torch.Tensor:
    """Compute the confidence of a next-token distribution.

    Args:
        logits (`torch.Tensor` of shape `(..., vocab)`): Float32 logits, before any logits
            processor.
        measure (`str`): `"max_prob"` is the largest probability. `"margin"` is the largest minus
            the second largest. `"entropy"` is 1 minus the entropy divided by `log(vocab)`.

    Returns:
        `torch.Tensor` of shape `(...)`: Confidences between 0 and 1.

    Raises:
        ValueError: If `measure` has another value.

    Example:
        >>> confidence(torch.tensor([2.0, 1.0, 0.0]), "max_prob")  # 0.6652

    Reference: Schuster et al., arXiv:2207.07061, section 3.5, for the first two.
    """
    check_choice("measure", measure, sorted(MEASURES))
    return MEASURES[measure](logits)


class EarlyExitRelay(RelayPolicy):
    """The base class of policies in which the first exit that may write a token writes it.

    A subclass defines `exits` and `leaves`. Override `new_state` to store something between tokens.

    Example:
        >>> class SpacesLeave(EarlyExitRelay):
        ...     def exits(self, num_exits):
        ...         return 0, -1
        ...     def leaves(self, exit_idx, logits, state):
        ...         return logits.argmax(-1) == 220  # exit 0 writes this token, exit -1 all others
        >>> model.relay_generate(**inputs, relay=SpacesLeave(), max_new_tokens=20)
    """

    def decoder(self, cache: RelayCache, text: Any) -> RelayDecoder:
        """Build an [`EarlyExitDecoder`]."""
        return EarlyExitDecoder(self, cache, text)

    def new_state(self, batch_size: int) -> Any:
        """Return the `state` that is passed to `reads` and `leaves`, for a new batch of texts."""
        return None

    def reads(self, exit_idx: int, state: Any) -> bool:
        """Return whether this exit can write the next token. If not, `leaves` is not called.

        Args:
            exit_idx (`int`): Index of the exit, 0 or more.
            state: The result of `new_state`.
        """
        return True

    def leaves(self, exit_idx: int, logits: torch.Tensor, state: Any) -> torch.Tensor:
        """Return a mask of the rows that get their next token from this exit.

        Args:
            exit_idx (`int`): Index of the exit, 0 or more.
            logits (`torch.Tensor` of shape `(batch, vocab)`): Float32 logits, before any logits
                processor.
            state: The result of `new_state`. You may change it.

        Returns:
            `torch.Tensor` of shape `(batch,)`: Boolean mask. Values of rows that already took their
            token from a shallower exit are ignored.
        """
        raise NotImplementedError


class EarlyExitDecoder(RelayDecoder):
    """A decoder that writes each token from the first exit at which the policy allows it."""

    def __init__(self, relay: EarlyExitRelay, cache: RelayCache, text: Any) -> None:
        super().__init__(cache, text)
        self.relay, self.state = relay, relay.new_state(len(text.input_ids))

    def step(self, **inputs: Any) -> NewTokens:
        """Generate one token for every row."""
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
    """The policy in which each token comes from the first exit whose confidence is high enough.

    The text can differ from that of the deepest exit. Keys and values of skipped layers are
    computed exactly, later, when a deeper token needs them. `hf_familial.calibrate` finds
    thresholds for a given agreement with the deepest exit.

    Args:
        threshold (`float` or `Mapping[int, float]`, *optional*, defaults to 0.9): Confidence
            between 0 and 1 that an exit needs to write a token. A mapping sets it per exit index,
            and early exits that are not in it are skipped. Above 1, an exit never writes.
        measure (`str`, *optional*, defaults to `"max_prob"`): `"max_prob"`, `"margin"` or
            `"entropy"`, see `confidence`.
        exit_idx (`int`, *optional*, defaults to -1): Exit that writes all other tokens.

    Raises:
        ValueError: If a threshold is not a number, or `threshold` has a negative index, or
            `measure` is unknown.

    Example:
        >>> relay = ConfidenceRelay(threshold={0: 0.95, 1: 0.8})
        >>> model.relay_generate(**inputs, relay=relay, max_new_tokens=20)

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
                "`threshold` must be a number, or a dict from exit index to number, got "
                f"{threshold!r}."
            )
        if isinstance(threshold, Mapping) and any(k < 0 for k in threshold):
            raise ValueError(f"`threshold` must have exit indices of 0 or more, got {threshold!r}.")
        check_choice("measure", self.measure, sorted(MEASURES))

    def exits(self, num_exits: int) -> tuple[int, ...]:
        """Return the exits with a threshold, then `exit_idx`."""
        last = self.exit_idx % num_exits
        if isinstance(self.threshold, Mapping):
            return (*sorted(self.threshold), last)
        return tuple(range(last + 1))

    def leaves(self, exit_idx: int, logits: torch.Tensor, state: Any) -> torch.Tensor:
        """Return a mask of the rows whose confidence reaches the threshold."""
        threshold = self.threshold
        if isinstance(threshold, Mapping):
            threshold = threshold[exit_idx]
        return confidence(logits, self.measure) >= threshold


@dataclass(frozen=True)
class HandoffRelay(EarlyExitRelay):
    """The policy in which a shallow exit starts the text and a deep exit completes it.

    Each row switches once, by its own confidence or by length, and never switches back. Both exits
    run in one process. [`DeviceSide`] and [`server_side`] run a hand-off between processes.

    Args:
        from_exit (`int`, *optional*, defaults to 0): Shallow exit.
        to_exit (`int`, *optional*, defaults to -1): Deep exit.
        after (`int`, *optional*): Switch after this many tokens.
        below (`float`, *optional*): Switch when the mean confidence of the last `window` tokens is
            below this value.
        window (`int`, *optional*, defaults to 4): Number of tokens in that mean. Until that
            many tokens exist, `below` has no effect.
        measure (`str`, *optional*, defaults to `"max_prob"`): `"max_prob"`, `"margin"` or
            `"entropy"`, see `confidence`.

    Raises:
        ValueError: If both `after` and `below` are `None`, or a value is out of range.

    Example:
        >>> relay = HandoffRelay(from_exit=0, after=10)
        >>> model.relay_generate(**inputs, relay=relay, max_new_tokens=20)
    """

    from_exit: int = 0
    to_exit: int = -1
    after: int | None = None
    below: float | None = None
    window: int = 4
    measure: str = "max_prob"

    def __post_init__(self) -> None:
        if self.after is None and self.below is None:
            raise ValueError("`HandoffRelay` needs `after` or `below`, got neither.")
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
        """Return the recent confidences, the token count, and a mask of rows that have switched."""
        return {"recent": [], "count": 0, "over": torch.zeros(batch_size, dtype=torch.bool)}

    def reads(self, exit_idx: int, state: dict[str, Any]) -> bool:
        """Return whether some row has not switched yet."""
        return not bool(state["over"].all())

    def leaves(self, exit_idx: int, logits: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        """Return a mask of the rows that have not switched yet."""
        state["recent"] = [*state["recent"], confidence(logits, self.measure)][-self.window :]
        state["over"] = over = state["over"].to(logits.device)
        if self.after is not None and state["count"] >= self.after:
            over |= True
        if self.below is not None and len(state["recent"]) == self.window:
            over |= torch.stack(state["recent"]).mean(0) < self.below
        state["count"] += 1
        return ~over

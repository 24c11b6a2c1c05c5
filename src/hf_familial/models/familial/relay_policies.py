"""When a relay goes deeper: small frozen dataclasses, given as `relay=`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from operator import index
from typing import Any, ClassVar

import torch

from .config_checks import check_choice


def _max_prob(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1).amax(-1)


def _margin(logits: torch.Tensor) -> torch.Tensor:
    best = logits.softmax(-1).topk(2).values
    return best[..., 0] - best[..., 1]


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    logs = logits.log_softmax(-1)
    return (
        1
        + (logs.exp() * logs.nan_to_num(neginf=0.0)).sum(-1)
        / torch.tensor(logits.shape[-1], dtype=logits.dtype, device=logits.device).log()
    )


# each from float32 logits of shape (..., vocab) to a confidence in [0, 1] of shape (...)
MEASURES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "max_prob": _max_prob,
    "margin": _margin,
    "entropy": _entropy,
}


def confidence(logits: torch.Tensor, measure: str) -> torch.Tensor:
    """How sure a distribution is of its next token.

    Args:
        logits (`torch.Tensor` of shape `(..., vocab)`): Float32, before any logits processor.
        measure (`str`): `"max_prob"`, the largest probability; `"margin"`, the largest less the
            second; `"entropy"`, 1 less the entropy over its maximum, the logarithm of the
            vocabulary.

    Returns:
        `torch.Tensor` of shape `(...)`: Between 0 and 1.

    Raises:
        ValueError: If there is no such measure.

    Reference: Schuster et al., arXiv:2207.07061, section 3.5 (the first two).
    """
    check_choice("measure", measure, sorted(MEASURES))
    return MEASURES[measure](logits)


class RelayPolicy:
    """Which exits a relay reads, and which tokens leave at them; base of a policy of one's own.

    A subclass gives `exits` and `sure`; if it must remember something from one token to the next,
    `new_state` makes what it remembers it in, anew for every call of `relay_generate`.
    """

    rolls_back: ClassVar[bool] = False  # whether tokens may be taken back, as drafts are

    def exits(self, num_exits: int) -> tuple[int, ...]:
        """Exits to read, shallowest first; at the last one every token leaves.

        Args:
            num_exits (`int`): G of the family.

        Returns:
            `tuple[int, ...]`: Indices, which may count from the end.
        """
        raise NotImplementedError

    def new_state(self, batch_size: int) -> Any:
        """What `sure` remembers, for a batch of new texts."""
        return None

    def asks(self, exit_idx: int, state: Any) -> bool:
        """Whether this exit is to be read at all for the next token; `sure` is not called if not.

        Args:
            exit_idx (`int`): Index of the exit, not negative.
            state: Of `new_state`.
        """
        return True

    def sure(self, exit_idx: int, logits: torch.Tensor, state: Any) -> torch.Tensor:
        """Which rows take their next token from this exit.

        Args:
            exit_idx (`int`): Index of the exit, not negative.
            logits (`torch.Tensor` of shape `(batch, vocab)`): Float32, before any logits processor.
            state: Of `new_state`; may be changed.

        Returns:
            `torch.Tensor` of shape `(batch,)`: Boolean. One row never decides for another; rows
            that have left at a shallower exit are asked too, to no effect.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FixedExit(RelayPolicy):
    """Every token comes from one exit: plain decoding of that member.

    Attributes:
        exit_idx (`int`): The exit.
    """

    exit_idx: int = -1

    def exits(self, num_exits: int) -> tuple[int, ...]:
        """The one exit."""
        return (self.exit_idx,)


@dataclass(frozen=True)
class ConfidenceRelay(RelayPolicy):
    """A token leaves at the first exit that is sure enough.

    Keys and values of the layers above are completed later, exactly, when a token needs them.
    `hf_familial.calibrate` finds thresholds for a wanted agreement with the deepest exit.

    Attributes:
        threshold (`float` or `Mapping[int, float]`): Confidence, between 0 and 1, at which a token
            leaves (above 1: never); one for all early exits, or by index of the exit: others are
            not read then.
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
                "`threshold` must be a number, or one by index of the exit, got "
                f"{self.threshold!r}."
            )
        if isinstance(threshold, Mapping) and any(k < 0 for k in threshold):
            raise ValueError(f"`threshold` must count exits from 0, got {self.threshold!r}.")
        confidence(torch.zeros(2), self.measure)

    def exits(self, num_exits: int) -> tuple[int, ...]:
        """Those that may let a token leave, and the one that decides."""
        last = self.exit_idx % num_exits
        if isinstance(self.threshold, Mapping):
            return (*sorted(self.threshold), last)
        return tuple(range(last + 1))

    def sure(self, exit_idx: int, logits: torch.Tensor, state: Any) -> torch.Tensor:
        """Rows whose confidence reaches the threshold."""
        threshold = self.threshold
        if isinstance(threshold, Mapping):
            threshold = threshold[exit_idx]
        return confidence(logits, self.measure) >= threshold


@dataclass(frozen=True)
class HandoffRelay(RelayPolicy):
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
        """The shallow and the deep exit."""
        return self.from_exit, self.to_exit

    def new_state(self, batch_size: int) -> dict[str, Any]:
        """Recent confidences, and which rows are handed over."""
        return {"recent": [], "count": 0, "over": torch.zeros(batch_size, dtype=torch.bool)}

    def asks(self, exit_idx: int, state: dict[str, Any]) -> bool:
        """Not once every row is handed over."""
        return not bool(state["over"].all())

    def sure(self, exit_idx: int, logits: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        """Rows that the shallow member still answers."""
        state["recent"] = [*state["recent"], confidence(logits, self.measure)][-self.window :]
        state["over"] = over = state["over"].to(logits.device)
        if self.after is not None and state["count"] >= self.after:
            over |= True
        if self.below is not None and len(state["recent"]) == self.window:
            over |= torch.stack(state["recent"]).mean(0) < self.below
        state["count"] += 1
        return ~over


@dataclass(frozen=True)
class SpeculativeRelay(RelayPolicy):
    """Lossless self-speculation: a shallow exit drafts, the layers above it check.

    Only the segments above the draft exit run again over the drafted positions, all in one pass.
    Greedy text is that of the deepest exit (in float32; in half precision a pass over several
    positions may round a tie otherwise), sampled text has its distribution.

    Attributes:
        draft_exit (`int`, `Sequence[int]` or `"auto"`): Exit that drafts; several make a chain, in
            which each checks the drafts of the one before; `"auto"` tries all shallower ones and
            goes on with the one that yields most tokens per time.
        draft_length (`int`, `"auto"`): Tokens drafted before a check; by default as many as pay,
            from the acceptance and the cost seen so far, and none where none pay.
        exit_idx (`int`): Exit whose text is wanted; the config's `default_exit` does not matter.

    Raises:
        ValueError: If `draft_length` is neither `"auto"` nor 1 or more, or `draft_exit` is no exit.

    Reference: Leviathan et al., arXiv:2211.17192; Elhoushi et al., arXiv:2404.16710.
    """

    draft_exit: int | Sequence[int] | str = 0
    draft_length: int | str = "auto"
    exit_idx: int = -1
    rolls_back: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("draft_exit", "draft_length"):
            number = getattr(self, name)
            if isinstance(number, Integral) and not isinstance(number, int):  # as numpy's are
                object.__setattr__(self, name, index(number))
        length = self.draft_length
        whole = isinstance(length, int) and not isinstance(length, bool) and length >= 1
        if length != "auto" and not whole:
            raise ValueError(f'`draft_length` must be "auto" or 1 or more, got {length!r}.')
        named = isinstance(self.draft_exit, str) and self.draft_exit != "auto"
        if named or not isinstance(self.draft_exit, (int, Sequence)):
            raise ValueError(
                f'`draft_exit` must be "auto", an exit or several, got {self.draft_exit!r}.'
            )

    def exits(self, num_exits: int) -> tuple[int, ...]:
        """The exits that draft, then the one that decides.

        Raises:
            ValueError: If they do not go deeper one after the other.
        """
        last = self.exit_idx % num_exits if abs(self.exit_idx) <= num_exits else self.exit_idx
        if last == 0:
            raise ValueError(
                f"exit {self.exit_idx} is the shallowest of {num_exits}, so none can draft for it: "
                f"give `relay=FixedExit({self.exit_idx})`, or call `generate(exit_idx=...)`."
            )
        drafts: Sequence[Any]
        if isinstance(self.draft_exit, int):
            drafts = [self.draft_exit]
        else:
            drafts = range(last) if self.draft_exit == "auto" else self.draft_exit
        chain = tuple(k % num_exits if -num_exits <= k < num_exits else k for k in (*drafts, last))
        if len(chain) < 2 or any(a >= b for a, b in zip(chain, chain[1:], strict=False)):
            raise ValueError(
                f"`draft_exit` must be shallower than `exit_idx`, each deeper than the one before; "
                f"got {self.draft_exit} and {self.exit_idx} in a family of {num_exits} exits."
            )
        return chain


def check_chain(exits: Sequence[int], num_exits: int) -> tuple[int, ...]:
    """Indices of a policy's exits, none negative.

    Args:
        exits (`Sequence[int]`): As a policy gives them.
        num_exits (`int`): G of the family.

    Returns:
        `tuple[int, ...]`: Strictly deeper and deeper.

    Raises:
        IndexError: If there is no such exit.
        ValueError: If they are out of order.
    """
    for k in exits:
        if not -num_exits <= k < num_exits:
            raise IndexError(
                f"the relay asks for exit {k}; this family has exits 0 to {num_exits - 1}."
            )
    chain = tuple(k % num_exits for k in exits)
    if not chain or any(a >= b for a, b in zip(chain, chain[1:], strict=False)):
        raise ValueError(f"a relay's exits must go deeper one after the other, got {tuple(exits)}.")
    return chain

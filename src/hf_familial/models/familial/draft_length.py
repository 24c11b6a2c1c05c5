"""How far to draft: as long as one more position is likely to pay for itself."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


# classes of confidence; how often a draft is right before that is known, from the least to the
# most sure (the best token of a shallow exit is the deepest's far more often than its probability
# says), and how much that weighs
BUCKETS, PRIOR, PRIOR_WEIGHT = 10, (0.5, 1.0), 4.0
# what drafts that came out as expected the expectation starts with, for all classes together
TRUST_WEIGHT = 2.0
# drafts of a round before anything was checked
FIRST_DRAFTS = 4
# how fast old acceptances and times are forgotten, per observation
FORGET_ACCEPTANCE, FORGET_TIME = 0.99, 0.9
# factor beyond which a time is believed no further: the machine did something else meanwhile
OUTLIER = 1.5
# cost of one more position in a checking pass, as a part of the pass, until it is measured
EXTRA_POSITION = 0.05
# rounds without drafts before trying again, at first and at most
FIRST_REST, LONGEST_REST, TRIAL = 8, 128, 6


@dataclass
class Acceptance:
    """How often a draft was right, by how sure its exit was of it.

    What is expected before a class of confidence was seen is believed as far as the drafts of all
    classes bore it out: an exit that was never trained is sure of itself, and found out in a few.
    """

    right: list[float] = field(default_factory=lambda: [0.0] * BUCKETS)
    seen: list[float] = field(default_factory=lambda: [0.0] * BUCKETS)
    weight: list[float] = field(default_factory=lambda: [PRIOR_WEIGHT] * BUCKETS)
    expected: float = TRUST_WEIGHT
    found: float = TRUST_WEIGHT

    def rate(self, confidence: float) -> float:
        """Estimated probability that a draft of this confidence is accepted."""
        i = _bucket(confidence)
        prior = min(1.0, self.found / self.expected) * _prior(i)
        return (self.right[i] + prior * self.weight[i]) / (self.seen[i] + self.weight[i])

    def observe(self, confidence: float, accepted: float) -> None:
        """Learn from one draft that was checked: 1 if it was right, 0 if not."""
        i = _bucket(confidence)
        self.right[i] = self.right[i] * FORGET_ACCEPTANCE + accepted
        self.seen[i] = self.seen[i] * FORGET_ACCEPTANCE + 1.0
        self.weight[i] *= FORGET_ACCEPTANCE
        self.found = self.found * FORGET_ACCEPTANCE + accepted
        self.expected = self.expected * FORGET_ACCEPTANCE + _prior(i)


def _prior(bucket: int) -> float:
    low, high = PRIOR
    return low + (high - low) * (bucket + 0.5) / BUCKETS


def _bucket(confidence: float) -> int:
    return max(0, min(BUCKETS - 1, int(confidence * BUCKETS)))


@dataclass
class Mean:
    """A running mean that forgets, and does not believe an outlier at once."""

    value: float
    measured: bool = False

    def observe(self, value: float) -> None:
        """Move toward a new value."""
        if self.measured:
            value = min(max(value, self.value / OUTLIER), OUTLIER * self.value)
            self.value = FORGET_TIME * self.value + (1 - FORGET_TIME) * value
        else:
            self.value, self.measured = value, True


@dataclass
class Line:
    """Time of a checking pass against its number of positions."""

    start: float
    slope: float
    weight: float = 0.0
    sums: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    def at(self, positions: int) -> float:
        """Expected time."""
        return self.start + self.slope * positions

    def observe(self, positions: int, value: float) -> None:
        """Fit again, older passes counting less."""
        if self.weight > 1:
            value = min(max(value, self.at(positions) / OUTLIER), OUTLIER * self.at(positions))
        x, y, xx, xy = (FORGET_TIME * s for s in self.sums)
        self.weight = FORGET_TIME * self.weight + 1
        self.sums = x, y, xx, xy = (
            x + positions, y + value, xx + positions**2, xy + positions * value,
        )  # fmt: skip
        mean, height = x / self.weight, y / self.weight
        variance = xx / self.weight - mean**2
        self.slope = EXTRA_POSITION * height
        if variance > 0.1:
            self.slope = max(0.0, (xy / self.weight - mean * height) / variance)
        self.start = max(0.0, height - self.slope * mean)


class DraftLength:
    """Decides after every draft whether to run it too, and before every round whether to draft.

    A round over the positions of one known token and k drafts yields `1 + S_1 + ... + S_k` tokens,
    with `S_i` the probability that the first i drafts are all right. Running one more draft pays if
    its `S` is worth more, at the present rate of tokens per time, than its pass through the shallow
    layers and its place in the checking pass.

    Args:
        share (`float`): Layers below the draft exit, as a share of all.
        fixed (`int`, *optional*): Draft just as many, whatever it costs.
        timed (`bool`, *optional*, defaults to `True`): Measure costs with a clock; otherwise they
            are taken from the number of layers, and the same seed gives the same text.
    """

    def __init__(self, share: float, fixed: int | None = None, timed: bool = True) -> None:
        self.fixed, self.timed = fixed, timed and fixed is None
        self.acceptance = Acceptance()
        deep = 1 - share
        self._feed, self._read = Mean(share), Mean(0.0)
        self._check = Line(deep * (1 - EXTRA_POSITION), deep * EXTRA_POSITION)
        self._rate: Mean | None = None
        self._rest, self._next_rest, self._trial = 0, FIRST_REST, TRIAL
        self._survival, self._confidences = 1.0, []  # type: float, list[float]
        self._began = 0.0

    def drafts(self) -> bool:
        """Whether to draft in this round."""
        self._survival, self._confidences = 1.0, []
        if self._rest:
            self._rest -= 1
            return False
        return True

    def goes_on(self, confidence: float) -> bool:
        """Whether to run the token just drafted, and draft another; not asked for a fixed length.

        Args:
            confidence (`float`): Probability that its exit gave it.
        """
        self._confidences.append(confidence)
        if self._rate is None and len(self._confidences) > FIRST_DRAFTS:
            return False
        self._survival *= self.acceptance.rate(confidence)
        cost = self._feed.value + self._read.value + self._check.slope
        return self._survival > self.rate * cost

    @property
    def rate(self) -> float:
        """Tokens per unit of time, of late."""
        return self.plain_rate if self._rate is None else self._rate.value

    @property
    def plain_rate(self) -> float:
        """Tokens per unit of time without drafts."""
        return 1 / max(self._feed.value + self._check.at(1), 1e-9)

    def finish(self, drafted: int, accepted: int, tokens: int) -> None:
        """Learn from a round.

        Args:
            drafted (`int`): Drafts that were checked.
            accepted (`int`): Those that were right, before the first that was not.
            tokens (`int`): What the round yielded.
        """
        for i, confidence in enumerate(self._confidences[:drafted]):
            if i <= accepted:
                self.acceptance.observe(confidence, i < accepted)
        if not self._confidences:  # of a fixed length, or without drafts
            return
        positions = drafted + 1
        spent = positions * self._feed.value + self._check.at(positions)
        rate = tokens / (spent + len(self._confidences) * self._read.value)
        if self._rate is None:
            self._rate = Mean(rate, measured=True)
        self._rate.observe(rate)
        self._trial = max(0, self._trial - 1)
        if not self._trial and self._rate.value < self.plain_rate:
            self._rest, self._trial = self._next_rest, TRIAL
            self._next_rest = min(2 * self._next_rest, LONGEST_REST)
            self._rate = None
        elif not self._trial:
            self._next_rest = FIRST_REST

    def learn_next(self, accepted: float) -> None:
        """Learn from the draft that was not worth running, of which the check told as well.

        Args:
            accepted (`float`): Share of the rows in which it was right.
        """
        self.acceptance.observe(self._confidences[-1], accepted)

    def start_clock(self) -> None:
        """Before a pass that is to be timed."""
        self._began = time.perf_counter()

    def fed(self) -> None:
        """After one position ran through the shallow layers."""
        self._stop(self._feed)

    def read(self) -> None:
        """After the draft exit was read."""
        self._stop(self._read)

    def checked(self, positions: int) -> None:
        """After a checking pass."""
        if self.timed:
            self._check.observe(positions, time.perf_counter() - self._began)

    def _stop(self, mean: Mean) -> None:
        if self.timed:
            mean.observe(time.perf_counter() - self._began)

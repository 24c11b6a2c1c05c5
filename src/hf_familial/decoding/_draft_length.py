"""Draft lengths: one more token is drafted as long as it is likely to pay for itself.

A round over one known token and k drafts yields `1 + S_1 + ... + S_k` tokens, with `S_i` the
probability that the first i drafts are all right. One more draft pays if its `S` is worth more, at
the present rate of tokens per time, than its pass through the shallow layers and its column in the
checking pass.
"""

from __future__ import annotations

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
# drafts of a round, where nothing else limits them
LONGEST = 15
# tokens that begin a text without drafts: the prompt's, and some that tell what one costs
BEGIN = 3
# tokens at which the draft exit is only read beside the deep one, before anything is drafted
WATCH = 4
# rounds of drafting before their rate is judged
TRIAL = 6
# plain rounds before the draft exit is watched again, at first and at most
FIRST_REST, LONGEST_REST = 16, 256

# kinds of rounds: no draft; no draft, but the draft exit is read too; drafts
PLAIN, WATCHED, DRAFTED = "plain", "watched", "drafted"


@dataclass
class Acceptance:
    """The share of drafts that were right, by the confidence of their exit.

    What is expected of a class of confidence before it was seen is scaled by what the drafts of all
    classes bore out, so an exit that was never trained, and is sure of itself, is found out soon.
    """

    right: list[float] = field(default_factory=lambda: [0.0] * BUCKETS)
    seen: list[float] = field(default_factory=lambda: [0.0] * BUCKETS)
    weight: list[float] = field(default_factory=lambda: [PRIOR_WEIGHT] * BUCKETS)
    expected: float = TRUST_WEIGHT
    found: float = TRUST_WEIGHT

    def rate(self, confidence: float) -> float:
        """Estimate the probability that a draft of this confidence is accepted."""
        i = _bucket(confidence)
        prior = min(1.0, self.found / self.expected) * _prior(i)
        return (self.right[i] + prior * self.weight[i]) / (self.seen[i] + self.weight[i])

    @property
    def mean(self) -> float:
        """`float`: Share of the recent drafts that were right."""
        return (sum(self.right) + 0.5) / (sum(self.seen) + 1)

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
    """The time of a checking pass as a line over its number of positions."""

    start: float
    slope: float
    weight: float = 0.0
    sums: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    def at(self, positions: int) -> float:
        """Return the expected time."""
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
    """The choice of draft lengths at one exit: whether to draft, and whether to draft one more.

    Decisions depend on distributions that were read and on tokens that were drawn before, never on
    the token that would be drafted: that would change the distribution of sampled text. A text
    starts without drafts; then the draft exit is read beside the deep one for some tokens, and it
    drafts only if that promises to pay.

    Args:
        share (`float`): Cost of the layers below the draft exit, as a share of a whole pass.
        read (`float`, *optional*, defaults to 0.0): Cost of reading the draft exit, likewise.
        fixed (`int`, *optional*): Draft just as many, whatever it costs.
        timed (`bool`, *optional*, defaults to `True`): Measure costs with a clock. Otherwise they
            are `share` and `read`, and the same seed gives the same text.
        watch (`bool`, *optional*, defaults to `True`): Watch the exit before it drafts.
    """

    def __init__(
        self,
        share: float,
        read: float = 0.0,
        fixed: int | None = None,
        timed: bool = True,
        watch: bool = True,
    ) -> None:
        self.fixed, self.timed = fixed, timed and fixed is None
        self.acceptance = Acceptance()
        deep = 1 - share
        self._feed, self._read, self._plain = Mean(share), Mean(read), Mean(1.0)
        self._check = Line(deep * (1 - EXTRA_POSITION), deep * EXTRA_POSITION)
        # of the drafted rounds of late; older ones count less
        self._tokens, self._spent = 0.0, 0.0
        self._watched = WATCH if watch else 0
        self._rest, self._next_rest, self._trial = BEGIN if watch else 0, FIRST_REST, TRIAL
        self._survival, self._confidences = 1.0, []  # type: float, list[float]

    def mode(self) -> str:
        """Return the kind of the next round, one of `PLAIN`, `WATCHED` and `DRAFTED`."""
        self._survival, self._confidences = 1.0, []
        if self._rest:
            self._rest -= 1
            return PLAIN
        return WATCHED if self._watched else DRAFTED

    def watch_again(self) -> None:
        """Ask for a watched round, to see whether what was learned still holds."""
        self._watched = max(1, self._watched)

    def watched(self, confidence: float, accepted: float) -> None:
        """Learn from a watched round: its confidence, the chance that a draft would be accepted."""
        self.acceptance.observe(confidence, accepted)
        self._watched = max(0, self._watched - 1)
        if not self._watched and self.fixed is None and self.promise < self.plain_rate:
            self._pause()

    def goes_on(self, confidence: float) -> bool:
        """Return whether to draw one more draft, and run it; not asked for a fixed length."""
        self._confidences.append(confidence)
        if not self._spent and len(self._confidences) > FIRST_DRAFTS:
            return False
        self._survival *= self.acceptance.rate(confidence)
        cost = self._feed.value + self._read.value + self._check.slope
        return self._survival > self._rate * cost

    @property
    def _rate(self) -> float:
        """`float`: Recent tokens per unit of time."""
        return self._tokens / self._spent if self._spent else self.plain_rate

    @property
    def plain_rate(self) -> float:
        """`float`: Tokens per unit of time without drafts."""
        split = self._feed.value + self._check.at(1)
        return 1 / max(self._plain.value if self._plain.measured else split, 1e-9)

    @property
    def promise(self) -> float:
        """`float`: Tokens per unit of time of drafted rounds, measured or expected."""
        if self._spent and not self._trial:
            return self._rate
        survival, tokens, best = 1.0, 1.0, 0.0
        for drafts in range(1, (self.fixed or LONGEST) + 1):
            survival *= self.acceptance.mean
            tokens += survival
            reads = (drafts + 1) * (self._feed.value + self._read.value)
            rate = tokens / max(reads + self._check.at(drafts + 1), 1e-9)
            best = rate if self.fixed else max(best, rate)
        return best

    def finish(self, drafted: int, accepted: int, tokens: int) -> None:
        """Learn from a round: drafts that were checked, those right, tokens that it yielded."""
        for i, confidence in enumerate(self._confidences[:drafted]):
            if i <= accepted:
                self.acceptance.observe(confidence, i < accepted)
        if not self._confidences:  # of a fixed length, or without drafts
            return
        positions = drafted + 1
        spent = positions * self._feed.value + self._check.at(positions)
        spent += len(self._confidences) * self._read.value
        self._tokens = FORGET_TIME * self._tokens + tokens
        self._spent = FORGET_TIME * self._spent + spent
        self._trial = max(0, self._trial - 1)
        if not self._trial and self._rate < self.plain_rate:
            self._pause()
        elif not self._trial:
            self._next_rest = FIRST_REST

    def _pause(self) -> None:
        """Write plainly for a while, longer every time, then watch the exit anew."""
        self._rest, self._trial, self._watched = self._next_rest, TRIAL, WATCH
        self._next_rest = min(2 * self._next_rest, LONGEST_REST)
        self._tokens, self._spent = 0.0, 0.0

    def learn_next(self, accepted: float) -> None:
        """Learn from a draft that was not drawn: the chance that the check would accept it."""
        self.acceptance.observe(self._confidences[-1], accepted)

    def fed(self, seconds: float) -> None:
        """Learn the time of one position in the shallow layers."""
        self._learn_time(self._feed, seconds)

    def read(self, seconds: float) -> None:
        """Learn the time of reading the draft exit."""
        self._learn_time(self._read, seconds)

    def wrote_plainly(self, seconds: float) -> None:
        """Learn the time of a round without drafts, over one position."""
        self._learn_time(self._plain, seconds)

    def checked(self, positions: int, seconds: float) -> None:
        """Learn the time of a checking pass."""
        if self.timed:
            self._check.observe(positions, seconds)

    def _learn_time(self, mean: Mean, seconds: float) -> None:
        if self.timed:
            mean.observe(seconds)

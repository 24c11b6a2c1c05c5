"""The rule for draft lengths: draft one more token as long as it is likely to save time.

A round with k drafts yields `1 + S_1 + ... + S_k` tokens on average. `S_i` is the probability that
the first i drafts are all accepted. One more draft costs a pass through the shallow layers and one
more position in the verifying pass. It saves time if its `S` is larger than this cost times the
current rate of tokens per second.
"""

from __future__ import annotations

from dataclasses import dataclass, field


# number of confidence classes; assumed acceptance rates of the lowest and the highest class; weight
# of this assumption in drafts. The rates are high: a shallow exit is right more often than it is
# confident.
BUCKETS, PRIOR, PRIOR_WEIGHT = 10, (0.5, 1.0), 4.0
# weight, in drafts, of the assumption that these rates are right
TRUST_WEIGHT = 2.0
# most drafts of a round before the first verification
FIRST_DRAFTS = 4
# factor per observation by which older acceptances and older times lose weight
FORGET_ACCEPTANCE, FORGET_TIME = 0.99, 0.9
# a time may differ from the mean by this factor; beyond it, the machine was busy with other work
OUTLIER = 1.5
# assumed cost of one more position in a verifying pass, as a share of the pass, until measured
EXTRA_POSITION = 0.05
# most drafts of a round
LONGEST = 15
# rounds without drafts at the start of a text: the prompt, and some that measure the plain cost
BEGIN = 3
# rounds that read the draft exit next to the deepest exit before it drafts
WATCH = 4
# drafted rounds before their rate is compared with the plain rate
TRIAL = 6
# plain rounds before the draft exit is watched again: at first, and at most
FIRST_REST, LONGEST_REST = 16, 256

# kinds of rounds: without drafts; without drafts but with a read of the draft exit; with drafts
PLAIN, WATCHED, DRAFTED = "plain", "watched", "drafted"


@dataclass
class Acceptance:
    """The share of accepted drafts, by the confidence of the draft exit.

    Confidences are divided into `BUCKETS` classes of equal width. A class without observations uses
    an assumed rate. This rate is scaled by the ratio of accepted to expected drafts over all
    classes. So the estimate for an untrained but confident exit falls
    after few drafts.
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
        """`float`: The share of recent drafts that were accepted."""
        return (sum(self.right) + 0.5) / (sum(self.seen) + 1)

    def observe(self, confidence: float, accepted: float) -> None:
        """Record one verified draft. `accepted` is 1 if it was accepted, else 0."""
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
    """A running mean in which older values lose weight and outliers are clipped."""

    value: float
    measured: bool = False

    def observe(self, value: float) -> None:
        """Move the mean towards a new value."""
        if self.measured:
            value = min(max(value, self.value / OUTLIER), OUTLIER * self.value)
            self.value = FORGET_TIME * self.value + (1 - FORGET_TIME) * value
        else:
            self.value, self.measured = value, True


@dataclass
class Line:
    """The time of a verifying pass as a linear function of its number of positions."""

    start: float
    slope: float
    weight: float = 0.0
    sums: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    def at(self, positions: int) -> float:
        """Return the expected time of a pass over this number of positions."""
        return self.start + self.slope * positions

    def observe(self, positions: int, value: float) -> None:
        """Add one measured pass and fit the line again. Older passes have less weight."""
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

    A text starts without drafts. Then some rounds read the draft exit next to the deepest exit. The
    exit drafts only if the expected rate of tokens is higher with drafts than without.

    Decisions depend on past tokens and on probabilities that were read. They never depend on the
    token to be drafted, because that would change the distribution of sampled text.

    Args:
        share (`float`): The cost of the layers below the draft exit, as a share of a whole pass.
        read (`float`, *optional*, defaults to 0.0): The cost of the draft exit's logits, as a share
            of a whole pass.
        fixed (`int`, *optional*): The fixed number of drafts per round. By default it is chosen.
        timed (`bool`, *optional*, defaults to `True`): Whether to measure costs with a clock. With
            `False` the costs stay `share` and `read`, and the same seed gives the same text.
        watch (`bool`, *optional*, defaults to `True`): Whether to watch the exit before it drafts.
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
        # tokens and time of drafted rounds; older rounds have less weight
        self._tokens, self._spent = 0.0, 0.0
        self._watched = WATCH if watch else 0
        self._rest, self._next_rest, self._trial = BEGIN if watch else 0, FIRST_REST, TRIAL
        self._survival, self._confidences = 1.0, []  # type: float, list[float]

    def mode(self) -> str:
        """Start a round and return its kind: `PLAIN`, `WATCHED` or `DRAFTED`."""
        self._survival, self._confidences = 1.0, []
        if self._rest:
            self._rest -= 1
            return PLAIN
        return WATCHED if self._watched else DRAFTED

    def watch_again(self) -> None:
        """Make the next rounds include a watched one, which tests the learned rates again."""
        self._watched = max(1, self._watched)

    def watched(self, confidence: float, accepted: float) -> None:
        """Record a watched round.

        Args:
            confidence (`float`): The confidence of the draft exit.
            accepted (`float`): The probability that the deepest exit accepts its draft.
        """
        self.acceptance.observe(confidence, accepted)
        self._watched = max(0, self._watched - 1)
        if not self._watched and self.fixed is None and self.promise < self.plain_rate:
            self._pause()

    def goes_on(self, confidence: float) -> bool:
        """Return whether to draft one more token, if the length is not fixed."""
        self._confidences.append(confidence)
        if not self._spent and len(self._confidences) > FIRST_DRAFTS:
            return False
        self._survival *= self.acceptance.rate(confidence)
        cost = self._feed.value + self._read.value + self._check.slope
        return self._survival > self._rate * cost

    @property
    def _rate(self) -> float:
        """`float`: Recent tokens per unit of time in drafted rounds."""
        return self._tokens / self._spent if self._spent else self.plain_rate

    @property
    def plain_rate(self) -> float:
        """`float`: Tokens per unit of time without drafts."""
        split = self._feed.value + self._check.at(1)
        return 1 / max(self._plain.value if self._plain.measured else split, 1e-9)

    @property
    def promise(self) -> float:
        """`float`: Tokens per unit of time with drafts, measured or expected."""
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
        """Record a drafted round.

        Args:
            drafted (`int`): The number of verified drafts.
            accepted (`int`): The number of accepted drafts.
            tokens (`int`): The number of new tokens.
        """
        for i, confidence in enumerate(self._confidences[:drafted]):
            if i <= accepted:
                self.acceptance.observe(confidence, i < accepted)
        if not self._confidences:  # a fixed length, or no drafts
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
        """Stop drafting for some rounds, then watch the exit again. Each pause is longer."""
        self._rest, self._trial, self._watched = self._next_rest, TRIAL, WATCH
        self._next_rest = min(2 * self._next_rest, LONGEST_REST)
        self._tokens, self._spent = 0.0, 0.0

    def learn_next(self, accepted: float) -> None:
        """Record the probability that the last draft, which was not drawn, would be accepted."""
        self.acceptance.observe(self._confidences[-1], accepted)

    def fed(self, seconds: float) -> None:
        """Record the time of one position in the shallow layers."""
        self._learn_time(self._feed, seconds)

    def read(self, seconds: float) -> None:
        """Record the time of the draft exit's logits."""
        self._learn_time(self._read, seconds)

    def wrote_plainly(self, seconds: float) -> None:
        """Record the time of a round without drafts, over one position."""
        self._learn_time(self._plain, seconds)

    def checked(self, positions: int, seconds: float) -> None:
        """Record the time of a verifying pass."""
        if self.timed:
            self._check.observe(positions, seconds)

    def _learn_time(self, mean: Mean, seconds: float) -> None:
        if self.timed:
            mean.observe(seconds)

"""The options of each candidate architecture, and whether their losses can be compared."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ..errors import ScalingError
from .flop_models import Flops, HeadFlops
from .leverage import even_members
from .optima import best
from .prediction import PublishedFit, Source, outside
from .results import Fit
from .tables.facts import Facts


Kind = Literal["dense", "sparse", "familial"]

# kind -> architectures in a law's domain that cover it
KINSHIP = {"dense": {"dense"}, "sparse": {"sparse", "moe"}, "familial": {"familial"}}
# variables that a candidate must not set, because they are computed or set elsewhere
ELSEWHERE = {
    "G": "leave G out, because there is one exit for each size of `memory`",
    "N": "leave N out, because the planner finds it",
    "D": "leave D out, because the planner finds it",
    "D_unique": "leave D_unique out, because it is `unique_tokens`",
}
MOST_DEVICES = 5  # up to this number of devices, every grouping is tried
COMMON = 0.5  # two fits are of one study if they share this part of the smaller table's rows
MEANINGS = {"data": "data", "vocab_size": "vocabularies"}


@dataclass(frozen=True)
class Situation:
    """The resources and requirements of a user, as passed to `advise`.

    `memory` lists the bytes for weights on each device, in rising order. `epochs` limits how often
    the model may see a token. Up to about 4 epochs, repeated tokens help nearly as much as new
    ones (arXiv:2305.16264). A law of `D_unique` models repetition itself and ignores `epochs`.
    """

    unique_tokens: float
    flops: float
    inference_tokens: float
    memory: tuple[float, ...]
    epochs: float = 4.0
    bytes_per_parameter: float = 2.0

    def __post_init__(self) -> None:
        if not self.memory or list(self.memory) != sorted(self.memory):
            raise ScalingError(
                f"`memory` must be one or more sizes in rising order, got {self.memory}."
            )
        positive = {
            "unique_tokens": self.unique_tokens,
            "training_flops": self.flops,
            "memory": self.memory[0],
            "epochs": self.epochs,
            "bytes_per_parameter": self.bytes_per_parameter,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ScalingError(f"`{name}` must be positive, got {value}.")
        if not 0 <= self.inference_tokens < math.inf:
            raise ScalingError(
                f"`inference_tokens` must be 0 or more, got {self.inference_tokens}."
            )


@dataclass(frozen=True)
class Candidate:
    """An architecture that `advise` can choose, with its scaling law.

    Attributes:
        name (`str`): Name of the candidate, used in the advice.
        source ([`Fit`] or [`PublishedFit`]): Its law of N and D with coefficients.
        kind (`str`): `"dense"`, `"sparse"` or `"familial"`. Default: the family of its law.
        given (`Mapping[str, float]`): Values of the law's variables other than N, D, G and
            D_unique, such as the sparsity or the number of experts.
        stored (`float`): Parameters in memory, as a multiple of N.
        active (`float`): Parameters that process each token, as a multiple of N.
        error (`float`, *optional*): Standard deviation of the error of the law's log loss, in
            addition to the uncertainty of its coefficients. An example is the held-out error of a
            comparison.
        branch ([`Fit`] or [`PublishedFit`], *optional*): For a family, its branch law. It predicts
            the loss of each exit.
        facts ([`Facts`], *optional*): Facts about the fitted runs: their data, tokenizer and loss,
            and how their FLOPs were counted.

    Example:
        >>> Candidate("dense", PublishedFit.published(get_law("hoffmann")))
    """

    name: str
    source: Source
    kind: Kind | Literal[""] = ""
    given: Mapping[str, float] = field(default_factory=dict)
    stored: float = 1.0
    active: float = 1.0
    error: float | None = None
    branch: Source | None = None
    facts: Facts | None = None

    def __post_init__(self) -> None:
        law = self.source.law
        if self.architecture not in KINSHIP:
            raise ScalingError(
                f"`kind` must be dense, sparse or familial, got {self.architecture!r}."
            )
        missing = {"N", "D"} - set(law.variable_names)
        if missing:
            raise ScalingError(
                f"Candidate {self.name!r} needs a law of N and D, but `{law.name}` lacks "
                f"{sorted(missing)}."
            )
        own = set(law.variable_names) - {"N", "D", "G", "D_unique"}
        if own != set(self.given):
            absent, more = sorted(own - set(self.given)), sorted(set(self.given) - own)
            words = [f"give a value for {', '.join(absent)}"] if absent else []
            words += [ELSEWHERE.get(name, f"`{name}` is not in its law") for name in more]
            takes = ", ".join([*sorted(own), "stored", "active"]) + " and error"
            raise ScalingError(
                f"Candidate {self.name!r}: {'; '.join(words)}. A candidate with the law "
                f"`{law.name}` accepts {takes}."
            )
        if self.architecture == "familial" and "G" not in law.variable_names:
            raise ScalingError(
                f"Candidate {self.name!r} is familial, but its law `{law.name}` does not use G."
            )

    @property
    def architecture(self) -> str:
        """The `kind`, or the family of the law if `kind` is empty."""
        return self.kind or self.source.law.family


@dataclass(frozen=True)
class Run:
    """A training run of an option: parameters (as the law counts them), tokens, exits and FLOPs.

    `members` are the sizes of the member on each device, as shares of N. They are all 1 unless
    the run trains a family.
    """

    N: float
    D: float
    G: int
    flops: float
    members: tuple[float, ...]


@dataclass(frozen=True)
class Option:
    """A way to use a candidate on all devices, such as one model for all of them."""

    name: str  # the candidate and the way, such as "dense, one for all"
    candidate: Candidate  # the candidate
    runs: tuple[Run, ...]  # the training runs
    serves: tuple[int, ...]  # index into `runs`, for each device
    losses: tuple[float, ...]  # loss on each device, in nats per token
    notes: tuple[str, ...]  # reasons to doubt the option

    @property
    def loss(self) -> float:
        """The mean loss over the devices, in nats per token."""
        return sum(self.losses) / len(self.losses)


def options(candidate: Candidate, situation: Situation, flops: Flops | None) -> Iterator[Option]:
    """Yield the options of a candidate: one model for all devices, several models, or a family."""
    uses = _Uses(candidate, situation, flops)
    if candidate.architecture == "familial":
        yield uses.family()
        return
    several = []
    for groups in _groupings(situation.memory):
        option = uses.models(groups)
        if len(groups) == 1:
            yield option
        else:
            several.append(option)
    if several:
        yield min(several, key=lambda option: option.loss)


def losses(option: Option, situation: Situation, values: Mapping[str, Any]) -> np.ndarray:
    """Return the loss on each device, shape (devices,), or (devices, draws) for draws of `values`.

    The loss is in nats per token.
    """
    candidate, found = option.candidate, []
    for device, number in enumerate(option.serves):
        run = option.runs[number]
        at = _given(candidate, situation, run.G)
        whole = candidate.source.law.predict(values, **at, N=run.N, D=run.D)
        if candidate.branch is not None and run.G > 1:
            share = run.members[device]
            rank = sorted(set(run.members)).index(share)
            place = {"U": float(rank), "V": float(run.G - 1 - rank)}
            member = candidate.branch.predict(N=share * run.N, D=run.D, **place)
            # the branch law has no draws, so the familial law's relative error is used for it
            whole = member * whole / candidate.source.predict(**at, N=run.N, D=run.D)
        found.append(whole)
    return np.array(found)


def uneven(candidate: Candidate, run: Run) -> bool:
    """Return whether the mean loss of a family is only a rough value for its devices.

    That is the case without a branch law, if the members are not evenly spaced.
    """
    if candidate.branch is not None or run.G == 1:
        return False
    even = even_members(run.G)
    return len(run.members) != run.G or not np.allclose(sorted(run.members), even, rtol=0.05)


def _groupings(memory: tuple[float, ...]) -> Iterator[list[tuple[float, ...]]]:
    """Yield the ways to split devices, sorted by memory, into groups with one model each."""
    count = len(memory)
    ways = range(2 ** (count - 1)) if count <= MOST_DEVICES else (0, 2 ** (count - 1) - 1)
    for way in ways:
        cuts = [i + 1 for i in range(count - 1) if way >> i & 1]
        if all(memory[cut] > memory[cut - 1] for cut in cuts):
            edges = [0, *cuts, count]
            yield [memory[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def _given(candidate: Candidate, situation: Situation, G: int) -> dict[str, float]:
    names = candidate.source.law.variable_names
    more = {"G": float(G), "D_unique": situation.unique_tokens}
    return {**candidate.given, **{name: more[name] for name in ("G", "D_unique") if name in names}}


class _Uses:
    """A planner of the runs of one candidate in one situation."""

    def __init__(self, candidate: Candidate, situation: Situation, flops: Flops | None) -> None:
        self.candidate, self.situation = candidate, situation
        own = candidate.facts.cost() if candidate.facts is not None else None
        self.cost = flops or own or HeadFlops()

    def models(self, groups: list[tuple[float, ...]]) -> Option:
        """Plan one model for each group of devices. The models share the FLOPs evenly."""
        memory, served = self.situation.memory, self.situation.inference_tokens
        flops = self.situation.flops / len(groups)
        runs = tuple(
            replace(
                self._run(1, group[0], flops, served * len(group)), members=(1.0,) * len(memory)
            )
            for group in groups
        )
        serves = tuple(number for number, group in enumerate(groups) for _ in group)
        return self._option("one for all" if len(groups) == 1 else "several models", runs, serves)

    def family(self) -> Option:
        """Plan one run whose members are as large as each device allows."""
        situation, candidate, memory = self.situation, self.candidate, self.situation.memory
        room = [size / situation.bytes_per_parameter / candidate.stored for size in memory]
        shares = tuple(size / memory[-1] for size in memory)
        for _ in memory:
            G, served = len(set(shares)), situation.inference_tokens * sum(shares)
            run = self._run(G, memory[-1], situation.flops, served)
            shares = tuple(min(1.0, size / run.N) for size in room)
            if len(set(shares)) == G:
                break
            # the whole model fits on several devices, so the family needs fewer members
        return self._option("one family", (replace(run, members=shares),), (0,) * len(memory))

    def _run(self, G: int, room: float, flops: float, served: float) -> Run:
        """Return the best run for `flops` FLOPs that fits in `room` bytes.

        The FLOPs include those of serving `served` tokens.
        """
        candidate, situation = self.candidate, self.situation
        source, active = candidate.source, candidate.active

        def paid(N: Any, D: Any, _: Any) -> Any:
            return (
                self.cost(active * np.asarray(N, float), D, G) + 2 * active * np.asarray(N) * served
            )

        most = room / situation.bytes_per_parameter / candidate.stored
        given = _given(candidate, situation, G)
        enough = math.inf if "D_unique" in given else situation.unique_tokens * situation.epochs
        N, D = best(source.law, source.values, flops, paid, max_N=most, max_D=enough, **given)
        return Run(float(N), float(D), G, float(paid(N, D, G)), ())

    def _option(self, way: str, runs: tuple[Run, ...], serves: tuple[int, ...]) -> Option:
        candidate, notes = self.candidate, tuple(self._notes(runs))
        option = Option(f"{candidate.name}, {way}", candidate, runs, serves, (), notes)
        found = losses(option, self.situation, candidate.source.values)
        return replace(option, losses=tuple(float(loss) for loss in found))

    def _notes(self, runs: tuple[Run, ...]) -> Iterator[str]:
        candidate = self.candidate
        said: dict[str, None] = {}
        for run in runs:
            at = _given(candidate, self.situation, run.G)
            said |= dict.fromkeys(outside(candidate.source, N=run.N, D=run.D, **at))
        yield from said
        law, kind = candidate.source.law, candidate.architecture
        if not KINSHIP[kind] & set(law.domain.architectures):
            of = " and ".join(law.domain.architectures)
            yield f"`{law.name}` is a law of {of} models, not of {kind} ones."
        if kind == "familial" and runs[0].G == 1:
            yield "the whole model fits on every device, so a family is not needed."
        elif kind == "familial" and uneven(candidate, runs[0]):
            yield (
                "there is no branch law, so the loss on every device is the mean loss of a family "
                f"with members of {', '.join(f'{s:.0%}' for s in even_members(runs[0].G))} of the "
                "parameters."
            )
        if kind == "sparse" and candidate.stored == candidate.active:
            yield (
                "`stored` and `active` are equal, but a mixture of experts stores more parameters "
                "than it uses for a token."
            )


def groups_of(candidates: Sequence[Candidate]) -> tuple[list[list[Candidate]], list[str]]:
    """Group the candidates whose losses can be compared.

    Return the groups, and one sentence for each pair that cannot be compared. There are no
    sentences if there is only one group.
    """
    groups: list[list[Candidate]] = []
    reasons: list[str] = []
    for candidate in candidates:
        for group in groups:
            reason = _difference(group[0], candidate)
            if not reason:
                group.append(candidate)
                break
            reasons.append(
                f"The losses of {group[0].name!r} and {candidate.name!r} cannot be compared: "
                f"{reason}."
            )
        else:
            groups.append([candidate])
    return groups, reasons if len(groups) > 1 else []


def _difference(first: Candidate, second: Candidate) -> str:
    """Return the reason why the losses of two candidates cannot be compared, `""` if they can."""
    sources = first.source, second.source
    known = [source for source in sources if isinstance(source, PublishedFit)]
    fits = [source for source in sources if isinstance(source, Fit)]
    if known and fits:
        return "one law was fitted to runs, and the other has published coefficients"
    if known:
        a, b = (source.origin for source in known)
        return "" if a == b else f"their coefficients come from {a or '?'} and {b or '?'}"
    rows = [set(zip(f.data.loss.tolist(), f.data.columns["D"].tolist(), strict=True)) for f in fits]
    shared = len(rows[0] & rows[1]) >= COMMON * min(map(len, rows))
    one, other = first.facts, second.facts
    if one is None or other is None:
        return "" if shared else "the data and the tokenizer of their runs are unknown"
    names = [facts.loss.lower() for facts in (one, other)]
    if one.dense or other.dense:  # the mean and the final loss of a run with one exit are equal
        names = [re.sub(r"_(mean|final)$", "", name) for name in names]
    if names[0] != names[1]:
        return f"one uses the loss {one.loss!r}, the other {other.loss!r}"
    for name, meaning in MEANINGS.items():
        values = getattr(one, name), getattr(other, name)
        if all(values) and values[0] != values[1]:
            return f"their runs have different {meaning}, {values[0]} and {values[1]}"
    if shared or all(getattr(f, name) for f in (one, other) for name in MEANINGS):
        return ""
    return (
        "their files contain different runs and do not name the data and the tokenizer (`data`, "
        "`vocab_size`)"
    )

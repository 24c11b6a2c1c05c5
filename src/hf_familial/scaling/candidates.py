"""Ways to use each architecture, and which of their losses compare."""

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

# kind -> architectures of a law's domain that speak for it
KINSHIP = {"dense": {"dense"}, "sparse": {"sparse", "moe"}, "familial": {"familial"}}
# what a candidate need not give, and where it comes from
ELSEWHERE = {
    "G": "leave G out, it follows from the devices: one exit for each size of `memory`",
    "N": "leave N out, it is what is looked for",
    "D": "leave D out, it is what is looked for",
    "D_unique": "leave D_unique out, it is `unique_tokens`",
}
MOST_DEVICES = 5  # of which every grouping is tried
COMMON = 0.5  # share of the smaller table's rows that two fits of one study have in common
MEANINGS = {"data": "data", "vocab_size": "vocabularies"}


@dataclass(frozen=True)
class Situation:
    """The resources and the requirements of a user; see `advise`.

    `memory` holds bytes on each device, rising. `epochs` says how often a token may be seen: to
    about 4 repeated tokens are worth nearly as much as new ones (arXiv:2305.16264); a law of
    `D_unique` counts repetition itself.
    """

    unique_tokens: float
    flops: float
    inference_tokens: float
    memory: tuple[float, ...]
    epochs: float = 4.0
    bytes_per_parameter: float = 2.0

    def __post_init__(self) -> None:
        if not self.memory or list(self.memory) != sorted(self.memory):
            raise ScalingError(f"`memory` must be one or more sizes, rising, got {self.memory}.")
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
    """An architecture at hand, and the law that is believed of it.

    Attributes:
        name (`str`): What to call it.
        source ([`Fit`] or [`PublishedFit`]): Its law of N and D.
        kind (`str`): `"dense"`, `"sparse"` or `"familial"`; the family of its law if empty.
        given (`Mapping[str, float]`): The law's variables other than N, D, G and D_unique, such as
            sparsity or experts.
        stored (`float`): Parameters that memory has to hold, per N.
        active (`float`): Parameters that a token passes through, per N.
        error (`float`, *optional*): How far the law's log loss may be off besides its
            coefficients, as a standard deviation; such as the held-out error of a comparison.
        branch ([`Fit`] or [`PublishedFit`], *optional*): Of a familial one, its branch law.
        facts ([`Facts`], *optional*): What the runs of a fit tell of their data, tokenizer and
            loss, and of how their FLOPs were counted.
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
            raise ScalingError(f"a candidate needs a law of N and D; `{law.name}` lacks {missing}.")
        own = set(law.variable_names) - {"N", "D", "G", "D_unique"}
        if own != set(self.given):
            absent, more = sorted(own - set(self.given)), sorted(set(self.given) - own)
            words = [f"must give {absent} of `{law.name}`"] if absent else []
            words += [ELSEWHERE.get(name, f"`{name}` is no variable of its law") for name in more]
            takes = f"{', '.join(sorted(own)) or 'no variable'}, besides stored, active and error"
            raise ScalingError(
                f"candidate {self.name!r}: {'; '.join(words)}. One of `{law.name}` takes {takes}."
            )
        if self.architecture == "familial" and "G" not in law.variable_names:
            raise ScalingError(f"{self.name!r} is familial; its law `{law.name}` reads no G.")

    @property
    def architecture(self) -> str:
        """`kind`, or the family of the law."""
        return self.kind or self.source.law.family


@dataclass(frozen=True)
class Run:
    """A training run of an option: parameters as the law counts them, tokens, exits, FLOPs.

    `members` are the sizes of the member on each device, as shares of N; 1 unless it is a family.
    """

    N: float
    D: float
    G: int
    flops: float
    members: tuple[float, ...]


@dataclass(frozen=True)
class Option:
    """A candidate put to use in one way."""

    name: str  # the candidate and the way
    candidate: Candidate  # the candidate
    runs: tuple[Run, ...]  # what would be trained
    serves: tuple[int, ...]  # the run that serves each device
    losses: tuple[float, ...]  # loss on each device, in nats per token
    notes: tuple[str, ...]  # what makes it doubtful

    @property
    def loss(self) -> float:
        """Mean over the devices, in nats per token."""
        return sum(self.losses) / len(self.losses)


def options(candidate: Candidate, situation: Situation, flops: Flops | None) -> Iterator[Option]:
    """Yield the ways to use a candidate: one model for all devices, several, or one family."""
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
    """Return the loss on each device, (devices,), or (devices, draws) for draws of `values`."""
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
            # the familial law's uncertainty stands for the branch law's
            whole = member * whole / candidate.source.predict(**at, N=run.N, D=run.D)
        found.append(whole)
    return np.array(found)


def uneven(candidate: Candidate, run: Run) -> bool:
    """Return whether a family's mean loss is not its devices', and no branch law tells more."""
    if candidate.branch is not None or run.G == 1:
        return False
    even = even_members(run.G)
    return len(run.members) != run.G or not np.allclose(sorted(run.members), even, rtol=0.05)


def _groupings(memory: tuple[float, ...]) -> Iterator[list[tuple[float, ...]]]:
    """Yield the ways to part devices, smallest first, into neighbours that share a model."""
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
    """The runs of a candidate in a situation, at their cost."""

    def __init__(self, candidate: Candidate, situation: Situation, flops: Flops | None) -> None:
        self.candidate, self.situation = candidate, situation
        own = candidate.facts.cost() if candidate.facts is not None else None
        self.cost = flops or own or HeadFlops()

    def models(self, groups: list[tuple[float, ...]]) -> Option:
        """Use one model for each group of devices; they share the FLOPs evenly."""
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
        """Use one run whose members are as large as each device allows."""
        situation, candidate, memory = self.situation, self.candidate, self.situation.memory
        room = [size / situation.bytes_per_parameter / candidate.stored for size in memory]
        shares = tuple(size / memory[-1] for size in memory)
        for _ in memory:
            G, served = len(set(shares)), situation.inference_tokens * sum(shares)
            run = self._run(G, memory[-1], situation.flops, served)
            shares = tuple(min(1.0, size / run.N) for size in room)
            if len(set(shares)) == G:
                break
            # the whole fits on more than the largest device: fewer members will do
        return self._option("one family", (replace(run, members=shares),), (0,) * len(memory))

    def _run(self, G: int, room: float, flops: float, served: float) -> Run:
        """Return the best run for `flops` whose whole fits into `room` bytes and serves tokens."""
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
            yield "the whole fits on every device: a family is not needed."
        elif kind == "familial" and uneven(candidate, runs[0]):
            yield (
                "no branch law: every device is given the family's mean loss, as if its members "
                f"were {', '.join(f'{share:.0%}' for share in even_members(runs[0].G))} of the "
                "whole."
            )
        if kind == "sparse" and candidate.stored == candidate.active:
            yield "`stored` and `active` are equal: a mixture of experts holds more than it uses."


def groups_of(candidates: Sequence[Candidate]) -> tuple[list[list[Candidate]], list[str]]:
    """Group the candidates whose losses compare, and say in sentences why others do not."""
    groups: list[list[Candidate]] = []
    reasons: list[str] = []
    for candidate in candidates:
        for group in groups:
            reason = _difference(group[0], candidate)
            if not reason:
                group.append(candidate)
                break
            reasons.append(f"{group[0].name!r} and {candidate.name!r} do not compare: {reason}.")
        else:
            groups.append([candidate])
    return groups, reasons if len(groups) > 1 else []


def _difference(first: Candidate, second: Candidate) -> str:
    """Return why the losses of two candidates do not compare; empty if they do."""
    sources = first.source, second.source
    known = [source for source in sources if isinstance(source, PublishedFit)]
    fits = [source for source in sources if isinstance(source, Fit)]
    if known and fits:
        return "one is fitted to runs, the coefficients of the other are given"
    if known:
        a, b = (source.origin for source in known)
        return "" if a == b else f"their coefficients are of {a or '?'} and of {b or '?'}"
    rows = [set(zip(f.data.loss.tolist(), f.data.columns["D"].tolist(), strict=True)) for f in fits]
    shared = len(rows[0] & rows[1]) >= COMMON * min(map(len, rows))
    one, other = first.facts, second.facts
    if one is None or other is None:
        return "" if shared else "nothing is known of the data and the tokenizer of their runs"
    names = [facts.loss.lower() for facts in (one, other)]
    if one.dense or other.dense:  # where a run has one exit, its mean is its final loss
        names = [re.sub(r"_(mean|final)$", "", name) for name in names]
    if names[0] != names[1]:
        return f"one is of the loss {one.loss!r}, the other of {other.loss!r}"
    for name, meaning in MEANINGS.items():
        values = getattr(one, name), getattr(other, name)
        if all(values) and values[0] != values[1]:
            return f"their runs have other {meaning}, {values[0]} and {values[1]}"
    if shared or all(getattr(f, name) for f in (one, other) for name in MEANINGS):
        return ""
    return "their files do not tell data and tokenizer (`data`, `vocab_size`), and hold other runs"

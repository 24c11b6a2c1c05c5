"""Advice on which architecture to train: how certain it is, and what would change it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import NoMinimumError, NotIdentifiedError, ScalingError, TooFewError
from ._covariance import CoefficientCovariance
from .candidates import Candidate, Option, Situation, groups_of, losses, options, uneven
from .flop_models import Flops
from .prediction import PublishedFit, Source
from .results import Fit


UNKNOWN = 0.02  # assumed error of the log loss if the runs behind a law are not available
DRAWS = 4000
TURNS = 12  # bisections to find the factor at which the winner changes
WORDS = ((0.95, "clearly"), (0.8, "probably"), (0.6, "perhaps"), (0.0, "a toss-up:"))

# assumptions of the user, and the factors by which `advise` varies each of them
ASSUMPTIONS: Mapping[str, tuple[float, ...]] = {
    "unique_tokens": (0.25, 4.0),
    "training_flops": (0.1, 10.0),
    "inference_tokens": (0.0, 10.0),
    "memory": (0.5, 2.0),
    "epochs": (0.25, 4.0),
}


@dataclass(frozen=True)
class Sensitivity:
    """The best option if one assumption is changed by a factor."""

    assumption: str  # the argument of `advise` that is changed
    factor: float  # the factor that multiplies it
    winner: str  # name of the best option under the changed assumption
    losses: Mapping[str, float]  # mean loss over the devices, by option, in nats per token
    changes: bool  # whether this winner differs from the winner of the advice
    turns_at: float | None  # the factor nearest to 1 at which the winner changes


@dataclass(frozen=True)
class Advice:
    """The result of [`advise`]: the recommended option, all others, and the confidence.

    Attributes:
        winner (`str`): Name of the option with the least loss. Empty if some losses cannot be
            compared.
        confidence (`float`, *optional*): Probability that the winner is the best option, given
            the uncertainty of the laws. `None` without a winner.
        options (`tuple[Option, ...]`): All options. Options with comparable losses are next to
            each other, the best one first.
        chances (`Mapping[str, float]`): For each option, the probability that it is the best of
            the options with comparable losses.
        sensitivity (`tuple[Sensitivity, ...]`): The winner under changed assumptions. Empty
            without a winner.
        situation ([`Situation`]): The arguments of `advise`.
        notes (`tuple[str, ...]`): Reasons to doubt the advice, one sentence each.
        incomparable (`tuple[str, ...]`): Reasons why there is no winner, one sentence each.
    """

    winner: str
    confidence: float | None
    options: tuple[Option, ...]
    chances: Mapping[str, float]
    sensitivity: tuple[Sensitivity, ...]
    situation: Situation
    notes: tuple[str, ...]
    incomparable: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The advice in one or two sentences."""
        if self.confidence is None:
            return (
                f"No ranking: {' '.join(self.incomparable)} Losses on different data, with "
                "different tokenizers or of different kinds have different units. Fit the laws to "
                "runs on one corpus, or state that the losses can be compared "
                "(`--losses-compare`)."
            )
        word = next(word for least, word in WORDS if self.confidence >= least)
        first = self.options[0]
        runs = " and ".join(f"N = {run.N:.3g} on {run.D:.3g} tokens" for run in first.runs)
        return (
            f"{word.capitalize()} {self.winner} ({self.confidence:.0%}): {runs}, mean loss "
            f"{first.loss:.3f} nats per token."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "winner": self.winner or None,
            "confidence": self.confidence,
            "sentence": self.sentence,
            "options": [
                {
                    "name": option.name,
                    "law": option.candidate.source.law.name,
                    "loss": option.loss,
                    "losses": list(option.losses),
                    "chance": self.chances[option.name],
                    "runs": [{**vars(run), "members": list(run.members)} for run in option.runs],
                    "notes": list(option.notes),
                }
                for option in self.options
            ],
            "sensitivity": [{**vars(row), "losses": dict(row.losses)} for row in self.sensitivity],
            "situation": {**vars(self.situation), "memory": list(self.situation.memory)},
            "notes": list(self.notes),
            "incomparable": list(self.incomparable),
        }


def advise(
    *,
    unique_tokens: float,
    training_flops: float,
    candidates: Sequence[Candidate | Source],
    memory: Sequence[float],
    inference_tokens: float = 0.0,
    epochs: float = 4.0,
    bytes_per_parameter: float = 2.0,
    flops: Flops | None = None,
    seed: int = 0,
    losses_compare: bool = False,
) -> Advice:
    """Recommend which architecture to train for your devices, tokens and FLOPs.

    Every candidate is planned for the same FLOPs, tokens and devices. A dense or sparse candidate
    has two options: one model for all devices, or several models that share the FLOPs evenly. A
    familial candidate has one option: a single run with one member per device. The best option
    has the least loss, averaged over the devices.

    Options are ranked only if their losses can be compared. That is so if the laws were fitted to
    one table, or to runs with the same data, vocabulary and kind of loss (`Candidate.facts`), or
    if their coefficients come from one publication.

    The confidence comes from random draws of the coefficients (with the covariance of the fit) and
    of the law's own error. That error is `Candidate.error`, else the fit's residuals, else 2% for
    published coefficients. For a fit it grows with every decade of compute beyond the fitted runs.

    Args:
        unique_tokens (`float`): Number of different training tokens.
        training_flops (`float`): The budget in FLOPs. It pays for training, and also for serving
            `inference_tokens`.
        candidates (`Sequence[Candidate | Fit | PublishedFit]`): At least one architecture. There
            must be at least two options.
        memory (`Sequence[float]`): Bytes for weights on each target device.
        inference_tokens (`float`): Tokens to serve per device.
        epochs (`float`): Largest number of passes over the unique tokens.
        bytes_per_parameter (`float`): Bytes per stored weight: 2 for bfloat16.
        flops (`Callable`, *optional*): FLOP model `flops(N, D, G)` of N active parameters. Default:
            the model that the runs of each candidate used, else [`HeadFlops`].
        seed (`int`): Seed of the draws.
        losses_compare (`bool`): Whether to assume that all losses can be compared.

    Raises:
        ScalingError: If an argument is out of range, or there are fewer than two options.
        NoMinimumError: If a law has no optimum.

    Example:
        >>> laws = [PublishedFit.published(get_law(name)) for name in ("hoffmann", "familial")]
        >>> advise(unique_tokens=1e12, training_flops=1e22, memory=[4e9, 16e9],
        ...        candidates=laws, losses_compare=True).sentence

    Reference: the guidelines of arXiv:2502.12051. Runs are planned as in [`plan`].
    """
    situation = Situation(
        float(unique_tokens),
        float(training_flops),
        float(inference_tokens),
        tuple(sorted(float(room) for room in memory)),
        float(epochs),
        float(bytes_per_parameter),
    )
    known = [c if isinstance(c, Candidate) else Candidate(c.law.name, c) for c in candidates]
    names = [candidate.name for candidate in known]
    if len(set(names)) < len(names):
        raise ScalingError(
            f"`candidates` must differ in name, got {names}. Pass `Candidate` objects with names "
            "of your choice."
        )
    groups, reasons = ([known], []) if losses_compare else groups_of(known)
    ranked = [_ranked(group, situation, flops) for group in groups]
    found = [option for options_of in ranked for option in options_of]
    if len(found) < 2:
        raise ScalingError(
            f"`candidates` must have two or more options to choose from, got "
            f"{[option.name for option in found]}. Add a candidate."
        )
    chances: dict[str, float] = {}
    notes: list[str] = []
    for options_of in ranked:
        chances |= _chances(options_of, situation, seed, notes)
    winner = "" if reasons else found[0].name
    turns = () if reasons else tuple(_sensitivity(known, situation, flops, winner))
    return Advice(
        winner=winner,
        confidence=None if reasons else chances[winner],
        options=tuple(found),
        chances=chances,
        sensitivity=turns,
        situation=situation,
        notes=tuple(dict.fromkeys([*notes, *_cautions(found, known)])),
        incomparable=tuple(reasons),
    )


def _ranked(known: Sequence[Candidate], situation: Situation, flops: Flops | None) -> list[Option]:
    found = [option for candidate in known for option in options(candidate, situation, flops)]
    return sorted(found, key=lambda option: option.loss)


def _chances(
    found: Sequence[Option], situation: Situation, seed: int, notes: list[str]
) -> dict[str, float]:
    """Return the share of draws in which each option has the lowest loss.

    The options of one candidate share its draws.
    """
    cloud, drawn, shifts = [], {}, {}
    generator = np.random.default_rng(seed)
    for option in found:
        candidate = option.candidate
        if candidate.name not in drawn:
            drawn[candidate.name] = _coefficients(candidate, seed, notes)
            shifts[candidate.name] = generator.standard_normal(DRAWS)
        mean = losses(option, situation, drawn[candidate.name]).mean(0)
        cloud.append(mean * np.exp(_error(option) * shifts[candidate.name]))
    best = np.argmin(np.array(cloud), axis=0)
    counts = np.bincount(best, minlength=len(found)) / DRAWS
    return {option.name: float(share) for option, share in zip(found, counts, strict=True)}


def _coefficients(candidate: Candidate, seed: int, notes: list[str]) -> Mapping[str, Any]:
    """Draw the coefficients of a fit, or return its values if there is no covariance."""
    source = candidate.source
    if isinstance(source, PublishedFit):
        notes.append(
            f"The coefficients of {candidate.name!r} are published values. Their uncertainty is "
            "modelled as an error of the loss alone."
        )
        return source.values
    try:
        return CoefficientCovariance.of(source).draws(DRAWS, seed)
    except (TooFewError, NotIdentifiedError) as error:
        notes.append(f"The uncertainty of {candidate.name!r} is not known. {error}")
        return source.values


def _error(option: Option) -> float:
    """Return the standard deviation of a law's error in the log loss, for the runs of an option."""
    candidate, source = option.candidate, option.candidate.source
    error = UNKNOWN if candidate.error is None else candidate.error
    if isinstance(source, Fit):
        if candidate.error is None:
            error = float(np.sqrt(np.mean((np.log(source.fitted() / source.data.loss)) ** 2)))
        columns = source.data.columns
        farthest = float(np.max(columns["N"] * columns["D"]))
        decades = math.log10(max(run.N * run.D for run in option.runs) / farthest)
        error *= 1 + max(decades, 0.0)
    return math.hypot(error, UNKNOWN) if uneven(candidate, option.runs[0]) else error


def _sensitivity(
    known: Sequence[Candidate], situation: Situation, flops: Flops | None, winner: str
) -> Iterator[Sensitivity]:
    for assumption, factors in ASSUMPTIONS.items():
        if assumption == "inference_tokens" and not situation.inference_tokens:
            continue
        for factor in factors:

            def ranked(share: float, name: str = assumption) -> list[Option]:
                return _ranked(known, _otherwise(situation, name, share), flops)

            try:
                there = ranked(factor)
            except NoMinimumError:
                continue
            changes = there[0].name != winner
            yield Sensitivity(
                assumption,
                factor,
                there[0].name,
                {option.name: option.loss for option in there},
                changes,
                _turn(ranked, factor, winner) if changes else None,
            )


def _otherwise(situation: Situation, assumption: str, factor: float) -> Situation:
    if assumption == "memory":
        return replace(situation, memory=tuple(room * factor for room in situation.memory))
    name = "flops" if assumption == "training_flops" else assumption
    return replace(situation, **{name: getattr(situation, name) * factor})


def _turn(ranked: Callable[[float], list[Option]], factor: float, winner: str) -> float:
    """Return the factor at which the winner changes, by bisection between 1 and `factor`."""
    near, far = 1.0, factor
    for _ in range(TURNS):
        middle = math.sqrt(near * far) if far > 0 else (near + far) / 2
        if ranked(middle)[0].name == winner:
            near = middle
        else:
            far = middle
    return far


def _cautions(found: Sequence[Option], known: Sequence[Candidate]) -> Iterator[str]:
    yield from (f"{option.name}: {note}" for option in found for note in option.notes)
    law = found[0].candidate.source.law
    yield from (f"Known limit of `{law.name}`: {failure}" for failure in law.domain.failures)
    sources = [candidate.source for candidate in known]
    tables = {id(source.data) for source in sources if isinstance(source, Fit)}
    given = any(isinstance(source, PublishedFit) for source in sources)
    if len(known) > 1 and (len(tables) > 1 or given):
        yield (
            "The laws were not all fitted to one table of runs. Their losses can be compared only "
            "if the data, the tokenizer, the evaluation and the way to count N are the same."
        )

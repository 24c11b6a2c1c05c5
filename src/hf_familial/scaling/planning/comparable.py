"""Which laws may be ranked by their losses: those of one corpus, tokenizer and kind of loss."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..data.facts import Facts
from ..fitting.result import Fit
from .candidates import Candidate
from .predict import Known


COMMON = 0.5  # share of the smaller table's rows that two fits of one study have in common
MEANINGS = {"data": "data", "vocab_size": "vocabularies"}


def groups_of(candidates: Sequence[Candidate]) -> tuple[list[list[Candidate]], list[str]]:
    """Return candidates whose losses compare, together, and why others do not, in sentences.

    Args:
        candidates (`Sequence[Candidate]`): In the order in which they are given.
    """
    groups: list[list[Candidate]] = []
    reasons: list[str] = []
    for candidate in candidates:
        for group in groups:
            reason = difference(group[0], candidate)
            if not reason:
                group.append(candidate)
                break
            reasons.append(f"{group[0].name!r} and {candidate.name!r} do not compare: {reason}.")
        else:
            groups.append([candidate])
    return groups, reasons if len(groups) > 1 else []


def difference(first: Candidate, second: Candidate) -> str:
    """Return why the losses of two candidates do not compare; empty if they do."""
    known = [c.source for c in (first, second) if isinstance(c.source, Known)]
    fits = [c.source for c in (first, second) if isinstance(c.source, Fit)]
    if known and fits:
        return "one is fitted to runs, the coefficients of the other are given"
    if known:
        one, other = (source.origin for source in known)
        return (
            "" if one == other else f"their coefficients are of {one or '?'} and of {other or '?'}"
        )
    return _of_fits(fits, first.facts, second.facts)


def _of_fits(fits: Sequence[Fit], one: Facts | None, other: Facts | None) -> str:
    rows = [set(zip(f.data.loss.tolist(), f.data.columns["D"].tolist(), strict=True)) for f in fits]
    shared = len(rows[0] & rows[1]) >= COMMON * min(map(len, rows))
    if one is None or other is None:
        return "" if shared else "nothing is known of the data and the tokenizer of their runs"
    losses = [_kind(facts, one.dense or other.dense) for facts in (one, other)]
    if losses[0] != losses[1]:
        return f"one is of the loss {one.loss!r}, the other of {other.loss!r}"
    for name, meaning in MEANINGS.items():
        values = getattr(one, name), getattr(other, name)
        if all(values) and values[0] != values[1]:
            return f"their runs have other {meaning}, {values[0]} and {values[1]}"
    if shared or all(getattr(f, name) for f in (one, other) for name in MEANINGS):
        return ""
    return "their files do not tell data and tokenizer (`data`, `vocab_size`), and hold other runs"


def _kind(facts: Facts, dense: bool) -> str:
    """A loss by name; where a run has one exit, its mean is its final loss."""
    words = facts.loss.lower()
    return re.sub(r"_(mean|final)$", "", words) if dense else words


__all__ = ["difference", "groups_of"]

"""Options that the commands of the fitter share, and what their words stand for."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from .app import one_of


if TYPE_CHECKING:
    from ..scaling import Fit, Law
    from ..scaling.flop_models import HeadFlops
    from ..scaling.prediction import PublishedFit
    from ..scaling.tables.facts import Facts
    from ..scaling.tables.load import ColumnChoice

T = TypeVar("T")

Size = Annotated[
    str,
    typer.Option(
        "--size",
        help="What N counts in runs.jsonl: total, non_embedding, active.",
        callback=one_of("--size", "total", "non_embedding", "active"),
    ),
]
LossChoice = Annotated[
    str,
    typer.Option(
        "--loss",
        help="mean, final, exit0 and so on, each with eval_ before it; exits for one row per exit; "
        "or a column.",
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="Column of a variable, as N=my_column; repeat for more."),
]
Statuses = Annotated[str, typer.Option("--status", help="Runs to keep, where there is a status.")]
Units = Annotated[
    list[str] | None,
    typer.Option(
        "--unit",
        help="Unit of a column, as N=1e6, D=B, C=log10, loss=ppl; N=1 if it is right as it is.",
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option("--where", help="Rows to keep, as 'optimizer == adamw' or 'D > 1e9'; repeatable."),
]
RunsAre = Annotated[
    str,
    typer.Option(
        help="Rows of one name or size are checkpoints of a run, or independent; judged by the "
        "rows if not given."
    ),
]
LastOfRun = Annotated[bool, typer.Option("--last-of-run", help="Keep the last row of each run.")]
Objective = Annotated[
    str,
    typer.Option(
        help="log_huber, huber or mse.",
        callback=one_of("--objective", "log_huber", "huber", "mse"),
    ),
]
Delta = Annotated[float, typer.Option(help="Where Huber's function turns linear.")]
Level = Annotated[float, typer.Option(min=0.5, max=0.9999, help="Coverage of the intervals.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def law_of(name: str) -> Law:
    """A law by name; near names where there is none."""
    from ..errors import UnknownLawError
    from ..scaling import get_law
    from ..scaling.laws import ALIASES, LAWS

    try:
        return get_law(name)
    except UnknownLawError:
        law, colon, given = name.partition(":")
        if colon and "=" in given and law in [*LAWS, *ALIASES]:
            raise UnknownLawError(
                f"{name!r} names a law and {given!r}: the law alone goes here; give G by "
                "`--granularity` and others by `--set` where a command has them."
            ) from None
        near = difflib.get_close_matches(name.lower(), [*LAWS, *ALIASES], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UnknownLawError(
            f"no law is called {name!r}; {hint}`hf-familial fit --law list` prints them all."
        ) from None


def fit_or_law(name: str) -> Fit | PublishedFit:
    """A fit in a file, or a law with its published values."""
    from ..scaling.prediction import PublishedFit
    from ..scaling.report import read_analysis

    if is_file(name):
        return read_analysis(name).fit
    return PublishedFit.published(law_of(name))


def is_file(name: str) -> bool:
    """Return whether a word names a file of a fit rather than a law."""
    return Path(name).exists() or name.endswith(".json") or "/" in name


def facts_of(name: str) -> Facts | None:
    """Read the facts of the runs from a fit's file; a law with published values has none."""
    from ..scaling.report import read_analysis

    return read_analysis(name).source.facts if is_file(name) else None


def head_cost(facts: Facts | None, vocab: int | None) -> HeadFlops:
    """Return the cost of a run, heads included, counted as the fitted runs counted it."""
    from ..scaling.flop_models import HeadFlops

    known = facts.cost(vocab) if facts is not None else None
    return known or (HeadFlops() if vocab is None else HeadFlops(vocab=vocab))


def cost_words(facts: Facts | None, cost: HeadFlops | None) -> str:
    """Describe in one line how a plan counts FLOPs."""
    if cost is None:
        return "FLOPs by C = 6ND."
    own = facts is not None and facts.vocab_size == cost.vocab
    of = "as the runs fitted have" if own else "by assumption; set it with --vocab"
    inside = "with embeddings and one head" if cost.heads_in_N else "without embeddings and heads"
    return f"FLOPs by 6ND and heads of {cost.vocab:,} tokens ({of}); N {inside}."


def choice_of(
    size: str,
    loss: str,
    columns: list[str] | None,
    status: str,
    units: list[str] | None = None,
    where: list[str] | None = None,
    runs_are: str = "",
    last_of_run: bool = False,
) -> ColumnChoice:
    """What to take from a table, as the options say."""
    from ..scaling.tables.load import ColumnChoice

    return ColumnChoice(
        size,
        loss,
        pairs(columns, str, "--column N=my_column") or {},
        tuple(status.split(",")),
        pairs(units, str, "--unit N=1e6") or {},
        tuple(where or ()),
        runs_are,
        last_of_run,
    )


def pairs(
    words: Iterable[str] | None, kind: Callable[[str], T], example: str
) -> dict[str, T] | None:
    """`name=value` options."""
    if not words:
        return None
    try:
        split = [word.split("=", 1) for word in words]
        return {name.strip(): kind(value.strip()) for name, value in split}
    except ValueError:
        raise ValueError(f"write {example}, got {' '.join(words)!r}.") from None


def span(word: str) -> tuple[float, float]:
    """Two ends, as `0:1`."""
    low, high = word.split(":")
    return float(low), float(high)


def numbers(words: str, example: str) -> list[float]:
    """Numbers parted by commas."""
    try:
        return [float(word) for word in words.split(",")]
    except ValueError:
        raise ValueError(f"write {example}, got {words!r}.") from None


def version() -> str:
    """Of the package."""
    from .. import __version__

    return __version__

"""Options that the commands of the fitter share, and what their words stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from typer import Option

from .app import one_of


if TYPE_CHECKING:
    from ..scaling import ColumnChoice, Fit, Law, PublishedFit
    from ..scaling.tables.facts import Facts

T = TypeVar("T")

Size = Annotated[
    str,
    Option(
        "--size",
        help="N in runs.jsonl: total, non_embedding or active.",
        callback=one_of("--size", "total", "non_embedding", "active"),
    ),
]
LossChoice = Annotated[
    str,
    Option("--loss", help="mean, final, exit0; eval_mean, ...; exits: a row per exit; a column."),
]
Columns = Annotated[
    list[str] | None,
    Option("--column", help="Column of a variable, as N=my_column."),
]
Statuses = Annotated[str, Option("--status", help="Runs to keep, where there is a status.")]
Units = Annotated[
    list[str] | None,
    Option(
        "--unit",
        help="Unit of a column, as N=1e6, D=B, C=log10, loss=ppl, N=1.",
    ),
]
Where = Annotated[
    list[str] | None,
    Option("--where", help="Rows to keep, as 'optimizer == adamw', 'D > 1e9'."),
]
RunsAre = Annotated[
    str, Option(help="checkpoints (rows of one name are one run) or independent; else judged.")
]
LastOfRun = Annotated[bool, Option("--last-of-run", help="Keep the last row of each run.")]
Objective = Annotated[
    str,
    Option(
        help="log_huber, huber or mse.",
        callback=one_of("--objective", "log_huber", "huber", "mse"),
    ),
]
Resample = Annotated[
    str,
    Option(
        help="runs or wild.",
        callback=one_of("--resample", "runs", "wild"),
    ),
]
Delta = Annotated[float, Option(help="Where Huber's function turns linear.")]
Level = Annotated[float, Option(min=0.5, max=0.9999, help="Coverage of the intervals.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON and nothing else.")]


def law_of(name: str) -> Law:
    """Return the law of a name; raise with near names where there is none."""
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
        near = get_close_matches(name.lower(), [*LAWS, *ALIASES], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UnknownLawError(
            f"no law is called {name!r}; {hint}`hf-familial fit --law list` prints them all."
        ) from None


def fit_or_law(name: str) -> tuple[Fit | PublishedFit, Facts | None]:
    """Read a fit and the facts of its runs from a file, or take a law's published values."""
    from ..scaling import PublishedFit
    from ..scaling.report import read_analysis

    if Path(name).exists() or name.endswith(".json") or "/" in name:
        found = read_analysis(name)
        return found.fit, found.source.facts
    return PublishedFit.published(law_of(name)), None


def choice_of(
    size: str,
    loss: str,
    columns: list[str] | None,
    status: str,
    units: list[str] | None,
    where: list[str] | None,
    runs_are: str,
    last_of_run: bool,
) -> ColumnChoice:
    """Return the choice of rows and columns that the options make."""
    from ..scaling import ColumnChoice

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
    """Parse `name=value` options; `None` if there are none."""
    if not words:
        return None
    try:
        split = [word.split("=", 1) for word in words]
        return {name.strip(): kind(value.strip()) for name, value in split}
    except ValueError:
        raise ValueError(f"write {example}, got {' '.join(words)!r}.") from None


def span(word: str) -> tuple[float, float]:
    """Parse two ends, as `0:1`."""
    low, high = word.split(":")
    return float(low), float(high)


def numbers(words: str, example: str) -> list[float]:
    """Parse numbers between commas."""
    try:
        return [float(word) for word in words.split(",")]
    except ValueError:
        raise ValueError(f"write {example}, got {words!r}.") from None

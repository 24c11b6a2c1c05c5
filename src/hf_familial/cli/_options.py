"""Options that several commands share, and parsers of their values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from typer import Argument, Option

from ._help import ADVANCED
from .app import one_of


if TYPE_CHECKING:
    from ..scaling import ColumnChoice, Fit, Law, PublishedFit
    from ..scaling.tables.facts import Facts

T = TypeVar("T")

TABLE = "Rows and columns of the table"

RUNS = "Table of runs: CSV, JSON lines, JSON or parquet."
Runs = Annotated[Path, Argument(metavar="RUNS", help=RUNS)]
RunsOrNone = Annotated[Path | None, Argument(metavar="RUNS", help=RUNS)]
Size = Annotated[
    str,
    Option(
        "--size",
        metavar="NAME",
        help="What N counts: total, non_embedding or active parameters.",
        callback=one_of("--size", "total", "non_embedding", "active"),
    ),
]
LossChoice = Annotated[
    str,
    Option(
        "--loss",
        metavar="NAME",
        help="Loss to fit: mean, final, exit0, eval_mean, exits (one row per exit) or a column.",
    ),
]
Columns = Annotated[
    list[str] | None,
    Option(
        "--column",
        metavar="NAME=COLUMN",
        rich_help_panel=TABLE,
        help="Read a variable from this column, for example N=params.",
    ),
]
Statuses = Annotated[
    str,
    Option(
        "--status",
        metavar="NAMES",
        rich_help_panel=TABLE,
        help="Keep runs of these statuses, if the table has statuses.",
    ),
]
Units = Annotated[
    list[str] | None,
    Option(
        "--unit",
        metavar="NAME=UNIT",
        rich_help_panel=TABLE,
        help="Set the unit of a variable, for example N=1e6, D=B, C=log10 or loss=ppl.",
    ),
]
Where = Annotated[
    list[str] | None,
    Option(
        "--where",
        metavar="CONDITION",
        rich_help_panel=TABLE,
        help="Keep only rows that match, for example 'D > 1e9'.",
    ),
]
RunsAre = Annotated[
    str,
    Option(
        metavar="KIND",
        rich_help_panel=TABLE,
        help="checkpoints: rows with the same name are one run. independent: each row is a run. "
        "By default the rows decide.",
    ),
]
LastOfRun = Annotated[
    bool,
    Option("--last-of-run", rich_help_panel=TABLE, help="Keep only the last row of each run."),
]
Objective = Annotated[
    str,
    Option(
        metavar="NAME",
        rich_help_panel=ADVANCED,
        help="Minimise log_huber, huber or mse.",
        callback=one_of("--objective", "log_huber", "huber", "mse"),
    ),
]
Resample = Annotated[
    str,
    Option(
        metavar="KIND",
        rich_help_panel=ADVANCED,
        help="Bootstrap by drawing runs, or by flipping signs of residuals (wild).",
        callback=one_of("--resample", "runs", "wild"),
    ),
]
Delta = Annotated[
    float,
    Option(
        metavar="X",
        rich_help_panel=ADVANCED,
        help="Residual above which the Huber objective becomes linear.",
    ),
]
Level = Annotated[
    float,
    Option(
        min=0.5,
        max=0.9999,
        metavar="P",
        rich_help_panel=ADVANCED,
        help="Coverage of the intervals.",
    ),
]
AsJson = Annotated[bool, Option("--json", help="Print JSON and nothing else.")]


def law_of(name: str) -> Law:
    """Return the law with this name. An error suggests similar names."""
    from ..errors import UnknownLawError
    from ..scaling import get_law
    from ..scaling.laws import ALIASES, LAWS

    try:
        return get_law(name)
    except UnknownLawError:
        law, colon, given = name.partition(":")
        if colon and "=" in given and law in [*LAWS, *ALIASES]:
            raise UnknownLawError(
                f"{name!r} must be the name of a law without {given!r}. Set G with "
                "`--granularity`, and other variables with `--set`, in commands that have them."
            ) from None
        near = get_close_matches(name.lower(), [*LAWS, *ALIASES], n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UnknownLawError(
            f"No law is named {name!r}.{hint} `hf-familial fit --law list` prints all names."
        ) from None


def fit_or_law(name: str) -> tuple[Fit | PublishedFit, Facts | None]:
    """Return a fit and facts about its runs from a file, or the published values of a law."""
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
    """Return the choice of rows and columns that the options describe."""
    from ..scaling import ColumnChoice

    return ColumnChoice(
        size,
        loss,
        pairs(columns, str, "--column", "N=my_column") or {},
        tuple(status.split(",")),
        pairs(units, str, "--unit", "N=1e6") or {},
        tuple(where or ()),
        runs_are,
        last_of_run,
    )


def pairs(
    words: Iterable[str] | None, kind: Callable[[str], T], option: str, example: str
) -> dict[str, T] | None:
    """Parse `name=value` options. Return `None` if there are none."""
    if not words:
        return None
    try:
        split = [word.split("=", 1) for word in words]
        return {name.strip(): kind(value.strip()) for name, value in split}
    except ValueError:
        raise unlike(option, example, " ".join(words)) from None


def span(word: str) -> tuple[float, float]:
    """Parse an interval such as `0:1`."""
    low, high = word.split(":")
    return float(low), float(high)


def numbers(words: str, option: str, example: str) -> list[float]:
    """Parse numbers separated by commas."""
    try:
        return [float(word) for word in words.split(",")]
    except ValueError:
        raise unlike(option, example, words) from None


def unlike(option: str, example: str, got: str) -> ValueError:
    """Return the error for a value that does not look like the example."""
    return ValueError(f"`{option}` must look like {example}, got {got!r}.")

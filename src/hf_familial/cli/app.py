"""The application `hf-familial`, to which the other modules of this folder add their commands."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

import typer

from ..paths import TRACEBACK, words_of
from ._help import Group


# options that accept several numbers, and such numbers
SEVERAL = ("--exit", "--exits", "--members")
NUMBERS = re.compile(r"-?[\d.]+(,-?[\d.]+)*,?")

# panels of `hf-familial --help`
MEMBERS, LAWS, SWEEPS = "Members of a family", "Scaling laws", "Sweeps"

# without markup, `_help` writes the help: boxes would double its length at 80 columns
app = typer.Typer(
    name="hf-familial",
    cls=Group,
    help="Inspect, export and publish the members of a familial model, and plan its training.",
    epilog="`hf-familial COMMAND --help` explains one command.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line. An error ends the process with one line and exit code 1."""
    try:
        app(joined(sys.argv[1:]), prog_name=app.info.name)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        typer.secho(f"error: {words_of(error)}", err=True, fg=typer.colors.RED)
        sys.exit(1)


def register_models() -> None:
    """Register the familial models with Transformers, for commands that load a model or config."""
    from ..models import familial  # noqa: F401


def one_of(option: str, *choices: str) -> Callable[[str | None], str | None]:
    """Return a callback that checks the value of an option against the choices."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in choices:
            near = get_close_matches(value.lower(), choices, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"`{option}` must be one of {', '.join(choices)}, got {value!r}.{hint}"
            )
        return value

    return check


def joined(words: Sequence[str]) -> list[str]:
    """Join numbers that follow an option for several numbers: `--exits 0 1` is `--exits 0,1`."""
    found: list[str] = []
    open_list = False
    for word in words:
        number = NUMBERS.fullmatch(word)
        if open_list and number and found[-1] not in SEVERAL:
            found[-1] = f"{found[-1].rstrip(',')},{word.strip(',')}"
        else:
            found.append(word)
            name, equals, value = word.partition("=")
            begins = name in SEVERAL and (not equals or NUMBERS.fullmatch(value) is not None)
            open_list = begins or (open_list and number is not None)
    return found


@app.callback()
def _commands() -> None:
    """Make Typer treat the application as a group of commands."""

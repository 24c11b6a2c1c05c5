"""The command `hf-familial`: one application, to which the files beside this add their commands."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

import typer

from ..paths import TRACEBACK, words_of


# options that take several numbers, and such numbers
SEVERAL = ("--exit", "--exits", "--members")
NUMBERS = re.compile(r"-?[\d.]+(,-?[\d.]+)*,?")

# plain help is half as long at 80 columns as help in boxes
app = typer.Typer(
    name="hf-familial",
    help="Familial models: one training run, many deployable language models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; what a user can get wrong ends in one line and exit code 1."""
    try:
        app(joined(sys.argv[1:]))
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        typer.secho(f"error: {words_of(error)}", err=True, fg=typer.colors.RED)
        sys.exit(1)


def one_of(option: str, *choices: str) -> Callable[[str | None], str | None]:
    """Make the callback of an option that takes one of several names, and suggests the nearest."""

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
    """Join the numbers after an option that takes several: `--exits 0 1` is `--exits 0,1`."""
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
    """Keep the application a group of commands, however many there are."""

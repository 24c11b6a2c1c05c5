"""The command line that scripts share, and one line for a mistake."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.progress import track
from transformers import HfArgumentParser

from .paths import TRACEBACK, check_model_place, words_of


Item = TypeVar("Item")


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Help that keeps the description's lines and shows the defaults that say something."""

    def _get_help_string(self, action: Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """The host's parser, which also names the choice nearest to a wrong one."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        choices = re.findall(r"[\w./-]+", found[2]) if found else []
        near = get_close_matches(found[1].lower(), choices, 1) if found else []
        message = f"{message}; did you mean {near[0]}?" if near else message
        super().error(message)
        raise SystemExit(2)  # for type checkers: the host's has exited


@contextmanager
def arguments(
    description: str,
    classes: Sequence[type],
    *,
    smoke: Callable[[Path], Mapping[str, Any]],
    positional: Mapping[str, str] | None = None,
    argv: Sequence[str] | None = None,
) -> Iterator[tuple[Any, ...]]:
    """Parse the command line of a script, which always has `--smoke`.

    With `--smoke` a script does in seconds what it always does: `smoke` makes the little that it
    needs and returns other defaults. Options of the user still win over them.

    Args:
        description (`str`): The script's docstring; `--help` shows it as it is.
        classes (`Sequence[type]`): Dataclasses, as for `HfArgumentParser`. A class with an
            `_argument_group_name` is a group of its own in `--help`.
        smoke (`Callable`): Takes a temporary folder, which lasts as long as the context, and
            returns defaults by name.
        positional (`Mapping[str, str]`, *optional*): Arguments without a dash and their help,
            required except with `--smoke`.
        argv (`Sequence[str]`, *optional*): The words; those of this process by default.

    Yields:
        `tuple`: One object per dataclass, then an `argparse.Namespace` with `smoke` and the
        positional arguments.

    Raises:
        SystemExit: With code 2 for words that cannot be parsed, 0 after `--help`.
        ValueError: If a dataclass rejects a value.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    trying = "--smoke" in words
    names = " ".join(name.upper() for name in positional or {})
    usage = " ".join(filter(None, ["%(prog)s", names, "[--option value ...]"]))
    parser: Any = _Parser(classes, description=description, formatter_class=_Help, usage=usage)
    for name, text in (positional or {}).items():
        parser.add_argument(name, nargs="?" if trying else None, metavar=name.upper(), help=text)
    parser.add_argument(
        "--smoke", action="store_true", help="Try it out in seconds, with something tiny."
    )
    with tempfile.TemporaryDirectory() as folder:
        if trying:
            parser.set_defaults(**smoke(Path(folder)))
        *parsed, unknown = parser.parse_args_into_dataclasses(
            _apart(words, parser), return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            known = [name for action in parser._actions for name in action.option_strings]
            near = get_close_matches(unknown[0].partition("=")[0], known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        yield tuple(parsed)
    if trying and int(os.environ.get("RANK", "0")) == 0:
        console().print("That was --smoke: its temporary folder is gone.")


def _apart(words: Sequence[str], parser: Any) -> list[str]:
    """Split numbers at commas after an option that takes several, as `--exits 2,4,8`."""
    several = {
        name
        for action in parser._actions
        if action.nargs == "+" and action.type is int
        for name in action.option_strings
    }
    found: list[str] = []
    inside = False
    for word in words:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            inside = name in several
        if inside and re.fullmatch(r"-?\d+(,-?\d+)*,?", value if equals else word):
            parts = (value if equals else word).strip(",").split(",")
            found += [name, *parts] if equals else parts
        else:
            found.append(word)
    return found


def run(main: Callable[[], None]) -> None:
    """Run a script; what a user can get wrong ends in one line and exit code 1.

    With `HF_FAMILIAL_TRACEBACK=1` in the environment the error itself is raised.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        sys.exit(f"error: {' '.join(words_of(error).split())}")


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Begin the message of an `OSError` with `what`, such as "`--model me/family`"."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{what}: {error}") from error


@contextmanager
def loading(option: str, place: str) -> Iterator[None]:
    """Check a model's folder or repository before it is loaded, and name it if that fails.

    Raises:
        OSError: If there is no such folder or repository.
    """
    check_model_place(option, place)
    if not Path(place).is_dir():
        print(f"there is no folder {place}: it is looked for on the Hub", file=sys.stderr)
    with naming(f"`{option} {place}`"):
        yield


def console() -> Console:
    """Return a console as wide as the terminal or `COLUMNS`, else of 100 columns."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else 100, highlight=False)


def progress(items: Sequence[Item], name: str) -> Iterable[Item]:
    """Iterate over items with a named bar on standard error, if that is a terminal."""
    bar = Console(stderr=True)
    return track(items, name, console=bar, transient=True, disable=not bar.is_terminal)


__all__ = ["arguments", "console", "loading", "naming", "progress", "run"]

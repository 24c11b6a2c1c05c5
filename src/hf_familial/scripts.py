"""The command line that scripts share: options, `--smoke`, `--help` and one-line errors."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.progress import track
from transformers import HfArgumentParser, TrainingArguments

from .paths import TRACEBACK, check_model_place, words_of


Item = TypeVar("Item")
HELP_ALL = "--help-all"
NO_BREAK = "\xa0"
PLACEHOLDERS: dict[Any, str] = {int: "N", float: "X", Path: "PATH"}


class _Help(RawDescriptionHelpFormatter):
    """Help with one name per option, a short placeholder of its value, and its default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings:
            return str(action.metavar)
        name = next(name for name in action.option_strings if name.startswith("--"))
        if action.nargs in (0, "?"):
            return name
        kind: Any = action.type
        value = action.metavar or PLACEHOLDERS.get(kind, "TEXT")
        return f"{name} {value}" + (" ..." if action.nargs == "+" else "")

    def _get_help_string(self, action: Action) -> str:
        text, default = action.help or "", action.default
        if isinstance(default, bool) or default in (None, "", SUPPRESS) or action.nargs == 0:
            return text
        default = default.value if isinstance(default, Enum) else default
        words = f"[default: {default:g}]" if isinstance(default, float) else f"[default: {default}]"
        if len(words) < 30:
            words = words.replace(" ", NO_BREAK)  # a short default stays on one line
        return f"{text} {words.replace('%', '%%')}"

    def format_help(self) -> str:
        return super().format_help().replace(NO_BREAK, " ")


class _Parser(HfArgumentParser):
    """The parser of Transformers, which also suggests a choice that is similar to a wrong one."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        choices = re.findall(r"[\w./-]+", found[2]) if found else []
        near = get_close_matches(found[1].lower(), choices, 1) if found else []
        message = f"{message}; did you mean {near[0]}?" if near else message
        super().error(message)
        raise SystemExit(2)  # for type checkers, which do not see that `error` exits


@contextmanager
def arguments(
    description: str,
    classes: Sequence[type],
    *,
    smoke: Callable[[Path], Mapping[str, Any]],
    positional: Mapping[str, str] | None = None,
    argv: Sequence[str] | None = None,
) -> Iterator[tuple[Any, ...]]:
    """Parse the command line of a script.

    `--smoke` tries the script in seconds. `smoke` creates tiny inputs in a temporary folder and
    returns defaults that use them. Options on the command line override these defaults.

    `--help` shows the most used options and should fit one screen. A class lists them in its
    `_help_arguments`, a dictionary from names to short help texts, where an empty text keeps the
    help of the field. For a class without this attribute they are all of its fields, except fields
    of `TrainingArguments`. `--help-all` shows every option and the whole description.

    Args:
        description (`str`): Docstring of the script. `--help` shows it up to the end of its first
            indented lines, which should be commands.
        classes (`Sequence[type]`): Dataclasses for `HfArgumentParser`. The attribute
            `_argument_group_name` of a class is the heading of its options in the help.
        smoke (`Callable`): Function that receives the temporary folder and returns defaults by
            name. The folder is deleted at the end of the context.
        positional (`Mapping[str, str]`, *optional*): Names of arguments without a dash, and their
            help. They are required, except with `--smoke`.
        argv (`Sequence[str]`, *optional*): Words of the command line. Default: `sys.argv[1:]`.

    Yields:
        `tuple`: One object per dataclass, then an `argparse.Namespace` with `smoke` and the
        positional arguments.

    Raises:
        SystemExit: With code 2 if the words cannot be parsed, and with code 0 after the help.
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
        "--smoke", action="store_true", help="Try the script with tiny inputs, in seconds."
    )
    groups = parser._action_groups
    groups.append(groups.pop(groups.index(parser._optionals)))  # the options of the family first
    _fill_help(parser, classes)
    if HELP_ALL in words:
        words = ["--help"]
    else:
        _shorten_help(parser, classes)
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
        console().print("This was a trial with --smoke. Its temporary folder is deleted.")


def _fill_help(parser: Any, classes: Sequence[type]) -> None:
    """Add the help of a base class to options whose field was declared again without help."""
    for action in parser._actions:
        bases = [base for cls in classes for base in cls.__mro__]
        found = [vars(base).get("__dataclass_fields__", {}).get(action.dest) for base in bases]
        texts = [field.metadata["help"] for field in found if field and "help" in field.metadata]
        action.help = action.help or (texts[0] if texts else None)


def _shorten_help(parser: Any, classes: Sequence[type]) -> None:
    """Hide the rarely used options from the help, and shorten its description."""
    host = {field.name for field in fields(TrainingArguments)}
    shown = {"smoke": ""}
    for cls in classes:
        names = {field.name for field in fields(cls)}
        own = names - host if issubclass(cls, TrainingArguments) else names
        shown |= getattr(cls, "_help_arguments", dict.fromkeys(own, ""))
    hidden = set()
    for action in parser._actions:
        if action.option_strings:
            if action.dest not in shown or action.option_strings[0].startswith("--no_"):
                hidden.add(action.dest)
                action.help = SUPPRESS
            else:
                action.help = shown[action.dest] or action.help
    count = len(hidden - {"help"} - set(shown))
    first = re.match(r"(?s:.*?)\n\n(?: +\S.*\n)+", parser.description)
    if count or first:
        more = f"{count} more options and " if count else ""
        parser.epilog = f"{HELP_ALL} shows {more}the whole description."
    parser.description = first[0].rstrip() if first else parser.description


def _apart(words: Sequence[str], parser: Any) -> list[str]:
    """Split numbers at commas after an option that accepts several, such as `--exits 2,4,8`."""
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
    """Run a script. An error ends the process with one line and exit code 1.

    With `HF_FAMILIAL_TRACEBACK=1` in the environment, the error is raised with its traceback.
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
    """Put `what`, for example "`--model me/family`", before the message of an `OSError`."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{what}: {error}") from error


@contextmanager
def loading(option: str, place: str) -> Iterator[None]:
    """Check that a model can exist, and add its name to each `OSError` of the `with` block.

    Raises:
        OSError: If there is no such folder or repository.
    """
    check_model_place(option, place)
    if not Path(place).is_dir():
        print(f"Folder {place} does not exist. Searching on the Hub.", file=sys.stderr)
    with naming(f"`{option} {place}`"):
        yield


def console() -> Console:
    """Return a console as wide as the terminal or `COLUMNS`, else 100 columns."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else 100, highlight=False)


def progress(items: Sequence[Item], name: str) -> Iterable[Item]:
    """Iterate over items with a progress bar on standard error, if it is a terminal."""
    bar = Console(stderr=True)
    return track(items, name, console=bar, transient=True, disable=not bar.is_terminal)


__all__ = ["arguments", "console", "loading", "naming", "progress", "run"]

"""Help of the commands: it fits one screen of 80 columns and 40 lines."""

from __future__ import annotations

import sys
from typing import Any

from typer.core import TyperCommand, TyperGroup

from .._wording import plural


LINES = 40
ADVANCED = "Advanced options"
HELP_ALL = "--help-all"
COLUMN = 26  # longer names of options get a line of their own
NO_BREAK = "\xa0"
METAVARS = {"int": "N", "float": "X", "Path": "FILE"}
Panels = dict[str, list[tuple[str, str]]]


class Command(TyperCommand):
    """A command whose options are grouped in panels.

    `--help` leaves out the advanced options if the help would be longer than one screen.
    `--help-all` shows every option.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of a command line. Replace `--help-all` by a `--help` without limit."""
        if HELP_ALL in args:
            ctx.meta[HELP_ALL] = True
            args = ["--help" if word == HELP_ALL else word for word in args]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the words after the name of the command in its usage line."""
        return [
            piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)
        ]

    def get_help(self, ctx: Any) -> str:
        """Return the help, without the advanced options if it would not fit one screen."""
        text = super().get_help(ctx).replace(NO_BREAK, " ")
        hidden = [p for p in self.params if getattr(p, "rich_help_panel", None) == ADVANCED]
        if HELP_ALL in ctx.meta or len(text.splitlines()) <= LINES or not hidden:
            return text
        every = self.params
        self.params = [p for p in every if p not in hidden]
        try:
            text = super().get_help(ctx).replace(NO_BREAK, " ")
        finally:
            self.params = every
        more = f"`{ctx.command_path} {HELP_ALL}` also shows {plural(len(hidden), 'more option')}."
        return f"{text}\n\n{more}"

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, each panel under its own heading."""
        panels: Panels = {}
        parameter: Any
        for parameter in self.get_params(ctx):
            if parameter.name != "help":  # readers of the help know this option
                argument = parameter.param_type_name == "argument"
                title = parameter.rich_help_panel or ("Arguments" if argument else "Options")
                row = (spelled(parameter), described(parameter, ctx))
                panels.setdefault(title, []).append(row)
        write_panels(formatter, panels)


class Group(TyperGroup):
    """A group of commands, whose help shows the commands in panels."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, then the options of the group."""
        panels: Panels = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            row = (name, command.get_short_help_str(100))
            panels.setdefault(command.rich_help_panel or "Commands", []).append(row)
        write_panels(formatter, panels)
        options = [p for p in self.get_params(ctx) if p.name != "help"]
        if options:
            write_panels(formatter, {"Options": [(spelled(p), described(p, ctx)) for p in options]})


def write_panels(formatter: Any, panels: Panels) -> None:
    """Write lists of names and their meanings, all aligned in the same columns."""
    longest = max((len(name) for rows in panels.values() for name, _ in rows), default=0)
    width = min(longest, COLUMN)
    for title, rows in panels.items():
        heading = f"\x1b[1m{title}\x1b[22m" if sys.stdout.isatty() else title
        with formatter.section(heading):
            formatter.write_dl([(name.ljust(width), text) for name, text in rows], col_max=width)


def spelled(parameter: Any) -> str:
    """Return the name of a parameter, for an option with a placeholder of its value."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    name = parameter.opts[0]
    if parameter.is_flag:
        return name.replace("--", "--[no-]", 1) if parameter.secondary_opts else str(name)
    kind = getattr(parameter.type_descriptor.annotation, "__name__", "")
    return f"{name} {parameter.metavar or METAVARS.get(kind, 'TEXT')}"


def described(parameter: Any, ctx: Any) -> str:
    """Return the help of a parameter with its default."""
    text, value = parameter.help or "", parameter.get_default(ctx, call=False)
    if parameter.param_type_name == "argument":
        return str(text)
    if parameter.required:
        words = "required"
    elif parameter.is_flag and parameter.secondary_opts:
        words = f"default: {'on' if value else 'off'}"
    elif parameter.is_flag or value in (None, "", ()) or not parameter.show_default:
        return str(text)
    else:
        words = f"default: {value:g}" if isinstance(value, float) else f"default: {value}"
    if len(words) < COLUMN:
        words = words.replace(" ", NO_BREAK)  # a short default stays on one line
    return f"{text} [{words}]"

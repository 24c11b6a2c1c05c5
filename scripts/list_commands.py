"""Write docs/cli.md from the command line itself.

python scripts/list_commands.py            # writes the page
python scripts/list_commands.py --check    # fails if the page would change
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pages import keep, table, wants_check

from hf_familial.cli import app


PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
PROGRAM = "hf-familial"
HEADER = f"""# Command line

Every command of `{PROGRAM}`, made by `python scripts/list_commands.py` from the commands
themselves. `{PROGRAM} COMMAND --help` says the same in a terminal. What a user can get wrong ends
in one line and exit code 1, a wrong option in exit code 2.
`HF_FAMILIAL_TRACEBACK=1` in the environment shows where an error was raised.
"""


def page() -> str:
    """The whole page."""
    found = list(commands(typer.main.get_command(app), (PROGRAM,)))
    rows = [[f"[`{' '.join(path)}`](#{anchor(path)})", summary(c)] for path, c in found]
    parts = [HEADER, table(["command", "what it does"], rows), ""]
    return "\n".join(parts) + "\n" + "\n\n".join(section(p, c) for p, c in found) + "\n"


def commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, with the words that call it; groups are walked into."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, child in command.commands.items():
        if not child.hidden:
            yield from commands(child, (*path, name))


def section(path: tuple[str, ...], command: Any) -> str:
    """One command: its usage, its help, its arguments and options."""
    context = command.make_context(" ".join(path), [], resilient_parsing=True)
    usage = " ".join([*path, *command.collect_usage_pieces(context)])
    usage = usage.replace("{", "").replace("}", "")
    parameters = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    options = [p for p in parameters if p.param_type_name == "option"]
    parts = [f"## {' '.join(path)} {{ #{anchor(path)} }}", paragraphs(command.help)]
    parts.append(f"```text\n{usage}\n```")
    if arguments:
        rows = [[f"`{name_of(a, context)}`", described(a)] for a in arguments]
        parts.append(table(["argument", "meaning"], rows))
    if options:
        rows = [[spelled(o, context), described(o), default(o, context)] for o in options]
        parts.append(table(["option", "meaning", "default"], rows))
    return "\n\n".join(filter(None, parts))


def anchor(path: tuple[str, ...]) -> str:
    """Where on the page a command stands."""
    return "-".join(path[1:])


def summary(command: Any) -> str:
    """The first sentence of a command's help."""
    return cell(command.get_short_help_str(limit=200))


def paragraphs(text: str | None) -> str:
    """A help text: every paragraph on one line."""
    blocks = (text or "").replace("\b", "").split("\n\n")
    return "\n\n".join(" ".join(block.split()) for block in blocks)


def name_of(parameter: Any, context: Any) -> str:
    """What stands for the value of a parameter."""
    if parameter.metavar:
        return parameter.metavar
    shown = parameter.param_type_name == "option" and parameter.display_type(ctx=context)
    return (shown or parameter.name).replace(" range>", ">")


def spelled(option: Any, context: Any) -> str:
    """How an option is written, with what stands for its value."""
    names = " / ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    if option.is_flag:
        return names
    return f"{names} `{name_of(option, context)}`"


def described(parameter: Any) -> str:
    """What a parameter means, and whether it must be given."""
    text = cell(getattr(parameter, "help", None) or "")
    text += " Required." if parameter.required and parameter.param_type_name == "option" else ""
    text += " Repeatable." if parameter.multiple and "repeat" not in text else ""
    return text.strip()


def default(option: Any, context: Any) -> str:
    """What holds if an option is not given."""
    value = option.get_default(context, call=False)
    if value is None or value == () or value == [] or callable(value):
        return ""
    if option.is_flag:
        # the side that holds, of `--on / --off`; a lone flag is off
        names = option.opts if value else option.secondary_opts
        return f"`{names[0]}`" if names else ""
    value = getattr(value, "value", value)
    return f"`{value}`" if value != "" else ""


def cell(text: str) -> str:
    """Text in a table: one line, with nothing that Markdown takes for a tag."""
    parts = " ".join(text.split()).split("`")
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]  # code keeps its own
    return "`".join(parts)


def main() -> int:
    """Write the page, or compare with it."""
    check, text = wants_check(__doc__), page()
    return keep(PAGE, text, "list_commands.py", f"{text.count('## ')} commands", check)


if __name__ == "__main__":
    sys.exit(main())

"""Write docs/cli.md from the commands of `hf-familial`, with sample output of some commands.

python scripts/list_commands.py            # writes the page
python scripts/list_commands.py --check    # fails if the page would change, samples excepted
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import typer
from pages import keep, table, wants_check

from hf_familial.cli import app
from hf_familial.cli._help import spelled
from hf_familial.cli.app import main as run_command
from hf_familial.toy import toy_family


ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "cli.md"
PROGRAM = "hf-familial"
# commands whose output the page shows; `samples` makes the files that they read
SAMPLES = {
    "describe": "describe family --context 64 --memory 200kB",
    "export": "export family members --exit 0,1",
    "fit": "fit runs.jsonl --out fit.json --no-profiles",
    "plan": "plan fit.json --flops 1e21 --granularity 4",
}
HEADER = f"""# Command line

```bash
{PROGRAM} --help              # the list of commands
{PROGRAM} fit --help          # the most used options of a command
{PROGRAM} fit --help-all      # every option
python -m {PROGRAM.replace("-", "_")} --help    # the same commands, also for `accelerate launch -m`
```

`{PROGRAM} --help` and commands without a model start in less than a second. All other commands, and
`python -m hf_familial`, first import torch, which takes some seconds.

Exit code 0 means success, 1 an error, which is one line on standard error, and 2 a wrong option.
With `HF_FAMILIAL_TRACEBACK=1` in the environment an error ends with a traceback.
"""
FOOTER = "*This page is written by `python scripts/list_commands.py` from the commands.*"


def page(outputs: dict[str, str]) -> str:
    """Return the page with these outputs of the commands in `SAMPLES`."""
    found = list(commands(typer.main.get_command(app), (PROGRAM,)))
    rows = [[f"[`{' '.join(path)}`](#{anchor(path)})", summary(c)] for path, c in found]
    parts = [HEADER, table(["command", "what it does"], rows), ""]
    sections = "\n\n".join(section(path, command, outputs) for path, command in found)
    return "\n".join(parts) + f"\n{sections}\n\n{FOOTER}\n"


def samples() -> dict[str, str]:
    """Run the sample commands in a temporary folder and return what they print."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        toy_family()[0].save_pretrained("family")
        make_runs = runpy.run_path(str(ROOT / "examples" / "fit_scaling_law.py"))["make_runs"]
        make_runs(Path("runs.jsonl"))
        for name, line in SAMPLES.items():
            shown = io.StringIO()
            with (
                mock.patch.object(sys, "argv", [PROGRAM, *line.split()]),
                mock.patch.dict(os.environ, {"COLUMNS": "80"}),
                contextlib.redirect_stdout(shown),
                contextlib.suppress(SystemExit),
            ):
                run_command()
            rows = shown.getvalue().strip().splitlines()
            found[name] = "\n".join(row.rstrip() for row in rows)
    return found


def kept_samples() -> dict[str, str]:
    """Return the outputs of the sample commands that the page shows now."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    blocks = dict(re.findall(rf"```bash\n{PROGRAM} (.*)\n```\n\n```text\n((?s:.*?))\n```", text))
    return {name: blocks.get(line, "") for name, line in SAMPLES.items()}


def commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the words and the object of every command, inside groups too."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, child in command.commands.items():
        if not child.hidden:
            yield from commands(child, (*path, name))


def section(path: tuple[str, ...], command: Any, outputs: dict[str, str]) -> str:
    """Return the part of the page about one command."""
    context = command.make_context(" ".join(path), [], resilient_parsing=True)
    usage = " ".join([*path, *command.collect_usage_pieces(context)])
    parameters = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    parts = [f"## {' '.join(path)} {{ #{anchor(path)} }}", paragraphs(command.help)]
    parts.append(f"```text\n{usage}\n```")
    name = " ".join(path[1:])
    if name in SAMPLES:
        line, output = f"{PROGRAM} {SAMPLES[name]}", outputs.get(name, "")
        parts += ["Example, with its output:", f"```bash\n{line}\n```", f"```text\n{output}\n```"]
    if arguments:
        rows = [[f"`{spelled(a)}`", cell(a.help)] for a in arguments]
        parts.append(table(["argument", "meaning"], rows))
    panels: dict[str, list[list[str]]] = {}
    for option in parameters:
        if option.param_type_name == "option":
            row = [names(option), meaning(option), default(option, context)]
            panels.setdefault(option.rich_help_panel or "option", []).append(row)
    parts += [table([title, "meaning", "default"], rows) for title, rows in panels.items()]
    return "\n\n".join(filter(None, parts))


def anchor(path: tuple[str, ...]) -> str:
    """Return the anchor of a command on the page."""
    return "-".join(path[1:])


def summary(command: Any) -> str:
    """Return the first sentence of a command's help."""
    return cell(command.get_short_help_str(limit=200))


def paragraphs(text: str | None) -> str:
    """Return a help text with every paragraph on one line."""
    blocks = (text or "").replace("\b", "").split("\n\n")
    return "\n\n".join(" ".join(block.split()) for block in blocks)


def names(option: Any) -> str:
    """Return all names of an option, with a placeholder of its value."""
    every = " / ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    value = "" if option.is_flag else spelled(option).partition(" ")[2]
    return f"{every} `{value}`" if value else every


def meaning(option: Any) -> str:
    """Return the help of an option, and a word if it is required or can be repeated."""
    text = cell(option.help or "")
    text += " Required." if option.required else ""
    return text + (" You can repeat this option." if option.multiple else "")


def default(option: Any, context: Any) -> str:
    """Return the default of an option."""
    value = option.get_default(context, call=False)
    if value is None or value == () or value == [] or callable(value):
        return ""
    if option.is_flag:
        # of the pair `--on` and `--off` the one that is the default
        names = option.opts if value else option.secondary_opts
        return f"`{names[0]}`" if names else ""
    value = f"{value:g}" if isinstance(value, float) else value
    return f"`{value}`" if value != "" else ""


def cell(text: str) -> str:
    """Return text for a cell of a table: one line without tags."""
    parts = " ".join(text.split()).split("`")
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]  # code is not changed
    return "`".join(parts)


def main() -> int:
    """Write the page, or compare it with the file."""
    check = wants_check(__doc__)
    text = page(kept_samples() if check else samples())
    return keep(PAGE, text, "list_commands.py", f"{text.count(chr(10) + '## ')} commands", check)


if __name__ == "__main__":
    sys.exit(main())

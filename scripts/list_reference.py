"""Write docs/reference from what each room of the package lists as public in its `__all__`.

python scripts/list_reference.py            # writes the pages
python scripts/list_reference.py --check    # fails if a page would change

A page has one section for each module that defines public names, under the module's own summary.
A name that `hf_familial` itself shows is shown by that short path.
"""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from imports import walk
from pages import keep, table, wants_check

import hf_familial


FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
# page -> its title, the rooms it shows, the guide to read first
PAGES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "models": ("Models and relay", ("models.familial", "models"), "concepts/families.md"),
    "training": ("Training", ("training", "training.data"), "training.md"),
    "evaluation": ("Evaluation", ("evaluation",), "relay.md"),
    "handoff": ("Hand-off", ("handoff",), "handoff.md"),
    "hub": ("Hub and checkpoints", ("hub", "checkpoints"), "hub.md"),
    "flops": ("FLOPs", ("flops",), "flops.md"),
    "isoflop": ("IsoFLOP sweeps", ("isoflop",), "sweeps.md"),
    "scaling": ("Scaling laws", ("scaling", "scaling.report"), "scaling.md"),
    "runs": ("Runs", ("runs",), "sweeps.md"),
    "errors": ("Errors", ("errors",), "training.md"),
}


def shown_in(room: str) -> dict[str, list[str]]:
    """Return the public names of a room by the module that defines them, without errors."""
    module = import_module(f"hf_familial.{room}")
    homes = homes_of(room)
    found: dict[str, list[str]] = {}
    for name in public_names(module):
        home = homes.get(name, room)
        if home != "errors" or room == "errors":
            found.setdefault(home, []).append(name)
    return found


def public_names(module: ModuleType) -> list[str]:
    """Return what a module lists as public, or else the classes that it defines."""
    own = [name for name, found in vars(module).items() if isinstance(found, type)]
    defined = [name for name in own if getattr(module, name).__module__ == module.__name__]
    return list(getattr(module, "__all__", defined))


def homes_of(room: str) -> dict[str, str]:
    """Return the module, relative to the package, from which a room takes each of its names."""
    source = Path(import_module(f"hf_familial.{room}").__file__ or "")
    parents = room.split(".") if source.name == "__init__.py" else room.split(".")[:-1]
    homes: dict[str, str] = {}
    for node, _ in walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = parents[: len(parents) - node.level + 1]
            home = ".".join([*above, *filter(None, [node.module])])
            homes |= {alias.name: home for alias in node.names}
    return homes


def short_path(room: str, name: str) -> str:
    """Return the shortest path under which a user imports a name."""
    found = getattr(import_module(f"hf_familial.{room}"), name)
    top = name in hf_familial.__all__ and getattr(hf_familial, name) is found
    return f"hf_familial.{name}" if top else f"hf_familial.{room}.{name}"


def summary(module: ModuleType) -> str:
    """Return the first paragraph of a module's docstring as one line."""
    return " ".join((module.__doc__ or "").strip().split("\n\n")[0].split())


def page(title: str, rooms: tuple[str, ...], guide: str) -> str:
    """Return one page of the reference."""
    about = summary(import_module(f"hf_familial.{rooms[0]}"))
    parts = [f"# {title}", f"{about} The guide is [on its own page](../{guide})."]
    shown: set[str] = set()
    for room in rooms:
        for home, names in shown_in(room).items():
            entries = [entry(room, name) for name in sorted(names)]
            entries = [each for each in entries if each.split(".")[-1] not in shown]
            if entries and home != room:
                heading = home.rsplit(".", 1)[-1].strip("_").replace("_", " ")
                about = summary(import_module(f"hf_familial.{home}"))
                parts += [f"## {heading.capitalize()}", about]
            shown.update(each.split(".")[-1] for each in entries)
            parts += entries
    return "\n\n".join(parts) + "\n"


def entry(room: str, name: str) -> str:
    """Return the line that shows a name; a constant has no docstring of its own."""
    found = getattr(import_module(f"hf_familial.{room}"), name)
    options = "" if callable(found) else "\n    options:\n      show_if_no_docstring: true"
    return f"::: {short_path(room, name)}{options}"


def index() -> str:
    """Return the page that lists the others."""
    rows = [
        [f"[{title}]({name}.md)", summary(import_module(f"hf_familial.{rooms[0]}"))]
        for name, (title, rooms, _) in PAGES.items()
    ]
    return (
        "# Reference\n\nThese pages list the public classes and functions of each part of the "
        "package, generated from the\ndocstrings. Names at the top level need one import:\n\n"
        "```python\nimport hf_familial as hff\n```"
        f"\n\n{table(['page', 'content'], rows)}\n\nOther reference pages: the "
        "[command line](../cli.md), [backbones](../backbones.md), [scaling laws](../laws.md)\n"
        "and [FLOPs](../flops.md).\n"
    )


def main() -> int:
    check, script = wants_check(__doc__ or ""), Path(__file__).name
    pages = {name: page(*arguments) for name, arguments in PAGES.items()} | {"index": index()}
    return max(
        keep(FOLDER / f"{name}.md", text, script, f"{name}.md", check)
        for name, text in pages.items()
    )


if __name__ == "__main__":
    sys.exit(main())

"""Which modules of the package a test file concerns, so that `pytest -k MODULE` finds its tests.

A file concerns the modules that it imports, those that define the names it takes from a room, and
what these import within their own room.
"""

import ast
from functools import cache
from pathlib import Path

from imports import imports_of, modules_of, walk


SRC = Path(__file__).resolve().parents[1] / "src" / "hf_familial"
PACKAGE = SRC.name
# what tests reach by a path, a command or the seam, and so do not import
ALSO = {
    "test_checkpoints": {"compiled_loss", "warm_start"},
    "test_cli_members": {"options"},
    "test_cli_scaling": {"options"},
    "test_distributed": {"sharded_heads"},
    "test_examples": {"scripts"},
    "test_examples_set": {"scripts"},
    "test_foreign_configs": {"warm_start"},
    "test_launched": {"zero3"},
    "test_laws": {"familial", "sparse"},
    "test_modules": {"exit_agreement", "exit_quality", "expected_calibration_error"},
    "test_plain": {"family_files"},
    "test_saves": {"family_files"},
}


@cache
def sources() -> dict[str, ast.Module]:
    """Return the syntax tree of every module, by its name below the package."""
    return {
        name: ast.parse(path.read_text(encoding="utf-8")) for name, path in modules_of(SRC).items()
    }


@cache
def within_rooms() -> dict[str, set[str]]:
    """Return for each module those of its own room that it imports."""
    edges: dict[str, set[str]] = {name: set() for name in sources()}
    for each in imports_of(SRC):
        target = each.target.removeprefix(f"{PACKAGE}.")
        shown = each.module + "." == target[: len(each.module) + 1]  # a room that shows its names
        if target in edges and target.split(".")[0] == each.module.split(".")[0] and not shown:
            edges[each.module].add(target)
    return edges


@cache
def homes(room: str) -> dict[str, str]:
    """Return the module from which a package's `__init__` takes each of its names."""
    found: dict[str, str] = {}
    for node, _ in walk(sources()[room]):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            home = ".".join(filter(None, [room, node.module]))
            found |= {alias.name: home for alias in node.names}
    return found


def defined(room: str, name: str) -> str:
    """Return the module that defines a name of a room, through the rooms that show it."""
    inner = f"{room}.{name}".strip(".")
    if inner in sources():
        return inner
    home = homes(room).get(name) if room in sources() else None
    return room if home is None or home == room else defined(home, name)


def modules_named(path: Path) -> set[str]:
    """Return the modules that a test file names."""
    tree, found, aliases = ast.parse(path.read_text(encoding="utf-8")), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            room = (node.module or "").removeprefix(PACKAGE).strip(".")
            found |= {defined(room, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            aliases |= {a.asname or a.name for a in node.names if a.name == PACKAGE}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in aliases:
                found.add(defined("", node.attr))
    return found


@cache
def keywords(path: Path) -> frozenset[str]:
    """Return the names of the modules that a test file concerns, without their rooms."""
    found, edges = set(), within_rooms()
    waiting = list(modules_named(path))
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += edges.get(module, ())
    names = {module.split(".")[-1].strip("_") for module in found if module}
    return frozenset(names | ALSO.get(path.stem, set()))

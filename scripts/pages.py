"""What scripts share that make a page of the documentation: tables, and whether it is fresh."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path


def wants_check(doc: str) -> bool:
    """Parse the command line of a script, which knows `--check` alone."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    return bool(parser.parse_args().check)


def line(cells: Iterable[str]) -> str:
    """A row of a Markdown table; bars inside its cells are no borders."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(line(cells) for cells in [head, ["---"] * len(head), *rows])


def keep(path: Path, text: str, script: str, done: str, check: bool) -> int:
    """Write a page, or compare with it; the exit status.

    Args:
        path (`Path`): The page.
        text (`str`): What it should be.
        script (`str`): Name of the script that makes it.
        done (`str`): Said once it is written.
        check (`bool`): Compare only.
    """
    if check:
        fresh = path.exists() and path.read_text(encoding="utf-8") == text
        print("fresh" if fresh else f"{path.name} is stale: run python scripts/{script}")
        return int(not fresh)
    path.write_text(text, encoding="utf-8")
    print(done)
    return 0

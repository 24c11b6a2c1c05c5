"""Functions for scripts that write a page of the documentation."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path


def wants_check(doc: str) -> bool:
    """Parse the command line of a script, whose only option is `--check`."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="Fail if the file differs.")
    return bool(parser.parse_args().check)


def line(cells: Iterable[str]) -> str:
    """Return a row of a Markdown table. Bars inside cells are escaped."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(line(cells) for cells in [head, ["---"] * len(head), *rows])


def keep(path: Path, text: str, script: str, done: str, check: bool) -> int:
    """Write a page, or compare it with the file. Return the exit code.

    Args:
        path (`Path`): File of the page.
        text (`str`): Text of the page.
        script (`str`): Name of the script that writes the page.
        done (`str`): Message after writing.
        check (`bool`): Compare and write nothing.
    """
    if check:
        fresh = path.exists() and path.read_text(encoding="utf-8") == text
        print("fresh" if fresh else f"{path.name} is stale. Run `python scripts/{script}`.")
        return int(not fresh)
    path.write_text(text, encoding="utf-8")
    print(done)
    return 0

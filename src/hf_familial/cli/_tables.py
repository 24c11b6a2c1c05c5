"""Tables and notes on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .._wording import plural


if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Return a console as wide as the terminal or `COLUMNS`, else 200 columns."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else 200, highlight=False)


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Print a table. All columns but the first `left` ones are aligned right."""
    from rich.table import Table
    from rich.text import Text

    out = console()
    if title:
        out.print(Text(f"\n{title}", "italic"))
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(head):
        # long text continues on the next line
        shown.add_column(
            name, justify="left" if i < left else "right", no_wrap=not i, overflow="fold"
        )
    for row in rows:
        shown.add_row(*map(Text, row))
    out.print(shown)


def bold(words: str) -> None:
    """Print a sentence in bold."""
    typer.secho(words, bold=True)


def notes(title: str, sentences: Iterable[str], colour: str | None = None) -> None:
    """Print a title and a list of sentences, if there are sentences."""
    from rich.text import Text

    found, out = list(sentences), console()
    if found:
        out.print(Text(f"\n{title}", "bold"))
    for sentence in found:
        out.print(Text(f"- {sentence}", colour or ""))


def saved(paths: Iterable[Path]) -> None:
    """Print the names of saved files. More than three files of a folder are only counted."""
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    for folder, files in folders.items():
        many = len(files) > 3
        for words in [f"{plural(len(files), 'file')} in {folder}"] if many else files:
            typer.echo(f"Saved {words}")

"""Pieces of HTML: tables that scroll by themselves, sections, words."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from .formula import symbol_html


class Words(str):
    """A cell of prose."""


class Symbol(str):
    """A cell of LaTeX."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    """A table that scrolls by itself where the page is narrow.

    Args:
        head (`Sequence[str]`): Names of the columns; none is shown if all are empty.
        rows (`Iterable[Sequence[str]]`): Cells; the first of each names its row. Cells are numbers
            unless they are [`Words`] or a [`Symbol`].
        note (`str`): What the table shows.

    Returns:
        `str`: Everything in it escaped.

    Raises:
        ValueError: If a row has another number of cells than the head: what follows a cell that is
            missing would stand under a wrong name.
    """
    rows = list(rows)
    wrong = [row[0] for row in rows if len(row) != len(head)]
    if wrong:
        raise ValueError(f"rows {wrong} must have {len(head)} cells.")
    columns = [f"<th{_kind(i, name)}>{html.escape(name)}</th>" for i, name in enumerate(head)]
    lines = []
    for row in rows:
        first, *others = (f"{_kind(i, cell)}>{_cell(cell)}" for i, cell in enumerate(row))
        cells = "".join(f"<td{other}</td>" for other in others)
        lines.append(f'<tr><th scope="row"{first}</th>{cells}</tr>')
    header = f"<thead><tr>{''.join(columns)}</tr></thead>" if any(head) else ""
    words = f'<p class="note">{prose(note)}</p>' if note else ""
    # two columns of words fit a phone; more scroll
    kind = "prose" if len(head) == 2 and isinstance(head[1], Words) else "scroll"
    focus = ' tabindex="0"' if kind == "scroll" else ""
    body = f"<table>{header}<tbody>{''.join(lines)}</tbody></table>"
    return f'{words}<div class="{kind}"{focus}>{body}</div>'


def _cell(cell: str) -> str:
    if isinstance(cell, Symbol):
        return f'<span class="symbol">{symbol_html(cell)}</span>'
    return prose(cell)


def _kind(place: int, cell: str) -> str:
    if isinstance(cell, Words):
        return ' class="words"'
    return ' class="n"' if place else ""


def section(title: str, *parts: str) -> str:
    """A part of the page with its title."""
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def prose(words: str) -> str:
    """Text, escaped, with `names` as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(str(words), quote=False))


def many(number: int, word: str) -> str:
    """As `1 run` or `84 runs`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def single_definitions(page: str) -> str:
    """A page whose pictures define every letter and marker once, for all of them.

    Matplotlib names a shape by what it is, so pictures on one page define the same ones.

    Args:
        page (`str`): HTML with pictures of `canvas.inline_svg`.

    Returns:
        `str`: The same without the repeated definitions.
    """
    seen: set[str] = set()

    def once(match: re.Match[str]) -> str:
        first = match[1] not in seen
        seen.add(match[1])
        return match[0] if first else ""

    page = re.sub(r'<path id="([^"]+)"[^>]*/>\n?', once, page)
    page = re.sub(r'<clipPath id="([^"]+)">.*?</clipPath>\n?', once, page, flags=re.S)
    return re.sub(r"<defs>\s*</defs>\n?", "", page)


__all__ = ["Symbol", "Words", "many", "prose", "section", "single_definitions", "table"]

"""A study as one page of HTML that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from importlib.resources import files
from itertools import count as numbers
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from . import sections
from .canvas import colour_sheet, inline_svg, to_png, to_svg
from .gallery import SECTIONS, Picture, pictures
from .markup import prose, section, single_definitions, table
from .study import Study, write_whole
from .wording import MISSING, significant


def report_html(study: Study) -> str:
    """The page of a study.

    Args:
        study ([`Study`]): The fit and what goes with it.

    Returns:
        `str`: HTML; the same for the same study.
    """
    shown = pictures(study)
    body = "\n".join(
        part
        for part in (
            sections.head(study),
            sections.warnings(study),
            sections.coefficients(study),
            sections.optima(study),
            sections.granularity(study),
            _figures(shown),
            _tables(study),
            sections.law_notes(study),
            sections.settings(study),
            sections.runs(study),
            sections.foot(study),
        )
        if part
    )
    body = single_definitions(body)
    light, dark = colour_sheet(body)
    page = files(__package__) / "assets"
    style = Template((page / "report.css").read_text("utf-8")).substitute(light=light, dark=dark)
    template = Template((page / "report.html").read_text("utf-8"))
    title = f"{html.escape(study.fit.law.title)}: fit to {study.fit.data.runs} runs"
    return template.substitute(title=title, style=style.strip(), body=body)


@np.errstate(all="ignore")  # a law may have no value at a point; such points are judged by name
def write_report(path: str | os.PathLike[str], study: Study) -> None:
    """Write the page, whole or not at all.

    Args:
        path (`str` or `os.PathLike`): Of the page.
        study ([`Study`]): What it is about.

    Raises:
        OSError: If it cannot be written; what was there stays.
    """
    write_whole(path, report_html(study))


@np.errstate(all="ignore")  # a law may have no value at a point; such points are judged by name
def write_figures(folder: str | os.PathLike[str], study: Study) -> list[Path]:
    """Write every picture of the page as PNG and as SVG.

    Args:
        folder (`str` or `os.PathLike`): Made if missing.
        study ([`Study`]): What they show.

    Returns:
        `list[Path]`: The files.

    Raises:
        OSError: If one cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for picture in pictures(study):
        for kind, content in (("png", to_png(picture.figure)), ("svg", to_svg(picture.figure))):
            path = folder / f"{picture.name}.{kind}"
            write_whole(path, content)
            written.append(path)
    return written


def _figures(shown: Sequence[Picture]) -> str:
    parts, number = [], numbers(1)
    for key, title in SECTIONS.items():
        here = [picture for picture in shown if picture.section == key]
        if here:
            boxes = "".join(_figure(picture, next(number)) for picture in here)
            parts.append(section(title, f'<div class="figures">{boxes}</div>'))
    return "\n".join(parts)


def _figure(picture: Picture, number: int) -> str:
    svg = inline_svg(picture.figure, html.escape(f"{picture.title}. {picture.caption}"))
    return (
        f'<figure id="{picture.name}">{svg}<figcaption><b>Figure {number}. '
        f"{prose(picture.title)}.</b> {prose(picture.caption)}</figcaption></figure>"
    )


def _tables(study: Study) -> str:
    parts = []
    for title, rows in study.tables.items():
        if rows:
            head = list(rows[0])
            cells = [[_cell(row.get(name)) for name in head] for row in rows]
            parts.append(section(title, table(head, cells)))
    return "\n".join(parts)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: MISSING}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return significant(value) if isinstance(value, float) else str(value)


__all__ = ["report_html", "write_figures", "write_report"]

"""Draw the picture of a family with backbone, exits, heads and members, once per theme.

python scripts/draw_family.py            # writes family-light.svg, family-dark.svg and icon.svg
python scripts/draw_family.py --check    # fails if a picture would change

The pictures are in docs/assets. The icon of the site shows three members side by side.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from pages import wants_check


ASSETS = Path(__file__).resolve().parent.parent / "docs" / "assets"
EXITS = (8, 16, 28)  # depths, as in the example of the first page
WIDTH, HEIGHT = 480, 520  # narrow enough to be legible on a phone
LAYER, GAP, FLOOR = 11.5, 16.0, 448.0  # height of a layer, space at a tap, y of layer 0
LEFT, RIGHT = 44, 174  # edges of the backbone
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


@dataclass(frozen=True)
class Palette:
    """The colours of one theme, with `segments` from the shallowest to the deepest."""

    ink: str
    faint: str
    line: str
    card: str
    edge: str
    head: str
    head_ink: str
    segments: tuple[str, ...]
    segment_ink: str


PALETTES = {
    "light": Palette(
        ink="#1d2b33",
        faint="#5b6b73",
        line="#8fa0a8",
        card="#ffffff",
        edge="#d5dde1",
        head="#e9eef1",
        head_ink="#33454e",
        segments=("#f4a259", "#62bdb0", "#74aede"),
        segment_ink="#10222b",
    ),
    "dark": Palette(
        ink="#e6edf0",
        faint="#9fb0b8",
        line="#6d7f88",
        card="#262b36",
        edge="#3a4250",
        head="#363d4a",
        head_ink="#d5dee2",
        segments=("#e8964c", "#52ab9f", "#619fd3"),
        segment_ink="#0c171d",
    ),
}


def draw(palette: Palette) -> str:
    """Draw the whole picture."""
    tops = tap_heights()
    parts = [
        embedding(palette),
        *(segment(palette, k, tops) for k in range(len(EXITS))),
        *(branch(palette, k, tops[k]) for k in range(len(EXITS))),
        relay(palette, tops),
        *titles(palette),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="{FONT}" font-size="15" role="img" aria-labelledby="title">'
    )
    title = (
        f'<title id="title">One backbone of {EXITS[-1]} layers with exits after '
        f"{', '.join(map(str, EXITS))} layers; each exit makes a member.</title>"
    )
    arrow = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{palette.line}"/>'
        "</marker></defs>"
    )
    return "\n".join([head, title, arrow, *parts, "</svg>"]) + "\n"


def icon(palette: Palette) -> str:
    """Draw the icon: three members side by side, each as high as its depth."""
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">']
    for k, depth in enumerate(EXITS):
        height = 20 * depth / EXITS[-1]
        parts.append(rect(2 + 7 * k, 22 - height, 6, height, palette.segments[k], "none", 1.5))
    return "\n".join([*parts, "</svg>"]) + "\n"


def tap_heights() -> list[float]:
    """Return the y of each tap from the shallowest, in the middle of its gap."""
    return [FLOOR - depth * LAYER - k * GAP - GAP / 2 for k, depth in enumerate(EXITS)]


def embedding(palette: Palette) -> str:
    """Draw the tokens and their arrow into layer 0."""
    middle = (LEFT + RIGHT) / 2
    return "\n".join(
        [
            rect(LEFT, FLOOR + 12, RIGHT - LEFT, 28, palette.head, palette.edge, 6),
            text(middle, FLOOR + 31, "embedding", palette.head_ink),
            text(middle, FLOOR + 62, "tokens", palette.faint),
            line(middle, FLOOR + 11, middle, FLOOR + 2, palette.line, arrow=True),
        ]
    )


def segment(palette: Palette, k: int, tops: list[float]) -> str:
    """Draw the layers between two taps as bars with their number."""
    first = EXITS[k - 1] if k else 0
    count, top = EXITS[k] - first, tops[k] + GAP / 2
    colour = palette.segments[k]
    bars = [
        rect(LEFT, top + i * LAYER, RIGHT - LEFT, LAYER - 2, colour, "none", 2)
        for i in range(count)
    ]
    middle, height = (LEFT + RIGHT) / 2, count * LAYER - 2
    label = [
        rect(middle - 46, top + height / 2 - 13, 92, 26, colour, "none", 6),
        text(middle, top + height / 2 + 5, f"{count} layers", palette.segment_ink, bold=True),
    ]
    return "\n".join([*bars, *label])


def branch(palette: Palette, k: int, y: float) -> str:
    """Draw a tap, its exit (norm and head) and its member."""
    colour, middle = palette.segments[k], (LEFT + RIGHT) / 2
    parts = [
        line(middle, y, 207, y, palette.line, arrow=True),
        f'<circle cx="{middle}" cy="{y:g}" r="5" fill="{palette.card}" stroke="{colour}" '
        'stroke-width="3"/>',
        rect(209, y - 14, 48, 28, palette.card, colour, 14, stroke=2),
        text(233, y + 5, "norm", palette.ink),
        text(187, y - 6, "tap", palette.faint, 13),
        line(258, y, 268, y, palette.line, arrow=True),
        rect(270, y - 14, 48, 28, palette.head, palette.edge, 14),
        text(294, y + 5, "head", palette.head_ink),
        line(319, y, 334, y, palette.line, arrow=True),
        card(palette, k, y),
    ]
    return "\n".join(parts)


def card(palette: Palette, k: int, y: float) -> str:
    """Draw a member as a small column of the layers that it runs."""
    left, width, height = 336, 138, 76
    top = y - height / 2
    scale, base = (height - 20) / EXITS[-1], top + height - 10
    column = [
        rect(left + 12, base - EXITS[-1] * scale, 16, EXITS[-1] * scale, palette.head, "none", 3)
    ]
    for i in range(k + 1):
        first = EXITS[i - 1] if i else 0
        size = (EXITS[i] - first) * scale
        column.append(
            rect(left + 12, base - EXITS[i] * scale, 16, size, palette.segments[i], "none", 2)
        )
    return "\n".join(
        [
            rect(left, top, width, height, palette.card, palette.edge, 10),
            *column,
            text(left + 38, y - 15, f"member {k}", palette.ink, bold=True, anchor="start"),
            text(left + 38, y + 5, f"{EXITS[k]} layers", palette.faint, anchor="start"),
            text(left + 38, y + 24, f"exit_idx={k}", palette.faint, 13, "start", family=MONO),
        ]
    )


def relay(palette: Palette, tops: list[float]) -> str:
    """Draw the arrow from a tap into the deeper layers."""
    x, low, high = 24, tops[0], tops[-1]
    middle = (low + high) / 2
    path = f"M{LEFT - 4} {low:g} H{x + 8} Q{x} {low:g} {x} {low - 8:g} V{high + 8:g} "
    path += f"Q{x} {high:g} {x + 8} {high:g} H{LEFT - 4}"
    return (
        f'<path d="{path}" fill="none" stroke="{palette.line}" stroke-width="1.6" '
        'stroke-dasharray="5 4" marker-end="url(#arrow)"/>\n'
        f'<text font-size="14" transform="translate({x - 7} {middle:g}) rotate(-90)" '
        f'text-anchor="middle" fill="{palette.faint}">relay: the text goes deeper</text>'
    )


def titles(palette: Palette) -> list[str]:
    """Draw the headings of the columns."""
    columns = (((LEFT + RIGHT) / 2, "one backbone"), (263, "exits"), (405, "members"))
    return [text(x, 24, title, palette.ink, 16, bold=True) for x, title in columns]


def rect(
    x: float,
    y: float,
    width: float,
    height: float,
    fill: str,
    edge: str,
    radius: float,
    stroke: float = 1,
) -> str:
    """Return a rounded rectangle."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
        f'fill="{fill}" stroke="{edge}" stroke-width="{stroke:g}"/>'
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str, arrow: bool = False) -> str:
    """Return a straight line."""
    end = ' marker-end="url(#arrow)"' if arrow else ""
    return (
        f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" '
        f'stroke-width="1.6"{end}/>'
    )


def text(
    x: float,
    y: float,
    words: str,
    colour: str,
    size: float = 15,
    anchor: str = "middle",
    *,
    bold: bool = False,
    family: str = "",
) -> str:
    """Return a line of text."""
    weight = ' font-weight="600"' if bold else ""
    face = f' font-family="{family}"' if family else ""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}" '
        f'font-size="{size:g}"{weight}{face}>{words}</text>'
    )


def main() -> int:
    """Write the pictures, or compare them with the files."""
    check = wants_check(__doc__)
    pictures = {f"family-{theme}.svg": draw(palette) for theme, palette in PALETTES.items()}
    pictures["icon.svg"] = icon(PALETTES["light"])
    stale = 0
    for name, picture in pictures.items():
        path = ASSETS / name
        if not check:
            path.write_text(picture, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != picture:
            print(f"{name} is stale: run python scripts/draw_family.py")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())

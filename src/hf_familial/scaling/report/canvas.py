"""How every picture looks and how it is saved: as a file, or inside a page that may be dark."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from typing import Any, ParamSpec

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from .wording import count, scientific, significant


P = ParamSpec("P")

# one column of a journal: on a phone as wide as the screen, so letters keep their size
WIDTH, HEIGHT = 3.6, 2.75
INK, SOFT, FAINT, PAPER = "#1c1c21", "#6a6a75", "#e3e3e8", "#ffffff"
# Okabe and Ito's colours, told apart without red or green: blue, vermilion, green, purple, orange
ACCENT, CONTRAST = "#0072b2", "#d55e00"
HUES = (ACCENT, CONTRAST, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vPX*"
MAX_POINTS = 1000  # of one cloud; more are thinned evenly

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "mathtext.fontset": "dejavusans",
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handletextpad": 0.4,
    "legend.borderaxespad": 0.2,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.minor.width": 0.5,
    "ytick.minor.width": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "axes.grid": True,
    "axes.axisbelow": True,
    "svg.fonttype": "path",
    "svg.hashsalt": "hf_familial",
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run a drawing function under the style of this module, and settle its layout."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with rc_context(STYLE):
            figure = draw(*args, **kwargs)
            if figure.get_layout_engine() is not None:
                figure.draw_without_rendering()
                figure.set_layout_engine("none")
            return figure

    return drawn


def blank(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """An empty picture of one panel."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def shades(number: int) -> list[str]:
    """Colours of an ordered quantity, from dark to light, apart without red or green."""
    return [to_hex(colour) for colour in colormaps["viridis"](np.linspace(0.05, 0.82, number))]


def thin(number: int, most: int = MAX_POINTS) -> np.ndarray:
    """Indices of the points to draw, of so many: all, or `most` of them evenly."""
    return np.unique(np.linspace(0, number - 1, min(number, most)).round().astype(int))


def log_axis(axes: Axes, which: str, kind: str = "count") -> None:
    """Make an axis logarithmic, with few ticks that people can read.

    Args:
        axes (`matplotlib.axes.Axes`): With its data drawn.
        which (`str`): `"x"` or `"y"`.
        kind (`str`): `"count"` (73B), `"power"` (10²¹) or `"plain"` (0.02).
    """
    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log")
    low, high = sorted(getattr(axes, f"get_{which}lim")())
    decades = np.log10(high / low)
    subs: tuple[float, ...] = (1.0,)
    if decades < 1.2:
        subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 0.6 else (1.0, 2.0, 5.0)
    elif decades < 3 and kind != "power":
        subs = (1.0, 3.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, kind)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def linear_axis(axes: Axes, which: str, ticks: int = 5) -> None:
    """Few ticks on an ordinary axis."""
    getattr(axes, f"{which}axis").set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))


def few_axis(axes: Axes, x: np.ndarray, kind: str = "plain") -> None:
    """Make x an axis of few values, each with a tick; logarithmic where all are positive.

    Args:
        axes (`matplotlib.axes.Axes`): With its data drawn.
        x (`numpy.ndarray`): The values, repeated or not.
        kind (`str`): As in [`log_axis`].
    """
    values = np.unique(x)
    if values[0] > 0:
        axes.set_xscale("log")
        room = max(1.25, (values[-1] / values[0]) ** 0.1)
        axes.set_xlim(values[0] / room, values[-1] * room)
    else:
        reach = 0.12 * (np.ptp(values) or 1)
        axes.set_xlim(values[0] - reach, values[-1] + reach)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(values, [tick(value, kind) for value in values])


def tick(value: float, kind: str) -> str:
    """A tick's number to two digits, without zeros that say nothing: 1.0B is 1B."""
    word = {"count": count, "power": scientific, "plain": significant}[kind](value, 2)
    return re.sub(r"\.0+(?=\D|$)", "", word)


def spread(positions: np.ndarray, gap: float) -> np.ndarray:
    """Move positions apart until neighbours are `gap` apart, as little as can be in squares.

    Args:
        positions (`numpy.ndarray` of shape `(n,)`): In any order, between 0 and 1.
        gap (`float`): Least distance, as far as 0 to 1 has room for it.

    Returns:
        `numpy.ndarray` of shape `(n,)`: In the same order, between 0 and 1.
    """
    number = len(positions)
    order = np.argsort(positions, kind="stable")
    steps = min(gap, 1 / max(1, number - 1)) * np.arange(number)
    # without the steps they need only not decrease: pool neighbours that do, at their mean
    pools: list[list[float]] = []
    for value in np.asarray(positions, float)[order] - steps:
        pools.append([float(value)])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    pooled = np.array([np.mean(pool) for pool in pools for _ in pool])
    moved = np.empty(number)
    moved[order] = np.clip(pooled, 0, 1 - steps[-1]) + steps
    return moved


def to_png(figure: Figure, dots_per_inch: int = 200) -> bytes:
    """The picture as a PNG file, on white."""
    buffer = io.BytesIO()
    with rc_context(STYLE):
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=dots_per_inch)
    return buffer.getvalue()


def to_svg(figure: Figure) -> str:
    """The picture as an SVG file, on white; the same bytes for the same picture."""
    buffer = io.StringIO()
    with rc_context(STYLE):
        FigureCanvasSVG(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def inline_svg(figure: Figure, label: str) -> str:
    """The picture as an element of a page, in colours that the page's style sheet decides.

    Args:
        figure (`matplotlib.figure.Figure`): The picture.
        label (`str`): What it shows, for who cannot see it; escaped for an attribute.

    Returns:
        `str`: `<svg>` as wide as what holds it, without a ground; every colour `#rrggbb` is the
            variable `--rrggbb` of [`colour_sheet`].
    """
    svg = to_svg(figure)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", svg, flags=re.S)
    # ground of the whole picture: the page's own
    svg = re.sub(r'<g id="patch_1">.*?</g>\s*', "", svg, count=1, flags=re.S)
    # names that nothing refers to would be double on a page of many pictures
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(r"#([0-9a-f]{6})\b", r"var(--c\1)", svg)
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', opening)
    assert box
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box[0]} role="img" aria-label="{label}">'
    return head + re.sub(r"\s*\n\s*", "\n", rest).strip()


def colour_sheet(page: str) -> tuple[str, str]:
    """The variables that the pictures of a page use, for a light and for a dark ground.

    Args:
        page (`str`): HTML with pictures of [`inline_svg`].

    Returns:
        `tuple[str, str]`: Declarations of CSS.
    """
    used = sorted(set(re.findall(r"var\(--c([0-9a-f]{6})\)", page)))
    light = "".join(f"--c{name}:#{name};" for name in used)
    dark = "".join(f"--c{name}:{on_dark('#' + name)};" for name in used)
    return light, dark


def on_dark(colour: str) -> str:
    """The colour that does on a dark ground what this one does on white.

    Greys change places, hues stay and get lighter; in Oklab, where lightness is as people see it.

    Args:
        colour (`str`): As `#rrggbb`.

    Returns:
        `str`: As `#rrggbb`.
    """
    linear = np.array(to_rgb(colour))
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    lab = OKLAB @ np.cbrt(LMS @ linear)
    grey = np.hypot(lab[1], lab[2]) < 0.03
    lab[0] = 1.02 - 0.82 * lab[0] if grey else 0.52 + 0.42 * lab[0]
    linear = np.linalg.solve(LMS, np.linalg.solve(OKLAB, lab) ** 3).clip(0, 1)
    shown = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    red, green, blue = shown.clip(0, 1).tolist()
    return to_hex((red, green, blue))


# Ottosson, https://bottosson.github.io/posts/oklab/
LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)

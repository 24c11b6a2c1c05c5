"""The style of pictures and symbols, and functions to save pictures as files or in a page."""

from __future__ import annotations

import html
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib import colormaps, rc_context, rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from scipy.optimize import isotonic_regression

from ..._wording import count, scientific, significant


# Size in inches: one column of a journal. On a phone this is the width of the screen, so letters
# keep their size.
WIDTH, HEIGHT = 3.6, 2.75
LEFT, BOTTOM = 0.66, 0.46
INK, SOFT = "#1c1c21", "#6a6a75"
# The colours of Okabe and Ito, which colour-blind readers can distinguish. On a dark background
# the page inverts them, and they keep a contrast of 3.
ACCENT, CONTRAST = "#0072b2", "#d55e00"
HUES = (ACCENT, CONTRAST, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vPX*"
MAX_POINTS = 300  # largest number of points in one cloud; more are thinned evenly
RASTER_FROM, RASTER_DPI = 60, 144  # clouds of more points are images inside the SVG

STYLE = rc_params_from_file(Path(__file__).with_name("report.mplstyle"), use_default_template=False)
styled = rc_context(STYLE)  # for functions that draw or save a picture


def blank(height: float = HEIGHT, right: float = 0.14, top: float = 0.14) -> tuple[Figure, Axes]:
    """Create an empty picture with one panel. The margins are in inches."""
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(LEFT / WIDTH, BOTTOM / height, 1 - right / WIDTH, 1 - top / height)
    return figure, figure.add_subplot()


def shades(number: int) -> list[str]:
    """Return colours for an ordered quantity, from dark to light, safe for colour-blind readers."""
    return [to_hex(colour) for colour in colormaps["viridis"](np.linspace(0.05, 0.6, number))]


def thin(number: int, most: int = MAX_POINTS) -> np.ndarray:
    """Return the indices of the points to draw: all of `number`, or `most` evenly spaced ones."""
    return np.unique(np.linspace(0, number - 1, min(number, most)).round().astype(int))


def dots(axes: Axes, x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS, **look: Any) -> None:
    """Draw a thinned cloud of points without edges. A large cloud is drawn as an image."""
    index = thin(len(x), most)
    plain: Any = {"marker": "o", "ls": "", "mec": "none", "rasterized": len(x) > RASTER_FROM}
    axes.plot(x[index], y[index], **plain | look)


def log_axis(axes: Axes, which: str, kind: str = "count") -> None:
    """Make an axis logarithmic, with few ticks. Call it after drawing. See `tick` for `kind`."""
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
    axis.minorticks_off()


def linear_axis(axes: Axes, which: str, ticks: int = 5) -> None:
    """Set at most `ticks` ticks on a linear axis."""
    getattr(axes, f"{which}axis").set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))


def few_axis(axes: Axes, x: np.ndarray, kind: str = "plain") -> None:
    """Set a tick at each value of `x` on the x axis. It is logarithmic if all are positive."""
    values = np.unique(x)
    if values[0] > 0:
        axes.set_xscale("log")
        room = max(1.25, (values[-1] / values[0]) ** 0.1)
        axes.set_xlim(values[0] / room, values[-1] * room)
    else:
        reach = 0.12 * (np.ptp(values) or 1)
        axes.set_xlim(values[0] - reach, values[-1] + reach)
    axes.xaxis.minorticks_off()
    axes.set_xticks(values, [tick(value, kind) for value in values])


def tick(value: float, kind: str) -> str:
    """Return the label of a tick with two digits: `count` (73B), `power` (10²¹), `plain` (0.02)."""
    word = {"count": count, "power": scientific, "plain": significant}[kind](value, 2)
    return re.sub(r"\.0+(?=\D|$)", "", word)  # 1.0B is 1B


def spread(positions: np.ndarray, gap: float) -> np.ndarray:
    """Move positions between 0 and 1 until neighbours are `gap` apart, if there is room.

    The positions keep their order. The sum of squared moves is the smallest possible.
    """
    number = len(positions)
    order = np.argsort(positions, kind="stable")
    steps = min(gap, 1 / max(1, number - 1)) * np.arange(number)
    # after subtracting the steps, the positions only must not decrease
    pooled = isotonic_regression(np.asarray(positions, float)[order] - steps).x
    moved = np.empty(number)
    moved[order] = np.clip(pooled, 0, 1 - steps[-1]) + steps
    return moved


@styled
def to_png(figure: Figure, dots_per_inch: int = 200) -> bytes:
    """Return the bytes of a PNG file of the picture, on a white background."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dots_per_inch)
    return buffer.getvalue()


@styled
def to_svg(figure: Figure) -> str:
    """Return the text of an SVG file of the picture, on a white background.

    The same picture always has the same text.
    """
    buffer = io.StringIO()
    FigureCanvasSVG(figure)
    metadata = {"Date": None, "Creator": None}
    figure.savefig(buffer, format="svg", metadata=metadata, dpi=RASTER_DPI)
    return buffer.getvalue()


def inline_svg(figure: Figure, label: str, size: str = "") -> Markup:
    """Return the picture as an SVG element for an HTML page, without a background.

    `label` is its description for screen readers. `size` has more attributes, such as a width.
    """
    svg = to_svg(figure)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", svg, flags=re.S)
    # remove the background of the picture, so that the page's background is visible
    svg = re.sub(r'<g id="patch_1">.*?</g>\s*', "", svg, count=1, flags=re.S)
    # remove ids without references, because several pictures of a page would use the same ones
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(r'(?<![(\d])(\d+\.\d\d)\d+(?=[" \n])', r"\1", svg)
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', opening)
    assert box
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box[0]} role="img"'
    body = re.sub(r"\s*\n\s*", "\n", rest).strip()
    return Markup(f'{head} aria-label="{escape(label)}">{body}')


def single_definitions(page: str) -> str:
    """Return a page that defines every letter and marker only once.

    Matplotlib derives the id of a shape from its content, so pictures of one page repeat the same
    definitions.
    """
    seen: set[str] = set()

    def once(match: re.Match[str]) -> str:
        first = match[1] not in seen
        seen.add(match[1])
        return match[0] if first else ""

    page = re.sub(r'<path id="([^"]+)"[^>]*/>\n?', once, page)
    page = re.sub(r'<clipPath id="([^"]+)">.*?</clipPath>\n?', once, page, flags=re.S)
    return re.sub(r"<defs>\s*</defs>\n?", "", page)


NAMES = (
    "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu rho sigma tau phi psi omega"
)
GREEK = dict(zip(NAMES.split(), "αβγδεζηθκλμνρστφψω", strict=True))
TOKEN = re.compile(r"\\[A-Za-z]+|[_^]\{[^{}]*\}|[_^].|.", re.S)
ARGUMENT = re.compile(r"\\(?:mathrm|text|operatorname)\{([^{}]*)\}")


def symbol_html(tex: str) -> Markup:
    r"""Convert the LaTeX of one symbol to HTML, such as `\gamma_U` to `γ<sub>U</sub>`."""
    tex = re.sub(r"\\(?:hat|tilde|bar)\s*\{?(\w)\}?", r"\1", ARGUMENT.sub(r"\1", tex))
    words = Markup("")
    for token in TOKEN.findall(tex):
        if token[0] in "_^" and len(token) > 1:
            tag = Markup("sub" if token[0] == "_" else "sup")
            words += Markup("<{0}>{1}</{0}>").format(tag, symbol_html(token[1:].strip("{}")))
        elif token[0] == "\\":
            words += GREEK.get(token[1:], token[1:])
        elif token not in "{}":
            words += token.replace("*", "∗")
    return words


def symbol_text(tex: str) -> str:
    r"""Convert the LaTeX of one symbol to plain text, such as `\gamma_U` to `γ_U`."""
    return html.unescape(
        re.sub(r"</?su[bp]>", lambda m: "" if "/" in m[0] else "_", symbol_html(tex))
    )

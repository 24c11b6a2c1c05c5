"""Draw the pictures of docs/concepts: docs/assets/concepts/NAME-light.svg and NAME-dark.svg.

python scripts/draw_concepts.py            # writes the pictures
python scripts/draw_concepts.py --check    # fails if one would change

Pictures are 480 units wide, so that text stays legible on a phone. Numbers in them come from
benchmarks/results and from the laws of `hf_familial.scaling`.
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from pages import wants_check

from hf_familial.scaling import get_law


ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "assets" / "concepts"
LOSS = ROOT / "benchmarks" / "results" / "multi_exit_loss_cpu.json"
WIDTH = 480
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
NAMES = ("ink", "muted", "line", "paper", "plain", "c0", "c1", "c2", "c3", "on")
THEMES: Mapping[str, Mapping[str, str]] = {
    "light": dict(zip(NAMES, (
        "#1c2733", "#5b6773", "#9aa6b2", "#ffffff", "#e9eef3",
        "#0e8a7d", "#2f6db5", "#7a4fb3", "#c2571a", "#ffffff",
    ), strict=True)),
    "dark": dict(zip(NAMES, (
        "#e7edf3", "#a3b0bd", "#66727f", "#1f2229", "#333b46",
        "#45c4b4", "#74aef0", "#b795ec", "#f29a62", "#10151b",
    ), strict=True)),
}  # fmt: skip


class Canvas:
    """An SVG of one theme; colours are names of the theme, numbers are units of its width."""

    def __init__(self, height: int, theme: str, title: str) -> None:
        self.colours, self.height, self.title = THEMES[theme], height, title
        self.parts: list[str] = []

    def box(
        self,
        x: float, y: float, w: float, h: float,
        fill: str = "plain", label: str = "", edge: str = "",
        dashed: bool = False, size: int = 14, round_: float = 4,
    ) -> None:  # fmt: skip
        """Add a rectangle with a label in its middle."""
        stroke = f' stroke="{self.colours[edge]}" stroke-width="1.5"' if edge else ""
        stroke += ' stroke-dasharray="4 3"' if dashed else ""
        colour = self.colours.get(fill, fill)
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{round_:g}" '
            f'fill="{colour}"{stroke}/>'
        )
        if label:
            ink = "on" if fill.startswith("c") else "ink"
            self.text(x + w / 2, y + h / 2 + size * 0.36, label, size, ink, "middle")

    def text(
        self,
        x: float, y: float, text: str, size: int = 14,
        ink: str = "ink", anchor: str = "start", bold: bool = False,
    ) -> None:  # fmt: skip
        """Add a line of text whose baseline is at y."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{self.colours[ink]}" '
            f'text-anchor="{anchor}"{weight}>{html.escape(text)}</text>'
        )

    def path(
        self,
        points: Sequence[tuple[float, float]], ink: str = "line", width: float = 1.5,
        arrow: bool = False, dashed: bool = False,
    ) -> None:  # fmt: skip
        """Add a line through points, with an arrowhead at its end if `arrow`."""
        marks = ' stroke-dasharray="3 3"' if dashed else ""
        marks += f' marker-end="url(#{ink})"' if arrow else ""
        found = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(
            f'<polyline points="{found}" fill="none" stroke="{self.colours[ink]}" '
            f'stroke-width="{width:g}" stroke-linejoin="round"{marks}/>'
        )

    def dot(self, x: float, y: float, ink: str, radius: float = 5) -> None:
        """Add a filled circle."""
        colour = self.colours[ink]
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}"/>')

    def svg(self) -> str:
        """Return the picture as SVG."""
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="9" '
            f'markerHeight="9" markerUnits="userSpaceOnUse" orient="auto">'
            f'<path d="M0,0 L8,4 L0,8 z" fill="{colour}"/></marker>'
            for name, colour in self.colours.items()
            if name in ("ink", "line", "muted", "c0", "c1", "c2", "c3")
        )
        hatch = (
            '<pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" '
            f'patternTransform="rotate(45)"><rect width="7" height="7" '
            f'fill="{self.colours["paper"]}" fill-opacity="0"/><line x1="0" y1="0" x2="0" y2="7" '
            f'stroke="{self.colours["c3"]}" stroke-width="2.4"/></pattern>'
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
            f'width="{WIDTH * 1.25:g}" height="{self.height * 1.25:g}" role="img" '
            f'font-family="{FONT}">\n<title>{html.escape(self.title)}</title>\n'
            f"<defs>{heads}{hatch}</defs>\n" + "\n".join(self.parts) + "\n</svg>\n"
        )


def family(theme: str) -> Canvas:
    """Draw a backbone of 12 layers with exits at depths 4, 8 and 12."""
    c = Canvas(492, theme, "A backbone of 12 layers with exits at depths 4, 8 and 12")
    exits, bottom, step, x, w = (4, 8, 12), 412, 29, 110, 92

    def top(depth: int) -> float:
        return bottom - step * depth

    c.text(52, 24, "members", 14, "muted", "middle")
    c.text(x + w / 2, 24, "backbone", 14, "muted", "middle")
    c.text(345, 24, "exits", 14, "muted", "middle")
    for layer in range(12):
        colour = f"c{layer // 4}"
        c.box(x, top(layer + 1) + 5, w, step - 5, colour, f"layer {layer}")
    for k, depth in enumerate(exits):
        ink, y = f"c{k}", top(depth) + 5
        c.box(20 + 26 * k, y, 16, bottom - y, ink, round_=8)
        c.text(28 + 26 * k, bottom + 18, str(k), 14, ink, "middle", bold=True)
        mid = y + 12
        c.path([(x + w, mid), (226, mid)], ink, 2)
        c.dot(228, mid, ink, 6)
        early = depth < 12
        start = 304 if early else 234
        if early:
            c.path([(234, mid), (247, mid)], ink, 2, arrow=True)
            c.box(247, mid - 14, 58, 28, "paper", "private", ink, dashed=True)
        c.path([(start + 1, mid), (318, mid)], ink, 2, arrow=True)
        c.box(318, mid - 14, 48, 28, "paper", "norm", ink)
        c.path([(366, mid), (380, mid)], ink, 2, arrow=True)
        c.box(380, mid - 14, 46, 28, "paper", "head", ink)
        c.path([(426, mid), (438, mid)], ink, 2, arrow=True)
        c.text(441, mid + 5, "logits", 14)
        c.text(212, mid + 38, f"hidden state at exit {k}, depth {depth}", 14, ink)
        c.text(212, mid + 56, "(batch, sequence, hidden)", 13, "muted")
    c.box(x, bottom + 8, w, 26, "plain", "embedding")
    c.path([(x + w / 2, 476), (x + w / 2, bottom + 38)], "line", arrow=True)
    c.text(x + w + 12, 466, "input_ids (batch, sequence)", 13, "muted")
    return c


def segments(theme: str) -> Canvas:
    """Draw a view of layers 4 to 7, and a view of the cache."""
    c = Canvas(440, theme, "The segment from depth 4 to depth 8")
    x0, cell = 14, 31

    def row(y: float, label: Callable[[int], str], kind: Callable[[int], str]) -> None:
        for i in range(12):
            fill = kind(i)
            x, w = x0 + cell * i, cell - 4
            if fill == "none":
                c.box(x, y, w, 28, "paper", "", "line", dashed=True)
            else:
                c.box(x, y, w, 28, fill, label(i))

    inside = range(4, 8)
    c.text(x0, 24, "The backbone", 15, bold=True)
    row(36, str, lambda i: "c1" if i in inside else "plain")
    c.box(x0 + cell * 12 + 4, 36, 78, 28, "plain", "final norm")
    c.text(x0, 84, "config: num_hidden_layers 12, layer_types of 12", 13, "muted")
    for i in inside:
        x = x0 + cell * i + 13
        c.path([(x, 92), (x, 136)], "c1", 1.5, dashed=True)
    c.text(x0 + cell * 8 + 4, 120, "the same objects", 13, "c1")
    c.text(x0, 130, "A shallow copy", 15, bold=True)
    row(144, str, lambda i: "c1" if i in inside else "none")
    c.box(x0 + cell * 12 + 4, 144, 78, 28, "paper", "identity", "c1")
    c.text(x0, 192, "config: num_hidden_layers 4, layer_types of 4", 13, "muted")
    y = 232
    c.text(x0, y, "hidden state", 14, "c0", bold=True)
    c.path([(x0 + 100, y - 5), (x0 + cell * 4 - 4, y - 5)], "c0", 2, arrow=True)
    c.box(x0 + cell * 4, y - 24, cell * 4 - 4, 38, "c1", "its forward", size=15)
    c.path([(x0 + cell * 8 - 2, y - 5), (x0 + cell * 8 + 44, y - 5)], "c2", 2, arrow=True)
    c.text(x0 + cell * 8 + 50, y, "hidden state", 14, "c2", bold=True)
    c.text(x0, y + 22, "at depth 4", 13, "muted")
    c.text(x0 + cell * 8 + 50, y + 22, "at depth 8", 13, "muted")
    c.path([(x0 + cell * 6 - 2, y + 44), (x0 + cell * 6 - 2, y + 18)], "c1", 2, arrow=True)
    c.text(x0, 294, "A view of the KV cache", 15, bold=True)
    row(306, str, lambda i: "c1" if i in inside else ("plain" if i < 4 else "none"))
    for i in range(4):
        c.path([(x0 + cell * i + 4, 310), (x0 + cell * i + 23, 330)], "line")
    c.text(x0, 354, "0 to 3: placeholders, so that each layer finds its index", 13, "muted")
    for i in inside:
        x = x0 + cell * i + 13
        c.path([(x, 364), (x, 392)], "c1", 1.5, dashed=True)
    c.text(x0 + cell * 8 + 4, 384, "the same objects", 13, "c1")
    c.text(x0, 388, "The KV cache", 15, bold=True)
    row(400, str, lambda i: "c1" if i in inside else "plain")
    return c


def relay(theme: str) -> Canvas:
    """Draw three drafts and one pass that verifies them."""
    c = Canvas(512, theme, "One round of self-speculation, on one cache")
    x0, cell, low, high = 112, 52, 28, 48
    stages: list[tuple[str, list[str], list[str], list[str]]] = [
        (
            "1  Draft: layers 0-3 write one token at a time",
            ["the", "cat", "sat", "on", "a", "big", ""],
            ["", "", "", "1", "2", "3", ""],
            ["old", "old", "old", "pending", "pending", "pending", ""],
        ),
        (
            "2  Verify: layers 4-11 run pending positions at once",
            ["the", "cat", "sat", "on", "a", "big", ""],
            ["", "", "", "", "", "", ""],
            ["old", "old", "old", "4", "4", "4", ""],
        ),
        (
            "3  Accept drafts up to the first difference",
            ["the", "cat", "sat", "on", "a", "mat", ""],
            ["", "", "", "", "", "gone", ""],
            ["old", "old", "old", "old", "old", "gone", ""],
        ),
    ]
    y = 0.0
    for place, (title, words, lower, upper) in enumerate(stages):
        c.text(14, y + 24, title, 15, bold=True)
        top = y + 36
        c.text(14, top + high / 2 + 5, "layers 4-11", 14, "muted")
        c.text(14, top + high + 4 + low / 2 + 5, "layers 0-3", 14, "muted")
        for i in range(6):
            x = x0 + (cell + 8) * i
            if upper[i] == "pending":
                c.box(x, top, cell, high, "url(#hatch)", edge="c3")
            elif upper[i] == "gone":
                c.box(x, top, cell, high, "paper", edge="line", dashed=True)
            else:
                new = upper[i].isdigit()
                label = upper[i] if new else ""
                c.box(x, top, cell, high, "c2" if new else "plain", label, size=16)
            below = top + high + 4
            if lower[i] == "gone":
                c.box(x, below, cell, low, "paper", edge="line", dashed=True)
            else:
                fill = "c0" if lower[i] else "plain"
                c.box(x, below, cell, low, fill, lower[i], size=16)
            ink = "ink" if i < 4 else "c0"
            if place == 2 and i >= 4:
                ink = "c2"
            c.text(x + cell / 2, below + low + 18, words[i], 14, ink, "middle", bold=i >= 4)
        y += 148
    c.path([(14, 452), (466, 452)], "line", 1)
    c.box(14, 464, 18, 16, "plain")
    c.text(38, 477, "done before", 13, "muted")
    c.box(134, 464, 18, 16, "url(#hatch)", edge="c3")
    c.text(158, 477, "pending, runs later", 13, "muted")
    c.box(324, 464, 18, 16, "paper", edge="line", dashed=True)
    c.text(348, 477, "removed", 13, "muted")
    c.text(
        14, 502, "Numbers show the order of passes. Each layer runs once per token.", 13, "muted"
    )
    return c


def loss(theme: str) -> Canvas:
    """Draw the loss chunk by chunk, and the measured peak memory."""
    c = Canvas(452, theme, "The multi-exit loss computes logits chunk by chunk")
    c.text(14, 24, "One chunk of rows, one exit at a time", 15, bold=True)
    for k in range(3):
        y = 40 + 46 * k
        c.text(14, y + 23, f"exit {k}", 14, f"c{k}", bold=True)
        for j in range(5):
            active = k == 1 and j == 2
            fill = f"c{k}" if active or j < 2 or (k == 2 and j == 2) else "plain"
            c.box(66 + 26 * j, y, 23, 36, fill, edge="c3" if active else "")
    c.text(66, 194, "hidden states (tokens, hidden)", 13, "muted")
    c.path([(198, 104), (222, 104)], "c3", 2, arrow=True)
    c.box(226, 76, 54, 56, "paper", "head", "ink", size=15)
    c.path([(280, 104), (300, 104)], "c3", 2, arrow=True)
    c.box(304, 82, 162, 44, "paper", "logits of the chunk", "c3", size=15)
    c.text(385, 70, "(rows, vocab)", 13, "muted", "middle")
    c.path([(385, 128), (385, 150)], "c3", 2, arrow=True)
    c.text(385, 170, "loss and gradient,", 14, "ink", "middle")
    c.text(385, 188, "then logits are freed", 14, "ink", "middle")
    metrics = json.loads(LOSS.read_text("utf-8"))["metrics"]
    bars = {
        "whole logits, 4 exits": ("memory_naive_G4_V32768_mib", "plain"),
        "dense model, 1 exit": ("memory_dense_G1_V32768_mib", "plain"),
        "PyTorch, 4 exits": ("memory_torch512_G4_V32768_mib", "plain"),
        "this loss, 4 exits": ("memory_ours_G4_V32768_mib", "c1"),
        "this loss, 8 exits": ("memory_ours_G8_V32768_mib", "c1"),
    }
    c.text(14, 236, "Peak memory of a step above the model, MiB", 15, bold=True)
    c.text(14, 256, "8 layers, width 384, 1024 tokens, vocabulary 32,768", 13, "muted")
    most = max(metrics[key] for key, _ in bars.values())
    for i, (label, (key, fill)) in enumerate(bars.items()):
        y, value = 272 + 35 * i, metrics[key]
        length = 240 * value / most
        c.text(14, y + 18, label, 14)
        c.box(176, y, length, 26, fill, edge="" if fill == "c1" else "line")
        c.text(182 + length, y + 18, f"{value:,.0f}", 14, "ink", bold=True)
    return c


def law(theme: str) -> Canvas:
    """Draw IsoFLOP curves of G = 1, 2, 4, 8 and the cost of G, with assumed coefficients."""
    c = Canvas(568, theme, "The familial law with assumed coefficients")
    found = get_law("familial")
    values, budget = found.published["assumed"].values, 1e20
    N = np.geomspace(1.2e8, 6e9, 81)
    curves = {
        G: found.predict(values, N=N, D=budget / 6 / N, G=np.full_like(N, G)) for G in (1, 2, 4, 8)
    }
    x0, x1, y0, y1 = 62, 424, 292, 44
    low, high = 2.5, 2.86

    def at(n: float, value: float) -> tuple[float, float]:
        across = np.log(n / N[0]) / np.log(N[-1] / N[0])
        return x0 + (x1 - x0) * across, y0 - (y0 - y1) * (value - low) / (high - low)

    c.text(14, 24, "Loss at one budget, 6ND = 1e20 FLOPs", 15, bold=True)
    for value in np.arange(low, high, 0.1):
        _, y = at(N[0], value)
        c.path([(x0, y), (x1, y)], "line", 0.6)
        c.text(x0 - 8, y + 5, f"{value:.1f}", 14, "muted", "end")
    for label, n in (("0.2 B", 2e8), ("0.5 B", 5e8), ("1 B", 1e9), ("2 B", 2e9), ("5 B", 5e9)):
        c.text(at(n, low)[0], y0 + 20, label, 14, "muted", "middle")
    c.text(x1, y0 + 40, "N, parameters", 14, "muted", "end")
    best = int(np.argmin(curves[1]))
    c.path([at(N[best], low), at(N[best], high)], "line", 1.2, dashed=True)
    for k, (G, losses) in enumerate(curves.items()):
        points = [at(n, v) for n, v in zip(N, losses, strict=True) if low <= v <= high]
        c.path(points, f"c{k}", 2.4)
        c.dot(*at(N[best], losses[best]), f"c{k}", 5)
        x, y = points[-1]
        c.text(x + 6, y + 5, f"G = {G}", 14, f"c{k}", bold=True)
    c.text(x0, y0 + 40, "the best N does not depend on G", 14, "muted")

    gamma, alpha, beta = (values[name] for name in ("gamma", "alpha", "beta"))
    power = gamma * (alpha + beta) / (alpha * beta)
    c.text(14, 374, f"Cost of G exits at gamma = {gamma:g}", 15, bold=True)
    c.text(14, 404, "G", 14, "muted")
    c.text(58, 404, "reducible loss", 14, "muted")
    c.text(256, 404, "extra FLOPs for equal loss", 14, "muted")
    for i, G in enumerate((2, 4, 8)):
        y = 414 + 36 * i
        c.text(14, y + 19, str(G), 15, f"c{i + 1}", bold=True)
        for x, factor, scale in ((58, G**gamma, 800), (256, G**power, 105)):
            length = scale * (factor - 1)
            c.box(x, y, length, 26, f"c{i + 1}")
            c.text(x + length + 6, y + 19, f"+{100 * (factor - 1):.0f} %", 14)
    c.text(14, 554, "Dense coefficients: arXiv 2404.10102. Gamma: arXiv 2512.23407.", 13, "muted")
    return c


PICTURES: tuple[Callable[[str], Canvas], ...] = (family, segments, relay, loss, law)


def main() -> int:
    """Write the pictures, or compare them with the files."""
    check = wants_check(__doc__)
    files = {
        FOLDER / f"{draw.__name__}-{theme}.svg": draw(theme).svg()
        for draw in PICTURES
        for theme in THEMES
    }
    if check:
        stale = [p for p, text in files.items() if not p.exists() or p.read_text("utf-8") != text]
        for path in stale:
            print(f"{path.name} is stale: run python scripts/draw_concepts.py")
        return int(bool(stale))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    print(f"{len(files)} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())

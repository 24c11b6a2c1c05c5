"""Formulas in LaTeX as pictures and as HTML, without a network or a font of their own."""

from __future__ import annotations

import html
import re

from matplotlib.figure import Figure

from .canvas import styled


NAMES = (
    "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu rho sigma tau phi psi omega"
)
GREEK = dict(zip(NAMES.split(), "αβγδεζηθκλμνρστφψω", strict=True))
TOKEN = re.compile(r"\\[A-Za-z]+|[_^]\{[^{}]*\}|[_^].|.", re.S)
ARGUMENT = re.compile(r"\\(?:mathrm|text|operatorname)\{([^{}]*)\}")


def symbol_html(tex: str) -> str:
    r"""A symbol as HTML, such as `γ<sub>U</sub>` for `\gamma_U`.

    Args:
        tex (`str`): LaTeX of one symbol: letters, Greek ones, accents left out, `_` and `^`.

    Returns:
        `str`: Escaped.
    """
    tex = re.sub(r"\\(?:hat|tilde|bar)\s*\{?(\w)\}?", r"\1", ARGUMENT.sub(r"\1", tex))
    words = []
    for token in TOKEN.findall(tex):
        if token[0] in "_^" and len(token) > 1:
            tag = "sub" if token[0] == "_" else "sup"
            words.append(f"<{tag}>{symbol_html(token[1:].strip('{}'))}</{tag}>")
        elif token[0] == "\\":
            words.append(GREEK.get(token[1:], html.escape(token[1:])))
        elif token not in "{}":
            words.append(html.escape(token).replace("*", "∗"))
    return "".join(words)


def symbol_text(tex: str) -> str:
    r"""A symbol in letters alone, such as `γ_U` for `\gamma_U`."""
    return html.unescape(
        re.sub(r"</?su[bp]>", lambda m: "" if "/" in m[0] else "_", symbol_html(tex))
    )


@styled
def draw_formula(tex: str, size: float = 15) -> Figure:
    r"""A formula as a picture of its own size.

    Args:
        tex (`str`): LaTeX without dollar signs, as far as matplotlib sets it.
        size (`float`): Of the letters, in points.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        ValueError: If matplotlib cannot set it.
    """
    figure = Figure(figsize=(1, 1))
    text = figure.text(0, 0, f"${tex}$", size=size, math_fontfamily="stix", va="bottom")
    box = text.get_window_extent()
    pad = 2 / 72
    figure.set_size_inches(box.width / figure.dpi + 2 * pad, box.height / figure.dpi + 2 * pad)
    inches = figure.get_size_inches()
    text.set_position((pad / inches[0], (pad - box.y0 / figure.dpi) / inches[1]))
    return figure


__all__ = ["draw_formula", "symbol_html", "symbol_text"]

"""Tables and pictures from the numbers of a study."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure


LOSSES = {"eval_mean": "mean over exits", "eval_final": "deepest exit"}
LAWS = {
    "familial": "E outside",
    "familial_e_inside": "E inside",
    "familial_n_only": "on the size term alone",
}
SIZES = {"non_embedding": "without embeddings", "total": "with embeddings"}
TOKENS = {"exact": "D counted", "six_nd": "D = C / 6N"}
PAPER = 0.033  # gamma as reported, arXiv:2512.23407
COLOURS = {"exact": "#2f81f7", "six_nd": "#db6d28"}
GRANULARITIES = {2: "#3fb950", 4: "#db6d28", 8: "#a371f7"}
SILENT: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".png": {"Software": None}}
MARKERS = ("<!-- --8<-- [start:tables] -->", "<!-- --8<-- [end:tables] -->")


def shown(row: Mapping[str, Any], digits: int = 3, method: str = "delta") -> str:
    """Return `value [low, high]`, or a note if there is no value or no interval."""
    if "error" in row:
        return "not identified"
    ends = row.get(method)
    interval = "no interval" if ends is None else f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"
    return f"{row['value']:.{digits}f} {interval}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sections with tables for README.md."""
    noise = results["seed_noise"]
    yield (
        f"{results['runs']} finished runs, {results['flops']:.3g} FLOPs, {results['tokens']:.3g} "
        "tokens in all."
    )
    if noise:
        low, high = noise["interval"]
        yield (
            f"Seed noise of the mean loss, as a share of it: {noise['relative']:.2%} "
            f"[{low:.2%}, {high:.2%}], from {noise['settings']} settings run more than once."
        )
    yield "### gamma\n\nIntervals cover 95 %. Those with the value use the delta method."
    yield table(
        ("loss", "law", "N", "D", "gamma", "profile", "rms of residuals"),
        [
            (
                LOSSES[row["loss"]],
                LAWS[row["law"]],
                SIZES[row["size"]],
                TOKENS[row["tokens"]],
                shown(row),
                shown(row, method="profile").partition(" ")[2],
                "" if "error" in row else f"{row['rms']:.2%}",
            )
            for row in results["gammas"]
        ],
    )
    yield "### Branches"
    yield table(
        ("law", "exponent", "value", "profile"),
        [
            (
                row["law"],
                row["coefficient"],
                shown(row),
                shown(row, method="profile").partition(" ")[2],
            )
            for row in results["branches"]
        ],
    )
    yield "### G exits against one, pair by pair\n\nRatio of losses: median, smallest and largest."
    yield table(
        ("C", "G", "pairs", "mean over exits", "deepest exit"),
        [
            (
                "all" if row["C"] is None else f"{row['C']:.2g}",
                str(row["G"]),
                str(row["pairs"]),
                *(
                    f"{row[k][0]:.3f} ({row[k][1]:.3f} to {row[k][2]:.3f})"
                    for k in ("eval_loss_mean", "eval_loss_final")
                ),
            )
            for row in results["pairs"]
        ],
    )
    yield (
        "### Efficiency Leverage, and the cost of G\n\nFLOPs are counted exactly. The dense models "
        "have equal shares of the FLOPs."
    )
    yield table(
        ("C", "G", "loss leverage", "compute leverage", "compute of G over G = 1"),
        [
            (
                f"{row['C']:.2g}",
                str(row["G"]),
                *(shown(row[k], 2) for k in ("loss_leverage", "compute_leverage", "compute_of_G")),
            )
            for row in results["leverage"]
        ],
    )
    yield (
        "### The best size of each curve\n\nThe minimum of a parabola in log N through all sizes "
        "of a budget. `ratio` is its loss divided by that of G = 1.\n`local gamma` is the exponent "
        "of G for this ratio. `place` is -1 at the smallest size and 1 at the largest."
    )
    yield table(
        ("loss", "C", "G", "N", "D", "lowest loss", "ratio", "local gamma", "place"),
        [
            (
                LOSSES[row["loss"]],
                f"{curve['C']:.2g}",
                str(row["G"]),
                f"{curve['N']:,.0f}",
                f"{curve['D']:.3g}",
                f"{curve['loss']:.3f}",
                f"{curve['ratio']:.3f}",
                "" if curve["gamma"] is None else f"{curve['gamma']:.3f}",
                f"{curve['offset']:+.2f}",
            )
            for row in results["curves"]
            for curve in row.get("curves", ())
        ],
    )
    yield told_rates(results["rates"])


def told_rates(rates: Mapping[str, Any]) -> str:
    """Return the result of the short runs for learning rates, in sentences."""
    at = rates["at"]
    return (
        f"### Learning rates\n\nThe best rate of the short runs is {at['rate']:.3g} at "
        f"N = {at['N']:,.0f}. It changes with N to the power {shown(rates['N'], 2)} and with G to "
        f"the power {shown(rates['G'], 2)}. This comes from {rates['runs']} runs in "
        f"{rates['cells']} groups of equal budget, size, G and batch, with residuals of "
        f"{rates['rms']:.1%}."
    )


def draw_gammas(results: Mapping[str, Any], path: Path, ink: str = "#1f2328") -> None:
    """Draw the gammas of two laws with their intervals, and the gamma that the paper reports."""
    laws = ("familial", "familial_e_inside")
    rows = [r for r in results["gammas"] if r["law"] in laws and r.get("delta")]
    rows.sort(key=lambda row: (row["tokens"], row["loss"], row["law"], row["size"]), reverse=True)
    figure = Figure(figsize=(7, 0.26 * len(rows) + 1.1), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        colour = COLOURS[row["tokens"]]
        axes.plot(row["delta"], [place, place], color=colour, lw=2)
        axes.plot(row["value"], place, "o", color=colour, ms=5)
    words = [
        f"{TOKENS[r['tokens']]}, {LOSSES[r['loss']]}, {LAWS[r['law']]}, N {SIZES[r['size']]}"
        for r in rows
    ]
    axes.set_yticks(range(len(rows)), words, fontsize=8, color=ink)
    axes.tick_params(colors=ink)
    axes.axvline(PAPER, color=ink, ls="--", lw=1)
    axes.axvline(0, color=ink, lw=0.8)
    place = (PAPER, len(rows) - 0.3)
    axes.annotate(f"{PAPER}, reported", place, fontsize=8, color=ink, ha="center")
    axes.set_xlabel("gamma, with 95 % interval", color=ink)
    _save(figure, path, ink)


def draw_costs(results: Mapping[str, Any], path: Path, ink: str = "#1f2328") -> None:
    """Draw the lowest loss of each G, divided by that of G = 1, against the budget."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for row in results["curves"]:
        if row["G"] == 1 or "error" in row:
            continue
        mean = row["loss"] == "eval_mean"
        axes.plot(
            [curve["C"] for curve in row["curves"]],
            [100 * (curve["ratio"] - 1) for curve in row["curves"]],
            "o-" if mean else "o--",
            color=GRANULARITIES[row["G"]],
            ms=4,
            label=f"G = {row['G']}, {LOSSES[row['loss']]}",
        )
    budgets = sorted({row["C"] for row in results["pairs"] if row["C"]})
    axes.set_xscale("log")
    axes.set_xticks(budgets, [f"{C:.2g}".replace("e+", "e") for C in budgets])
    axes.minorticks_off()
    axes.tick_params(colors=ink)
    axes.axhline(0, color=ink, lw=0.8)
    axes.set_xlabel("FLOPs of a run", color=ink)
    axes.set_ylabel("% over the best dense run", color=ink)
    axes.legend(frameon=False, labelcolor=ink, fontsize=8, ncols=2)
    _save(figure, path, ink)


def _save(figure: Figure, path: Path, ink: str) -> None:
    for axes in figure.axes:
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(ink)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "hf_familial"}):
        figure.savefig(path, dpi=150, transparent=True, metadata=SILENT[path.suffix])


def write_tables(readme: Path, results: Mapping[str, Any]) -> None:
    """Write the tables between the markers of a file."""
    text = readme.read_text(encoding="utf-8")
    body = "\n\n".join(tables(results))
    pattern = re.escape(MARKERS[0]) + ".*" + re.escape(MARKERS[1])
    whole = f"{MARKERS[0]}\n\n{body}\n\n{MARKERS[1]}"
    readme.write_text(re.sub(pattern, lambda _: whole, text, flags=re.S), encoding="utf-8")

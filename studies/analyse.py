"""Fit the runs of a study, and write what they say.

    python studies/analyse.py studies/stdlib_cpu

Reads `runs.jsonl` there and writes `results.json` (every number), `fit.json` and `report.html` (of
the mean loss), `figures/`, and the tables of README.md, between its markers. `--draws 0` leaves out
the bootstrap, and with it minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from hf_familial import __version__
from hf_familial.scaling import (
    Fit,
    Observations,
    Quantity,
    ScalingError,
    compute_leverage,
    fit,
    get_law,
    granularity_compute,
    intervals,
    loss_leverage,
    seed_noise,
    size_exponent,
)
from hf_familial.scaling.data.columns import Choice, read_runs
from hf_familial.scaling.planning.leverage import even_members
from hf_familial.scaling.report.examine import examine
from hf_familial.scaling.report.page import write_figures, write_report
from hf_familial.scaling.report.study import Origin, write_study


LOSSES = {"eval_mean": "mean over exits", "eval_final": "deepest exit"}
LAWS = {
    "familial": "E outside",
    "familial_e_inside": "E inside",
    "familial_n_only": "on the size term alone",
}
SIZES = {"non_embedding": "without embeddings", "total": "with embeddings"}
TOKENS = {"exact": "D counted", "six_nd": "D = C / 6N"}
PAPER = {"gamma": 0.033, "gamma_U": 0.001, "gamma_V": 0.04}  # arXiv:2512.23407, as reported
RIVALS = ("familial", "familial_e_inside", "familial_n_only", "hoffmann")
COLOURS = {"exact": "#2f81f7", "six_nd": "#db6d28"}
SILENT: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".png": {"Software": None}}
INKS = {"light": "#1f2328", "dark": "#e6edf3"}
PICTURES = Path(__file__).parent.parent / "docs" / "assets" / "studies"
MARKERS = ("<!-- --8<-- [start:tables] -->", "<!-- --8<-- [end:tables] -->")


@dataclass(frozen=True)
class Counted:
    """FLOPs of a run as its rows have them: per token, between the sizes that were run.

    Attributes:
        logs (`Mapping[int, np.ndarray]`): By G the logarithms of N and of FLOPs per token, rising.
    """

    logs: Mapping[int, np.ndarray]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], size: str) -> Counted:
        """From the rows; N as the fit has it."""
        points: dict[int, set[tuple[float, float]]] = {}
        for row in rows:
            point = (math.log(row[f"N_{size}"]), math.log(row["C_flops"] / row["D_tokens"]))
            points.setdefault(row["G"], set()).add(point)
        return cls({G: np.array(sorted(found)).T for G, found in points.items()})

    def __call__(self, N: Any, D: Any, G: Any) -> Any:
        """FLOPs; beyond the sizes that were run the last slope goes on."""
        x, (known, cost) = np.log(np.asarray(N, float)), self.logs[int(np.max(G))]
        inside = np.interp(x, known, cost)
        below = (x - known[0]) * (cost[1] - cost[0]) / (known[1] - known[0])
        above = (x - known[-1]) * (cost[-1] - cost[-2]) / (known[-1] - known[-2])
        return np.exp(inside + np.minimum(below, 0) + np.maximum(above, 0)) * D


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The finished runs."""
    lines = (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["status"] == "finished"]


def observed(folder: Path, law: str, loss: str, size: str, tokens: str = "exact") -> Observations:
    """The rows as a law takes them; with `six_nd` D is what C = 6ND would make of the budget."""
    data = read_runs(folder / "runs.jsonl", get_law(law), Choice(size=size, loss=loss)).data
    if tokens == "exact":
        return data
    columns = dict(data.columns)
    columns["D"] = columns["C"] / (6 * columns["N"])
    return replace(data, columns=columns)


def estimate(found: Fit, quantity: str | Quantity) -> dict[str, Any]:
    """A number and its intervals by two methods; an interval that cannot be had is null."""
    name = quantity if isinstance(quantity, str) else quantity.name
    value = found.values[name] if isinstance(quantity, str) else float(quantity.of(found.values))
    row: dict[str, Any] = {"value": value}
    for method in ("delta", "profile") if isinstance(quantity, str) else ("delta",):
        try:
            interval = intervals(found, [quantity], method=method)[name]  # type: ignore[arg-type]
            row[method] = [interval.low, interval.high]
        except ScalingError:
            row[method] = None
    return row


def gammas(folder: Path) -> list[dict[str, Any]]:
    """The exponent of granularity under every choice that it could depend on."""
    found = []
    for loss in LOSSES:
        for law in LAWS:
            for size in SIZES:
                for tokens in TOKENS:
                    names = {"loss": loss, "law": law, "size": size, "tokens": tokens}
                    fitted = attempt(observed(folder, law, loss, size, tokens), law)
                    found.append(names | fitted)
    return found


def attempt(data: Observations, law: str, coefficient: str = "gamma") -> dict[str, Any]:
    """One fit in few numbers, or why there is none."""
    try:
        answer = fit(get_law(law), data)
    except ScalingError as error:
        return {"error": str(error)}
    off = np.log(answer.predict(**columns_for(answer, data)) / data.loss)
    rms = float(np.sqrt(np.mean(np.square(off))))
    return estimate(answer, coefficient) | {"rms": rms, "E": answer.values["E"], "rows": len(data)}


def columns_for(answer: Fit, data: Observations) -> dict[str, np.ndarray]:
    """The variables of a law at the rows."""
    return {name: data.columns[name] for name in answer.law.variable_names}


def branches(folder: Path) -> list[dict[str, Any]]:
    """Exponents of the exits before and after one."""
    found = []
    for law in ("branch", "branch_e_inside"):
        data = observed(folder, law, "eval_exits", "non_embedding")
        for name in ("gamma_U", "gamma_V"):
            found.append({"law": law, "coefficient": name} | attempt(data, law, name))
    return found


def leverage(folder: Path, answer: Fit) -> list[dict[str, Any]]:
    """What a family saves over dense models, and what G costs, at the budgets that were run."""
    rows = rows_of(folder)
    cost, found = Counted.of(rows, "non_embedding"), []
    budgets = sorted({float(f"{row['C_flops']:.1e}") for row in rows})
    for C in budgets:
        for G in sorted({row["G"] for row in rows} - {1}):
            members = even_members(G)
            asked = {
                "loss_leverage": loss_leverage(answer.law, C, members, "flops", cost),
                "compute_leverage": compute_leverage(answer.law, C, members, "flops", cost),
                "compute_of_G": granularity_compute(answer.law, G, C, cost),
            }
            found.append({"C": C, "G": G} | {k: estimate(answer, q) for k, q in asked.items()})
    return found


def pairs(folder: Path) -> list[dict[str, Any]]:
    """Losses of G exits against the dense run of the same budget, size and seed; no law."""
    rows, found = rows_of(folder), []

    def cell(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return float(f"{row['C_flops']:.1e}"), row["backbone"]["hidden"], row["seed"]

    dense = {cell(row): row["eval_loss_final"] for row in rows if row["G"] == 1}
    several = [row for row in rows if row["G"] > 1 and cell(row) in dense]
    for C in (None, *sorted({cell(row)[0] for row in several})):
        for G in sorted({row["G"] for row in several}):
            chosen = [r for r in several if r["G"] == G and C in (None, cell(r)[0])]
            entry: dict[str, Any] = {"C": C, "G": G, "pairs": len(chosen)}
            for name in ("eval_loss_mean", "eval_loss_final"):
                ratios = [row[name] / dense[cell(row)] for row in chosen]
                entry[name] = [float(q) for q in np.quantile(ratios, (0.5, 0, 1))]
            found.append(entry)
    return found


def optima(folder: Path) -> list[dict[str, Any]]:
    """The run of lowest loss on each curve, and whether smaller and larger ones stand beside it."""
    curves: dict[tuple[float, int], list[tuple[float, int]]] = {}
    for row in rows_of(folder):
        if row["seed"] == 0:
            key = (float(f"{row['C_flops']:.1e}"), row["G"])
            curves.setdefault(key, []).append((row["eval_loss_mean"], row["backbone"]["hidden"]))
    found = []
    for (C, G), points in sorted(curves.items()):
        loss, width = min(points)
        widths = sorted(width for _, width in points)
        inside = width not in (widths[0], widths[-1])
        found.append({"C": C, "G": G, "width": width, "loss": loss, "inside": inside})
    return found


def analyse(folder: Path) -> tuple[dict[str, Any], Fit]:
    """Every number of the study, and the fit of its report."""
    rows = rows_of(folder)
    data = observed(folder, "familial", "eval_mean", "non_embedding")
    answer = fit(get_law("familial"), data)
    noise = (
        seed_noise(replace(data, columns=dict(data.columns)), get_law("familial"))
        if len({row["seed"] for row in rows}) > 1
        else None
    )
    results = {
        "runs": len(rows),
        "flops": sum(row["C_flops"] for row in rows),
        "tokens": sum(row["D_tokens"] for row in rows),
        "coefficients": {name: estimate(answer, name) for name in answer.free},
        "size_exponent": estimate(answer, size_exponent(answer.law, G=1.0)),
        "gammas": gammas(folder),
        "branches": branches(folder),
        "leverage": leverage(folder, answer),
        "pairs": pairs(folder),
        "optima": optima(folder),
        "seed_noise": None
        if noise is None
        else {
            "relative": noise.relative,
            "interval": [noise.interval.low, noise.interval.high],
            "settings": noise.settings,
        },
    }
    return results, answer


def shown(row: Mapping[str, Any], digits: int = 3, method: str = "delta") -> str:
    """`value [low, high]`, or why there is none."""
    if "error" in row:
        return "not identified"
    ends = row.get(method)
    interval = "no interval" if ends is None else f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"
    return f"{row['value']:.{digits}f} {interval}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(results: Mapping[str, Any]) -> Iterator[str]:
    """The tables of README.md."""
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
    yield "### gamma\n\n95 % intervals by the delta method; in brackets behind them by profile."
    yield table(
        ("loss", "G multiplies", "N", "D", "gamma", "profile", "rms of residuals"),
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
    yield "### G exits against one, pair by pair\n\nRatio of losses: median, least and greatest."
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
        "### Efficiency Leverage, and what G costs\n\nFLOPs as counted; every dense model has an "
        "equal share."
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
    yield "### The lowest run of each curve"
    yield table(
        ("C", "G", "width", "mean loss", "inside the sizes"),
        [
            (
                f"{row['C']:.2g}",
                str(row["G"]),
                str(row["width"]),
                f"{row['loss']:.4f}",
                "yes" if row["inside"] else "no",
            )
            for row in results["optima"]
        ],
    )


def draw_gammas(results: Mapping[str, Any], path: Path, ink: str = "#1f2328") -> None:
    """Every gamma of a whole-factor law with its interval, beside the paper's; no background."""
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
    axes.axvline(PAPER["gamma"], color=ink, ls="--", lw=1)
    axes.axvline(0, color=ink, lw=0.8)
    place = (PAPER["gamma"], len(rows) - 0.3)
    axes.annotate("0.033, reported", place, fontsize=8, color=ink, ha="center")
    axes.set_xlabel("gamma, with 95 % interval", color=ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "hf_familial"}):
        figure.savefig(path, dpi=150, transparent=True, metadata=SILENT[path.suffix])


def write_tables(readme: Path, results: Mapping[str, Any]) -> None:
    """Put the tables between the markers."""
    text = readme.read_text(encoding="utf-8")
    body = "\n\n".join(tables(results))
    pattern = re.escape(MARKERS[0]) + ".*" + re.escape(MARKERS[1])
    whole = f"{MARKERS[0]}\n\n{body}\n\n{MARKERS[1]}"
    readme.write_text(re.sub(pattern, lambda _: whole, text, flags=re.S), encoding="utf-8")


def write_fit(folder: Path, answer: Fit, draws: int) -> None:
    """`fit.json`, `report.html`, `figures/`."""
    choice = Choice(size="non_embedding", loss="eval_mean")
    origin = Origin.of(read_runs(folder / "runs.jsonl", answer.law, choice))
    rivals = [get_law(name) for name in RIVALS]
    study = examine(answer, origin, draws=draws, rivals=rivals, version=__version__)
    write_study(folder / "fit.json", study)
    write_report(folder / "report.html", study)
    write_figures(folder / "figures", study)


def main() -> int:
    """Fit and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="The study.")
    parser.add_argument("--draws", type=int, default=1000, help="Replicates of the bootstrap.")
    args = parser.parse_args()
    results, answer = analyse(args.folder)
    (args.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write_fit(args.folder, answer, args.draws)
    for theme, ink in INKS.items():
        name = args.folder.resolve().name
        draw_gammas(results, PICTURES / f"{name}-{theme}.svg", ink)
    if (args.folder / "README.md").exists():
        write_tables(args.folder / "README.md", results)
    print(f"{results['runs']} runs; gamma {shown(results['coefficients']['gamma'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write docs/performance.md from benchmarks/results/*.json.

python scripts/list_benchmarks.py            # writes the page
python scripts/list_benchmarks.py --check    # fails if the page would change
"""

from __future__ import annotations

import ast
import html
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pages import keep, table, wants_check


ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
PAGE = ROOT / "docs" / "performance.md"
HEADER = """# Performance

Made by `python scripts/list_benchmarks.py` from
[`benchmarks/results`](../benchmarks/results/), which keeps the last full run of every benchmark on
every kind of machine. Nothing here is typed by hand: a number that is not in those files is not on
this page, and a goal that was missed is shown as missed.

A *limit* is computed, not measured: what would be reached if the cost were that of the arithmetic
alone. Times are processor time on a CPU unless said, so that other work on the machine does not
count. Run a benchmark again with the command above its tables; `--save` keeps the result.
"""


@dataclass(frozen=True)
class Table:
    """Metrics of one benchmark that belong side by side.

    Attributes:
        title (`str`): Above the table.
        rows (`Mapping[str, str]`): Label of a row, and what stands for `{}` in its metrics' names.
        columns (`Mapping[str, str]`): Label of a column, and the name of its metrics.
    """

    title: str
    rows: Mapping[str, str]
    columns: Mapping[str, str]


@dataclass(frozen=True)
class Words:
    """What the names of a benchmark's metrics do not say.

    Attributes:
        goals (`Mapping[str, str]`): What a metric with a goal means; `{}` stands for a part that
            differs, and is filled in. The first that fits counts.
        limits (`Mapping[str, tuple[float, str]]`): Computed limit of a metric, and how it is had.
        tables (`tuple[Table, ...]`): What else to show.
    """

    goals: Mapping[str, str]
    limits: Mapping[str, tuple[float, str]]
    tables: tuple[Table, ...] = ()


GRANULARITIES = {
    f"G = {g}, vocabulary {v:,}": f"G{g}_V{v}" for v in (8192, 32768) for g in (2, 4, 8)
}
VOCABULARIES = {f"vocabulary {v:,}": f"V{v}" for v in (8192, 32768)}
WORDS: Mapping[str, Words] = {
    "sweep": Words(
        goals={
            "minutes": "the whole of `examples/isoflop.yaml`, minutes",
            "overhead": "time that a sweep adds to a run, as a share of it",
        },
        limits={},
        tables=(),
    ),
    "relay": Words(
        goals={
            "relay_speedup_over_assistant": "relay over the host's `assistant_early_exit`, float32",
            "relay_speedup_over_generate": "relay over `generate`, float32",
            "plain_speedup_over_generate": "the engine without drafts over `generate`, float32",
            "relay_of_limit": "gain of drafting, as a share of its limit, float32",
            "relay_texts_that_differ": "texts that differ from `generate`'s, relay, float32",
            "plain_texts_that_differ": "texts that differ, without drafts, float32",
        },
        limits={"relay_of_limit": (1.0, "a checking pass costs what one token costs")},
        tables=tuple(
            Table(
                f"Of 21 texts, {dtype}",
                {
                    "`generate`, full depth": "generate",
                    "`assistant_early_exit`, best setting": "assistant",
                    "this engine without drafts": "plain",
                    "`SpeculativeRelay()`": "relay",
                    "`SpeculativeRelay`, best setting": "scanned",
                },
                {
                    "ms per token": f"{{}}_ms_per_token{suffix}",
                    "over `generate`": f"{{}}_speedup_over_generate{suffix}",
                    "drafts accepted": f"{{}}_acceptance{suffix}",
                    "limit of drafting": f"{{}}_limit{suffix}",
                    "share of it": f"{{}}_of_limit{suffix}",
                    "texts that differ": f"{{}}_texts_that_differ{suffix}",
                },
            )
            for dtype, suffix in (("float32", ""), ("bfloat16", "_bf16"))
        ),
    ),
    "multi_exit_loss": Words(
        goals={
            "step_G{}_V{}": "time of a step over the dense one, over the ratio of FLOPs; G = {}, "
            "vocabulary {}",
            "over_torch_G{}_V{}": "time over `torch`'s own chunked loss per exit; G = {}, "
            "vocabulary {}",
            "memory_G4_over_naive_V{}": "memory over a loss from whole logits; G = 4, "
            "vocabulary {}",
            "memory_G4_over_fused_V{}": "memory over the dense model with this loss; G = 4, "
            "vocabulary {}",
            "memory_G4_over_torch512_V{}": "memory over `torch`'s own, chunks of 512; G = 4, "
            "vocabulary {}",
            "memory_G8_over_G2_V{}": "memory of 8 exits over that of 2; vocabulary {}",
        },
        limits={
            "step_G{}_V{}": (1.0, "FLOPs alone"),
            "memory_G8_over_G2_V{}": (1.0, "no growth with G"),
            "memory_G4_over_fused_V{}": (1.0, "no growth with G"),
        },
        tables=(
            Table(
                "A training step over the dense model's, divided by the ratio of FLOPs",
                GRANULARITIES,
                {
                    "FLOPs over dense": "flop_ratio_{}",
                    "this loss": "step_{}",
                    "loss from whole logits": "naive_step_{}",
                    "peak MiB": "memory_ours_{}_mib",
                },
            ),
            Table(
                "Peak memory above the model, MiB, four exits unless said",
                VOCABULARIES,
                {
                    "dense": "memory_dense_G1_{}_mib",
                    "dense, this loss": "memory_fused_G1_{}_mib",
                    "whole logits": "memory_naive_G4_{}_mib",
                    "`torch`'s chunks": "memory_torch512_G4_{}_mib",
                    "this loss": "memory_ours_G4_{}_mib",
                    "this loss, 8 exits": "memory_ours_G8_{}_mib",
                },
            ),
        ),
    ),
    "export": Words(
        goals={
            "ours_{}_peak_mib": "peak memory of an export, MiB; {}",
            "time_over_whole_{}": "time over loading, truncating and saving, not synced; {}",
        },
        limits={},
        tables=(
            Table(
                "Half the layers of a checkpoint, from a folder to a folder",
                {
                    "`export_exit`, synced to the disk": "ours",
                    "load, truncate, `save_pretrained`": "whole",
                    "the same, synced": "whole_synced",
                },
                {
                    "300 MB: s": "{}_300mb_seconds",
                    "300 MB: peak MiB": "{}_300mb_peak_mib",
                    "4 GB: s": "{}_4gb_seconds",
                    "4 GB: peak MiB": "{}_4gb_peak_mib",
                },
            ),
        ),
    ),
    "fitter": Words(
        goals={
            "fit_240_s": "a fit of 240 runs, s",
            "refit_240_ms": "one refit of a bootstrap, 240 runs, ms",
            "bootstrap_familial_84_s": "1000 refits of the familial law, 84 runs, s",
            "growth_over_linear": "seconds per row at 100,000 rows over those at 1,000",
            "objective_e3": "objective of the published 240 runs, times 1000",
            "peer_over_ours": "time of `chinchilla` 0.2.0, its README's grid, over a fit here",
            "peer_objective_over_ours": "its objective over the one here",
        },
        limits={
            "growth_over_linear": (1.0, "linear in the rows"),
            "objective_e3": (1.01827401780, "the optimum"),
        },
    ),
    "trainer_overhead": Words(
        goals={"added_ms_{}": "added to a step of the host's Trainer, ms; {}"},
        limits={"added_ms_{}": (0.0, "no work of its own")},
        tables=(
            Table(
                "A step, ms",
                {
                    "as it comes": "plain",
                    "with a schedule of weights": "scheduled",
                    "gradients accumulated": "accumulated",
                },
                {
                    "host's Trainer": "host_ms_{}",
                    "`FamilialTrainer`": "ours_ms_{}",
                    "added, median of pairs": "added_ms_{}",
                },
            ),
        ),
    ),
}
SIGNS = {"<=": "&le;", ">=": "&ge;"}
PARTS = {"300mb": "300 MB", "4gb": "4 GB", "8192": "8,192", "32768": "32,768"}
# results are kept to four decimals; the goals they were held against are not
ROUNDING = 5e-5


def page() -> str:
    """The whole page."""
    results = [json.loads(path.read_text("utf-8")) | {"path": path} for path in result_files()]
    goals = [met(result, key) for result in results for key in result["targets"]]
    count = f"{sum(goals)} of {len(goals)} goals are met; {len(goals) - sum(goals)} are missed."
    rows = [summary(result) for result in results]
    head = ["benchmark", "machine", "goals met", "missed"]
    parts = [HEADER + "\n" + count, table(head, rows)]
    names = list(dict.fromkeys(result["name"] for result in results))
    for name in names:
        parts += benchmark(name, [result for result in results if result["name"] == name])
    return "\n\n".join(parts) + "\n"


def result_files() -> list[Path]:
    """Files of results, in the order of `WORDS`, others after them."""
    order = list(WORDS)

    def rank(path: Path) -> tuple[int, str]:
        name = path.stem.rsplit("_", 1)[0]
        return order.index(name) if name in order else len(order), path.name

    return sorted((BENCHMARKS / "results").glob("*.json"), key=rank)


def met(result: Mapping[str, Any], key: str) -> bool:
    """Whether a goal was met."""
    sign, goal = result["targets"][key]
    value = result["metrics"][key]
    return bool(value <= goal + ROUNDING if sign == "<=" else value >= goal - ROUNDING)


def summary(result: Mapping[str, Any]) -> list[str]:
    """A benchmark on one machine, in the cells of a line."""
    missed = [label(result["name"], key) for key in result["targets"] if not met(result, key)]
    name, kind = result["name"], result["path"].stem.rsplit("_", 1)[1]
    total = len(result["targets"])
    cells = [f"[{name}](#{name})", kind.upper(), f"{total - len(missed)} of {total}"]
    return [*cells, "; ".join(missed) or "none"]


def benchmark(name: str, results: list[Mapping[str, Any]]) -> list[str]:
    """One benchmark on every machine."""
    script = BENCHMARKS / f"{name}.py"
    title, commands, measured = docstring(script)
    parts = [f"## {name}", title, "```bash\n" + commands + "\n```", measured]
    for result in results:
        parts += machine(result)
    return parts


def docstring(script: Path) -> tuple[str, str, str]:
    """First line, commands, and how it is measured, from the benchmark itself."""
    text = ast.get_docstring(ast.parse(script.read_text("utf-8"))) or ""
    title, _, rest = text.partition("\n")
    command = re.compile(r"^    (python .*)$", re.MULTILINE)
    commands = command.findall(rest) or [f"python benchmarks/{script.name}"]
    return title, "\n".join(commands), command.sub("", rest).strip()


def machine(result: Mapping[str, Any]) -> list[str]:
    """What one machine measured."""
    host, path = result["host"], result["path"]
    where = host.get("gpu") or f"{host['processor']}, {host['cores']} cores"
    versions = ", ".join(f"{key} {host[key]}" for key in ("python", "torch", "transformers"))
    words = WORDS.get(result["name"], Words({}, {}))
    parts = [
        f"Measured on: {where}; {host['threads']} thread{'s' * (host['threads'] != 1)}; "
        f"{versions} ([{path.name}](../benchmarks/results/{path.name})).",
        goals(result),
    ]
    for asked in words.tables:
        parts += [f"**{asked.title}**", grid(asked, result["metrics"])]
    return [*parts, everything(result["metrics"])]


def goals(result: Mapping[str, Any]) -> str:
    """Every metric that has a goal."""
    rows = []
    for key, (sign, goal) in result["targets"].items():
        limit = words_of(WORDS.get(result["name"], Words({}, {})).limits, key)
        cells = [label(result["name"], key), number(result["metrics"][key])]
        cells += [f"{SIGNS[sign]} {number(goal)}"]
        cells += [f"{number(limit[0][0])}, {limit[0][1]}" if limit else ""]
        rows.append([*cells, "met" if met(result, key) else "**missed**"])
    return table(["what", "measured", "goal", "limit", ""], rows)


def label(name: str, key: str) -> str:
    """What a metric means, in words where there are some."""
    found = words_of(WORDS.get(name, Words({}, {})).goals, key)
    return found[0].format(*(PARTS.get(part, part) for part in found[1])) if found else f"`{key}`"


def words_of(table: Mapping[str, Any], key: str) -> tuple[Any, tuple[str, ...]] | None:
    """The entry whose pattern fits a metric, and what its `{}` stand for."""
    for pattern, entry in table.items():
        fits = re.fullmatch(re.escape(pattern).replace(r"\{\}", "(.+)"), key)
        if fits:
            return entry, fits.groups()
    return None


def grid(words: Table, metrics: Mapping[str, float]) -> str:
    """Metrics side by side; none where there is no such number."""
    rows = []
    for name, part in words.rows.items():
        keys = [pattern.format(part) for pattern in words.columns.values()]
        rows.append([name, *(number(metrics[k]) if k in metrics else "" for k in keys)])
    return table(["", *words.columns], rows)


def everything(metrics: Mapping[str, float]) -> str:
    """All metrics as they stand in the file, folded away."""
    cells = (
        f"<tr><td><code>{html.escape(key)}</code></td><td>{value:g}</td></tr>"
        for key, value in metrics.items()
    )
    title = f"<summary>All {len(metrics)} numbers of this run</summary>"
    return f"<details>\n{title}\n<table>\n" + "\n".join(cells) + "\n</table>\n</details>"


def number(value: float) -> str:
    """Three digits or three decimals, thousands apart."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 10 or abs(value) < 0.1:
        return f"{value:.3g}"
    return f"{value:.3f}".rstrip("0").rstrip(".")


def main() -> int:
    """Write the page, or compare with it."""
    check, text = wants_check(__doc__), page()
    return keep(PAGE, text, "list_benchmarks.py", f"{len(result_files())} results", check)


if __name__ == "__main__":
    sys.exit(main())

"""Write docs/performance.md from benchmarks/results/*.json.

python scripts/list_benchmarks.py            # writes the page
python scripts/list_benchmarks.py --check    # fails if the page would change
"""

from __future__ import annotations

import ast
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

Each benchmark compares this package with the simplest alternative on the same machine.
{met} of {total} goals are met, {missed} are missed.

To repeat a benchmark, run its script in a clone after `make setup`:

```bash
python benchmarks/relay.py           # some minutes
python benchmarks/relay.py --quick   # under 50 seconds, smaller model
python benchmarks/relay.py --save    # also writes the result file
```

`python scripts/list_benchmarks.py` writes this page from the files in
[`benchmarks/results`](../benchmarks/results/). Footnotes name the file and the machine.

## Goals"""
FOOTER = """!!! note "Limits of these numbers"

    - All models are small, and all times are from one CPU. No benchmark has run on a GPU yet.
    - Times are processor time, so other programs on the machine do not count. Times of exports and
      of the sweep are seconds on the clock instead.
    - A repeated benchmark gives slightly different values. Ratios are steadier than times,
      because the variants take turns in one process."""


@dataclass(frozen=True)
class Table:
    """Metrics of one benchmark that are shown side by side.

    Attributes:
        title (`str`): The line above the table.
        rows (`Mapping[str, str]`): The label of each row, and the text that replaces `{}` in the
            names of its metrics.
        columns (`Mapping[str, str]`): The label of each column, and the name of its metrics.
    """

    title: str
    rows: Mapping[str, str]
    columns: Mapping[str, str]


@dataclass(frozen=True)
class Words:
    """The words for one benchmark, whose file contains only names and numbers.

    Attributes:
        sentences (`str`): What runs, and how to read the tables.
        goals (`Mapping[str, str]`): The meaning of each metric that has a goal. `{}` matches the
            part of a name that differs, and is filled in. The first match counts.
        tables (`tuple[Table, ...]`): The tables to show.
    """

    sentences: str
    goals: Mapping[str, str]
    tables: tuple[Table, ...] = ()


GRANULARITIES = {
    f"G = {g}, vocabulary {v:,}": f"G{g}_V{v}" for v in (8192, 32768) for g in (2, 4, 8)
}
VOCABULARIES = {f"vocabulary {v:,}": f"V{v}" for v in (8192, 32768)}
WORDS: Mapping[str, Words] = {
    "relay": Words(
        sentences="One small family writes 21 texts with greedy decoding, batch 1 and one thread. "
        "*Limit of drafting* is the speed-up that drafts could give if verifying several tokens "
        "cost as much as verifying one. [Relay](concepts/relay.md#draft-and-verify) derives it.",
        goals={
            "relay_speedup_over_assistant": "speed over `assistant_early_exit` of Transformers",
            "relay_speedup_over_generate": "speed over `generate`",
            "plain_speedup_over_generate": "speed over `generate`, without drafts",
            "relay_of_limit": "speed-up from drafts, as a share of its limit",
            "relay_texts_that_differ": "texts that differ from those of `generate`",
            "plain_texts_that_differ": "the same, without drafts",
        },
        tables=tuple(
            Table(
                f"Weights in {dtype}:",
                {
                    "`generate`, all layers": "generate",
                    "`assistant_early_exit`, best setting": "assistant",
                    "relay without drafts, `FixedExit(-1)`": "plain",
                    "`SpeculativeRelay()`": "relay",
                    "`SpeculativeRelay`, best setting": "scanned",
                },
                {
                    "ms per token": f"{{}}_ms_per_token{suffix}",
                    "speed over `generate`": f"{{}}_speedup_over_generate{suffix}",
                    "share of drafts accepted": f"{{}}_acceptance{suffix}",
                    "limit of drafting": f"{{}}_limit{suffix}",
                    "share of the limit": f"{{}}_of_limit{suffix}",
                    "texts that differ": f"{{}}_texts_that_differ{suffix}",
                },
            )
            for dtype, suffix in (("float32", ""), ("bfloat16", "_bf16"))
        ),
    ),
    "multi_exit_loss": Words(
        sentences="One training step of a Llama with 8 layers of width 384 on 1,024 tokens. Step "
        "times are divided by the time of the dense model's step (one exit) and by the ratio of "
        "their FLOPs. A value of 1 means that extra exits take as much extra time as their FLOPs "
        "predict.",
        goals={
            "step_G{}_V{}": "step time over dense, per FLOP; G = {}, vocabulary {}",
            "over_torch_G{}_V{}": "step time over PyTorch's chunked loss; G = {}, vocabulary {}",
            "memory_G4_over_naive_V{}": "memory over a loss from whole logits; G = 4, "
            "vocabulary {}",
            "memory_G4_over_fused_V{}": "memory over the same loss at G = 1; G = 4, vocabulary {}",
            "memory_G4_over_torch512_V{}": "memory over PyTorch's chunked loss; G = 4, "
            "vocabulary {}",
            "memory_G8_over_G2_V{}": "memory of 8 exits over that of 2; vocabulary {}",
        },
        tables=(
            Table(
                "Time of a step over the dense model's, divided by the ratio of FLOPs:",
                GRANULARITIES,
                {
                    "FLOPs over dense": "flop_ratio_{}",
                    "this loss": "step_{}",
                    "loss from whole logits": "naive_step_{}",
                    "peak memory, MiB": "memory_ours_{}_mib",
                },
            ),
            Table(
                "Peak memory of a step in MiB, without the model itself, for 4 exits:",
                VOCABULARIES,
                {
                    "dense": "memory_dense_G1_{}_mib",
                    "dense, this loss": "memory_fused_G1_{}_mib",
                    "loss from whole logits": "memory_naive_G4_{}_mib",
                    "PyTorch's chunks": "memory_torch512_G4_{}_mib",
                    "this loss": "memory_ours_G4_{}_mib",
                    "this loss, 8 exits": "memory_ours_G8_{}_mib",
                },
            ),
        ),
    ),
    "export": Words(
        sentences="The deeper half of a Llama's layers is cut off, from one folder to another. "
        "`export_exit` copies tensors from file to file and waits until the bytes are on the disk. "
        "The alternative loads the whole model, and `save_pretrained` does not wait.",
        goals={
            "ours_{}_peak_mib": "peak memory, MiB; checkpoint of {}",
            "time_over_whole_{}": "time over loading and saving; checkpoint of {}",
        },
        tables=(
            Table(
                "Checkpoints of 300 MB and 4 GB:",
                {
                    "`export_exit`": "ours",
                    "load, cut, `save_pretrained`": "whole",
                    "the same, then wait for the disk": "whole_synced",
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
    "trainer_overhead": Words(
        sentences="Both trainers train copies of one tiny family on the same rows. A negative "
        "number means that `FamilialTrainer` was faster.",
        goals={"added_ms_{}": "ms added to a step of Transformers' `Trainer`; {}"},
        tables=(
            Table(
                "One training step, in ms:",
                {
                    "default settings": "plain",
                    "with a schedule of exit weights": "scheduled",
                    "with gradient accumulation": "accumulated",
                },
                {
                    "`Trainer`": "host_ms_{}",
                    "`FamilialTrainer`": "ours_ms_{}",
                    "median difference": "added_ms_{}",
                },
            ),
        ),
    ),
    "multi_exit": Words(
        sentences="Each row is a training step of one Llama with 8 layers and a vocabulary of "
        "32,768, in a process of its own. `SFTTrainer` is trl's, with the loss that it has by "
        "default. The last row is the loss of the family itself.",
        goals={
            "mib_all_over_one": "memory of `multi_exit(SFTTrainer)` with 4 exits over one exit",
            "seconds_all_over_passes": "time of 4 exits over 4 plain steps, one for each exit",
        },
        tables=(
            Table(
                "One training step of 1,024 tokens:",
                {
                    "`SFTTrainer`, deepest exit only": "one",
                    "`multi_exit(SFTTrainer)`, 4 exits": "all",
                    'the same with `exits="sample"`': "sample",
                    "4 plain steps, one for each exit": "passes",
                    "`FamilialTrainer`, 4 exits": "familial",
                },
                {"s": "seconds_{}", "peak MiB": "mib_{}"},
            ),
        ),
    ),
    "sweep": Words(
        sentences="The 30 runs of `examples/isoflop.yaml` with two workers of one thread each. The "
        "first row counts all the time of the sweep: starting workers, data, evaluations and "
        "checkpoints. The second row repeats training steps alone, on larger batches.",
        goals={
            "minutes": "all runs of `examples/isoflop.yaml`, minutes",
            "overhead": "time that a sweep adds to a run, as a share of it",
        },
        tables=(
            Table(
                "Speed of one worker:",
                {
                    "training in the sweep": "useful_gflops_per_worker",
                    "training steps alone": "step_gflops",
                    "a float32 product of two 1024 x 1024 matrices": "matmul_gflops",
                },
                {"GFLOP per second": "{}"},
            ),
        ),
    ),
    "fitter": Words(
        sentences="Fits of Hoffmann's law to the 240 runs that Epoch AI read from the figure of "
        "[2203.15556](https://arxiv.org/abs/2203.15556), and to simulated runs, on one thread. "
        "The objective of the best fit that is known for the 240 runs is 1.01827 thousandths.",
        goals={
            "fit_240_s": "one fit of 240 runs, s",
            "refit_240_ms": "one refit of a bootstrap, 240 runs, ms",
            "bootstrap_familial_84_s": "1,000 refits of the familial law, 84 runs, s",
            "growth_over_linear": "time per row, 100,000 rows over 1,000 rows",
            "objective_e3": "objective of the 240 runs, in thousandths",
            "peer_over_ours": "time of `chinchilla` 0.2.0 with 3,125 starts, over one fit",
            "peer_objective_over_ours": "objective of `chinchilla` over the one here",
        },
        tables=(
            Table(
                "Time of one fit:",
                {f"{n:,} rows": f"{n}" for n in (240, 1000, 10_000, 100_000)},
                {"seconds": "fit_{}_s"},
            ),
        ),
    ),
}
SIGNS = {"<=": "&le;", ">=": "&ge;"}
PARTS = {"300mb": "300 MB", "4gb": "4 GB", "8192": "8,192", "32768": "32,768"}
PARTS |= {"plain": "default", "scheduled": "schedule", "accumulated": "accumulation"}
# files keep four decimals, the benchmark compared unrounded values with its goals
ROUNDING = 5e-5


def page() -> str:
    """Return the page."""
    results = [json.loads(path.read_text("utf-8")) | {"path": path} for path in result_files()]
    made = [met(result, key) for result in results for key in result["targets"]]
    counts = {"met": sum(made), "total": len(made), "missed": len(made) - sum(made)}
    rows = [row for result in results for row in goals(result)]
    head = ["benchmark", "measure", "value", "goal", ""]
    parts = [HEADER.format(**counts), table(head, rows)]
    names = list(dict.fromkeys(result["name"] for result in results))
    for name in names:
        parts += benchmark(name, [result for result in results if result["name"] == name])
    return "\n\n".join([*parts, FOOTER, "\n".join(map(footnote, results))]) + "\n"


def result_files() -> list[Path]:
    """Return the result files in the order of `WORDS`, unknown ones last."""
    order = list(WORDS)

    def rank(path: Path) -> tuple[int, str]:
        name = path.stem.rsplit("_", 1)[0]
        return order.index(name) if name in order else len(order), path.name

    return sorted((BENCHMARKS / "results").glob("*.json"), key=rank)


def met(result: Mapping[str, Any], key: str) -> bool:
    """Return whether a benchmark met the goal of one metric."""
    sign, goal = result["targets"][key]
    value = result["metrics"][key]
    return bool(value <= goal + ROUNDING if sign == "<=" else value >= goal - ROUNDING)


def goals(result: Mapping[str, Any]) -> list[list[str]]:
    """Return a table row for each metric that has a goal."""
    rows = []
    for key, (sign, goal) in result["targets"].items():
        first = f"[{title(result['name'])}](#{anchor(result['name'])})[^{result['path'].stem}]"
        value = number(result["metrics"][key])
        verdict = "met" if met(result, key) else "**missed**"
        cells = [label(result["name"], key), value, f"{SIGNS[sign]} {number(goal)}", verdict]
        rows.append(["" if rows else first, *cells])
    return rows


def title(name: str) -> str:
    """Return a benchmark's name as a heading: "Multi exit loss" for `multi_exit_loss`."""
    return name.replace("_", " ").capitalize()


def anchor(name: str) -> str:
    """Return the anchor of a benchmark's heading."""
    return name.replace("_", "-")


def benchmark(name: str, results: list[Mapping[str, Any]]) -> list[str]:
    """Return the section of one benchmark, with the tables of every machine."""
    words = WORDS.get(name, Words(summary(name), {}))
    script = f"[`benchmarks/{name}.py`](../benchmarks/{name}.py)"
    parts = [f"## {title(name)}", f"{words.sentences} Script: {script}."]
    for result in results:
        for shown in words.tables:
            mark = f"[^{result['path'].stem}]"
            parts += [f"{shown.title}{mark}", grid(shown, result["metrics"])]
    return parts


def summary(name: str) -> str:
    """Return the first line of a benchmark's docstring."""
    text = ast.get_docstring(ast.parse((BENCHMARKS / f"{name}.py").read_text("utf-8"))) or ""
    return text.partition("\n")[0]


def footnote(result: Mapping[str, Any]) -> str:
    """Return the footnote that names the file and the machine of a result."""
    host, path = result["host"], result["path"]
    machine = host.get("gpu") or f"{host['processor']}, {host['cores']} cores"
    versions = ", ".join(f"{key} {host[key]}" for key in ("python", "torch", "transformers"))
    threads = f"{host['threads']} thread{'s' * (host['threads'] != 1)}"
    link = f"[{path.name}](../benchmarks/results/{path.name})"
    return f"[^{path.stem}]: {link}, measured on {machine}, {threads}, {versions}."


def label(name: str, key: str) -> str:
    """Return the meaning of a metric, or its name if `WORDS` does not contain it."""
    for pattern, meaning in WORDS.get(name, Words("", {})).goals.items():
        found = re.fullmatch(re.escape(pattern).replace(r"\{\}", "(.+)"), key)
        if found:
            return meaning.format(*(PARTS.get(part, part) for part in found.groups()))
    return f"`{key}`"


def grid(shown: Table, metrics: Mapping[str, float]) -> str:
    """Return a table of metrics. A cell is empty if the file has no such metric."""
    rows = []
    for name, part in shown.rows.items():
        keys = [pattern.format(part) for pattern in shown.columns.values()]
        rows.append([name, *(number(metrics[k]) if k in metrics else "" for k in keys)])
    return table(["", *shown.columns], rows)


def number(value: float) -> str:
    """Return a number with three digits or three decimals, and a comma after thousands."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 10 or 0 < abs(value) < 0.1:
        return f"{value:.3g}"
    return f"{value:.3f}".rstrip("0").rstrip(".")


def main() -> int:
    """Write the page, or compare it with the file."""
    check, text = wants_check(__doc__), page()
    return keep(PAGE, text, "list_benchmarks.py", f"{len(result_files())} results", check)


if __name__ == "__main__":
    sys.exit(main())

"""Fit the runs of a study and write the results.

    python studies/analyse.py studies/stdlib_cpu

Reads `runs.jsonl` in that folder. Writes `results.json` with every number, `fit.json` and
`report.html` for the mean loss, `figures/`, and the tables of README.md between its markers.
`--draws 0` skips the bootstrap, which takes minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import measure
from tell import draw_costs, draw_gammas, shown, write_tables

from hf_familial import __version__
from hf_familial.scaling import ColumnChoice, Fit, get_law, load_runs
from hf_familial.scaling.report import (
    DataSource,
    analyse,
    write_analysis,
    write_figures,
    write_report,
)


RIVALS = ("familial", "familial_e_inside", "familial_n_only", "hoffmann")
INKS = {"light": "#1f2328", "dark": "#e6edf3"}
PICTURES = Path(__file__).parent.parent / "docs" / "assets" / "studies"


def write_fit(folder: Path, answer: Fit, draws: int) -> None:
    """Write `fit.json`, `report.html` and `figures/`."""
    choice = ColumnChoice(size="non_embedding", loss="eval_mean")
    source = DataSource.of(load_runs(folder / "runs.jsonl", answer.law, choice))
    rivals = [get_law(name) for name in RIVALS]
    analysis = analyse(answer, source, draws=draws, rivals=rivals, version=__version__)
    write_analysis(folder / "fit.json", analysis)
    write_report(folder / "report.html", analysis)
    write_figures(folder / "figures", analysis)


def main() -> int:
    """Fit the runs and write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="Folder of the study.")
    parser.add_argument("--draws", type=int, default=1000, help="Bootstrap replicates.")
    args = parser.parse_args()
    results, answer = measure.analyse(args.folder)
    (args.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write_fit(args.folder, answer, args.draws)
    for theme, ink in INKS.items():
        name = args.folder.resolve().name
        draw_gammas(results, PICTURES / f"{name}-{theme}.svg", ink)
        draw_costs(results, PICTURES / f"{name}-costs-{theme}.svg", ink)
    if (args.folder / "README.md").exists():
        write_tables(args.folder / "README.md", results)
    print(f"{results['runs']} runs; gamma {shown(results['coefficients']['gamma'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The studies: what their pages say follows from their rows, and a fit of them takes seconds."""

import json
from pathlib import Path
from typing import Any

import measure
import pytest
import tell

from hf_familial.isoflop import IsoFlopDesign
from hf_familial.runs import read_runs
from hf_familial.scaling.report import read_analysis


ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "studies" / "stdlib_cpu"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(measure.analyse(STUDY)[0]))
    return found


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a JSON value by their paths."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)  # type: ignore[assignment]
    else:
        return {path: value}
    return {k: v for key, inner in items for k, v in flat(inner, f"{path}/{key}").items()}


def test_a_new_fit_of_the_rows_finds_what_is_committed(results: dict[str, Any]) -> None:
    found, kept = flat(results), flat(json.loads((STUDY / "results.json").read_text()))
    assert found.keys() == kept.keys()
    for path, value in kept.items():
        if isinstance(value, float):
            assert found[path] == pytest.approx(value, rel=1e-3, abs=1e-6), path
        elif not path.endswith("/error"):
            assert found[path] == value, path


def test_the_page_has_the_tables_of_the_rows() -> None:
    kept = json.loads((STUDY / "results.json").read_text())
    page = (STUDY / "README.md").read_text(encoding="utf-8")
    for part in tell.tables(kept):
        assert part in page


def test_every_row_is_a_run_of_the_design_and_stands_once() -> None:
    designs = [IsoFlopDesign.from_yaml(STUDY / name) for name in ("design.yaml", "seeds.yaml")]
    planned = {run.id: run for design in designs for run in design.runs()}
    rows = read_runs(STUDY / "runs.jsonl")
    assert len({row.run_id for row in rows}) == len(rows)
    for row in rows:
        plan = planned[row.run_id]
        assert (row.G, row.D_tokens, row.seed) == (plan.G, plan.tokens, plan.seed)
        assert row.C_flops == pytest.approx(plan.flops, rel=1e-9)


@pytest.mark.parametrize(
    "folder", [STUDY / "proxy", STUDY / "proxy" / "init"], ids=lambda p: p.name
)
def test_every_proxy_is_a_run_of_a_design_beside_it(folder: Path) -> None:
    designs = [IsoFlopDesign.from_yaml(path) for path in folder.glob("*.yaml")]
    planned = {run.id for design in designs for run in design.runs()}
    assert {row.run_id for row in read_runs(folder / "runs.jsonl")} == planned


def test_the_committed_fit_can_be_read() -> None:
    analysis = read_analysis(STUDY / "fit.json")
    assert analysis.fit.law.name == "familial"
    kept = json.loads((STUDY / "results.json").read_text())
    assert analysis.fit.values["gamma"] == pytest.approx(kept["coefficients"]["gamma"]["value"])

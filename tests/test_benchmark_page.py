"""docs/performance.md agrees with benchmarks/results and shows every missed goal."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
FILES = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def script(name):
    """A script of scripts/ as a module."""
    path = ROOT / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmarks():
    return script("list_benchmarks")


@pytest.fixture
def made_up(tmp_path, benchmarks, monkeypatch):
    """Puts results of a benchmark that nobody knows in place of the real ones."""

    def make(**result):
        (tmp_path / "results").mkdir(exist_ok=True)
        host = {
            "python": "3.12.0",
            "torch": "3.0",
            "transformers": "6.0",
            "processor": "abacus",
            "cores": 1,
            "threads": 1,
            "gpu": None,
        }
        text = json.dumps({"name": "new", "host": host} | result)
        (tmp_path / "results" / "new_cpu.json").write_text(text)
        lines = ['"""What is new.', "", "    python benchmarks/new.py  # soon", "", 'How."""']
        (tmp_path / "new.py").write_text("\n".join(lines))
        monkeypatch.setattr(benchmarks, "BENCHMARKS", tmp_path)
        return benchmarks.page()

    return make


def test_the_page_is_fresh(benchmarks, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["list_benchmarks.py", "--check"])
    assert benchmarks.main() == 0, capsys.readouterr().out


def test_a_stale_page_is_found(benchmarks, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmarks, "PAGE", tmp_path / "performance.md")
    monkeypatch.setattr(sys, "argv", ["list_benchmarks.py", "--check"])
    assert benchmarks.main() == 1
    assert "stale" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_every_goal_is_on_the_page(path, benchmarks):
    result, page = json.loads(path.read_text("utf-8")), PAGE.read_text("utf-8")
    rows = [[cell.strip() for cell in line.split("|")] for line in page.split("\n") if "|" in line]
    met = [benchmarks.met(result, key) for key in result["targets"]]
    assert all(met) == result["pass"]
    for key, made in zip(result["targets"], met, strict=True):
        shown = [benchmarks.label(result["name"], key), benchmarks.number(result["metrics"][key])]
        sign, goal = result["targets"][key]
        shown += [f"{benchmarks.SIGNS[sign]} {benchmarks.number(goal)}"]
        assert [*shown, "met" if made else "**missed**"] in [row[2:6] for row in rows], key


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_footnote_names_file_and_machine(path, benchmarks):
    result, page = json.loads(path.read_text("utf-8")), PAGE.read_text("utf-8")
    (note,) = re.findall(rf"^\[\^{path.stem}\]: .*$", page, re.M)
    assert f"(../benchmarks/results/{path.name})" in note
    assert result["host"]["processor"] in note
    assert f"\n## {benchmarks.title(result['name'])}\n" in page


def test_the_page_is_short(benchmarks):
    assert len(PAGE.read_text("utf-8").splitlines()) < 200


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_every_goal_is_said_in_words(path, benchmarks):
    result = json.loads(path.read_text("utf-8"))
    if result["name"] in benchmarks.WORDS:
        for key in result["targets"]:
            assert not benchmarks.label(result["name"], key).startswith("`"), key


def test_words_name_metrics_that_exist(benchmarks):
    for path in FILES:
        result = json.loads(path.read_text("utf-8"))
        words = benchmarks.WORDS.get(result["name"])
        for table in words.tables if words else ():
            found = [
                pattern.format(part) in result["metrics"]
                for part in table.rows.values()
                for pattern in table.columns.values()
            ]
            # some cells stay empty: the baseline has no ratio to itself
            assert sum(found) > len(found) / 2, table.title


def test_a_benchmark_without_words_has_its_section(made_up):
    page = made_up(metrics={"speed": 1.25, "heat": 3.0}, targets={"speed": [">=", 1.5]})
    assert "0 of 1 goals are met, 1 are missed." in page
    assert "| [New](#new)[^new_cpu] | `speed` | 1.25 | &ge; 1.5 | **missed** |" in page
    assert "What is new." in page
    assert "(../benchmarks/new.py)" in page
    assert "abacus, 1 cores, 1 thread" in page


def test_a_value_that_was_rounded_onto_its_goal_is_met(made_up):
    page = made_up(metrics={"objective": 1.0183}, targets={"objective": ["<=", 1.018275]})
    assert "1 of 1 goals are met" in page
    page = made_up(metrics={"objective": 1.0185}, targets={"objective": ["<=", 1.018275]})
    assert "0 of 1 goals are met" in page


def test_the_pictures_of_the_concepts_are_fresh(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["draw_concepts.py", "--check"])
    assert script("draw_concepts").main() == 0, capsys.readouterr().out


def test_every_picture_is_there_in_both_themes_and_shown():
    docs = ROOT / "docs"
    sources = [docs / "architecture.md", *(docs / "concepts").glob("*.md")]
    pages = "".join(page.read_text("utf-8") for page in sources)
    for path in (ROOT / "docs" / "assets" / "concepts").glob("*-light.svg"):
        dark = path.name.replace("-light", "-dark")
        assert path.with_name(dark).is_file()
        assert f"{path.name}#only-light" in pages
        assert f"{dark}#only-dark" in pages

"""The page of the architecture names what stands in the code, and its picture is fresh."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SRC = ROOT / "src" / "hf_familial"
STEPS = re.findall(r"^\d+\. `([\w/.]+\.py)`: `([\w.]+)`", PAGE, re.M)


def defined_in(path: Path) -> set[str]:
    """Return the functions and classes of a file, and the methods as `Class.method`."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
            names |= {
                f"{node.name}.{inner.name}"
                for inner in getattr(node, "body", ())
                if isinstance(node, ast.ClassDef) and isinstance(inner, ast.FunctionDef)
            }
    return names


@pytest.mark.parametrize(("file", "name"), sorted(set(STEPS)))
def test_every_step_names_a_function_that_exists(file, name):
    path = next(p for p in (SRC / file, ROOT / file) if p.exists())
    assert name in defined_in(path)


def test_every_life_is_told_in_steps():
    lives = re.split(r"^## The life of ", PAGE, flags=re.M)[1:]
    assert len(lives) == 4
    for life in lives:
        numbers = re.findall(r"^(\d+)\. `", life, re.M)
        assert numbers == [str(i + 1) for i in range(len(numbers))]
        assert len(numbers) >= 5


def test_every_room_of_the_tree_is_in_the_table():
    rooms = {path.name for path in SRC.iterdir() if (path / "__init__.py").exists()}
    assert rooms <= set(re.findall(r"^\| `(\w+)/`", PAGE, re.M))


def test_the_page_is_read_in_minutes():
    assert len(PAGE.splitlines()) <= 150

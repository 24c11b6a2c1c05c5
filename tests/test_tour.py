"""examples/tour.ipynb: committed with what it shows, and it runs from top to bottom."""

import json
import os
import re
from pathlib import Path

import pytest


TOUR = Path(__file__).resolve().parents[1] / "examples" / "tour.ipynb"
MAX_BYTES = 500_000


@pytest.fixture(scope="module")
def notebook() -> dict:
    return json.loads(TOUR.read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text_of(output: dict) -> str:
    found = output.get("text") or output.get("data", {}).get("text/plain", "")
    return "".join(found)


def test_it_was_run_in_order_without_an_error(notebook: dict) -> None:
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds <= {"stream", "display_data", "execute_result"}
    streams = {output.get("name", "stdout") for cell in cells for output in cell["outputs"]}
    assert streams == {"stdout"}  # no warnings, no bars


def test_it_is_a_page(notebook: dict) -> None:
    assert TOUR.stat().st_size < MAX_BYTES
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    # a heading or a sentence before every piece of code that begins something new
    assert notebook["cells"][0]["cell_type"] == "markdown"
    sections = [c for c in notebook["cells"] if "".join(c["source"]).startswith("## ")]
    assert len(sections) == 9
    for output in outputs:
        assert "/home/" not in text_of(output)
        assert "/tmp/" not in text_of(output)


def test_its_links_lead_somewhere(notebook: dict) -> None:
    page = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] != "code")
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len(links) >= 4
    for link in links:
        assert (TOUR.parent / link).is_file(), link


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(TOUR, as_version=4)
    sources = [cell.source for cell in notebook.cells]
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3").execute(cwd=tmp_path)
    # what the cells assert held; and each shows again what it was committed with
    assert [cell.source for cell in notebook.cells] == sources
    committed = code_cells(json.loads(TOUR.read_text(encoding="utf-8")))
    for fresh, kept in zip(code_cells(notebook), committed, strict=True):
        shown = [output.output_type for output in fresh.outputs]
        assert shown == [output["output_type"] for output in kept["outputs"]], fresh.source

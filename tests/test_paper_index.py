"""docs/papers.md against the code: every paper is on it, and every file it names cites it."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "papers.md"
NUMBER = re.compile(r"(?<![\d.])\d{4}\.\d{5}(?!\d)")
ROWS = [line for line in PAGE.read_text("utf-8").splitlines() if NUMBER.search(line)]


def cited(folder):
    """Numbers of papers that Python files of a folder name, with the word arXiv on the page."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text("utf-8")
        if "arxiv" in text.lower():
            for number in NUMBER.findall(text):
                found.setdefault(number, path.relative_to(ROOT).as_posix())
    return found


def test_every_paper_of_the_source_is_on_the_page():
    listed = {NUMBER.search(row).group() for row in ROWS}
    missing = {number: path for number, path in cited("src").items() if number not in listed}
    assert not missing
    assert len(listed) == len(ROWS), "a paper has two rows"


@pytest.mark.parametrize("row", ROWS, ids=[NUMBER.search(row).group() for row in ROWS])
def test_every_file_of_a_row_cites_its_paper(row):
    number = NUMBER.search(row).group()
    assert f"[{number}](https://arxiv.org/abs/{number})" in row
    files = re.findall(r"\]\(\.\./(src/[^)]+)\)", row)
    assert files
    for name in files:
        assert number in (ROOT / name).read_text("utf-8"), f"{name} does not cite {number}"


@pytest.mark.parametrize("row", ROWS, ids=[NUMBER.search(row).group() for row in ROWS])
def test_every_symbol_of_a_row_is_in_its_file(row):
    for label, name in re.findall(r"\[([^\]]+)\]\(\.\./(src/[^)]+)\)", row):
        text = (ROOT / name).read_text("utf-8")
        for symbol in re.findall(r"`([^`]+)`", label):
            last = symbol.rsplit(".", 1)[-1]
            assert symbol == Path(name).name or re.search(rf"\b{last}\b", text), (symbol, name)

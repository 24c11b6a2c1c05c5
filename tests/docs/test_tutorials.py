"""Tutorials: scripts and pages agree, numbers in prose come from outputs, and everything runs."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location(
    "render_tutorials", ROOT / "scripts" / "render_tutorials.py"
)
render = importlib.util.module_from_spec(spec)
sys.modules["render_tutorials"] = render
spec.loader.exec_module(render)

SCRIPTS = sorted(render.FOLDER.glob("*.py"))
NAMES = [script.stem for script in SCRIPTS]

# what a script prints, and how its page begins and ends
SMALL = """# %% [markdown]
# # A page
#
# Two is 2.

# %%
from pathlib import Path

print("sum", 1 + 1)
Path("dot.png").write_bytes(b"picture")

# %% [markdown]
# ![A dot](small_files/dot.png)

# %% varies
print("card\\n```python\\ncode\\n```")
"""
OUTPUT = '```\n\n````text title="Output"\nsum 2\n````\n\n![A dot](small_files/dot.png)\n'


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A folder of one tutorial, `small`, and its script."""
    folder = tmp_path / "tutorials"
    folder.mkdir()
    monkeypatch.setattr(render, "FOLDER", folder)
    monkeypatch.setattr(render, "NEEDS", {"small": None})
    (folder / "small.py").write_text(SMALL)
    return folder / "small.py"


# the pages of the repository


def test_every_tutorial_has_its_place_and_its_page():
    assert set(NAMES) == set(render.NEEDS) >= {"pretrain", "tune"}
    assert {page.stem for page in render.FOLDER.glob("*.md")} - {"index"} == set(NAMES)
    order = list(render.NEEDS)
    assert all(order.index(a) < order.index(b) for b, a in render.NEEDS.items() if a)


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_a_page_is_its_script_with_outputs(script):
    outputs, last = render.read_page(script)
    assert script.name in last
    assert any(outputs)
    cells = render.read_cells(script)
    assert cells[0].kind == "prose"
    assert cells[0].text.startswith("# ")
    for cell, output in zip(cells, outputs, strict=True):
        assert bool(output) <= (cell.kind != "prose")
        # code that prints shows something
        assert bool(output) or not re.search(r"^(print|print_\w+)\(", cell.text, re.MULTILINE)


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_pictures_are_there_and_no_others(script):
    folder = script.with_name(f"{script.stem}_files")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    assert there == set(render.pictures(script))
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in there)


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_numbers_in_prose_come_from_code_or_output(script):
    outputs, _ = render.read_page(script)
    cells = render.read_cells(script)
    source = "\n".join([c.text for c in cells if c.kind != "prose"] + outputs)
    prose = "\n".join(c.text for c in cells if c.kind == "prose")
    prose = re.sub(r"```.*?```|arXiv:\S+|\]\([^)]*\)", "", prose, flags=re.DOTALL)
    # what carries digits after a point or between commas is a measurement
    for number in re.findall(r"(?<![\w.])\d[\d,]*\.\d+|(?<![\w.])\d{1,3}(?:,\d{3})+", prose):
        value = float(number.replace(",", ""))
        places = len(number.partition(".")[2])
        known = [float(n.replace(",", "")) for n in render.NUMBER.findall(source) if n != "-"]
        assert any(round(x, places) == value for x in known), number


# the renderer


def test_a_script_is_run_and_rendered(book, tmp_path):
    render.main(["small", "--work", str(tmp_path / "work")])
    page = book.with_suffix(".md").read_text()
    assert page.startswith("<!-- made by scripts/render_tutorials.py from small.py: edit that -->")
    assert "# A page\n\nTwo is 2.\n\n```python\nfrom pathlib" in page
    assert OUTPUT in page
    assert 'Output"\ncard\n```python\ncode\n```\n````\n' in page
    assert (book.parent / "small_files" / "dot.png").read_bytes() == b"picture"
    assert render.read_page(book)[0] == ["", "sum 2", "", "card\n```python\ncode\n```"]
    assert not list(book.parent.glob("dot*"))
    render.main(["--check"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Two is 2", "Three is 3", "differs from small.py at its line 2"),
        ("1 + 1", "1 + 2", "differs from small.py at its line 7"),
        ('title="Output"\nsum', 'title="Output"\n\nmore\n````\n\nsum', "differs from small.py"),
        ("*Run by", "More.\n\n*Run by", "has more than small.py: 'More."),
    ],
)
def test_a_page_that_was_edited_is_found(book, old, new, message):
    render.main(["small"])
    page = book.with_suffix(".md")
    assert old in page.read_text()
    page.write_text(page.read_text().replace(old, new))
    with pytest.raises(render.PageError, match=re.escape(message)):
        render.read_page(book)


def test_check_finds_other_output_and_overlooks_what_varies(book):
    render.main(["small"])
    page = book.with_suffix(".md")
    page.write_text(page.read_text().replace("card\n", "another card\n"))
    render.main(["--check"])
    page.write_text(page.read_text().replace("sum 2\n", "sum 3\n"))
    with pytest.raises(render.PageError, match=r"line 7: the page has\nsum 3\nnow it is\nsum 2"):
        render.main(["--check"])
    # what another Python wrote need not be the same
    page.write_text(re.sub(r"under Python [\d.]+", "under Python 3.1.4", page.read_text()))
    render.main(["--check"])


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("loss 4.123, exits 1 2", "loss 4.150, exits 1 2", True),
        ("loss 4.123", "loss 4.323", False),
        ("1,000,000 tokens", "1,010,000 tokens", True),
        ("1,000,000 tokens", "1,100,000 tokens", False),
        ("2.17e+12 FLOPs", "2.18e+12 FLOPs", True),
        ("a  9.9\n──────", "a 10.0\n───────", True),
        ("equal: True", "equal: False", False),
        ("[1.0, 2.0]", "[1.0, 2.0, 3.0]", False),
    ],
)
def test_outputs_are_alike_up_to_rounding(old, new, same):
    assert render.alike(old, new) is same


def test_new_prose_keeps_the_outputs(book):
    render.main(["small"])
    book.write_text(SMALL.replace("Two is 2.", "Two is two.").replace("A dot", "The dot"))
    render.main(["small", "--prose"])
    assert render.read_page(book)[0][1] == "sum 2"
    assert "Two is two." in book.with_suffix(".md").read_text()
    book.write_text(SMALL.replace("1 + 1", "1 + 2"))
    with pytest.raises(render.PageError, match="new code at line 7. Leave out `--prose`"):
        render.main(["small", "--prose"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1 + 1", "1 / 0", r'small\.py", line 9.*\n(.*\n)*ZeroDivisionError'),
        ("dot.png", "spot.png", "shows dot.png, but did not save it"),
        ("# %% varies", "# %% hidden", r"a cell must be \[markdown\] or varies, got 'hidden'"),
        ("# Two", "Two", "prose must be comments, got 'Two is 2.'"),
        ("# %% [markdown]\n# # A", "import os\n# %% [markdown]\n# # A", "start with a cell"),
    ],
)
def test_what_goes_wrong_leaves_no_page(book, old, new, message):
    book.write_text(SMALL.replace(old, new, 1))
    with pytest.raises(render.PageError, match=message):
        render.main(["small"])
    assert not book.with_suffix(".md").exists()


def test_an_unknown_name_is_refused():
    with pytest.raises(render.PageError, match="Unknown tutorial 'pretraining'. The tutorials"):
        render.main(["pretraining"])


def test_what_is_needed_runs_first(monkeypatch):
    monkeypatch.setattr(render, "NEEDS", {"first": None, "other": None, "second": "first"})
    assert render.order(["second", "other"]) == ["first", "other", "second"]
    assert render.order(["other"]) == ["other"]


def test_what_cannot_run_here_is_left_out(book, monkeypatch, capsys):
    monkeypatch.setattr(render, "PACKAGES", {"small": ("no_such_package",)})
    render.main(["small"])
    assert capsys.readouterr().err == "small: skipped, it needs no_such_package\n"
    assert not book.with_suffix(".md").exists()


# all of them, from the first line to the last


@pytest.mark.slow
def test_every_tutorial_runs_and_shows_what_its_page_shows(tmp_path):
    before = {path: path.read_bytes() for path in render.FOLDER.rglob("*") if path.is_file()}
    render.main(["--check", "--work", str(tmp_path)])
    assert {p: p.read_bytes() for p in render.FOLDER.rglob("*") if p.is_file()} == before
    shutil.rmtree(tmp_path)

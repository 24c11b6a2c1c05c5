"""The code blocks of the documentation: where they are, and which are not run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent


ROOT = Path(__file__).resolve().parents[2]
# made from docstrings, and from scripts that a test of their own runs
ELSEWHERE = ("reference", "tutorials")

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^`\n]*)\n", re.MULTILINE)
TITLE = re.compile(r'title="([^"]+)"')
# the first line of a block that no test runs; a reader sees it too
NOT_RUN = re.compile(r"# not run by the tests: (.+)")
# a command in an indented block
COMMAND = re.compile(r" {4,}(\S*/)?(hf-familial|python|accelerate|make|pip) ")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the page it is on and the line of its first line."""

    page: str
    line: int
    language: str
    title: str | None
    text: str

    @property
    def reason_not_run(self) -> str | None:
        found = NOT_RUN.match(self.text)
        return found[1] if found else None


def pages() -> list[Path]:
    """README and every page that people write."""
    docs = ROOT / "docs"
    found = [p for p in docs.rglob("*.md") if p.relative_to(docs).parts[0] not in ELSEWHERE]
    return [ROOT / "README.md", *sorted(found)]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: str, markdown: str) -> list[Block]:
    """The fenced blocks of a page, in order; a fence within a longer one is its text."""
    found, at = [], 0
    while start := FENCE.search(markdown, at):
        end = re.compile(rf"^ *{start['fence']}`* *$", re.MULTILINE).search(markdown, start.end())
        if end is None:
            raise ValueError(f"{page}: a fence is not closed: {start[0].strip()!r}.")
        info = start["info"].strip()
        title = TITLE.search(info)
        language = re.match(r"[\w+-]*", info)
        found.append(
            Block(
                page=page,
                line=markdown.count("\n", 0, start.end()) + 1,
                language=language[0] if language else "",
                title=title[1] if title else None,
                text=dedent(markdown[start.end() : end.start()]),
            )
        )
        at = end.end()
    return found


def commands_of(page: str, markdown: str) -> Iterator[tuple[str, str]]:
    """Command lines of a page: of its shell blocks, its indented blocks and its `inline code`.

    Yields the place, and the line with its continuations joined; inline ones begin with a backtick.
    """
    for block in blocks_of(page, markdown):
        if block.language in ("bash", "sh", "shell", "console"):
            for offset, line in joined_lines(block.text):
                yield f"{page}:{block.line + offset}", line
    prose = without_blocks(markdown)
    for offset, line in joined_lines(prose):
        if COMMAND.match(line):
            yield f"{page}:{offset + 1}", line.strip()
    for found in re.finditer(r"`((?:hf-familial|make|python|accelerate) [^`]+)`", prose):
        line = prose.count("\n", 0, found.start()) + 1
        yield f"{page}:{line}", "`" + " ".join(found[1].split())


def joined_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with those joined that end in a backslash, each with the number of its first."""
    held, start = "", 0
    for i, line in enumerate(text.splitlines()):
        start = start if held else i
        held += line.strip() if held else line
        if held.endswith("\\"):
            held = held[:-1].rstrip() + " "
            continue
        yield start, held
        held = ""


def without_blocks(markdown: str) -> str:
    """A page with every fenced block made blank; lines keep their numbers."""
    at, kept = 0, []
    while start := FENCE.search(markdown, at):
        end = re.compile(rf"^ *{start['fence']}`* *$", re.MULTILINE).search(markdown, start.end())
        stop = end.end() if end else len(markdown)
        kept += [markdown[at : start.start()], "\n" * markdown.count("\n", start.start(), stop)]
        at = stop
    return "".join([*kept, markdown[at:]])

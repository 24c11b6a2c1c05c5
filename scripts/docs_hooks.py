"""Hooks of mkdocs that show files as pages, formulas as MathML and papers as links.

A link from a page to a file outside docs/, such as `../examples/handoff.py`, works in the
repository and on the site: there it leads to a page that shows the file. The report of each study
is drawn from its fit.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from html import unescape
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).resolve().parent.parent
SOURCE = "source"  # folder of the site for the repository's files
# languages of files that become pages, by suffix; other files are copied
LANGUAGES = {
    "": "text",
    ".cfg": "ini",
    ".css": "css",
    ".html": "html",
    ".json": "json",
    ".jsonl": "json",
    ".md": "markdown",
    ".py": "python",
    ".sh": "bash",
    ".toml": "toml",
    ".txt": "text",
    ".yaml": "yaml",
    ".yml": "yaml",
}
MOST_CHARACTERS = 100_000
PAGE = """---
search:
  exclude: true
---

# `{title}`

{note}

{body}
"""

LINK = re.compile(r"(\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^ *(`{3,}|~{3,})")
MATH = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)
# a block of code without colours, so a text
TEXT_BLOCK = re.compile(
    r'<div class="(highlight">(?:<span class="filename">[^<]*</span>)?<pre>'
    r"<span></span><code>)((?:(?!<span class|</code>).)*</code>)",
    re.S,
)
COLUMNS = re.compile(r"\S {2,}\S|[│┃]")
# an element that stays unchanged, or a paper outside of one
PAPER = re.compile(r"<(a|code|pre|script|svg)\b.*?</\1>|\barXiv[: ](\d{4}\.\d{4,5})", re.S)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every file of the repository that a page of docs/ links to."""
    wanted = {
        target
        for file in files.documentation_pages()
        for link in links(file.content_string)
        if (target := repository_file(link, file.src_uri))
    }
    folders = [ROOT / target for target in wanted if (ROOT / target).is_dir()]
    wanted |= {f"{folder.relative_to(ROOT)}/{name}" for folder in folders for name in names(folder)}
    for target in sorted(wanted):
        files.append(File.generated(config, place(target), content=shown(target)))
    for fit in sorted(ROOT.glob("studies/*/fit.json")):
        name = f"studies/{fit.parent.name}.html"
        files.append(File.generated(config, name, content=report(fit, fit.stat().st_mtime)))
    return files


@cache
def report(fit: Path, changed: float) -> str:
    """Return the report of a study as HTML. `changed` is the time of the file, for the cache."""
    from hf_familial.scaling.report import read_analysis, report_html  # seconds, not at each start

    return str(report_html(read_analysis(fit)))


def names(folder: Path) -> list[str]:
    """Return the names of the files in a folder, without hidden ones."""
    return sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))


def links(text: str) -> Iterator[str]:
    """Yield the relative targets of all links of a page, except in code."""
    for line, is_prose in lines_of(text):
        for match in LINK.finditer(line) if is_prose else ():
            if ":" not in match[2]:
                yield match[2]


def lines_of(text: str) -> Iterator[tuple[str, bool]]:
    """Yield each line of a page, and `True` if it is outside of fenced code."""
    fence = ""
    for line in text.splitlines(keepends=True):
        mark = FENCE.match(line)
        if not fence:
            yield line, not mark
            fence = mark[1] if mark else ""
        else:
            yield line, False
            if mark and line.strip() == fence:
                fence = ""


def repository_file(link: str, src_uri: str) -> str:
    """Return the repository path of a link to a file outside docs/, else ""."""
    path = normpath(join("docs", dirname(src_uri), link))
    leaves = path.split("/")[0] not in ("docs", "..")
    return path if leaves and (ROOT / path).exists() else ""


def place(target: str) -> str:
    """Return the source path, for mkdocs, of a file or folder of the repository."""
    path = ROOT / target
    if path.is_dir():
        return f"{SOURCE}/{target}/index.md"
    return f"{SOURCE}/{target}" + (".md" if path.suffix in LANGUAGES else "")


def shown(target: str) -> str | bytes:
    """Return a page that lists a folder or shows a file, or the file's bytes."""
    path = ROOT / target
    if path.is_dir():
        here = dirname(place(target))
        rows = [f"- [`{n}`]({relpath(place(f'{target}/{n}'), here)})" for n in names(path)]
        return PAGE.format(title=target, note="A folder of the repository.", body="\n".join(rows))
    if path.suffix not in LANGUAGES:
        return path.read_bytes()
    text = path.read_text(encoding="utf-8")
    note = "A file of the repository."
    if len(text) > MOST_CHARACTERS:
        note = f"The first {MOST_CHARACTERS:,} characters of a file of the repository."
    fence = "`" * (1 + max([2, *map(len, re.findall(r"`+", text))]))
    body = f"{fence}{LANGUAGES[path.suffix]}\n{text[:MOST_CHARACTERS].rstrip()}\n{fence}"
    return PAGE.format(title=target, note=note, body=body)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Change links to files outside docs/ into links to the pages of these files."""
    here = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        target = "" if ":" in match[2] else repository_file(match[2], here)
        return f"{match[1]}{relpath(place(target), dirname(here) or '.')})" if target else match[0]

    if here.startswith(f"{SOURCE}/"):
        return markdown
    return "".join(LINK.sub(moved, line) if prose else line for line, prose in lines_of(markdown))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace formulas by MathML and papers by links, and mark blocks of prose."""
    if page.file.src_uri.startswith(f"{SOURCE}/"):
        return html
    return TEXT_BLOCK.sub(as_words, PAPER.sub(as_paper, MATH.sub(as_mathml, html)))


def as_words(match: re.Match[str]) -> str:
    """Return a block of text with the class `columns` if it has some, else `words`."""
    kind = "columns" if COLUMNS.search(re.sub(r"<[^>]*>", "", match[2])) else "words"
    return f'<div class="{kind} {match[1]}{match[2]}'


def as_mathml(match: re.Match[str]) -> str:
    """Return a formula as MathML."""
    display = "block" if match[1] == "div" else "inline"
    mathml = convert(unescape(match[3]).strip(), display=display)
    return f'<{match[1]} class="formula">{mathml}</{match[1]}>'


def as_paper(match: re.Match[str]) -> str:
    """Return a link to a paper, or an unchanged element."""
    if match[1]:
        return match[0]
    return f'<a href="https://arxiv.org/abs/{match[2]}">arXiv:{match[2]}</a>'

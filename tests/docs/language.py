"""Offences against the rules of prose that a program can check.

`python tests/docs/language.py [FILE...]` lists them, for the files given or for all.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parent.parent.parent
LONGEST_SENTENCE = 32
FIRST_SCREEN = 30  # lines of a page's source

# made by scripts
NOT_OURS = {"docs/backbones.md", "docs/laws.md", "docs/cli.md"}
# pages that a reader opens for their text
WITHOUT_CODE = {"docs/glossary.md", "docs/papers.md", "docs/comparison.md", "docs/performance.md"}

RIDDLES = {"what", "whether", "of", "why", "how", "where", "when", "which", "who", "whose", "as"}
RIDDLES |= {"by", "for", "from", "in", "on", "to", "with", "without", "if", "that", "so", "or"}

# the imperatives that summaries of functions begin with
VERBS = set(Path(__file__).with_name("verbs.txt").read_text(encoding="utf-8").split())

# pattern: what to write
WORDS = {
    r"\brefus(e|es|ed|ing|al|als)\b": "reject, raise, not support",
    r"\b(tell|tells|told|telling)\b": "show, report, pass",
    r"\b(wants|wanted)\b": "need, expect, require",
    r"\bknows\b": "holds, has",
    r"\b(hope|hopes|hoped)\b": "expect",
    r"\b(lest|wherein|whence|whereof|whereby|hereby|hitherto|whilst|upon|seldom)\b": "a newer word",
    r"\b(thereof|therein|thereby)\b": "a newer word",
    r"\bholds? that\b": "check that",
    r"\bcomes? with\b": "include, have",
    r"(?<!here )\b(is|are|was|were) no (?!longer\b|more\b|less\b|fewer\b|one\b)": "is not a",
    r"\b(stands|stood)\b(?! for\b)": "is",
    r"\b(go|goes|went|going) on\b": "continue",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\b(forget|forgets|forgot|forgotten|forgetting)\b": "drop, clear",
    r"\basks\b": "needs, requests",
    r"\basked of\b": "required of",
    r"\bfor good\b": "permanently",
    r"\bat hand\b": "available",
    r"\bhand-?over(s)?\b": "hand-off",
    r"\bwhole or not\b": "atomically",
    r"\bone way it can\b": "canonical",
    r", for (it|they|there|this|that|he|she|we|you)\b": "because",
    r"(?:^|[.!?] )(Of|Whether|Why) (?!\w+[?])": "a sentence with a subject",
    r"(?:^|[.!?] )(Dropped|Kept|Given|Wanted|Shown|Counted|Left|Taken|Meant|Made) (is|are)\b": (
        "the subject first"
    ),
}
COMPILED = {
    re.compile(pattern, re.I if pattern[0] == "\\" else 0): say for pattern, say in WORDS.items()
}


class Offence(NamedTuple):
    path: str
    line: int
    rule: str
    text: str


def prose_of_python(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line, kind, prose) for docstrings, messages and comments."""
    tree = ast.parse(text)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node):
                constant = node.body[0].value
                docstrings.add(id(constant))
                yield constant.lineno, "docstring", ast.get_docstring(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "`x`" for v in node.values]
            docstrings |= {id(v) for v in node.values}
            yield node.lineno, "message", "".join(parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings and node.value.count(" ") >= 2:
                yield node.lineno, "message", node.value
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], "comment", token.string.lstrip("# ")


def without_code(text: str) -> str:
    """Return the prose of a Markdown page or docstring, line for line."""
    text = re.sub(r"\A---\n.*?\n---\n", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    text = re.sub(
        r"^( *)(```|~~~).*?^\1\2", lambda m: "\n" * m[0].count("\n"), text, flags=re.S | re.M
    )
    text = re.sub(r"^ *(>>>|\.\.\.|python |hf-familial |accelerate ).*$", "", text, flags=re.M)
    text = re.sub(r"<[^>\n]*>", "", text)
    text = re.sub(r"`[^`]*`", "`x`", text)
    return re.sub(r"\]\([^)]*\)", "]", text)


def sentences(prose: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*|]|\d+\.) )|\n(?=#)", prose):
        if "|" in block:
            continue  # a table
        yield from re.split(r"(?<=[.!?]) ", " ".join(block.split()))


def word_offences(path: str, line: int, prose: str) -> Iterator[Offence]:
    plain = without_code(prose)
    for at, row in enumerate(plain.split("\n")):
        for pattern, say in COMPILED.items():
            for found in pattern.finditer(row):
                yield Offence(
                    path,
                    line + at,
                    "word",
                    f"{found[0].strip(' .')!r}: {say}. In: {row.strip()[:90]}",
                )
    if not re.search(r"[.,:;]", plain):
        return  # a list of names
    for sentence in sentences(plain):
        if len(sentence.split()) > LONGEST_SENTENCE:
            yield Offence(path, line, "long", f"{len(sentence.split())} words: {sentence[:80]}...")


def is_deed(summary: str, first: str) -> bool:
    """Return whether the summary of a class describes an action, such as "Logs the FLOPs"."""
    second = (summary.split() + [""])[1]
    if first in {"raised", "results"} or second in {"of", "that", "for", "and", "from", "with"}:
        return False
    return first in VERBS or (first.endswith("s") and first[:-1] in VERBS)


def is_property(node: ast.FunctionDef) -> bool:
    return any("property" in ast.unparse(d) for d in node.decorator_list)


def summary_offences(path: str, text: str) -> Iterator[Offence]:
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
            continue
        summary = (ast.get_docstring(node) or "").split("\n")[0]
        if not summary:
            continue
        line = getattr(node, "lineno", 1)
        first = re.match(r"[\w'-]*", summary.lstrip('`[("'))[0].lower()
        is_code = summary[0] in "`["
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_property(
            node
        )
        if first in RIDDLES:
            yield Offence(path, line, "summary", f"begins with {first!r}: {summary}")
        elif is_function and (is_code or first not in VERBS):
            yield Offence(path, line, "summary", f"begins with no imperative: {summary}")
        elif isinstance(node, ast.ClassDef) and not is_code and is_deed(summary, first):
            yield Offence(path, line, "summary", f"a class is a thing, not a deed: {summary}")


def page_offences(path: str, text: str) -> Iterator[Offence]:
    if path in WITHOUT_CODE or path.startswith("docs/reference/"):
        return
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)
    head = "\n".join(body.split("\n")[:FIRST_SCREEN])
    if "```" not in head:
        yield Offence(path, 1, "page", f"no code in its first {FIRST_SCREEN} lines")


def offences_of(path: Path) -> list[Offence]:
    """Return the offences of one file, a path inside the repository."""
    name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    if path.suffix in {".md", ".j2"}:
        found = list(word_offences(name, 1, text))
        return found + (list(page_offences(name, text)) if name.startswith("docs/") else [])
    found = list(summary_offences(name, text))
    for line, _, prose in prose_of_python(text):
        found += word_offences(name, line, prose)
    return found


def files() -> list[Path]:
    """Return the files whose prose people read."""
    pythons = [
        p
        for folder in ("src", "examples", "benchmarks", "scripts", "studies")
        for p in (ROOT / folder).rglob("*.py")
    ]
    pages = [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "examples/README.md",
        *(ROOT / "docs").rglob("*.md"),
    ]
    templates = [p for p in (ROOT / "src").rglob("*.j2") if ".md" in p.name]
    return sorted(
        p for p in pythons + pages + templates if p.relative_to(ROOT).as_posix() not in NOT_OURS
    )


def main() -> None:
    given = [Path(name).resolve() for name in sys.argv[1:]]
    given = [
        q
        for p in given
        for q in (sorted([*p.rglob("*.py"), *p.rglob("*.md")]) if p.is_dir() else [p])
    ]
    for path in given or files():
        for offence in offences_of(path):
            print(f"{offence.path}:{offence.line}: [{offence.rule}] {offence.text}")


if __name__ == "__main__":
    main()

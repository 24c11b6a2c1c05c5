"""A griffe extension that turns docstrings in the style of Transformers into Markdown.

`Args`, `Attributes`, `Returns`, `Yields` and `Raises` become lists, and examples become code. Names
in [`brackets`] become links if a reference page documents them. griffe reads the sources and
imports nothing.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import griffe


REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"
TITLES = {
    "Args": "Parameters",
    "Attributes": "Attributes",
    "Returns": "Returns",
    "Yields": "Yields",
    "Raises": "Raises",
    "Example": "Example",
    "Examples": "Examples",
}
HEADING = re.compile(rf"^({'|'.join(TITLES)}):[ ]*$")
# `name (type): meaning`, `name: meaning`, `one, other (type): meaning`; types may have parentheses
FIELD = re.compile(
    r"^(?P<name>\*{0,2}[\w.]+(?:, [\w.]+)*)(?:\s+\((?P<type>.*?)\))?:(?:\s+(?P<text>.*))?$", re.S
)
# `type` of shape ...: meaning
RESULT = re.compile(r"^(?P<type>\[?`[^`]+`\]?[^:`]*(?:`[^`]*`[^:`]*)*):\s+(?P<text>.*)$", re.S)
BRACKETS = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")
DOTTED = re.compile(r"(?<![\[`])`(hf_familial(?:\.\w+)+)`(?![\]`])")


class TransformersManner(griffe.Extension):
    """The extension: it rewrites every docstring of a loaded package."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        """Rewrite the docstrings of a package. griffe calls this method."""
        identifiers.cache_clear()  # `mkdocs serve` calls this again
        for found in walk(pkg):
            if found.docstring:
                found.docstring.value = to_markdown(found.docstring.value, found.path)
        for name in identifiers():
            found = pkg[name.partition(".")[2]]
            found = found.final_target if found.is_alias else found
            text = found.docstring.value if found.docstring else ""
            line = f"`{import_line(name, pkg)}`{{ .import }}"
            found.docstring = griffe.Docstring(f"{line}\n\n{text}", parent=found)


def walk(parent: griffe.Object) -> Iterator[griffe.Object]:
    """Yield an object and all objects that are defined in it, without aliases."""
    yield parent
    for member in parent.members.values():
        if not member.is_alias:
            yield from walk(member)


def import_line(name: str, pkg: griffe.Module) -> str:
    """Return the import of a documented name, from the package that exports it if one does."""
    parent, _, short = name.rpartition(".")
    room, _, module = parent.rpartition(".")
    path = room.partition(".")[2]
    if module == short and short in ((pkg[path] if path else pkg).exports or ()):
        parent = room  # the module has the name of the function
    return f"from {parent} import {short}"


def to_markdown(docstring: str, path: str) -> str:
    """Return the Markdown for the docstring of the object at `path`."""
    parts: list[str] = []
    for title, body in sections(docstring):
        if title.startswith("Example"):
            parts.append(f"**{TITLES[title]}**\n\n```python\n{textwrap.dedent(body).strip()}\n```")
        elif title:
            parts.append(f"**{TITLES[title]}**\n\n{items(title, textwrap.dedent(body), path)}")
        else:
            parts.append(linked(body.strip(), path))
    return "\n\n".join(filter(None, parts))


def sections(docstring: str) -> Iterator[tuple[str, str]]:
    """Yield titles and texts in order. Text outside of sections has the title ""."""
    title, lines = "", []
    for line in docstring.splitlines():
        heading = HEADING.match(line)
        ends = title and line and not line.startswith(" ")
        if heading or ends:
            yield title, "\n".join(lines)
            title, lines = (heading.group(1), []) if heading else ("", [line])
        else:
            lines.append(line)
    yield title, "\n".join(lines)


def items(title: str, body: str, path: str) -> str:
    """Return the entries of a section as a Markdown list."""
    if title in ("Returns", "Yields"):
        entry = body.strip()
        found = RESULT.match(entry)
        text = f"{found['type']} — {found['text']}" if found else entry
        return f"- {indented(linked(text, path))}"
    lines = []
    for entry in entries(body):
        found = FIELD.match(entry)
        if not found:
            lines.append(f"- {indented(linked(entry, path))}")
            continue
        kind = f" ({found['type']})" if found["type"] else ""
        text = f" — {found['text'].strip()}" if found["text"] else ""
        bold = "" if title == "Raises" else "**"
        name = ", ".join(f"{bold}`{name}`{bold}" for name in found["name"].split(", "))
        lines.append(f"- {name}{indented(linked(kind + text, path))}")
    return "\n".join(lines)


def entries(body: str) -> Iterator[str]:
    """Yield the entries of a section. A line without indent starts an entry."""
    lines: list[str] = []
    for line in body.splitlines():
        if lines and line and not line.startswith(" "):
            yield "\n".join(lines).strip()
            lines = []
        if line or lines:
            lines.append(line)
    if lines:
        yield "\n".join(lines).strip()


def indented(text: str) -> str:
    """Indent all lines of a text except the first, for an item of a list."""
    first, *rest = text.splitlines() or [""]
    body = textwrap.dedent("\n".join(rest))
    return first + (f"\n{textwrap.indent(body, '    ')}" if body else "")


def linked(text: str, path: str) -> str:
    """Turn bracketed names into links, or into code if no page documents them."""

    def bracketed(match: re.Match[str]) -> str:
        short, name = match.groups()
        shown = name.rsplit(".", 1)[-1] if short else name
        target = documented(name, path)
        return f"[`{shown}`][{target}]" if target else f"`{shown}`"

    def dotted(match: re.Match[str]) -> str:
        target = documented(match.group(1), path)
        return f"[`{match.group(1)}`][{target}]" if target else match.group(0)

    return DOTTED.sub(dotted, BRACKETS.sub(bracketed, text))


def documented(name: str, path: str) -> str:
    """Return the documented identifier that matches a name and is nearest to `path`."""
    head, *rest = name.split(".") if not name.startswith("hf_familial") else [name]
    found = [i for i in identifiers() if i == head or i.endswith(f".{head}")]
    if not found:
        return ""
    nearest = max(found, key=lambda i: (shared(i, path), -len(i)))
    return ".".join([nearest, *rest])


def shared(one: str, other: str) -> int:
    """Return the number of leading parts that two dotted paths share."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(one.split(".")))


@cache
def identifiers() -> tuple[str, ...]:
    """Return all identifiers after `:::` in the reference pages."""
    pages = sorted(REFERENCE.glob("*.md"))
    texts = (page.read_text(encoding="utf-8") for page in pages)
    return tuple(name for text in texts for name in re.findall(r"^::: (\S+)", text, re.M))

"""Write docs/laws.md from the catalogue of scaling laws.

python scripts/list_laws.py            # writes the page
python scripts/list_laws.py --check    # fails if the page would change
"""

from __future__ import annotations

import sys
from pathlib import Path

from pages import keep, table, wants_check

from hf_familial.scaling import LAWS, Law
from hf_familial.scaling.laws import ALIASES


PAGE = Path(__file__).resolve().parent.parent / "docs" / "laws.md"
FAMILIES = {
    "familial": "Familial models",
    "dense": "Dense models",
    "sparse": "Sparse models and mixtures of experts",
    "rule": "Rules for settings",
}
HEADER = """# Scaling laws

The {count} laws of `hf_familial.scaling`, made by `python scripts/list_laws.py` from the catalogue
itself. Fit one by its name: `hf-familial fit runs.jsonl --law {first}`; see
[scaling.md](scaling.md). Losses are in nats per token, C in FLOPs, N in parameters, D in tokens.

A law of your own is one more [`Law`](../src/hf_familial/scaling/laws/law.py): its variables, its
parameters, and one function that gives a column per linear parameter."""


def page() -> str:
    """The whole page."""
    first = next(iter(LAWS))
    rows = [
        [f"[`{law.name}`](#{law.name})", f"`{law.formula_text}`", ", ".join(law.variable_names)]
        for law in LAWS.values()
    ]
    aliases = ", ".join(f"`{alias}` is `{name}`" for alias, name in ALIASES.items())
    parts = [HEADER.format(count=len(LAWS), first=first), table(["name", "formula", "reads"], rows)]
    parts += [f"Other names: {aliases}."] if aliases else []
    for family, title in FAMILIES.items():
        laws = [law for law in LAWS.values() if law.family == family]
        if laws:
            parts += [f"## {title}", *map(section, laws)]
    return "\n\n".join(parts) + "\n"


def section(law: Law) -> str:
    """One law."""
    parts = [
        f"### {law.name}",
        f"{law.title}. Source: {link(law.source)}.",
        f"$$ {law.formula} $$",
        f"    {law.formula_text}",
    ]
    if law.target.name != "loss":
        parts.append(f"Predicts `{law.target.name}`: {law.target.meaning} ({law.target.unit}).")
    columns = [[f"${v.symbol}$ `{v.name}`", v.unit, v.range_text, v.meaning] for v in law.variables]
    parts.append(table(["variable", "unit", "values", "meaning"], columns))
    labels = list(law.published)
    head = ["parameter", "kind", "bounds", "meaning", *(f"published: {name}" for name in labels)]
    rows = []
    for parameter in law.parameters:
        low, high = parameter.bounds
        kind = "linear" if parameter in law.linear else "nonlinear"
        values = [f"{law.published[name].values[parameter.name]:.6g}" for name in labels]
        cells = [f"${parameter.symbol}$ `{parameter.name}`", kind, f"{low:g} to {high:g}"]
        rows.append([*cells, parameter.meaning, *values])
    parts.append(table(head, rows))
    for name, published in law.published.items():
        note = f" {published.note}" if published.note else ""
        parts.append(f"- {name}: {link(published.source)}.{note}")
    parts += [law.notes] if law.notes else []
    return "\n\n".join([*parts, *domain(law)])


def domain(law: Law) -> list[str]:
    """Where a law holds, and where it does not."""
    found = law.domain
    words = [f"For {', '.join(found.architectures)} models."] if found.architectures else []
    words += [found.settings] if found.settings else []
    if found.ranges:
        ranges = (f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in found.ranges.items())
        words.append(f"Fitted on: {'; '.join(ranges)}.")
    failures = "\n".join(f"- {failure}" for failure in found.failures)
    return [part for part in (" ".join(words), failures) if part]


def link(source: str) -> str:
    """A source with its arXiv number as a link."""
    words = source.split(" ")
    for i, word in enumerate(words):
        number = word.strip(",.;:()")
        if i and words[i - 1].lower() == "arxiv" and number[:4].isdigit():
            words[i] = word.replace(number, f"[{number}](https://arxiv.org/abs/{number})")
    return " ".join(words)


def main() -> int:
    """Write the page, or compare with it."""
    check, text = wants_check(__doc__), page()
    return keep(PAGE, text, "list_laws.py", f"{len(LAWS)} laws", check)


if __name__ == "__main__":
    sys.exit(main())

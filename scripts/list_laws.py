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

A scaling law predicts the loss of a model from its size, its training tokens and other numbers
of a run. This package contains {count} laws. Choose one by its name:

```bash
hf-familial fit runs.jsonl --law {first}
hf-familial fit --law list                    # prints names and formulas
```

```python
from hf_familial.scaling import get_law

law = get_law("hoffmann")
values = law.published["besiroglu"].values
loss = float(law.predict(values, N=70e9, D=1.4e12))
print(f"{{loss:.3f}} nats per token")
```

```text title="Output"
{example}
```

The loss is in nats per token, N in parameters, D in tokens and C in FLOPs. Open a law below for
its symbols, the values that papers published, and the runs that those values come from.
[Fit and plan](scaling.md) explains how to fit. `python scripts/list_laws.py` writes this page.

A law of your own is an instance of [`Law`](../src/hf_familial/scaling/laws/law.py). It has
variables, parameters, and one function that returns a column for each linear parameter."""


def page() -> str:
    """Return the page."""
    rows = [[f"[`{law.name}`](#{law.name})", f"`{law.formula_text}`"] for law in LAWS.values()]
    hoffmann = LAWS["hoffmann"]
    loss = hoffmann.predict(hoffmann.published["besiroglu"].values, N=70e9, D=1.4e12)
    names = {"count": len(LAWS), "first": next(iter(LAWS))}
    head = HEADER.format(**names, example=f"{float(loss):.3f} nats per token")
    aliases = ", ".join(f"`{alias}` is `{name}`" for alias, name in ALIASES.items())
    parts = [head, table(["name", "formula"], rows)]
    parts += [f"Other names: {aliases}."] if aliases else []
    for family, title in FAMILIES.items():
        laws = [law for law in LAWS.values() if law.family == family]
        if laws:
            parts += [f"## {title}", *map(block, laws)]
    return "\n\n".join(parts) + "\n"


def block(law: Law) -> str:
    """Return the collapsible block of one law."""
    summary = f"<summary><code>{law.name}</code>: {law.title}</summary>"
    parts = [f'<details id="{law.name}" markdown>\n{summary}', f"$$ {law.formula} $$"]
    parts.append(f"As text: `{law.formula_text}`. Source: {link(law.source)}.")
    if law.target.name != "loss":
        parts.append(f"Predicts `{law.target.name}`: {law.target.meaning} ({law.target.unit}).")
    labels = list(law.published)
    rows = [
        [f"${v.symbol}$ `{v.name}`", v.meaning + unit(v.unit), v.range_text, *("" for _ in labels)]
        for v in law.variables
    ]
    for parameter in law.parameters:
        low, high = parameter.bounds
        values = [f"{law.published[name].values[parameter.name]:.6g}" for name in labels]
        cells = [f"${parameter.symbol}$ `{parameter.name}`", parameter.meaning]
        rows.append([*cells, f"{low:g} to {high:g}", *values])
    parts.append(table(["symbol", "meaning", "range", *(f"*{name}*" for name in labels)], rows))
    notes = [
        f"- *{name}*: {link(found.source)}. {found.note}".rstrip()
        for name, found in law.published.items()
    ]
    parts += ["\n".join(notes)] if notes else []
    parts += [law.notes] if law.notes else []
    return "\n\n".join([*parts, *domain(law), "</details>"])


def unit(name: str) -> str:
    """Return the words for a unit; a count has none."""
    return "" if name == "1" else f" ({name})"


def domain(law: Law) -> list[str]:
    """Return the range of runs that a law was fitted to, and its known failures."""
    found = law.domain
    words = [f"For {', '.join(found.architectures)} models."] if found.architectures else []
    words += [found.settings] if found.settings else []
    if found.ranges:
        ranges = (f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in found.ranges.items())
        words.append(f"Fitted on: {'; '.join(ranges)}.")
    failures = "\n".join(f"- {failure}" for failure in found.failures)
    return [part for part in (" ".join(words), failures) if part]


def link(source: str) -> str:
    """Return a source with a link for its arXiv number."""
    words = source.split(" ")
    for i, word in enumerate(words):
        number = word.strip(",.;:()")
        if i and words[i - 1].lower() == "arxiv" and number[:4].isdigit():
            words[i] = word.replace(number, f"[{number}](https://arxiv.org/abs/{number})")
    return " ".join(words)


def main() -> int:
    """Write the page, or compare it with the file."""
    check, text = wants_check(__doc__), page()
    return keep(PAGE, text, "list_laws.py", f"{len(LAWS)} laws", check)


if __name__ == "__main__":
    sys.exit(main())

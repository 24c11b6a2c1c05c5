"""What turns docstrings and links into the book's pages."""

import doctest
import importlib.util
import sys
import textwrap
from pathlib import Path

import pytest


pytest.importorskip("griffe")
pytest.importorskip("mkdocs")
pytest.importorskip("latex2mathml")

ROOT = Path(__file__).resolve().parents[2]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


docstrings, hooks = load("docs_docstrings"), load("docs_hooks")

DOCSTRING = """Cut a family.

Args:
    model ([`FamilialForCausalLM`]): The family.
    ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*, defaults to `None`): Token
        ids, as `{"a": 1}`.
    low, high (`float`): Band.
    **kwargs: Passed on.

Returns:
    `tuple[int, ...]`: Depths; see
    [`NotOurs`].

Raises:
    ValueError: If wrong: badly.

Example:
    >>> cut(model)
    [1]

Reference: arXiv:2512.23407.
"""
MARKDOWN = """Cut a family.

**Parameters**

- **`model`** ([`FamilialForCausalLM`][hf_familial.FamilialForCausalLM]) — The family.
- **`ids`** (`torch.LongTensor` of shape `(batch, seq)`, *optional*, defaults to `None`) — Token
    ids, as `{"a": 1}`.
- **`low`**, **`high`** (`float`) — Band.
- **`**kwargs`** — Passed on.

**Returns**

- `tuple[int, ...]` — Depths; see
    `NotOurs`.

**Raises**

- `ValueError` — If wrong: badly.

**Example**

```python
>>> cut(model)
[1]
```

Reference: arXiv:2512.23407."""


def test_a_docstring_becomes_markdown():
    assert docstrings.to_markdown(DOCSTRING, "hf_familial.hub.cut") == MARKDOWN


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[`~transformers.Trainer`]", "`Trainer`"),
        ("[`FamilialConfig`]", "[`FamilialConfig`][hf_familial.FamilialConfig]"),
        ("[`ServerSide.resume`]", "[`ServerSide.resume`][hf_familial.handoff.ServerSide.resume]"),
        ("`hf_familial.calibrate`", "[`hf_familial.calibrate`][hf_familial.calibrate]"),
        ("`hf_familial.nothing`", "`hf_familial.nothing`"),
        ("[`kept`](page.md)", "[`kept`](page.md)"),
        ("`torch.Tensor`", "`torch.Tensor`"),
    ],
)
def test_names_become_links_where_a_page_documents_them(text, expected):
    assert docstrings.linked(text, "hf_familial.hub.export") == expected


def test_of_two_names_the_nearest_is_linked(monkeypatch):
    far, near = "hf_familial.scaling.fit.Thing", "hf_familial.training.data.Thing"
    monkeypatch.setattr(docstrings, "identifiers", lambda: (far, near))
    assert docstrings.documented("Thing", "hf_familial.training.data.corpus") == near
    assert docstrings.documented("Thing", "hf_familial.scaling.fit.search") == far


@pytest.fixture(scope="module")
def package():
    import griffe

    return griffe.load("hf_familial", search_paths=[ROOT / "src"], allow_inspection=False)


def test_every_example_of_a_docstring_is_python(package):
    count = 0
    for found in docstrings.walk(package):
        for title, body in docstrings.sections(found.docstring.value if found.docstring else ""):
            if title.startswith("Example"):
                examples = doctest.DocTestParser().get_examples(textwrap.dedent(body))
                assert examples, found.path
                count += len([compile(e.source, found.path, "single") for e in examples])
    assert count > 30


def test_every_entry_of_a_docstring_is_understood(package):
    odd = [
        (found.path, entry)
        for found in docstrings.walk(package)
        for title, body in docstrings.sections(found.docstring.value if found.docstring else "")
        if title in ("Args", "Attributes", "Raises")
        for entry in docstrings.entries(textwrap.dedent(body))
        if not docstrings.FIELD.match(entry)
    ]
    assert odd == []


def test_every_import_line_works(package):
    lines = [docstrings.import_line(name, package) for name in docstrings.identifiers()]
    assert "from hf_familial import FamilialConfig" in lines
    assert "from hf_familial.scaling import fit" in lines
    for line in lines:
        namespace = {}
        exec(line, namespace)
        assert type(namespace[line.split()[-1]]) is not type(sys), line


@pytest.mark.parametrize(
    ("link", "page", "expected"),
    [
        ("../examples/handoff.py", "handoff.md", "examples/handoff.py"),
        ("../../benchmarks/results/", "concepts/loss.md", "benchmarks/results"),
        ("relay.md", "training.md", ""),
        ("../training.md", "concepts/loss.md", ""),
        ("../no_such_file.py", "training.md", ""),
        ("../../outside.md", "training.md", ""),
    ],
)
def test_links_that_leave_the_book_are_found(link, page, expected):
    assert hooks.repository_file(link, page) == expected


def test_links_in_code_are_left_alone():
    text = "[a](../a.py) and\n```md\n[b](../b.py)\n````\n```\n[c](https://c) [d](d.md#x)\n"
    assert list(hooks.links(text)) == ["../a.py", "d.md"]


def test_a_file_of_the_repository_is_shown_whole():
    page = hooks.shown("examples/handoff.py")
    assert (ROOT / "examples" / "handoff.py").read_text(encoding="utf-8").rstrip() in page
    assert "exclude: true" in page
    assert hooks.place("examples/handoff.py") == "source/examples/handoff.py.md"
    folder = hooks.shown("benchmarks/results")
    assert "[`relay_cpu.json`](relay_cpu.json.md)" in folder
    assert isinstance(hooks.shown("docs/assets/family-light.svg"), bytes)


def test_papers_become_links_outside_links_and_code():
    html = 'arXiv:2512.23407 <a href="x">arXiv:2512.23407</a> <code>arXiv:2512.23407</code>'
    link = '<a href="https://arxiv.org/abs/2512.23407">arXiv:2512.23407</a>'
    assert hooks.PAPER.sub(hooks.as_paper, html) == html.replace("arXiv:2512.23407", link, 1)


def test_formulas_become_mathml():
    html = r'<span class="arithmatex">\(a &lt; \frac{b}{c}\)</span>'
    made = hooks.MATH.sub(hooks.as_mathml, html)
    assert made.startswith('<span class="formula"><math')
    assert "<mfrac>" in made
    assert "&#x0003C;" in made
    block = hooks.MATH.sub(hooks.as_mathml, r'<div class="arithmatex">\[x\]</div>')
    assert 'display="block"' in block


def test_only_blocks_of_prose_wrap():
    start = '<div class="highlight"><pre><span></span><code>'
    for text, kind in [
        ("`exits` must be 1 or more.\nGot 0.", "words "),
        ("    indented", "words "),
        ("depth   loss\n   20   4.84", "columns "),
        ("│ 20 │", "columns "),
        ('<span class="kn">import</span> this', ""),
    ]:
        html = hooks.TEXT_BLOCK.sub(hooks.as_words, f"{start}{text}</code></pre></div>")
        assert html == f"{start.replace('high', f'{kind}high')}{text}</code></pre></div>"

"""The rules of prose that a program can check, over all that people read."""

from collections import Counter
from pathlib import Path

import pytest
from docs.language import ROOT, files, offences_of, page_offences, summary_offences, word_offences


# file: offences that remain in it; a number may only fall, and a file without any leaves the list
REMAINING: dict[str, int] = {}


def test_prose_keeps_the_rules() -> None:
    found = [offence for path in files() for offence in offences_of(path)]
    counts = Counter(offence.path for offence in found)
    new = [o for o in found if counts[o.path] > REMAINING.get(o.path, 0)]
    assert not new, "\n" + "\n".join(f"{o.path}:{o.line}: {o.text}" for o in new)
    assert counts == REMAINING, "lower the numbers in REMAINING"


def test_the_rules_read_every_kind_of_file() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in files()}
    assert {"README.md", "docs/index.md", "src/hf_familial/errors.py"} <= names
    assert {"examples/pretrain.py", "src/hf_familial/hub/card.md.j2"} <= names


@pytest.mark.parametrize(
    "prose",
    [
        "The relay refuses to draft.",
        "Whether lean passes are worth a copy.",
        "It is no folder.",
        "Dropped are the layers below.",
        "The server knows the exits.",
        "The state stands in the cache.",
        "It stops, for it has no tokens.",
        " ".join(["word"] * 33) + ".",
    ],
)
def test_words_that_break_a_rule_are_found(prose: str) -> None:
    assert list(word_offences("a.md", 1, prose))


@pytest.mark.parametrize(
    "prose",
    [
        "There is no folder. G stands for the number of exits.",
        "Run `refuses to` as code.\n\n```python\nwanted = 1\n```\n",
        "| a table | tells |",
    ],
)
def test_plain_prose_is_left_alone(prose: str) -> None:
    assert [o for o in word_offences("a.md", 1, prose) if o.rule == "long"] == []


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ('def f():\n    """Return the loss."""', 0),
        ('def f():\n    """What a run costs."""', 1),
        ('def f():\n    """The loss."""', 1),
        ('class A:\n    """The side that runs."""', 0),
        ('class A:\n    """Writes rows."""', 1),
        ('class A:\n    @property\n    def f(self):\n        """The loss."""', 0),
    ],
)
def test_summaries_begin_with_a_verb_or_a_noun(code: str, count: int) -> None:
    assert len(list(summary_offences("a.py", code))) == count


def test_a_page_has_code_in_its_first_screen(tmp_path: Path) -> None:
    assert list(page_offences("docs/a.md", "# Title\n" + "text\n" * 40 + "```python\n```\n"))
    assert not list(page_offences("docs/a.md", "# Title\n\n```python\n```\n"))

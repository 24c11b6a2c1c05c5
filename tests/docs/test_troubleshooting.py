"""The messages that docs/troubleshooting.md quotes are those that the mistakes cause."""

import pytest
from docs.troubles import ENTRY, PAGE, TROUBLES, message_of


QUOTED = dict(ENTRY.findall(PAGE.read_text(encoding="utf-8")))


def test_every_mistake_is_explained():
    assert list(QUOTED) == list(TROUBLES)


@pytest.mark.parametrize("name", TROUBLES)
def test_a_quoted_message_is_the_real_one(name):
    assert QUOTED[name].split() == message_of(name).split(), (
        "Run `PYTHONPATH=src:tests python tests/docs/troubles.py`."
    )

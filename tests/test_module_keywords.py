"""`pytest -k MODULE` finds tests for every module of the package."""

from pathlib import Path

from module_keywords import keywords, sources


TESTS = Path(__file__).parent


def test_every_module_is_concerned_by_some_test_file():
    known = frozenset().union(*map(keywords, TESTS.rglob("test_*.py")))
    files = " ".join(path.stem for path in TESTS.rglob("test_*.py"))
    rooms = {name.rpartition(".")[0] for name in sources()}
    stems = {name.split(".")[-1].strip("_") for name in set(sources()) - rooms - {"__main__"}}
    assert {stem for stem in stems if stem not in known and stem not in files} == set()


def test_a_file_concerns_what_it_imports_and_little_else():
    found = keywords(TESTS / "checkpoints" / "test_plain.py")
    assert {"plain", "cuts"} <= found
    assert not found & {"trainer", "sweep", "fitting", "server"}

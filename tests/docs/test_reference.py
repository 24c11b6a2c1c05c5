"""Generated pages are fresh, the reference is whole, the first page's numbers are measured."""

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ROOMS = tuple(
    path.parent.name
    for path in sorted((ROOT / "src" / "hf_familial").glob("*/__init__.py"))
    if "__all__" in path.read_text(encoding="utf-8") and path.parent.name != "cli"
)
PAGES = {
    path.stem: re.findall(r"^::: (\S+)", path.read_text(encoding="utf-8"), re.M)
    for path in sorted((DOCS / "reference").glob("*.md"))
}
NAMES = [name for names in PAGES.values() for name in names]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def resolve(name):
    """What a dotted name stands for: its longest part that is a module, then attributes."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{name} is not importable")


@pytest.mark.parametrize(
    "script", ["list_commands.py", "draw_family.py", "draw_house.py", "list_reference.py"]
)
def test_what_scripts_make_is_fresh(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    assert load(ROOT / "scripts" / script).main() == 0, capsys.readouterr().out


@pytest.mark.parametrize("script", ["list_commands.py", "draw_family.py"])
def test_a_stale_file_is_noticed(script, monkeypatch, capsys, tmp_path):
    module = load(ROOT / "scripts" / script)
    place = "PAGE" if hasattr(module, "PAGE") else "ASSETS"
    monkeypatch.setattr(module, place, tmp_path / "page.md" if place == "PAGE" else tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    assert module.main() == 1
    assert "stale" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(sys, "argv", [script])
    assert module.main() == 0
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    assert module.main() == 0


def test_the_page_of_commands_knows_every_command():
    import typer

    from hf_familial.cli import app

    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    for name, command in typer.main.get_command(app).commands.items():
        assert f"`hf-familial {name}" in page, name
        for option in getattr(command, "params", ()):
            if option.param_type_name == "option" and option.name != "help":
                assert f"`{option.opts[0]}`" in page, (name, option.opts)


@pytest.mark.slow
def test_the_page_of_commands_shows_their_output():
    module = load(ROOT / "scripts" / "list_commands.py")
    assert module.kept_samples() == module.samples()


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_every_public_name_is_on_one_page(room):
    module = importlib.import_module(f"hf_familial.{room}".rstrip("."))
    shown = {}
    for name in NAMES:
        shown.setdefault(name.rsplit(".", 1)[1], []).append(resolve(name))
    for name in set(module.__all__) - {"__version__"}:
        wanted = getattr(module, name)
        count = sum(found is wanted for found in shown.get(name, ()))
        assert count == 1, f"{module.__name__}.{name} is {count} times in docs/reference/"


def test_names_of_the_package_are_shown_by_their_short_path():
    import hf_familial

    long = [
        name
        for name in NAMES
        if (short := name.rsplit(".", 1)[1]) in hf_familial.__all__
        and name != f"hf_familial.{short}"
        and resolve(name) is getattr(hf_familial, short)
    ]
    assert long == []


def test_what_the_reference_names_exists():
    assert sorted(set(NAMES)) == sorted(NAMES)
    assert [name for name in NAMES if not is_told(resolve(name))] == []


def is_told(found):
    return not callable(found) or bool(found.__doc__)


def test_the_index_of_the_reference_lists_its_pages():
    text = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\w+)\.md\)", text)) == set(PAGES) - {"index"}


# the numbers of the first pages: how they are shown, and where they are measured
FIRST_PAGE = {
    "2.06 times as fast": ("relay_cpu", "relay_speedup_over_generate"),
    "1.20 times": ("relay_cpu", "relay_speedup_over_plain"),
    "0.35 times": ("multi_exit_loss_cpu", "memory_G4_over_naive_V32768"),
    "5.7 MiB": ("export_cpu", "ours_4gb_peak_mib"),
    "0.024 s": ("fitter_cpu", "fit_240_s"),
}


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_numbers_of_the_first_pages_are_measured(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    shown = re.findall(r"^\| .*\]\(.*performance\.md#[\w-]+\).*\| (.+) \|$", text, re.M)
    assert shown == list(FIRST_PAGE)
    claims = list(FIRST_PAGE.items())
    if "times the FLOPs of one" in text:
        claims.append(("2.18 times the FLOPs", ("multi_exit_loss_cpu", "flop_ratio_G4_V32768")))
    for claim, (file, key) in claims:
        assert claim in text
        number = claim.split()[0]
        path = ROOT / "benchmarks" / "results" / f"{file}.json"
        measured = json.loads(path.read_text(encoding="utf-8"))["metrics"][key]
        digits = len(number.partition(".")[2])
        assert f"{measured:.{digits}f}" == number, (file, key, measured)

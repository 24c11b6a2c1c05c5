"""Every command line of the documentation names commands, options, files and targets that exist."""

import ast
from pathlib import Path

import pytest
from docs.blocks import ROOT, commands_of, name_of, pages
from docs.command_lines import commands_in, help_of, options_of, problems


SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("examples/**/*.py"))
READMES = [ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("examples/**/README.md"))]


@pytest.mark.parametrize("page", [*pages(), *READMES], ids=name_of)
def test_a_page_commands_what_there_is(page: Path) -> None:
    lines = commands_of(name_of(page), page.read_text(encoding="utf-8"))
    wrong = [f"{place}: {line}: {what}" for place, line in lines for what in problems(line)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_says_how_to_run_it(script: str) -> None:
    documentation = ast.get_docstring(ast.parse((ROOT / script).read_text(encoding="utf-8"))) or ""
    lines = [line for _, line in commands_of(script, documentation)]
    assert any(script in line for line in lines)
    assert not [what for line in lines for what in problems(line)]


def test_lines_are_found() -> None:
    page = (
        "Say `hf-familial fit\nruns.jsonl --law x`, or\n\n"
        "    python examples/a.py \\\n        --b 1\n\n"
        "```bash\n# a comment\nmake test  # and one more\nX=1 hf-familial push a b && cd c\n```\n"
    )
    lines = dict(commands_of("p", page))
    assert lines["p:9"] == "make test  # and one more"
    assert lines["p:1"] == "`hf-familial fit runs.jsonl --law x"
    assert lines["p:4"] == "python examples/a.py --b 1"
    assert commands_in(lines["p:10"]) == [["hf-familial", "push", "a", "b"], ["cd", "c"]]
    assert commands_in(lines["p:8"]) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("hf-familial fly", "no command `fly`"),
        ("hf-familial fit runs.jsonl --lew familial", "No such option: --lew"),
        ("hf-familial describe", "Missing parameter"),
        ("hf-familial describe x --context many", "a valid integer"),
        ("`hf-familial fit --lew x", "has no option --lew"),
        ("python examples/absent.py", "no such file: examples/absent.py"),
        ("python examples/relay_generate.py --mudel x", "has no option --mudel"),
        ("accelerate launch --config_file x.yaml examples/handoff.py", "no such file: x.yaml"),
        ("make nonsense", "no such target: nonsense"),
        ('pip install -e ".[tests]" -c constraints.txt', "no such extra: tests"),
        ("pip install -r absent.txt", "no such file: absent.txt"),
        ("frobnicate", "what is `frobnicate`?"),
        ("cd a && hf-familial fly", "no command `fly`"),
    ],
)
def test_what_is_wrong_is_seen(line: str, said: str) -> None:
    (found,) = problems(line)
    assert said in found


@pytest.mark.parametrize(
    "line",
    [
        "hf-familial describe me/family --context 2048 --memory 2GB  # which fits",
        "`hf-familial fit --law",
        "OMP_NUM_THREADS=1 python examples/relay_generate.py --model x --draft-exit 1 > out.txt",
        "$ .venv/bin/accelerate launch --num_processes 2 examples/tune_exits.py --backbone x",
        'pip install -e ".[test,lint]" -c constraints.txt',
    ],
)
def test_what_is_right_passes(line: str) -> None:
    assert problems(line) == []


def test_options_are_those_of_the_script() -> None:
    assert {"--smoke", "--draft_exit", "--help"} <= options_of("examples/relay_generate.py")
    assert "usage: relay_generate.py" in help_of("examples/relay_generate.py")

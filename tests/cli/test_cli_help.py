"""The help of every command, and the start of `hf-familial` without torch."""

import os
import subprocess
import sys

import pytest
import typer

from hf_familial.cli import app
from hf_familial.cli._help import ADVANCED, LINES


START = "from hf_familial_command import main; main()"
# a module `torch` in the working folder that ends the process as soon as it is imported
NO_TORCH = "raise SystemExit('torch was imported')"


def commands(command=None, path=()):
    command = command or typer.main.get_command(app)
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


COMMANDS = {" ".join(path): command for path, command in commands()}


@pytest.fixture(scope="module")
def helps(cli_once):
    """The help of every command at 80 columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer._click.formatting.FORCED_WIDTH", 78)
        return {name: cli_once(*name.split(), "--help") for name in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_one_screen(helps, name):
    code, out, err = helps[name]
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= 80
    assert "\xa0" not in out
    if not name:  # no summary of a command is cut
        assert "..." not in out.split("\n", 1)[1]


@pytest.mark.parametrize("name", [n for n, c in COMMANDS.items() if not hasattr(c, "commands")])
def test_help_all_shows_every_option_with_a_sentence(cli, name):
    code, out, err = cli(*name.split(), "--help-all", columns=80)
    assert (code, err) == (0, "")
    for parameter in COMMANDS[name].params:
        assert parameter.help.endswith("."), parameter.name
        if parameter.param_type_name == "option":
            assert parameter.opts[0].removeprefix("--") in out


def test_help_counts_the_options_that_it_hides(helps):
    hidden = [p for p in COMMANDS["fit"].params if p.rich_help_panel == ADVANCED]
    _, out, _ = helps["fit"]
    assert out.rstrip().endswith(
        f"`hf-familial fit --help-all` also shows {len(hidden)} more options."
    )
    assert "--objective" not in out
    assert "--help-all" not in helps["plan"][1]


def test_help_lists_every_command(helps):
    out = helps[""][1]
    for name in COMMANDS[""].commands:
        assert f"\n  {name} " in out
    assert out.index("  fit ") < out.index("  plan ")


def run_in(folder, *words):
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def without_torch(tmp_path):
    (tmp_path / "torch.py").write_text(NO_TORCH)
    return tmp_path


@pytest.mark.parametrize("words", ["--help", "fit --help-all", "fit --law list", "sweep plan -h"])
def test_commands_without_a_model_start_without_torch(without_torch, words):
    done = run_in(without_torch, "-c", START, *words.split())
    assert done.returncode == (2 if "-h" in words.split() else 0), done.stderr
    assert "torch was imported" not in done.stderr


@pytest.mark.parametrize(
    "name", ["hf-familial.py", "hf-familial", "hf_familial_command.py", "x.py"]
)
def test_a_script_with_any_name_registers_the_models(without_torch, name):
    """The import of torch, which stops this script, is the first step of the registration."""
    (without_torch / name).write_text("import hf_familial\nprint('not registered')\n")
    done = run_in(without_torch, name)
    assert (done.stdout, done.stderr) == ("", "torch was imported\n")


def test_importing_the_entry_point_does_not_stop_the_registration(without_torch):
    done = run_in(without_torch, "-c", "import hf_familial_command, hf_familial")
    assert done.stderr == "torch was imported\n"


def test_a_command_with_a_model_registers_it_first(without_torch):
    (without_torch / "family").mkdir()
    (without_torch / "family" / "config.json").write_text("{}")
    done = run_in(without_torch, "-c", START, "describe", "family")
    assert done.stderr == "torch was imported\n"


@pytest.mark.slow
@pytest.mark.parametrize("start", [("-c", START), ("-m", "hf_familial")])
def test_commands_describe_a_family(tmp_path, start):
    from hf_familial.toy import toy_family

    toy_family()[0].save_pretrained(tmp_path / "family")
    done = run_in(tmp_path, *start, "describe", "family")
    assert done.returncode == 0, done.stderr
    assert "exit" in done.stdout


@pytest.mark.slow
def test_a_script_of_this_name_loads_a_family_by_auto_classes(tmp_path):
    from hf_familial.toy import toy_family

    toy_family()[0].save_pretrained(tmp_path / "family")
    (tmp_path / "hf-familial.py").write_text(
        "import hf_familial\nfrom transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_pretrained('family')).__name__)\n"
    )
    done = run_in(tmp_path, "hf-familial.py")
    assert done.stdout == "FamilialForCausalLM\n", done.stderr


@pytest.mark.slow
def test_accelerate_launches_the_module(tmp_path):
    words = ("launch", "--cpu", "-m", "hf_familial", "fit", "--law", "list")
    done = run_in(tmp_path, "-m", "accelerate.commands.accelerate_cli", *words)
    assert done.returncode == 0, done.stderr
    assert "hoffmann" in done.stdout

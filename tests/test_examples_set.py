"""The examples as a set: each tries itself out, explains itself and ends as a program should."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants


ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


@dataclass(frozen=True)
class Example:
    """What an example shows when it is tried, and what it says of mistakes.

    Attributes:
        shows: Found in what it prints with `--smoke`, spaces and line ends made one space.
        mistakes: Words, the exit code, and what the last line on standard error holds.
        slow: Whether `--smoke` starts further processes.
    """

    shows: tuple[str, ...]
    mistakes: tuple[tuple[str, int, str], ...]
    slow: bool = False


OF_ITS_OWN = "push_exits"  # is tried in a process of its own, the others in this one
NONE = (("--smoke --nonsense", 2, "unrecognized arguments: --nonsense"),)
EXAMPLES = {
    "fit_scaling_law": Example(
        shows=("84 runs", "gamma", "0.0339", "D (tokens)", "report.html"),
        mistakes=(
            ("", 2, "required: RUNS"),
            ("absent.jsonl", 1, "absent.jsonl"),
            ("--smoke --law nonsense", 1, "nonsense"),
            ("--smoke --granularity 0", 1, "`--granularity` must be 1 or more, got 0"),
            ("--smoke --flops many", 2, "invalid float value: 'many'"),
            *NONE,
        ),
    ),
    "handoff": Example(
        shows=("split 137 32", "migrate-light 137 1", "yes"),
        mistakes=(
            ("", 1, "`--family` is missing"),
            ("--family absent/family", 1, "absent/family"),
            ("--smoke --exit_idx 7", 1, "7"),
            (
                "--smoke --dtype fp8",
                1,
                "`--dtype` must be one of fp32, bf16, int8, got 'fp8'",
            ),
            *NONE,
        ),
        slow=True,
    ),
    "pretrain": Example(
        shows=("Members", "exit 3 (depth 4)", "members.json and losses.png in", "is deleted"),
        mistakes=(
            ("--exits 2 9", 1, "got [2, 9]"),
            ("--smoke --backbone absent/decoder", 1, "absent/decoder"),
            ("--smoke --train_files absent.txt", 1, "must exist, got 'absent.txt'"),
            ("--smoke --learning_rate much", 2, "invalid float value: 'much'"),
            ("absent.yaml", 1, "absent.yaml"),
            ("--exits 2,4,9", 1, "got [2, 4, 9]"),
            ("--exits=2,4,9", 1, "got [2, 4, 9]"),
            ("--exits 2, 4, 9", 1, "got [2, 4, 9]"),
            ("--model_type quen3", 1, "Did you mean qwen3"),
            ("--model_type bert", 1, "`bert` cannot be the backbone"),
            ("--hidden_size 30", 1, "not a multiple"),
            ("--exit_weights unifrom", 1, "Did you mean 'uniform'?"),
            ("--exit_weights 1,2", 1, "one number for each of the 4 exits, got 2"),
            ("--output_dir /dev/null", 1, "`--output_dir` must be a folder"),
            ("--output_dir /dev/null/deep/er", 1, "`--output_dir` must be a folder"),
            ("--optim adamw_troch", 2, "did you mean adamw_torch?"),
            ("--learning_rte 1", 2, "did you mean --learning_rate?"),
            ("--tokenizer_name ./absent", 1, "`tokenizer_name`: there is no folder `./absent`"),
            *NONE,
        ),
    ),
    "push_exits": Example(
        shows=("The deepest member that fits is exit 1.", "me/family-depth4", "bytes, not sent"),
        mistakes=(
            ("", 2, "required: FOLDER, REPO"),
            ("absent me/family", 1, "absent"),
            ("--smoke --exits 0 9", 1, "`--exits` must be within the 3 exits, got 9"),
            ("--smoke --memory 10", 1, "no member of"),
            ("--smoke --no-dry_run", 2, "unrecognized arguments: --no-dry_run"),
            *NONE,
        ),
    ),
    "relay_generate": Example(
        shows=("Relay and generate at full depth", "The texts are equal.", "exit 2 (depth 4)"),
        mistakes=(
            ("", 1, "`--model` is missing"),
            ("--model absent/family", 1, "absent/family"),
            ("--smoke --draft_exit 7", 1, "7"),
            ("--smoke --relay specultive", 1, "Did you mean 'speculative'?"),
            ("--model ./absent", 1, "`--model`: there is no folder `./absent`"),
            ("--smoke --relay confidence --texts absent.txt", 1, "absent.txt"),
            ("--smoke --repeats 0", 1, "`--repeats` must be 1 or more, got 0"),
            *NONE,
        ),
    ),
    "tune_exits": Example(
        shows=("before and after tuning", "100.0% │ 100.0%", "exits.json and exits.png in"),
        mistakes=(
            ("", 1, "`--backbone` is missing"),
            ("--backbone absent/decoder", 1, "absent/decoder"),
            ("--smoke --train some", 1, "`--train` must be one of exits, lora, full, got 'some'"),
            ("--smoke --exits 2 9", 1, "[2, 9]"),
            ("--smoke --seq_length 1", 1, "`seq_length` must be at least 2, got 1"),
            ("--smoke --output_dir /dev/null", 1, "`--output_dir` must be a folder"),
            ("--smoke --exit_head Shared", 1, "Did you mean 'shared'?"),
            *NONE,
        ),
    ),
}
MISTAKES = [(name, *row) for name, example in EXAMPLES.items() for row in example.mistakes]


def path_of(name: str) -> Path:
    return ROOT / "examples" / f"{name}.py"


def start(
    name: str, *words: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run an example in a process of its own, as its first line says."""
    return subprocess.run(
        [sys.executable, str(path_of(name)), *words],
        env=os.environ | ENVIRONMENT | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@dataclass(frozen=True)
class Ended:
    """How a program ended: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs an example in this process, which spares the imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(name: str, *words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", [str(path_of(name)), *words])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(path_of(name)), run_name="__main__")
                code: object = 0
            except SystemExit as stop:
                code = stop.code
        if isinstance(code, str):  # as the interpreter does at the end
            err.write(code + "\n")
            code = 1
        return Ended(int(code or 0), out.getvalue(), err.getvalue())

    return run


def held_to(ended: Ended | subprocess.CompletedProcess[str], code: int, said: str) -> None:
    """One line tells of the mistake, and nothing was printed for a result."""
    found, errors = (
        (ended.code, ended.err) if isinstance(ended, Ended) else (ended.returncode, ended.stderr)
    )
    assert found == code, errors
    assert "Traceback" not in errors
    assert said in errors.splitlines()[-1]


def test_every_example_is_in_the_set() -> None:
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {*EXAMPLES, "isoflop"}  # which has no command line


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if e.slow else []) for n, e in EXAMPLES.items()],
)
def test_smoke(name: str, here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    if EXAMPLES[name].slow or name == OF_ITS_OWN:
        places = {"TMPDIR": str(tmp_path / "tmp"), "HF_HOME": str(tmp_path / "home")}
        done = start(name, "--smoke", cwd=tmp_path, **places)
        ended = Ended(done.returncode, done.stdout, done.stderr)
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
        ended = here(name, "--smoke")
    assert ended.code == 0, ended.err
    shown = " ".join(ended.out.split())
    for words in EXAMPLES[name].shows:
        assert words in shown.replace("│ ", "") or words in shown, ended.out
    # nothing is left behind, in the folder it was started in or in the temporary one, but torch's
    # own cache, which it makes for itself on some machines
    left = {path.name for folder in (tmp_path, tmp_path / "tmp") for path in folder.iterdir()}
    assert {name for name in left if not name.startswith("torchinductor_")} <= {"tmp", "home"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_help(name: str, here, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = here(name, "--help")
    assert ended.code == 0
    documentation = ast.get_docstring(ast.parse(path_of(name).read_text(encoding="utf-8")))
    assert documentation.splitlines()[0] in ended.out
    assert f"examples/{name}.py --smoke" in ended.out
    assert "--smoke" in ended.out.split("options:")[1]
    monkeypatch.setenv("COLUMNS", "80")
    short, every = here(name, "--help").out, here(name, "--help-all").out
    assert len(short.splitlines()) <= 40
    assert max(map(len, short.splitlines())) <= 80
    assert short.splitlines()[-1].startswith("--help-all shows ")
    assert documentation.splitlines()[-1] in every
    for option in re.findall(r"^  (--\w+)", short, re.MULTILINE):
        assert f"\n  {option}" in every


@pytest.mark.parametrize("name", ["pretrain", "tune_exits"])
def test_help_shows_the_options_of_the_family_first(name: str, here) -> None:
    short, every = here(name, "--help").out, here(name, "--help-all").out
    for shown in (short, every):
        places = [
            shown.index(f"\n  {name} ") for name in ("--backbone", "--dataset_name", "--bf16")
        ]
        assert places == sorted(places)
    assert "--adam_beta1" not in short
    assert "--adam_beta1" in every
    # fields that the example declares again keep the help of Transformers
    assert "The learning rate scheduler type" in " ".join(every.split())


@pytest.mark.parametrize(("name", "words", "code", "said"), MISTAKES)
def test_a_mistake_is_one_line(name: str, words: str, code: int, said: str, here) -> None:
    ended = here(name, *words.split())
    held_to(ended, code, said)
    assert ended.out == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_in_a_process_of_its_own(name: str) -> None:
    done = start(name, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "--smoke" in done.stdout
    words, code, said = EXAMPLES[name].mistakes[0]
    held_to(start(name, *words.split()), code, said)


@pytest.mark.slow
def test_isoflop_is_a_study_in_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At toy size it does every run once, and shows minima, a picture and a law."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    study = runpy.run_path(str(path_of("isoflop")))["main"]
    names = study.__globals__
    names["BUDGETS"], names["SHAPES"] = (2e8, 4e8, 8e8), ((16, 2), (32, 2), (48, 2))
    names["GRANULARITIES"] = (1, 2)
    sizes = {"vocab_size": 300, "seq_length": 32}
    bounds = {"max_train_bytes": 40_000, "max_eval_tokens": 1024}
    names["TEXT"] = names["DataArguments"](**sizes, **bounds)
    study(tmp_path / "study")
    shown = capsys.readouterr().out
    assert shown.count(" steps") == 18
    assert "gamma is between" in shown
    assert (tmp_path / "study" / "isoflop.png").exists()
    rows = (tmp_path / "study" / "runs.jsonl").read_bytes()
    assert rows.count(b"\n") == 18
    study(tmp_path / "study")
    assert " steps" not in capsys.readouterr().out
    assert (tmp_path / "study" / "runs.jsonl").read_bytes() == rows

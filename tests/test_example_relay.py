"""examples/relay_generate.py: as a new user runs it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "relay_generate.py"


@pytest.fixture(scope="module")
def example():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("relay_generate", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--relay", "speculative", "--draft_length", "2"],
            "drafts were accepted. The texts are equal.",
        ),
        (["--relay", "confidence", "--target", "0.9"], "held-out tokens the agreement is 0.9"),
        (["--relay", "handoff"], "exit 2 (depth 4)"),
    ],
)
def test_it_compares_with_generate(example, capsys, words, expected):
    example.main(["--smoke", "--max_new_tokens", "8", "--repeats", "1", *words])
    shown = capsys.readouterr().out
    assert expected in " ".join(shown.split())
    assert "Relay and generate at full depth" in shown


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "`--model` is missing"),
        (["--smoke", "--relay", "magic"], "must be one of speculative, confidence, handoff, fixed"),
        (["--smoke", "--draft_length", "many"], "must be auto or a number"),
        (["--smoke", "--relay", "confidence", "--texts", "nowhere"], "no file or folder `nowhere`"),
    ],
)
def test_what_is_wrong(example, words, expected):
    with pytest.raises((ValueError, OSError), match=expected):
        example.main(words)


def test_an_error_is_one_line():
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--smoke", "--draft_exit", "7"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr

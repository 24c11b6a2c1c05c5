"""examples/relay_generate.py: as a new user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "relay_generate.py"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--relay", "speculative", "--draft_length", "2"],
            "drafts accepted; the text is the same",
        ),
        (["--relay", "confidence", "--target", "0.9"], "held-out tokens: agreement 0.9"),
    ],
)
def test_it_compares_with_generate(words, expected):
    done = run("--smoke", "--max_new_tokens", "8", "--repeats", "1", *words)
    assert done.returncode == 0, done.stderr
    assert expected in " ".join(done.stdout.split())
    assert "against plain generate at full depth" in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "`--model` is missing"),
        (["--smoke", "--relay", "magic"], "must be speculative, confidence, handoff or fixed"),
        (["--smoke", "--draft_exit", "7"], "error: "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words, expected):
    done = run(*words)
    assert done.returncode == 1
    assert expected in done.stderr
    assert "Traceback" not in done.stderr

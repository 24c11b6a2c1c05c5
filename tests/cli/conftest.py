"""The command line in this process."""

import sys

import pytest

from hf_familial.cli import main


def call(monkeypatch, *words, columns=120):
    """Run a command line; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["hf-familial", *map(str, words)])
    monkeypatch.setenv("COLUMNS", str(columns))
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs a command line; returns exit code, output and errors."""

    def run(*words, columns=120):
        capsys.readouterr()
        code = call(monkeypatch, *words, columns=columns)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture(scope="module")
def cli_once():
    """The same for fixtures of a module: exit code, output and errors."""
    import contextlib
    import io

    def run(*words):
        out, err = io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = call(patch, *words)
        return code, out.getvalue(), err.getvalue()

    return run

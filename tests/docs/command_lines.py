"""What is wrong with a command line of the documentation, without running it."""

from __future__ import annotations

import configparser
import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import typer
from docs.blocks import ROOT

from hf_familial.cli import app


# programs of others, of which no more is asked than that their name is right
OTHERS = {
    "cd",
    "cp",
    "curl",
    "git",
    "hf",
    "ls",
    "mkdir",
    "source",
    "unzip",
    "tensorboard",
    "ray",
    "sbatch",
}
OTHERS |= {
    "jupyter",
    "lm_eval",
    "nvidia-smi",
    "ollama",
    "pre-commit",
    "llama-cli",
    "tail",
    "xdg-open",
    "open",
}
PYTHON = re.compile(r"(.*/)?python(3(\.\d+)?)?$")
# options of python, of `accelerate launch` and of torchrun that take a word after them
WITH_VALUE = {"-c", "-m", "-W", "-X", "--config_file", "--num_processes", "--num_machines"}
WITH_VALUE |= {"--mixed_precision", "--dynamo_backend", "--num_cpu_threads_per_process"}
WITH_VALUE |= {"--machine_rank", "--nproc_per_node"}


def problems(line: str) -> list[str]:
    """Everything wrong with a line; one that begins with a backtick may lack arguments."""
    found: list[str] = []
    partial = line.startswith("`")
    for words in commands_in(line.lstrip("`").removeprefix("$ ")):
        found += problems_of(words, partial)
    return found


def commands_in(line: str) -> list[list[str]]:
    """A line of the shell as commands, each a list of words, without what is set before it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("<>"):
            next(lexer)  # a file
        elif set(word) <= set("|&;"):
            commands.append([])
        elif commands[-1] or not re.match(r"\w+=", word):
            commands[-1].append(word)
    # of a loop only what it does is a command
    commands = [words[1:] if words[:1] == ["do"] else words for words in commands]
    return [words for words in commands if words and words[0] not in ("for", "while", "done")]


def problems_of(words: Sequence[str], partial: bool) -> list[str]:
    program, rest = words[0].removeprefix(".venv/bin/"), list(words[1:])
    if program == "hf-familial":
        return of_command(rest, partial)
    if program == "make":
        return [f"no such target: {w}" for w in rest if "=" not in w and w not in targets()]
    if program == "pip":
        return of_pip(rest)
    if program == "accelerate" and rest[:1] == ["launch"]:
        return of_script(rest[1:], partial)
    if PYTHON.match(program):
        return of_script(rest, partial)
    return [] if program in OTHERS or partial else [f"what is `{program}`?"]


def of_command(words: list[str], partial: bool) -> list[str]:
    """Parsed by the application's own parser; parts of a line are held to names alone."""
    command: Any = typer.main.get_command(app)
    name = "hf-familial"
    while words and hasattr(command, "commands") and re.match(r"[a-z]", words[0]):
        if words[0] not in command.commands:
            return [f"{name} has no command `{words[0]}`"]
        name, command, words = f"{name} {words[0]}", command.commands[words[0]], words[1:]
    known = {
        "--help",
        "--help-all",
        *(option for row in command.params for option in (*row.opts, *row.secondary_opts)),
    }
    if partial or hasattr(command, "commands"):
        return [f"{name} has no option {word}" for word in options_in(words) if word not in known]
    try:
        command.make_context(name, list(words))
    except (Exception, SystemExit) as error:
        return [] if words in (["--help"], ["--help-all"]) else [f"{name}: {error}"]
    return []


def of_script(words: list[str], partial: bool) -> list[str]:
    """The script must be there, and have the options given to it."""
    found, at = [], 0
    while at < len(words) and words[at].startswith("-"):
        if words[at] == "--config_file" and not (ROOT / words[at + 1]).is_file():
            found.append(f"no such file: {words[at + 1]}")
        if words[at] in ("-m", "-c"):
            return found
        at += 2 if words[at] in WITH_VALUE else 1
    if at == len(words):
        return found if partial else [*found, "no script is named"]
    script = words[at]
    if not script.endswith(".py") or (partial and "/" not in script):
        return found
    if not (ROOT / script).is_file():
        return [*found, f"no such file: {script}"]
    known = {option.replace("_", "-") for option in options_of(script)}
    wrong = [w for w in options_in(words[at + 1 :]) if w.replace("_", "-") not in known]
    return [*found, *(f"{script} has no option {word}" for word in wrong)]


def of_pip(words: list[str]) -> list[str]:
    """Extras of ours must be there, and files named."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    known = setup["options.extras_require"]
    found = []
    for word in words:
        if match := re.match(r"(?:\.|hf[-_]familial)\[([\w,]+)\]", word):
            found += [f"no such extra: {name}" for name in match[1].split(",") if name not in known]
    for flag, name in zip(words, words[1:], strict=False):
        if flag in ("-c", "-r") and not (ROOT / name).is_file():
            found.append(f"no such file: {name}")
    return found


def options_in(words: Sequence[str]) -> list[str]:
    return [word.split("=")[0] for word in words if re.match(r"--\w", word)]


@functools.cache
def targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))


@functools.cache
def options_of(script: str) -> set[str]:
    """The options that a script's `--help` lists; of one that parses nothing, none."""
    return set(re.findall(r"(?<![\w-])--\w[\w-]*", help_of(script)))


@functools.cache
def help_of(script: str) -> str:
    """What a script prints on `--help`, run here: a process of its own takes seconds to import."""
    path = ROOT / script
    text = path.read_text(encoding="utf-8")
    if not re.search(r"ArgumentParser|hf_familial\.scripts import|typer", text):
        return ""
    shared = "hf_familial.scripts import" in text
    modules, shown = set(sys.modules), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [str(path), "--help-all" if shared else "--help"]),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        mock.patch.dict(os.environ, {"COLUMNS": "100"}),
        contextlib.redirect_stdout(shown),
        contextlib.suppress(SystemExit),
    ):
        runpy.run_path(str(path), run_name="__main__")
    # neighbours of one script must not be taken for those of another
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(path.parent)):
            del sys.modules[name]
    return shown.getvalue()

"""Clusters of rows that are checkpoints of one run, by a column that names it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import TableError
from .._cells import is_missing
from ._names import find, plain


RUNS_ARE = ("checkpoints", "independent")

# names of columns that may name a run, or a size, or an architecture; the first that fits counts
NAMES = (
    "uid uuid run_uid id name exp experiment exp_name experiment_name exp_id experiment_id "
    "run_group job job_id "
    "job_name trial trial_id series model model_name model_id modelname checkpoint ckpt "
    "checkpoint_name path file architecture arch config config_name size_name label group"
).split()
# what the name of a checkpoint has behind that of its run
STEP = re.compile(
    r"[-_/ .:@]*(?:step|steps|ckpt|checkpoint|iter|iteration|epoch|global_step|tokens?)"
    r"[-_ =]?\d+(?:\.\d+)?[kmbt]?(?:\.\w+)?$",
    re.I,
)
SAME = ("N", "G", "S", "E", "seed", "lr")  # what the checkpoints of one run share


@dataclass(frozen=True)
class Runs:
    """The run of every row: rows of one label are of one run.

    `column` names the runs and is empty if each row is a run of its own; `named` says that it
    names runs and nothing else.
    """

    labels: list[str]
    column: str = ""
    notes: tuple[str, ...] = ()
    named: bool = False


def named_runs(
    columns: Sequence[str], cells: Callable[[str], Sequence[Any]], own: Sequence[str], asked: str
) -> Runs:
    """Return the runs that a column such as `run_id` names."""
    column = asked or find(columns, "run_id")
    if not column:
        return Runs(list(own))
    names = cells(column)
    empty = [is_missing(name) for name in names]
    if all(empty):
        return Runs(list(own), "", (f"{column!r} is empty: each row is a run of its own.",))
    notes: tuple[str, ...] = ()
    if any(empty):
        notes = (f"{sum(empty)} rows without {column!r} are runs of their own.",)
    labels = [
        line if gone else str(name).strip()
        for name, line, gone in zip(names, own, empty, strict=True)
    ]
    return Runs(labels, column, notes, True)


def split_by_size(runs: Runs, values: Mapping[str, np.ndarray]) -> Runs:
    """Split runs by N: a name with several N is of a sweep, not of a run."""
    sizes = values.get("N")
    if sizes is None:
        return runs
    first: dict[str, float] = {}
    several = {
        label
        for label, size in zip(runs.labels, sizes.tolist(), strict=True)
        if size == size and first.setdefault(label, size) != size
    }
    if not several:
        return runs
    labels = [
        f"{label}, N = {size:g}" if label in several else label
        for label, size in zip(runs.labels, sizes.tolist(), strict=True)
    ]
    note = (
        f"{len(several)} of the names in {runs.column!r} stand with several N: rows of one name "
        "and one N count as one run."
    )
    return Runs(labels, runs.column, (*runs.notes, note))


def guessed_runs(
    columns: Sequence[str],
    cells: Callable[[str], Sequence[Any]],
    own: Sequence[str],
    values: Mapping[str, np.ndarray],
    runs_are: str,
) -> Runs:
    """Return the runs of rows that no column names for certain.

    A column such as `model` names runs if its rows look like checkpoints: each of its names has
    one N and several D. Sizes that were trained several times look alike, so the note says what
    was taken and how to say otherwise.
    """
    if runs_are == "independent" or not {"N", "D"} <= set(values):
        return Runs(list(own))
    settings = _settings(values)
    for name in NAMES:
        column = next((c for c in columns if plain(c) == name), "")
        if not column:
            continue
        labels = _labels(cells(column), own)
        if runs_are == "checkpoints" or _look_like_checkpoints(labels, settings, values):
            if len(set(labels)) == len(labels):
                continue
            together = [f"{label} {i}" for label, i in zip(labels, settings, strict=True)]
            count = len(set(together))
            # the plain names where they tell the runs apart, else names with the setting
            names = labels if len(set(labels)) == count else together
            note = f"{len(names)} rows of {count} {column!r} count as checkpoints of {count} runs"
            if not runs_are:
                note += " (the same N at several D); if not, `--runs-are independent`"
            return Runs(names, column, (note + ".",))
    if runs_are == "checkpoints":
        labels = [f"run of N = {n:g} ({i})" for n, i in zip(values["N"], settings, strict=True)]
        note = f"Rows of equal N are taken for checkpoints: {len(set(labels))} runs."
        return Runs(labels, "N", (note,))
    return Runs(list(own), "", _curves(settings, values))


def check_runs_are(word: str) -> None:
    """Raise `TableError` unless the word is one of `RUNS_ARE` or empty."""
    if word not in ("", *RUNS_ARE):
        raise TableError(f"`--runs-are` is one of {', '.join(RUNS_ARE)}, got {word!r}.")


def last_of_each(labels: Sequence[str], tokens: np.ndarray, parts: Sequence[int]) -> np.ndarray:
    """Return which rows are the last of their run, by tokens."""
    last: dict[tuple[str, int], int] = {}
    for i, key in enumerate(zip(labels, parts, strict=True)):
        old = last.get(key)
        if old is None or tokens[i] >= tokens[old] or np.isnan(tokens[old]):
            last[key] = i
    keep = np.zeros(len(labels), bool)
    keep[list(last.values())] = True
    return keep


def _labels(cells: Sequence[Any], own: Sequence[str]) -> list[str]:
    """Cut the step of a checkpoint off names; rows without a name are runs of their own."""
    return [
        line if is_missing(cell) else STEP.sub("", str(cell).strip()) or str(cell).strip()
        for cell, line in zip(cells, own, strict=True)
    ]


def _settings(values: Mapping[str, np.ndarray]) -> list[int]:
    """Return a number for each combination of what the checkpoints of one run share."""
    table = np.column_stack([values[name] for name in SAME if name in values])
    return np.unique(table, axis=0, return_inverse=True)[1].reshape(-1).tolist()


def _look_like_checkpoints(
    labels: Sequence[str], settings: Sequence[int], values: Mapping[str, np.ndarray]
) -> bool:
    """Return whether most rows that share a name share N as well, at several D."""
    groups: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        groups.setdefault(label, []).append(i)
    several = [rows for rows in groups.values() if len(rows) > 1]
    alike = [
        rows
        for rows in several
        if len({settings[i] for i in rows}) == 1 and len({values["D"][i] for i in rows}) > 1
    ]
    return bool(alike) and 2 * sum(map(len, alike)) >= sum(map(len, several))


def _curves(settings: Sequence[int], values: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Return a note where rows without names come like a log: D grows row by row."""
    tokens = values["D"]
    same = [i for i in range(1, len(settings)) if settings[i] == settings[i - 1]]
    grows = sum(tokens[i] > tokens[i - 1] for i in same)
    sizes = len(set(settings))
    if len(settings) < 4 * sizes or grows < 0.9 * (len(settings) - sizes):
        return ()
    return (
        f"{len(settings)} rows of {sizes} settings count as independent runs; if they are "
        "checkpoints of one run each, `--runs-are checkpoints`.",
    )

"""Grouping of rows that are checkpoints of one run."""

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

# columns that can name a run, but also a size or an architecture; the first suitable one is used
NAMES = (
    "uid uuid run_uid id name exp experiment exp_name experiment_name exp_id experiment_id "
    "run_group job job_id "
    "job_name trial trial_id series model model_name model_id modelname checkpoint ckpt "
    "checkpoint_name path file architecture arch config config_name size_name label group"
).split()
# the suffix that the name of a checkpoint adds to the name of its run
STEP = re.compile(
    r"[-_/ .:@]*(?:step|steps|ckpt|checkpoint|iter|iteration|epoch|global_step|tokens?)"
    r"[-_ =]?\d+(?:\.\d+)?[kmbt]?(?:\.\w+)?$",
    re.I,
)
SAME = ("N", "G", "S", "E", "seed", "lr")  # variables that are equal in all checkpoints of a run


@dataclass(frozen=True)
class Runs:
    """The run of every row. Rows with the same label belong to one run.

    `column` is the column that names the runs, `""` if each row is a separate run. `named` is True
    if the column names runs for certain, such as `run_id`.
    """

    labels: list[str]
    column: str = ""
    notes: tuple[str, ...] = ()
    named: bool = False


def named_runs(
    columns: Sequence[str], cells: Callable[[str], Sequence[Any]], own: Sequence[str], asked: str
) -> Runs:
    """Return the runs according to a column such as `run_id`."""
    column = asked or find(columns, "run_id")
    if not column:
        return Runs(list(own))
    names = cells(column)
    empty = [is_missing(name) for name in names]
    if all(empty):
        return Runs(list(own), "", (f"{column!r} is empty, so each row is a separate run.",))
    notes: tuple[str, ...] = ()
    if any(empty):
        notes = (f"{sum(empty)} rows without {column!r} count as separate runs.",)
    labels = [
        line if gone else str(name).strip()
        for name, line, gone in zip(names, own, empty, strict=True)
    ]
    return Runs(labels, column, notes, True)


def split_by_size(runs: Runs, values: Mapping[str, np.ndarray]) -> Runs:
    """Split runs by N, because a name with several N is the name of a sweep, not of a run."""
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
        f"{len(several)} of the names in {runs.column!r} have several N. Rows with the same name "
        "and the same N count as one run."
    )
    return Runs(labels, runs.column, (*runs.notes, note))


def guessed_runs(
    columns: Sequence[str],
    cells: Callable[[str], Sequence[Any]],
    own: Sequence[str],
    values: Mapping[str, np.ndarray],
    runs_are: str,
) -> Runs:
    """Guess the runs of rows if no column such as `run_id` names them.

    A column such as `model` names runs if its rows look like checkpoints: each name has one N and
    several D. A size that was trained several times looks the same. So a note states the guess and
    the option that changes it.
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
            # if different runs have the same name, the label also contains the setting
            names = labels if len(set(labels)) == count else together
            note = f"{len(names)} rows count as checkpoints of {count} runs, named in {column!r}"
            if not runs_are:
                note += " (each has one N and several D). If they are not, pass `--runs-are "
                note += "independent`"
            return Runs(names, column, (note + ".",))
    if runs_are == "checkpoints":
        labels = [f"run of N = {n:g} ({i})" for n, i in zip(values["N"], settings, strict=True)]
        note = f"Rows with the same N count as checkpoints of one run: {len(set(labels))} runs."
        return Runs(labels, "N", (note,))
    return Runs(list(own), "", _curves(settings, values))


def check_runs_are(word: str) -> None:
    """Raise `TableError` unless the word is one of `RUNS_ARE` or empty."""
    if word not in ("", *RUNS_ARE):
        raise TableError(f"`--runs-are` must be {' or '.join(RUNS_ARE)}, got {word!r}.")


def last_of_each(labels: Sequence[str], tokens: np.ndarray, parts: Sequence[int]) -> np.ndarray:
    """Return a mask of the rows with the most tokens of their run and exit."""
    last: dict[tuple[str, int], int] = {}
    for i, key in enumerate(zip(labels, parts, strict=True)):
        old = last.get(key)
        if old is None or tokens[i] >= tokens[old] or np.isnan(tokens[old]):
            last[key] = i
    keep = np.zeros(len(labels), bool)
    keep[list(last.values())] = True
    return keep


def _labels(cells: Sequence[Any], own: Sequence[str]) -> list[str]:
    """Return names without the step of a checkpoint. Rows without a name get their own label."""
    return [
        line if is_missing(cell) else STEP.sub("", str(cell).strip()) or str(cell).strip()
        for cell, line in zip(cells, own, strict=True)
    ]


def _settings(values: Mapping[str, np.ndarray]) -> list[int]:
    """Return an integer per row that is equal for rows with the same variables of `SAME`."""
    table = np.column_stack([values[name] for name in SAME if name in values])
    return np.unique(table, axis=0, return_inverse=True)[1].reshape(-1).tolist()


def _look_like_checkpoints(
    labels: Sequence[str], settings: Sequence[int], values: Mapping[str, np.ndarray]
) -> bool:
    """Return whether most rows with the same name have the same N and different D."""
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
    """Return a note if rows without names look like a training log, where D grows row by row."""
    tokens = values["D"]
    same = [i for i in range(1, len(settings)) if settings[i] == settings[i - 1]]
    grows = sum(tokens[i] > tokens[i - 1] for i in same)
    sizes = len(set(settings))
    if len(settings) < 4 * sizes or grows < 0.9 * (len(settings) - sizes):
        return ()
    return (
        f"{len(settings)} rows of {sizes} settings count as independent runs. If the rows of a "
        "setting are checkpoints of one run, pass `--runs-are checkpoints`.",
    )

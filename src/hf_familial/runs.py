"""A row of runs.jsonl, the contract between training and fitting: fields, writing, reading."""

from __future__ import annotations

import functools
import json
import math
import os
import types
import typing
import warnings
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from .errors import RunRecordError


STATUSES = ("finished", "stopped", "diverged", "failed")
LARGEST = 1e40  # beyond every count and seed; an integer of JSON may have any number of digits


@dataclass(frozen=True)
class Backbone:
    """Shape of a run's backbone.

    Attributes:
        model_type (`str`): Name of its architecture in transformers.
        hidden (`int`): Width of its hidden states.
        layers (`int`): Number of its decoder layers.
    """

    model_type: str
    hidden: int
    layers: int

    def __post_init__(self) -> None:
        _coerce_fields(self, "backbone.")


@dataclass(frozen=True)
class RunRecord:
    """One training run, as a line of runs.jsonl.

    Losses are in nats per token. JSON has no NaN and no infinity: a loss that is not finite is
    written as null and comes back as `None`.

    Attributes:
        run_id (`str`): Names the run; a run taken up again keeps it.
        N_total (`int`): Parameters of the whole family, each shared one once.
        N_non_embedding (`int`): The same without token embedding and output heads.
        N_active (`int`): Of `N_total`, those that take part in one token: of routed experts, as
            many as a token is sent to. Equal to `N_total` in a dense backbone.
        D_tokens (`int`): Tokens seen in training, repeated ones each time, padding left out.
        C_flops (`float`): FLOPs of the whole run: forward and backward, every exit and head, of
            every position that was computed; `total_flos` of the trainer.
        G (`int`): Number of exits, the deepest one counted.
        exits (`tuple[int, ...]`): Depth of every exit, in backbone layers.
        loss_mean (`float`, *optional*): Mean of `loss_exits`, weights 1/G.
        loss_exits (`tuple[float | None, ...]`, *optional*): Training loss of every exit, shallowest
            first, averaged over the last logging interval.
        loss_final (`float`, *optional*): Training loss of the deepest exit.
        eval_loss_mean (`float`, *optional*): As `loss_mean`, in the last evaluation.
        eval_loss_exits (`tuple[float | None, ...]`, *optional*): As `loss_exits`, there.
        eval_loss_final (`float`, *optional*): As `loss_final`, there.
        seed (`int`): Seed of the run.
        lr (`float`): Peak learning rate.
        batch_tokens (`int`): Tokens of one optimiser step over all processes, at most: those of
            full batches of sequences of `seq_len`.
        seq_len (`int`): Tokens of the longest sequence.
        vocab_size (`int`): Rows of the token embedding.
        data (`str`): What it was trained on.
        backbone ([`Backbone`]): Architecture, width and depth.
        wall_s (`float`): Seconds of training that led to the result, evaluations included.
        tokens_per_s (`float`): `D_tokens / wall_s`.
        code_version (`str`): Version of the code that trained it.
        status (`str`): `"finished"`, `"stopped"` before its last step, `"diverged"` or `"failed"`.
        target_tokens (`int`, *optional*): Positions that had a loss, which are fewer than
            `D_tokens`: the first token of a sequence and what has a label of -100 is predicted by
            none. `None` if nobody counted (see `RunRecordCallback`).
        computed_tokens (`int`, *optional*): Positions that the model ran, padding included. `None`
            if nobody counted.

    Raises:
        RunRecordError: If a field is of a wrong type or out of its range.
    """

    run_id: str
    N_total: int
    N_non_embedding: int
    N_active: int
    D_tokens: int
    C_flops: float
    G: int
    exits: tuple[int, ...]
    loss_mean: float | None
    loss_exits: tuple[float | None, ...] | None
    loss_final: float | None
    eval_loss_mean: float | None
    eval_loss_exits: tuple[float | None, ...] | None
    eval_loss_final: float | None
    seed: int
    lr: float
    batch_tokens: int
    seq_len: int
    vocab_size: int
    data: str
    backbone: Backbone
    wall_s: float
    tokens_per_s: float
    code_version: str
    status: str
    target_tokens: int | None = None
    computed_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check every field; lists become tuples, integers where a float belongs floats."""
        _coerce_fields(self)
        if not self.run_id:
            raise RunRecordError("`run_id` must not be empty.", "run_id")
        if self.status not in STATUSES:
            raise RunRecordError(
                f"`status` must be one of {', '.join(STATUSES)}, got {self.status!r}.", "status"
            )
        for name in ("exits", "loss_exits", "eval_loss_exits"):
            values = getattr(self, name)
            if values is not None and len(values) != self.G:
                raise RunRecordError(
                    f"`{name}` must hold one value for each of G = {self.G} exits, got "
                    f"{list(values)}.",
                    name,
                )
        if not self.G or any(a >= b for a, b in zip((0, *self.exits), self.exits, strict=False)):
            raise RunRecordError(
                f"`exits` must be strictly increasing depths from 1 up, got {list(self.exits)}.",
                "exits",
            )

    def to_json(self) -> str:
        """The record as one line of JSON, without the line's end."""
        return json.dumps(_without_nan(asdict(self)), allow_nan=False)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> RunRecord:
        """The record of a row as JSON has it.

        Args:
            row (`Mapping[str, Any]`): Every field by name, and no other; those with a default may
                be missing, as in rows of older versions.

        Returns:
            [`RunRecord`]

        Raises:
            RunRecordError: If a field is missing, unknown or wrong.
        """
        values = _known_fields(cls, row)
        if not isinstance(values["backbone"], Mapping):
            raise RunRecordError(
                f"`backbone` must be an object, got {values['backbone']!r}.", "backbone"
            )
        inner = _known_fields(Backbone, values["backbone"], "backbone.")
        return cls(**(values | {"backbone": Backbone(**inner)}))


def append_run(path: str | os.PathLike[str], record: RunRecord) -> None:
    """Add a run to a file, whole or not at all, without locks.

    The line goes out in one write to a file opened for appending, so lines of processes that write
    at once do not mix (on a local file system; network ones promise less). It is on disk when
    this returns. Losses that are not finite are written as null.

    Args:
        path (`str` or `os.PathLike`): File of the runs; made, with its folder, if missing.
        record ([`RunRecord`]): The run.

    Raises:
        OSError: If the line could not be written as a whole.
        TypeError: If `record` is not a [`RunRecord`].
    """
    if not isinstance(record, RunRecord):
        raise TypeError(f"`record` must be a RunRecord, got {type(record).__name__}.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = f"{record.to_json()}\n".encode()
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if _is_torn(file):
            # end the line that a crash cut off, or this one would be lost with it
            line = b"\n" + line
        written = os.write(file, line)
        if written != len(line):
            raise OSError(f"wrote {written} of {len(line)} bytes of a run to {path}; is it full?")
        os.fsync(file)
    finally:
        os.close(file)


def read_runs(path: str | os.PathLike[str]) -> list[RunRecord]:
    """Read every run of a file.

    A last line that a crash cut off is reported by a warning and left out.

    Args:
        path (`str` or `os.PathLike`): File of the runs.

    Returns:
        `list[RunRecord]`: In the order of the file; empty lines are left out.

    Raises:
        OSError: If the file cannot be read.
        RunRecordError: Naming file, line and field, if any other line is wrong.
    """
    lines = Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                warnings.warn(f"{path}, line {number} is cut off and left out.", stacklevel=2)
                continue
            message = f"not one JSON object ({error}); mend or delete it."
            raise RunRecordError(message, path=str(path), line=number) from None
        try:
            records.append(RunRecord.from_dict(row))
        except RunRecordError as error:
            raise RunRecordError(error.reason, error.field, str(path), number) from None
    return records


def _is_torn(file: int) -> bool:
    """Whether a file does not end at the end of a line."""
    size = os.fstat(file).st_size
    if not size:
        return False
    os.lseek(file, size - 1, os.SEEK_SET)
    return os.read(file, 1) != b"\n"


def _without_nan(value: Any) -> Any:
    """The same value with null for every number that JSON does not have."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _known_fields(cls: type, row: Any, prefix: str = "") -> dict[str, Any]:
    """A row that has exactly the fields of a dataclass."""
    if not isinstance(row, Mapping):
        raise RunRecordError(f"a run must be a JSON object, got {row!r}.")
    names, needed = _kinds(cls).keys(), _needed(cls)
    if needed <= row.keys() <= names:
        return dict(row)
    for wrong, problem in ((needed - set(row), "missing"), (set(row) - set(names), "unknown")):
        if wrong:
            name = prefix + min(wrong)
            raise RunRecordError(f"`{name}` is {problem}; a run has {', '.join(names)}.", name)
    return dict(row)


class _Kind(NamedTuple):
    """The values that a field may have, found once: files have a hundred thousand rows."""

    hint: Any
    plain: frozenset[type]  # types whose values need no second look
    ranged: bool  # whether such values are to be 0 or more, and below `LARGEST`
    items: _Kind | None = None  # of a tuple


def _kind_of(hint: Any) -> _Kind:
    inner = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        first = _kind_of(inner[0])
        return _Kind(hint, first.plain | {types.NoneType}, inner[0] is int, first.items)
    if typing.get_origin(hint) is tuple:
        return _Kind(hint, frozenset(), False, _kind_of(inner[0]))
    return _Kind(hint, frozenset([hint]), hint in (int, float))


@functools.cache
def _kinds(cls: Hashable) -> Mapping[str, _Kind]:
    """Kind of each field of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: _kind_of(hints[field.name]) for field in fields(cls)}  # type: ignore[arg-type]


@functools.cache
def _needed(cls: Hashable) -> frozenset[str]:
    """Names of the fields of a dataclass that have no default."""
    found = fields(cls)  # type: ignore[arg-type]
    return frozenset(field.name for field in found if field.default is MISSING)


def _coerce_fields(record: Any, prefix: str = "") -> None:
    """Check the fields of a frozen dataclass against their annotations."""
    cls: type = type(record)
    values = vars(record)
    for name, kind in _kinds(cls).items():
        value = values[name]
        if _is_plain(value, kind):
            continue
        try:
            object.__setattr__(record, name, _checked(value, kind))
        except TypeError as error:
            name = prefix + name
            raise RunRecordError(f"`{name}` must be {error}, got {value!r}.", name) from None


def _is_plain(value: Any, kind: _Kind) -> bool:
    if value is None or type(value) not in kind.plain:
        return value is None and types.NoneType in kind.plain
    return not kind.ranged or 0 <= value < LARGEST


def _checked(value: Any, kind: _Kind) -> Any:
    """The value as its kind has it; lists of plain items need no second look."""
    items = kind.items
    if items is not None and isinstance(value, list) and all(_is_plain(v, items) for v in value):
        return tuple(value)
    return _coerced(value, kind.hint)


def _coerced(value: Any, hint: Any, optional: bool = False) -> Any:
    """The value as its annotation has it; a TypeError that says what would be right."""
    if isinstance(hint, types.UnionType):
        return None if value is None else _coerced(value, typing.get_args(hint)[0], optional=True)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError("a list")
        try:
            return tuple(_coerced(item, typing.get_args(hint)[0]) for item in value)
        except TypeError as error:
            raise TypeError(f"a list, each item {error}") from None
    if hint is int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise TypeError("an integer of 0 or more")
        if value >= LARGEST:
            raise TypeError(f"an integer below {LARGEST:g}")
        return value
    if hint is float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError("a number")
        if isinstance(value, int) and abs(value) >= LARGEST:
            raise TypeError(f"a number below {LARGEST:g}")
        if not optional and not 0 <= value < math.inf:
            raise TypeError("a finite number of 0 or more")
        return float(value)
    if not isinstance(value, hint):
        raise TypeError("a string" if hint is str else f"a {hint.__name__}")
    return value


__all__ = ["STATUSES", "Backbone", "RunRecord", "RunRecordError", "append_run", "read_runs"]

"""Rows of runs.jsonl, the file that training writes and scaling-law fitting reads."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ._files import append_lines
from ._records import Check, Fields, without_nan
from .errors import RunRecordError


STATUSES = ("finished", "stopped", "diverged", "failed")
LARGEST = 1e40  # more than any count or seed; an integer in JSON may have any number of digits


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError("an integer of 0 or more")
    if value >= LARGEST:
        raise TypeError(f"an integer below {LARGEST:g}")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError("a number")
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise TypeError(f"a number below {LARGEST:g}")
    return float(value)


def _amount(value: Any) -> float:
    number = _number(value)
    if not 0 <= number < math.inf:
        raise TypeError("a finite number of 0 or more")
    return number


FIELDS = Fields(
    RunRecordError,
    "a run",
    {
        int: Check(lambda value: type(value) is int and 0 <= value < LARGEST, _count),
        float: Check(lambda value: type(value) is float and 0 <= value < LARGEST, _amount),
        # a loss, which may be infinite or NaN
        float | None: Check(lambda value: value is None or type(value) is float, _number),
    },
)


@dataclass(frozen=True)
class Backbone:
    """Architecture and size of the backbone of a run.

    Attributes:
        model_type (`str`): Name of the architecture in Transformers, for example `"llama"`.
        hidden (`int`): Width of the hidden states.
        layers (`int`): Number of decoder layers.
    """

    model_type: str
    hidden: int
    layers: int

    def __post_init__(self) -> None:
        FIELDS.check(self)


@dataclass(frozen=True)
class RunRecord:
    """A training run, stored as one line of runs.jsonl.

    Losses are in nats per token. JSON has no NaN and no infinity, so such a loss is written as null
    and read as `None`.

    Attributes:
        run_id (`str`): Name of the run. A resumed run keeps its name.
        N_total (`int`): Parameters of the whole family. A shared parameter counts once.
        N_non_embedding (`int`): `N_total` without the token embedding and the output heads.
        N_active (`int`): Parameters that process one token. Routed experts count only as often as a
            token uses them. Without routed experts, `N_active` is equal to `N_total`.
        D_tokens (`int`): Tokens seen in training, without padding. Repeated tokens count each time.
        C_flops (`float`): FLOPs of the whole run: the forward and backward passes of all computed
            positions, with all exits and heads. This is `total_flos` of the trainer.
        G (`int`): Number of exits, the deepest one included.
        exits (`tuple[int, ...]`): Depth of each exit, in backbone layers.
        loss_mean (`float`, *optional*): Mean of `loss_exits`.
        loss_exits (`tuple[float | None, ...]`, *optional*): Training loss of each exit, shallowest
            first, averaged over the last logging interval.
        loss_final (`float`, *optional*): Training loss of the deepest exit.
        eval_loss_mean (`float`, *optional*): Mean of `eval_loss_exits`.
        eval_loss_exits (`tuple[float | None, ...]`, *optional*): Loss of each exit in the last
            evaluation, shallowest first.
        eval_loss_final (`float`, *optional*): Loss of the deepest exit in the last evaluation.
        seed (`int`): Seed of the run.
        lr (`float`): Peak learning rate.
        batch_tokens (`int`): Maximum number of tokens in one optimiser step over all processes,
            with full batches of sequences of `seq_len` tokens.
        seq_len (`int`): Tokens of the longest sequence.
        vocab_size (`int`): Rows of the token embedding.
        data (`str`): Name of the training data.
        backbone ([`Backbone`]): Architecture and size of the backbone.
        wall_s (`float`): Seconds that training took, evaluations included.
        tokens_per_s (`float`): `D_tokens / wall_s`.
        code_version (`str`): Version of the training code.
        status (`str`): `"finished"`, `"stopped"` (before the last step), `"diverged"` (a loss is
            not finite) or `"failed"` (an error was raised).
        target_tokens (`int`, *optional*): Positions that have a loss. Their number is below
            `D_tokens`, because the first token of a sequence and labels of -100 have no loss.
            `None` if the tokens were not counted (see `RunRecordCallback`).
        computed_tokens (`int`, *optional*): Positions that the model computed, padding included.
            `None` if the tokens were not counted.

    Raises:
        RunRecordError: If a field has a wrong type or is out of its range.
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
        """Check every field, and convert lists to tuples and integers to floats where needed."""
        FIELDS.check(self)
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
                    f"`{name}` must have one value for each of G = {self.G} exits, got "
                    f"{list(values)}.",
                    name,
                )
        if not self.G or any(a >= b for a, b in zip((0, *self.exits), self.exits, strict=False)):
            raise RunRecordError(
                f"`exits` must be strictly increasing depths of 1 or more, got {list(self.exits)}.",
                "exits",
            )

    def to_json(self) -> str:
        """Return the record as one line of JSON, without the line end."""
        return json.dumps(without_nan(asdict(self)), allow_nan=False)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> RunRecord:
        """Build a record from a row of JSON.

        Args:
            row (`Mapping[str, Any]`): Field names and their values. Fields with a default may be
                missing, as in rows from older versions.

        Returns:
            [`RunRecord`]

        Raises:
            RunRecordError: If a field is missing, unknown or wrong.
        """
        record: RunRecord = FIELDS.read(cls, row)
        return record


def append_run(path: str | os.PathLike[str], record: RunRecord) -> None:
    """Append one run to a runs.jsonl file, as one line in a single write without locks.

    Several processes can append to the same file on a local file system at the same time. Network
    file systems do not guarantee this. The line is on disk when the function returns.

    Args:
        path (`str` or `os.PathLike`): Path of the runs.jsonl file. The file and its folder are
            created if they do not exist.
        record ([`RunRecord`]): The run.

    Raises:
        OSError: If the line could not be written completely.
        TypeError: If `record` is not a [`RunRecord`].

    Example:
        >>> append_run("runs.jsonl", record)
    """
    if not isinstance(record, RunRecord):
        raise TypeError(f"`record` must be a RunRecord, got {type(record).__name__}.")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    append_lines(path, [record.to_json()])


def read_runs(path: str | os.PathLike[str]) -> list[RunRecord]:
    """Read all runs of a runs.jsonl file.

    If a crash cut off the last line, the function skips it with a warning.

    Args:
        path (`str` or `os.PathLike`): Path of the runs.jsonl file.

    Returns:
        `list[RunRecord]`: The runs in the order of the file. Empty lines are skipped.

    Raises:
        OSError: If the file cannot be read.
        RunRecordError: If another line is wrong. The message names the file, line and field.

    Example:
        >>> losses = [run.eval_loss_final for run in read_runs("runs.jsonl")]
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
                warnings.warn(f"{path}, line {number} is incomplete and was skipped.", stacklevel=2)
                continue
            message = f"not one JSON object ({error}). Correct or delete the line."
            raise RunRecordError(message, path=str(path), line=number) from None
        try:
            records.append(RunRecord.from_dict(row))
        except RunRecordError as error:
            raise RunRecordError(error.reason, error.field, str(path), number) from None
    return records


__all__ = ["STATUSES", "Backbone", "RunRecord", "append_run", "read_runs"]

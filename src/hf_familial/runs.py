"""A row of runs.jsonl, the contract between training and fitting: fields, writing, reading."""

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
LARGEST = 1e40  # beyond every count and seed; an integer of JSON may have any number of digits


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
        FIELDS.check(self)


@dataclass(frozen=True)
class RunRecord:
    """A training run, as a line of runs.jsonl.

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
        """Return the record as one line of JSON, without the line's end."""
        return json.dumps(without_nan(asdict(self)), allow_nan=False)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> RunRecord:
        """Build the record of a row as JSON has it.

        Args:
            row (`Mapping[str, Any]`): Every field by name, and no other; those with a default may
                be missing, as in rows of older versions.

        Returns:
            [`RunRecord`]

        Raises:
            RunRecordError: If a field is missing, unknown or wrong.
        """
        record: RunRecord = FIELDS.read(cls, row)
        return record


def append_run(path: str | os.PathLike[str], record: RunRecord) -> None:
    """Add a run to a file as one line, whole or not at all, without locks.

    Lines of processes that write at once do not mix (on a local file system; network ones promise
    less). The line is on disk when this returns. Losses that are not finite are written as null.

    Args:
        path (`str` or `os.PathLike`): File of the runs; made, with its folder, if missing.
        record ([`RunRecord`]): The run.

    Raises:
        OSError: If the line could not be written as a whole.
        TypeError: If `record` is not a [`RunRecord`].
    """
    if not isinstance(record, RunRecord):
        raise TypeError(f"`record` must be a RunRecord, got {type(record).__name__}.")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    append_lines(path, [record.to_json()])


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


__all__ = ["STATUSES", "Backbone", "RunRecord", "append_run", "read_runs"]

"""Batches of tensors with labels, created from the rows of a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..models.familial.losses import IGNORE_INDEX


Row = Mapping[str, Any]
Collator = Callable[[list[Row]], Mapping[str, Any]]


def iter_batches(
    dataset: Iterable[Row],
    batch_size: int,
    max_batches: int | None,
    data_collator: Collator | None,
) -> Iterator[dict[str, Any]]:
    """Yield batches of a dataset in order, each with `labels`. Read only the rows that are needed.

    The collator defaults to `pad_rows`.
    """
    rows = islice(dataset, None if max_batches is None else max_batches * batch_size)
    while chunk := list(islice(rows, batch_size)):
        yield _with_labels((data_collator or pad_rows)(chunk))


def model_inputs(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch without its labels, with all tensors on `device`."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name not in ("labels", "shift_labels")
    }


def pad_rows(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Pad rows on the right. Add an `attention_mask` only if some position is masked.

    Columns other than `input_ids`, `labels` and `attention_mask` are dropped.
    """
    tensors = [_row_tensors(row) for row in rows]
    ids, labels, mask = (
        pad_sequence([row[i] for row in tensors], batch_first=True, padding_value=value)
        for i, value in enumerate((0, IGNORE_INDEX, 0))
    )
    batch = {"input_ids": ids, "labels": labels}
    return batch if bool(mask.all()) else batch | {"attention_mask": mask}


def _with_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch with labels (not shifted). If it has none, they come from its tokens."""
    batch = dict(batch)
    if "input_ids" not in batch:
        raise ValueError(f"`data_collator` must return `input_ids`, got {sorted(batch)}.")
    ids = batch["input_ids"]
    if batch.get("labels") is None:
        mask = batch.get("attention_mask")
        if mask is None or mask.shape != ids.shape:
            mask = torch.ones_like(ids)
        batch["labels"] = _own_labels(ids, mask)
    for name in ("labels", "shift_labels"):
        given = batch.get(name)
        if given is not None and given.shape != ids.shape:
            raise ValueError(
                f"`{name}` of a batch must have the shape of its `input_ids`, {tuple(ids.shape)}, "
                f"got {tuple(given.shape)}. Use {IGNORE_INDEX} at positions without a target."
            )
    return batch


def shifted_labels(batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the target of each position, shape `(batch, seq)`, as the training loss uses it.

    The value is -100 at positions without a target. `shift_labels` take precedence over `labels`.
    """
    given: torch.Tensor | None = batch.get("shift_labels")
    if given is not None:
        return given
    return nn.functional.pad(batch["labels"], (0, 1), value=IGNORE_INDEX)[..., 1:]


def _own_labels(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the tokens as labels, with -100 for masked tokens and those after a masked one."""
    masked = attention_mask == 0
    labels = input_ids.masked_fill(masked, IGNORE_INDEX)
    labels[..., 1:].masked_fill_(masked[..., :-1], IGNORE_INDEX)
    return labels


def _row_tensors(row: Row) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not isinstance(row, Mapping):
        raise ValueError(
            "`dataset` must contain rows with a column `input_ids`, such as "
            f"{{'input_ids': [1, 2]}}, got a {type(row).__name__}."
        )
    if row.get("input_ids") is None:
        raise ValueError(f"`dataset` must have a column `input_ids`, got {sorted(row)}.")
    ids = torch.as_tensor(row["input_ids"], dtype=torch.long)
    mask, labels = (
        None if row.get(name) is None else torch.as_tensor(row[name], dtype=torch.long)
        for name in ("attention_mask", "labels")
    )
    mask = torch.ones_like(ids) if mask is None else mask
    labels = _own_labels(ids, mask) if labels is None else labels
    shapes = [tuple(tensor.shape) for tensor in (ids, labels, mask)]
    if ids.ndim != 1 or len(set(shapes)) > 1:
        raise ValueError(
            "`input_ids`, `labels` and `attention_mask` of a row must be one-dimensional and "
            f"of equal length, got shapes {shapes}."
        )
    return ids, labels, mask

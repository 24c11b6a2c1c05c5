"""From rows of a dataset to batches of tensors with labels."""

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
    """Yield batches of a dataset in its order, with `labels`, and read no further than asked for.

    The collator defaults to `pad_rows`.
    """
    rows = islice(dataset, None if max_batches is None else max_batches * batch_size)
    while chunk := list(islice(rows, batch_size)):
        yield _with_labels((data_collator or pad_rows)(chunk))


def model_inputs(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch without its labels, on a device."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name not in ("labels", "shift_labels")
    }


def pad_rows(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Pad rows on the right, and mask only where there is something to mask.

    Columns other than `input_ids`, `labels` and `attention_mask` are left out.
    """
    tensors = [_row_tensors(row) for row in rows]
    ids, labels, mask = (
        pad_sequence([row[i] for row in tensors], batch_first=True, padding_value=value)
        for i, value in enumerate((0, IGNORE_INDEX, 0))
    )
    batch = {"input_ids": ids, "labels": labels}
    return batch if bool(mask.all()) else batch | {"attention_mask": mask}


def _with_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch with labels (not shifted) that follow from its tokens if it has none."""
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
                f"got {tuple(given.shape)}. Give {IGNORE_INDEX} where there is no target."
            )
    return batch


def shifted_labels(batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the target of every position, shape `(batch, seq)`, as the loss of training reads it.

    `shift_labels` go before `labels`; -100 where there is no target.
    """
    given: torch.Tensor | None = batch.get("shift_labels")
    if given is not None:
        return given
    return nn.functional.pad(batch["labels"], (0, 1), value=IGNORE_INDEX)[..., 1:]


def _own_labels(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return every token as a label, but those masked or predicted from a masked one."""
    masked = attention_mask == 0
    labels = input_ids.masked_fill(masked, IGNORE_INDEX)
    labels[..., 1:].masked_fill_(masked[..., :-1], IGNORE_INDEX)
    return labels


def _row_tensors(row: Row) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, labels and mask of a row."""
    if not isinstance(row, Mapping):
        raise ValueError(
            "`dataset` must hold rows with a column `input_ids`, such as {'input_ids': [1, 2]}, "
            f"got a {type(row).__name__}."
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
            "`input_ids`, `labels` and `attention_mask` of a row must be flat and of one length, "
            f"got shapes {shapes}."
        )
    return ids, labels, mask

"""Facts about the runs of a file: their vocabulary and data, and how N and C were counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .._cells import is_missing, number_of, numbers_of
from ..flop_models import HeadFlops, PowerWidth, six_nd
from ._files import Table, some


MEANINGS = {"vocab_size": "vocabularies", "data": "data", "seq_len": "lengths of sequences"}


@dataclass(frozen=True)
class Facts:
    """The facts that all runs of a fit share. A fact that the file does not contain is empty or 0.

    Attributes:
        flops: The way C was counted. `"heads"` if C is closer to 6ND plus the FLOPs of every
            exit's head, `"6ND"` if it is closer to 6ND alone.
    """

    loss: str = ""  # column (and exit) of the fitted loss
    size: str = ""  # the way N was counted: `"total"`, `"non_embedding"` or `"active"`
    data: str = ""  # name of the training data
    vocab_size: int = 0  # vocabulary size: rows of the token embedding and of every head
    seq_len: int = 0  # sequence length in tokens
    flops: str = ""
    width: tuple[float, float] | None = None  # the width is `width[0] * N ** width[1]`
    dense: bool = False  # whether every run has one exit, so that its mean loss is its final loss

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Facts:
        """Build facts from their JSON form."""
        width = record.get("width")
        return cls(**{**record, "width": None if width is None else (width[0], width[1])})

    def cost(self, vocab: int | None = None) -> HeadFlops | None:
        """Return the FLOP model of these runs, `None` if the vocabulary size is unknown.

        Args:
            vocab (`int`, *optional*): Vocabulary size. Default: `vocab_size`.
        """
        rows = vocab or self.vocab_size
        if not rows:
            return None
        inside = 1 if self.size in ("total", "active") else 0
        width = () if self.width is None else (PowerWidth(*self.width),)
        return HeadFlops(rows, inside, *width)

    @property
    def words(self) -> str:
        """The known facts in one line, `""` if there are none."""
        parts = [f"trained on {self.data}"] if self.data else []
        parts += [f"vocabulary of {self.vocab_size:,}"] if self.vocab_size else []
        parts += [f"sequences of {self.seq_len:,} tokens"] if self.seq_len else []
        parts += [f"N counts {self.size.replace('_', '-')} parameters"] if self.size else []
        counted = {"heads": "C counts the heads of every exit", "6ND": "C is near 6ND"}
        parts += [counted[self.flops]] if self.flops else []
        return "; ".join(parts)


def facts_of(
    table: Table, rows: list[int], values: Mapping[str, np.ndarray], loss: str, size: str
) -> tuple[Facts, list[str]]:
    """Return the facts that some rows share, and sentences on those in which they differ."""
    shared: dict[str, Any] = {}
    notes = []
    for name, meaning in MEANINGS.items():
        cells = [table.columns[name][i] for i in rows] if name in table.columns else []
        distinct = dict.fromkeys(cell for cell in cells if cell.__hash__)
        found = {_plain(cell): None for cell in distinct if not is_missing(cell)}
        if len(found) == 1:
            shared[name] = next(iter(found))
        elif len(found) > 1 and name != "seq_len":
            notes.append(
                f"The runs have several {meaning} ({some(found, 4)}), so their losses cannot be "
                f"compared. Choose one with `--where '{name} == {next(iter(found))}'`."
            )
    vocab, length = (shared.get(name, 0) for name in ("vocab_size", "seq_len"))
    facts = Facts(
        loss,
        size,
        str(shared.get("data", "")),
        vocab if isinstance(vocab, int) else 0,
        length if isinstance(length, int) else 0,
        width=_width(table, rows, values.get("N")),
        dense="G" not in values or bool(np.all(values["G"] == 1)),
    )
    return replace(facts, flops=_counted(facts, values)), notes


def _plain(cell: Any) -> Any:
    number = number_of(cell)
    return int(number) if np.isfinite(number) and number == int(number) else str(cell)


def _width(table: Table, rows: list[int], N: np.ndarray | None) -> tuple[float, float] | None:
    """Fit the width as a power of N, from the runs whose width is in the table."""
    backbones = table.columns.get("backbone", ())
    if N is None or not len(backbones):
        return None
    cells = [backbones[i].get("hidden") if isinstance(backbones[i], dict) else None for i in rows]
    width = np.array(numbers_of(cells))
    good = np.isfinite(width) & (width > 0) & np.isfinite(N) & (N > 0)
    if not good.any():
        return None
    x, y = np.log(N[good]), np.log(width[good])
    slope = 1 / 3 if np.ptp(x) < 0.1 else float(np.polyfit(x - x.mean(), y, 1)[0])
    # a width that falls with N, or grows nearly as fast as N, is not plausible
    slope = min(max(slope, 0.2), 0.6)
    return float(np.exp(y.mean() - slope * x.mean())), slope


def _counted(facts: Facts, values: Mapping[str, np.ndarray]) -> str:
    """Return the way C was counted (see `Facts.flops`), `""` without N, D or C."""
    if not {"N", "D", "C"} <= set(values):
        return ""
    N, D, C = (values[name] for name in "NDC")
    G = values.get("G", np.ones_like(N))
    plain = _distance(C, six_nd(N, D))
    model = facts.cost()
    heads = np.inf if model is None else _distance(C, model(N, D, G))
    return "heads" if heads < plain - 1e-9 else "6ND"


def _distance(C: np.ndarray, model: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        off = np.abs(np.log(C / model))
    return float(np.median(off[np.isfinite(off)])) if np.isfinite(off).any() else np.inf

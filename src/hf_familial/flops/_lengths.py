"""FLOPs of a sequence as a polynomial in its length, fitted to counts at a few lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from ..models.backbone_verification import VERIFIED
from ..models.familial import FamilialConfig
from ._fake_model import SHORT, is_walked


# Backbones that process a sequence in chunks -> the config field with the chunk length, or the
# length itself if the code fixes it. Their FLOPs also depend on the number of chunks.
CHUNKED: dict[str, str | int] = {
    "bailing_hybrid": 64,
    "bamba": "mamba_chunk_size",
    "falcon_h1": "mamba_chunk_size",
    "granitemoehybrid": "mamba_chunk_size",
    "kimi_linear": 64,
    "mamba2": "chunk_size",
    "minimax": "block_size",
    "nemotron_h": "chunk_size",
    "olmo_hybrid": 64,
    "qwen3_5_moe_text": 64,
    "qwen3_5_text": 64,
    "qwen3_next": 64,
    "zamba2": "chunk_size",
}
# A backbone with separate kernels for whole chunks and for the rest. No polynomial fits it.
COUNTED = frozenset({"xlstm"})
CHECKED = 61  # a length at which the polynomial of an untested backbone is checked


class LengthCounts:
    """FLOPs of one family at any length, from a few calls of a slow `count(length)`.

    The first length is counted. For the second length, a quadratic is fitted to counts at a few
    lengths. A backbone that works in chunks gets a second polynomial for more than one chunk. It is
    a quadratic in the length and the number of chunks. If the polynomial does not fit the backbone,
    each length is counted once.
    """

    def __init__(self, config: FamilialConfig, count: Callable[[int], int]) -> None:
        self.config, self.count = config, count
        self.chunk = _chunk_of(config)
        self.known: dict[int, int] = {}
        # key: whether there is more than one chunk; value: coefficients, empty if none fit
        self._weights: dict[bool, list[Fraction]] = {}

    def at(self, length: int) -> int:
        """Return the FLOPs of a sequence of this length."""
        if length in self.known or not (self.known or is_walked(self.config, length)):
            return self._counted(length)
        return self._predicted(length, self._laid(self._several(length)))

    def prepare(self) -> None:
        """Fit the polynomial now, so that later calls of `at` are fast."""
        self._laid(self.chunk is not None)

    def _several(self, length: int) -> bool:
        return self.chunk is not None and length > self.chunk

    def _laid(self, several: bool) -> list[Fraction]:
        if self.config.text_config.model_type in COUNTED:
            return []
        if several not in self._weights:
            nodes = _nodes(self.chunk, several)
            rows = [self._terms(length) for length in nodes]
            weights = _solved(rows, [self._counted(length) for length in nodes])
            checks = {n for n in self.known if self._several(n) == several}
            if self.config.text_config.model_type not in VERIFIED:
                checks.add(CHECKED)
            fits = all(self._predicted(n, weights) == self._counted(n) for n in checks)
            self._weights[several] = weights if fits else []
        return self._weights[several]

    def _counted(self, length: int) -> int:
        if length not in self.known:
            self.known[length] = self.count(length)
        return self.known[length]

    def _predicted(self, length: int, weights: list[Fraction]) -> int:
        if not weights:
            return self._counted(length)
        return round(sum(w * t for w, t in zip(weights, self._terms(length), strict=True)))

    def _terms(self, length: int) -> list[int]:
        terms = [1, length, length**2]
        if self.chunk is None or length <= self.chunk:
            return terms
        chunks = -(-length // self.chunk)
        return [*terms, chunks, chunks**2, length * chunks]


def _chunk_of(config: FamilialConfig) -> int | None:
    """Return the chunk length, or `None` for a backbone that does not work in chunks."""
    chunk = CHUNKED.get(config.text_config.model_type)
    return getattr(config.text_config, chunk) if isinstance(chunk, str) else chunk


def _nodes(chunk: int | None, several: bool) -> Sequence[int]:
    """Return lengths at which the counts determine the polynomial."""
    if chunk is None:
        return SHORT
    if not several:
        return (chunk - 2, chunk - 1, chunk)
    return (2 * chunk - 2, 2 * chunk - 1, 2 * chunk, 3 * chunk - 1, 3 * chunk, 4 * chunk)


def _solved(rows: list[list[int]], values: list[int]) -> list[Fraction]:
    """Solve a square linear system exactly, by Gauss-Jordan elimination."""
    table = [[*map(Fraction, row), Fraction(v)] for row, v in zip(rows, values, strict=True)]
    for column in range(len(table)):
        pivot = next(i for i in range(column, len(table)) if table[i][column])
        table[column], table[pivot] = table[pivot], table[column]
        head = table[column] = [x / table[column][column] for x in table[column]]
        for i, row in enumerate(table):
            if i != column and row[column]:
                table[i] = [x - row[column] * y for x, y in zip(row, head, strict=True)]
    return [row[-1] for row in table]

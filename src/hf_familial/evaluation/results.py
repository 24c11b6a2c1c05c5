"""The result of an evaluation, with one row per exit, as a table or a dict."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd  # type: ignore[import-untyped]


# columns of the printed table: heading, width, format
COLUMNS: tuple[tuple[str, int, Callable[[ExitRow], str]], ...] = (
    ("exit", 4, lambda row: str(row.exit_idx)),
    ("depth", 5, lambda row: str(row.depth)),
    ("loss", 8, lambda row: f"{row.loss:.4f}"),
    ("perplexity", 10, lambda row: f"{row.perplexity:.5g}"),
    ("bits/byte", 9, lambda row: "-" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"),
    ("accuracy", 8, lambda row: f"{row.accuracy:.1%}"),
    ("agreement", 9, lambda row: f"{row.agreement:.1%}"),
    ("calibration", 11, lambda row: f"{row.expected_calibration_error:.3f}"),
    ("FLOPs", 7, lambda row: re.sub(r"e\+0?", "e", f"{row.flops_per_token:.2e}")),
)


@dataclass(frozen=True)
class ExitRow:
    """The quality and cost of one exit.

    Attributes:
        exit_idx (`int`): The exit, an index into `config.exits`. 0 is the shallowest.
        depth (`int`): The number of backbone layers below the exit.
        flops_per_token (`float`): FLOPs per token of the member's forward pass, at the length of
            the longest sequence. See [`measure_flops_per_token`].
        loss (`float`): Cross entropy in nats per predicted token, over the whole dataset.
        perplexity (`float`): `exp(loss)` (Jelinek et al. 1977, "Perplexity: a measure of the
            difficulty of speech recognition tasks"). It is infinite if that overflows.
        bits_per_byte (`float`, *optional*): `loss / ln(2) / bytes_per_token`, which is comparable
            between tokenizers (The Pile, arXiv:2101.00027, section 3.1). It is `None` if
            `bytes_per_token` is not given.
        accuracy (`float`): The share of positions where the most probable token is the true one.
        agreement (`float`): The share of positions where the most probable token is that of the
            deepest exit. CALM (arXiv:2207.07061) calls it consistency. In greedy self-speculation
            (arXiv:2404.16710) it is the share of accepted single drafts.
        expected_calibration_error (`float`): The mean distance between accuracy and the probability
            of the most probable token, over bins of equal width (Guo et al. 2017, arXiv:1706.04599,
            equation 3).
    """

    exit_idx: int
    depth: int
    flops_per_token: float
    loss: float
    perplexity: float
    bits_per_byte: float | None
    accuracy: float
    agreement: float
    expected_calibration_error: float


@dataclass(frozen=True)
class ExitEvaluation:
    """The quality and cost of all exits, as [`evaluate_exits`] returns them.

    Attributes:
        rows (`tuple[ExitRow, ...]`): One row per exit, shallowest first.
        num_tokens (`int`): The number of predicted tokens, the same for each exit.
        num_sequences (`int`): The number of dataset rows that were read.
        seq_length (`int`): The number of tokens of the longest sequence. FLOPs are counted at this
            length.
        num_bins (`int`): The number of bins of the calibration error.
        bytes_per_token (`float`, *optional*): The given UTF-8 bytes of text per token.
        backbone (`str`): The `model_type` of the backbone.
    """

    rows: tuple[ExitRow, ...]
    num_tokens: int
    num_sequences: int
    seq_length: int
    num_bins: int
    bytes_per_token: float | None
    backbone: str

    def __str__(self) -> str:
        """Return the exits as a text table of up to 80 columns."""
        lines = [
            f"{self.num_tokens:,} tokens of {self.num_sequences:,} sequences, a family on "
            f"{self.backbone}; loss in nats per token",
            " ".join(f"{name:>{width}}" for name, width, _ in COLUMNS),
        ]
        lines += [
            " ".join(f"{cell(row):>{width}}" for _, width, cell in COLUMNS) for row in self.rows
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the exits as an HTML table for a notebook."""
        return str(self.to_pandas()._repr_html_())

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain Python values. `rows` is a list of dicts."""
        return asdict(self) | {"rows": [asdict(row) for row in self.rows]}

    def to_pandas(self) -> pd.DataFrame:
        """Return a `pandas.DataFrame` with one row per exit and the fields of [`ExitRow`].

        `bits_per_byte` is NaN instead of `None`. The attribute `attrs` contains the other fields.
        """
        fields = self.to_dict()
        table = pd.DataFrame(fields.pop("rows")).astype({"bits_per_byte": float})
        table.attrs = fields
        return table

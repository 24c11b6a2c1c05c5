"""What an evaluation found: one row per exit, as a table, a dict or a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
from matplotlib.figure import Figure

from .plots import draw_exits


# headings of the printed table, and the width of each column
COLUMNS = {
    "exit": 4,
    "depth": 5,
    "loss": 8,
    "perplexity": 10,
    "bits/byte": 9,
    "accuracy": 8,
    "agreement": 9,
    "calibration": 11,
    "FLOPs": 7,
}


@dataclass(frozen=True)
class ExitRow:
    """One exit: how good it is and what it costs.

    Attributes:
        exit_idx (`int`): Index into `config.exits`, 0 the shallowest.
        depth (`int`): Backbone layers below it.
        flops_per_token (`float`): FLOPs of its member's forward pass per token, at the length of
            the longest sequence; see `flops.measure_flops_per_token`.
        loss (`float`): Cross entropy in nats per predicted token, over all tokens of the dataset.
        perplexity (`float`): `exp(loss)` (Jelinek et al. 1977, "Perplexity: a measure of the
            difficulty of speech recognition tasks"); infinite where that overflows.
        bits_per_byte (`float`, *optional*): `loss / ln(2) / bytes_per_token`, comparable between
            tokenizers (The Pile, arXiv:2101.00027, section 3.1); `None` without `bytes_per_token`.
        accuracy (`float`): Share of predicted tokens that the exit holds most probable.
        agreement (`float`): Share of positions where that token is the deepest exit's too (the
            consistency that CALM, arXiv:2207.07061, asks of an early exit; for greedy
            self-speculation, arXiv:2404.16710, the share of single drafts accepted).
        expected_calibration_error (`float`): Mean distance between accuracy and the probability of
            the top token, over bins of equal width (Guo et al. 2017, arXiv:1706.04599, equation 3).
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
    """What [`evaluate_exits`] returns.

    Attributes:
        rows (`tuple[ExitRow, ...]`): One per exit, shallowest first.
        num_tokens (`int`): Predicted tokens, the same for every exit.
        num_sequences (`int`): Rows of the dataset that were read.
        seq_length (`int`): Tokens of the longest sequence, the length that FLOPs are counted at.
        num_bins (`int`): Bins of the calibration error.
        bytes_per_token (`float`, *optional*): UTF-8 bytes of text per token, as given.
        backbone (`str`): `model_type` of the backbone.
    """

    rows: tuple[ExitRow, ...]
    num_tokens: int
    num_sequences: int
    seq_length: int
    num_bins: int
    bytes_per_token: float | None
    backbone: str

    def __str__(self) -> str:
        """A table of the exits, for a terminal of 80 columns."""
        lines = [
            f"{self.num_tokens:,} tokens of {self.num_sequences:,} sequences, a family on "
            f"{self.backbone}; loss in nats per token",
            " ".join(f"{name:>{width}}" for name, width in COLUMNS.items()),
        ]
        return "\n".join([*lines, *map(_line, self.rows)])

    def _repr_html_(self) -> str:
        """The same table in a notebook."""
        return str(self.to_pandas()._repr_html_())

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values, the rows as a list of dicts."""
        return asdict(self) | {"rows": [asdict(row) for row in self.rows]}

    def to_pandas(self) -> pd.DataFrame:
        """A table with one line per exit and the fields of [`ExitRow`] as columns.

        Returns:
            `pandas.DataFrame`: `bits_per_byte` is NaN where it is `None`; `attrs` holds the rest.
        """
        fields = self.to_dict()
        table = pd.DataFrame(fields.pop("rows")).astype({"bits_per_byte": float})
        table.attrs = fields
        return table

    def plot(self, path: str | PathLike[str] | None = None) -> Figure:
        """Draw quality against FLOPs: loss, agreement and calibration error of every exit.

        Args:
            path (`str` or `os.PathLike`, *optional*): File to write; its suffix says the format.

        Returns:
            `matplotlib.figure.Figure`: The picture.
        """
        figure = draw_exits(self.rows)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def _line(row: ExitRow) -> str:
    """The cells of one exit."""
    cells = (
        str(row.exit_idx),
        str(row.depth),
        f"{row.loss:.4f}",
        f"{row.perplexity:.5g}",
        "-" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}",
        f"{row.accuracy:.1%}",
        f"{row.agreement:.1%}",
        f"{row.expected_calibration_error:.3f}",
        f"{row.flops_per_token:.2e}".replace("e+0", "e").replace("e+", "e"),
    )
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True))

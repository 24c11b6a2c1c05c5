"""Results of a training run: a table of the members and a plot of their losses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich import box
from rich.console import Console
from rich.table import Table

from ..flops import count_parameters, measure_flops_per_token
from ..models.familial import FamilialForCausalLM


@dataclass(frozen=True)
class MemberRow:
    """A row of the table of members."""

    exit_idx: int  # exit at which the member ends
    depth: int  # backbone layers below the exit
    parameters: int  # all parameters of the member; a shared parameter counts once
    non_embedding: int  # the same without token embedding and output head
    flops_per_token: float  # FLOPs of a forward pass per token, at the training length
    eval_loss: float  # nats per token
    perplexity: float  # `exp(eval_loss)`
    bits_per_byte: float  # loss in bits per byte of the evaluation text


def member_rows(
    model: FamilialForCausalLM,
    metrics: Mapping[str, float],
    seq_length: int,
    bytes_per_token: float,
) -> list[MemberRow]:
    """Return one row per member, shallowest first.

    Args:
        model ([`FamilialForCausalLM`]): The family.
        metrics (`Mapping[str, float]`): Metrics from `FamilialTrainer.evaluate`. They must have
            `eval_exit_<k>_loss` of each exit.
        seq_length (`int`): Tokens in a sequence. The FLOPs of attention depend on it.
        bytes_per_token (`float`): UTF-8 bytes of evaluation text per token.

    Example:
        >>> rows = member_rows(model, trainer.evaluate(), 256, data.eval_bytes_per_token)
        >>> print_members(rows)
    """
    rows = []
    for k, depth in enumerate(model.config.exits):
        counts, loss = count_parameters(model, k), metrics[f"eval_exit_{k}_loss"]
        flops = measure_flops_per_token(model, k, seq_length)
        # show a diverged loss as infinity, because `exp` would overflow
        perplexity = math.inf if loss > 700 else math.exp(loss)
        bits = loss / math.log(2) / bytes_per_token
        sizes = (counts["total"], counts["non_embedding"])
        rows.append(MemberRow(k, depth, *sizes, flops, loss, perplexity, bits))
    return rows


def print_members(rows: Sequence[MemberRow], console: Console | None = None) -> None:
    """Print a table of the members, to standard output by default."""
    # the table fits 80 columns up to members of 10 billion parameters
    table = Table(title="Members", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    table.pad_edge, table.collapse_padding = False, True
    names = ("exit", "depth", "parameters", "without\nembeddings", "FLOPs\n/token")
    for name in (*names, "eval\nloss", "perplexity", "bits\n/byte"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row.exit_idx),
            str(row.depth),
            f"{row.parameters:,}",
            f"{row.non_embedding:,}",
            f"{row.flops_per_token:.3g}",
            f"{row.eval_loss:#.5g}",
            f"{row.perplexity:.2f}" if row.perplexity < 1e6 else f"{row.perplexity:.3g}",
            f"{row.bits_per_byte:#.4g}",
        )
    (console or Console()).print(table)


def save_members(rows: Sequence[MemberRow], path: Path) -> None:
    """Write the rows to a JSON file, one object per member."""
    # JSON has no infinity, so a number that is not finite becomes null
    members = [
        {name: value if math.isfinite(value) else None for name, value in asdict(row).items()}
        for row in rows
    ]
    path.write_text(json.dumps(members, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def plot_losses(
    log_history: Sequence[Mapping[str, Any]],
    depths: Sequence[int],
    tokens_per_step: int,
    path: Path,
) -> None:
    """Plot the loss of each exit over the tokens seen, as lines (training) and dots (evaluation).

    Args:
        log_history (`Sequence[Mapping[str, Any]]`): `trainer.state.log_history`.
        depths (`Sequence[int]`): Depth of each exit, in layers.
        tokens_per_step (`int`): Tokens of one optimiser step over all processes.
        path (`Path`): PNG file to write.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    # deeper exits are darker, so the lines differ in black and white too
    colours = colormaps["viridis"](np.linspace(0, 0.85, len(depths)))[::-1]
    for k, (depth, colour) in enumerate(zip(depths, colours, strict=True)):
        training = _points(log_history, f"exit_{k}_loss", tokens_per_step)
        evaluation = _points(log_history, f"eval_exit_{k}_loss", tokens_per_step)
        axes.plot(*training, color=colour, label=f"exit {k} (depth {depth})", zorder=2)
        axes.plot(*evaluation, "o", color=colour, markeredgecolor="white", zorder=3)
    axes.set(xlabel="tokens seen", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title("Loss of every exit: lines in training, dots in evaluation", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _points(
    log_history: Sequence[Mapping[str, Any]], key: str, tokens_per_step: int
) -> tuple[list[int], list[float]]:
    """Return the tokens seen and the values of all logs that have `key`."""
    rows = [row for row in log_history if key in row]
    return [row["step"] * tokens_per_step for row in rows], [row[key] for row in rows]

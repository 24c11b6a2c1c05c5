"""What a training run shows at its end: a table of the members and a picture of their losses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ..flops import count_parameters, measure_flops_per_token
from ..models.familial import FamilialForCausalLM


@dataclass(frozen=True)
class MemberRow:
    """One member, as a line of the table.

    Attributes:
        exit_idx (`int`): Exit at which it ends.
        depth (`int`): Backbone layers below it.
        parameters (`int`): All parameters it needs, each shared one once.
        non_embedding (`int`): The same without token embedding and output head.
        flops_per_token (`float`): FLOPs of a forward pass per token, at the training sequence length.
        eval_loss (`float`): Nats per token.
        perplexity (`float`): `exp(eval_loss)`.
        bits_per_byte (`float`): Loss in bits per byte of the evaluation text.
    """

    exit_idx: int
    depth: int
    parameters: int
    non_embedding: int
    flops_per_token: float
    eval_loss: float
    perplexity: float
    bits_per_byte: float


def member_rows(
    model: FamilialForCausalLM,
    metrics: Mapping[str, float],
    seq_length: int,
    bytes_per_token: float,
) -> list[MemberRow]:
    """One row per member, from a model and the metrics of its evaluation.

    Args:
        model ([`FamilialForCausalLM`]): The family.
        metrics (`Mapping[str, float]`): What [`FamilialTrainer`] returns: `eval_exit_<k>_loss`.
        seq_length (`int`): Tokens in a sequence, for the FLOPs of attention.
        bytes_per_token (`float`): UTF-8 bytes of evaluation text per token.

    Returns:
        `list[MemberRow]`: Shallowest first.
    """
    rows = []
    for k, depth in enumerate(model.config.exits):
        counts, loss = count_parameters(model, k), metrics[f"eval_exit_{k}_loss"]
        rows.append(
            MemberRow(
                exit_idx=k,
                depth=depth,
                parameters=counts["total"],
                non_embedding=counts["non_embedding"],
                flops_per_token=measure_flops_per_token(model, k, seq_length),
                eval_loss=loss,
                # a diverged loss is shown as such rather than as an overflow
                perplexity=math.exp(loss) if loss < 700 else math.inf,
                bits_per_byte=loss / math.log(2) / bytes_per_token,
            )
        )
    return rows


def print_members(rows: Sequence[MemberRow], console: Console | None = None) -> None:
    """Print the table of the members.

    Args:
        rows (`Sequence[MemberRow]`): Shallowest first.
        console (`rich.console.Console`, *optional*): Where to; standard output by default.
    """
    table = Table(title="Members", title_justify="left")
    names = ("exit", "depth", "parameters", "w/o embeddings", "FLOPs/token")
    for name in (*names, "eval loss", "perplexity", "bits/byte"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row.exit_idx),
            str(row.depth),
            f"{row.parameters:,}",
            f"{row.non_embedding:,}",
            f"{row.flops_per_token:.3g}",
            f"{row.eval_loss:.4f}",
            f"{row.perplexity:.2f}",
            f"{row.bits_per_byte:.3f}",
        )
    (console or Console()).print(table)


def save_members(rows: Sequence[MemberRow], path: Path) -> None:
    """Write the table as JSON, one object per member.

    Args:
        rows (`Sequence[MemberRow]`): Shallowest first.
        path (`Path`): File to write.
    """
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


def plot_losses(
    log_history: Sequence[Mapping[str, Any]],
    depths: Sequence[int],
    tokens_per_step: int,
    path: Path,
) -> None:
    """Draw the loss of every exit over the tokens seen: lines in training, dots in evaluation.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`): `trainer.state.log_history`.
        depths (`Sequence[int]`): Depth of every exit, in layers.
        tokens_per_step (`int`): Tokens of one optimiser step, over all processes.
        path (`Path`): PNG file to write.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for k, depth in enumerate(depths):
        # from light to dark with the depth, readable in print too
        colour = (0.05, 0.3, 0.55, 0.35 + 0.65 * (k + 1) / len(depths))
        for key, style in ((f"exit_{k}_loss", "-"), (f"eval_exit_{k}_loss", "o")):
            points = [(row["step"] * tokens_per_step, row[key]) for row in log_history if key in row]
            if points:
                label = f"exit {k} (depth {depth})" if style == "-" else None
                axes.plot(*zip(*points, strict=True), style, color=colour, label=label)
    axes.set(xlabel="tokens seen", ylabel="loss (nats per token)")
    axes.set_title("Loss of every exit: lines in training, dots in evaluation", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)

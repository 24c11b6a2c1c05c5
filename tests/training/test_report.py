"""Report: the numbers of the table, and that it and the picture come out whole."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from reference import tiny_family
from rich.console import Console

from hf_familial.flops import count_parameters, measure_flops_per_token
from hf_familial.training.report import (
    MemberRow,
    member_rows,
    plot_losses,
    print_members,
    save_members,
)


EXITS = [1, 2, 4]
COLUMNS = ("exit", "depth", "parameters", "embeddings", "FLOPs", "loss", "perplexity", "bits")


def metrics_of(*losses: float) -> dict[str, float]:
    return {f"eval_exit_{k}_loss": loss for k, loss in enumerate(losses)}


def row_of(exit_idx: int, eval_loss: float, perplexity: float) -> MemberRow:
    """A member of 9 billion parameters."""
    counts = (9_234_567_890, 8_234_567_890)
    return MemberRow(exit_idx, 28, *counts, 1.23e10, eval_loss, perplexity, eval_loss / 3)


def history(num_exits: int, steps: int = 5) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        losses = {f"exit_{k}_loss": 5 / step - 0.1 * k for k in range(num_exits)}
        rows.append({"step": step, "loss": 1.0, **losses})
    evaluation = {f"eval_exit_{k}_loss": 2 - 0.1 * k for k in range(num_exits)}
    return [
        *rows,
        {"step": steps, "eval_loss": 1.0, **evaluation},
        {"step": steps, "train_loss": 1},
    ]


def test_rows() -> None:
    family = tiny_family("llama", EXITS)
    losses = (3.0, 2.5, math.log(8))
    rows = member_rows(family, metrics_of(*losses), seq_length=16, bytes_per_token=1.5)
    assert [(row.exit_idx, row.depth) for row in rows] == [(0, 1), (1, 2), (2, 4)]
    for k, row in enumerate(rows):
        counts = count_parameters(family, k)
        assert (row.parameters, row.non_embedding) == (counts["total"], counts["non_embedding"])
        assert row.flops_per_token == measure_flops_per_token(family, k, 16)
        assert row.eval_loss == losses[k]
        assert row.perplexity == math.exp(losses[k])
    # a token of 1.5 bytes that costs log2(8) bits
    assert rows[-1].perplexity == pytest.approx(8)
    assert rows[-1].bits_per_byte == pytest.approx(3 / 1.5)


def test_diverged_losses() -> None:
    family = tiny_family("llama", EXITS)
    metrics = metrics_of(1e4, math.inf, math.nan)
    rows = member_rows(family, metrics, seq_length=4, bytes_per_token=1.0)
    assert [row.perplexity for row in rows[:2]] == [math.inf, math.inf]
    assert math.isnan(rows[2].perplexity)


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_is_whole(width: int) -> None:
    rows = [row_of(0, 2.5, 12.18), row_of(1, 12.5, 268337.29), row_of(2, 800.0, math.inf)]
    rows += [row_of(3, math.nan, math.nan), row_of(4, 650.0, math.exp(650))]
    console = Console(width=width, file=io.StringIO())
    print_members(rows, console)
    text = console.file.getvalue()
    assert "…" not in text
    lines = text.splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    assert all(name in text for name in COLUMNS)
    body = [line.split() for line in lines if line.strip() and line.split()[0].isdigit()]
    assert [len(cells) for cells in body] == [8] * 5
    numbers = ["9,234,567,890", "8,234,567,890", "1.23e+10"]
    assert body[0] == ["0", "28", *numbers, "2.5000", "12.18", "0.8333"]
    assert body[2][5:] == ["800.00", "inf", "266.7"]
    assert body[3][5:] == ["nan", "nan", "nan"]
    assert body[4][6] == "1.96e+282"


def test_members_are_saved_as_strict_json(tmp_path: Path) -> None:
    save_members([row_of(0, 2.5, 12.18), row_of(1, 800.0, math.inf)], tmp_path / "members.json")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = (tmp_path / "members.json").read_text()
    first, second = json.loads(text, parse_constant=refuse)
    assert first["perplexity"] == 12.18
    assert first["parameters"] == 9_234_567_890
    assert second["perplexity"] is None


@pytest.mark.parametrize("num_exits", [1, 3, 8])
def test_the_picture_is_drawn(tmp_path: Path, num_exits: int) -> None:
    path = tmp_path / "losses.png"
    plot_losses(history(num_exits), range(1, num_exits + 1), 2048, path)
    pixels = imread(path)[..., :3]
    assert pixels.shape[:2] == (675, 1200)
    # something besides white, black and grey
    assert (pixels.max(-1) - pixels.min(-1)).max() > 0.2


@pytest.mark.parametrize("rows", [[], [{"step": 0, "eval_loss": 2.0, "eval_exit_0_loss": 2.0}]])
def test_a_history_without_training(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    plot_losses(rows, EXITS, 2048, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 1000


def test_a_history_with_diverged_losses(tmp_path: Path) -> None:
    rows = [*history(3), {"step": 6, "exit_0_loss": math.nan, "exit_1_loss": math.inf}]
    plot_losses(rows, EXITS, 2048, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 1000

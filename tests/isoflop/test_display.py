"""The display of a sweep: lines, bars, and the FLOPs that are done."""

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sweep_harness import Here, design_of, rows_of

from hf_familial.isoflop import (
    Failure,
    IsoFlopDesign,
    Sweep,
    SweepDisplay,
    WorkerEvent,
)
from hf_familial.isoflop._display import Progress
from hf_familial.runs import Backbone, RunRecord


PLANS = design_of("stdlib", seeds=(0, 1)).runs()  # nothing is read for them


def record_of(plan: Any, **fields: Any) -> RunRecord:
    losses = tuple(2.0 + k for k in range(plan.G))
    usual: dict[str, Any] = {
        "run_id": plan.id,
        "N_total": 1,
        "N_non_embedding": 1,
        "N_active": 1,
        "D_tokens": plan.tokens,
        "C_flops": plan.flops,
        "G": plan.G,
        "exits": plan.exits,
        "seed": plan.seed,
        "lr": plan.lr,
        "batch_tokens": plan.batch_tokens,
        "seq_len": plan.seq_length,
        "vocab_size": 300,
        "data": "noise",
        "backbone": Backbone("llama", plan.width, plan.depth),
        "wall_s": 90.0,
        "tokens_per_s": 1.0,
        "code_version": "0",
        "status": "finished",
    }
    for name in ("loss", "eval_loss"):
        usual |= {f"{name}_mean": 2.0, f"{name}_exits": losses, f"{name}_final": losses[-1]}
    return RunRecord(**(usual | fields))


@given(
    steps=st.lists(
        st.tuples(st.integers(0, len(PLANS) - 1), st.floats(0, 1), st.booleans()), max_size=30
    )
)
def test_a_tally_stays_in_its_bounds(steps: list[tuple[int, float, bool]]) -> None:
    tally = Progress(sum(plan.flops for plan in PLANS))
    for index, share, before in steps:
        plan = PLANS[index]
        tally.put(plan, round(share * plan.steps), before)
        assert 0 <= tally.share <= 1 + 1e-12
        assert tally.rate >= 0
        assert (tally.left() == "?") == (tally.rate == 0)


def test_a_tally_knows_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, other = PLANS[0], PLANS[1]
    tally = Progress(plan.flops + other.flops, start=0.0)
    monkeypatch.setattr("hf_familial.isoflop._display.time.monotonic", lambda: 100.0)
    assert (tally.share, tally.left()) == (0.0, "?")
    tally.put(other, other.steps, before=True)
    tally.put(plan, plan.steps // 2, before=True)
    assert tally.rate == 0
    tally.put(plan, plan.steps * 3 // 4)
    # a quarter of a run in 100 seconds: as much is left
    assert tally.rate == pytest.approx(plan.flops / 4 / 100)
    assert tally.share == pytest.approx(1 - plan.flops / 4 / tally.total)
    assert tally.left() == "1.7 min"
    # taken up again after a failure, from where it was: that work was of this start
    tally.put(plan, plan.steps * 3 // 4, before=True)
    assert tally.rate == pytest.approx(plan.flops / 4 / 100)


def told(terminal: bool = False, **choices: Any) -> tuple[SweepDisplay, io.StringIO]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=80, color_system=None)
    return SweepDisplay(console, **choices), text


def play(display: SweepDisplay) -> None:
    first, second, third, fourth = PLANS
    display.begin(PLANS, [fourth])
    display.progress(first, WorkerEvent("progress", first.id, 0))
    display.progress(first, WorkerEvent("progress", first.id, 10, 3.25, 2e9))
    display.ended(first, record_of(first))
    display.progress(second, WorkerEvent("progress", second.id, 4, None, None))
    display.failed(second, Failure(1, 0, "boom [not markup]"), True)
    display.failed(second, Failure(2, 0, "boom"), False)
    display.ended(third, record_of(third, status="diverged", eval_loss_exits=(None,) * third.G))
    display.close()


def test_plain_lines_where_there_is_no_terminal() -> None:
    display, text = told(seconds=0)
    play(display)
    said = text.getvalue()
    lines = said.splitlines()
    assert "\x1b" not in said
    assert "\r" not in said
    assert lines[0].startswith("1 of 4 runs done, ")
    assert "step 10/20, loss 3.250, 2.0 GFLOP/s" in said
    ids = [plan.id[:8] for plan in PLANS]
    assert f"2/4 {ids[0]} C=4.3e+07 16x2 G=1 s0 finished: eval loss 2.0000, 1.5 min" in said
    assert any("failed and will be tried again: boom [not markup]" in line for line in lines)
    assert any("failed and will not be tried again: boom" in line for line in lines)
    assert any(line.startswith(f"3/4 {ids[2]}") and "diverged" in line for line in lines)
    assert display.summary().startswith("3/4 runs, 1 failed, ")


def test_lines_of_progress_are_few() -> None:
    display, text = told(seconds=3600)
    display.begin(PLANS, [])
    for step in range(20):
        display.progress(PLANS[0], WorkerEvent("progress", PLANS[0].id, step, 3.0, 1e9))
    assert len(text.getvalue().splitlines()) == 1


def test_bars_where_there_is_one() -> None:
    display, text = told(terminal=True)
    display.begin(PLANS, [PLANS[3]])
    assert display._bars is not None
    display.progress(PLANS[0], WorkerEvent("progress", PLANS[0].id, 10, 3.25, 2e9))
    display._bars.refresh()
    bars = text.getvalue().splitlines()[-2:]
    assert "all runs" in bars[0]
    assert "1/4 runs, " in bars[0]
    assert bars[0].rstrip().endswith(" left")
    assert f"{PLANS[0].id[:8]} C=4.3e+07 16x2 G=1 s0" in bars[1]
    assert bars[1].rstrip().endswith("step 10/20, loss 3.250, 2.0 GFLOP/s")
    display.close()
    again, text = told(terminal=True)
    play(again)
    said = text.getvalue()
    assert "\x1b[" in said
    assert "2/4 " in said
    assert "failed and will not be tried again: boom" in said
    plain, _ = told(terminal=False)
    plain.begin(PLANS, [])
    assert plain._bars is None


def test_a_display_closes_before_it_begins() -> None:
    for terminal in (False, True):
        told(terminal)[0].close()


def test_a_sweep_tells_how_it_goes(design: IsoFlopDesign, tmp_path: Path) -> None:
    display, text = told(seconds=0)
    failed: list[str] = []

    def hear(event: WorkerEvent) -> None:
        if event.kind == "progress" and event.step == 4 and event.run_id not in failed:
            failed.append(event.run_id)
            raise RuntimeError("once")

    Sweep(design, tmp_path, Here(hear=hear), retries=1, display=display).run()
    lines = text.getvalue().splitlines()
    assert lines[0].startswith("0 of 2 runs done")
    assert sum("failed and will be tried again: RuntimeError: once" in line for line in lines) == 2
    assert [line.split()[0] for line in lines if "finished: eval loss" in line] == ["1/2", "2/2"]
    losses = {row["run_id"][:8]: row["eval_loss_final"] for row in rows_of(tmp_path)}
    assert all(any(f"{loss:.4f}" in line for line in lines) for loss in losses.values())

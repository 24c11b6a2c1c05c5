"""A sweep on this process's own executor: what runs, what is skipped, what is refused."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sweep_harness import (
    Here,
    Killed,
    assert_same_sweep,
    design_of,
    killed_at,
    rows_of,
    write_corpus,
)

from hf_familial.errors import DesignError, RunRecordError, StoppedSweepError, SweepLockedError
from hf_familial.isoflop import (
    Fixed,
    IsoFlopDesign,
    RunTask,
    Sweep,
    SweepDisplay,
    SweepFolder,
    WorkerEvent,
    run_states,
)
from hf_familial.isoflop._folder import FAILURE, RECORD, RUN_POINTS
from hf_familial.isoflop.arguments import _corpus
from hf_familial.runs import read_runs


def failing(times: int, message: str = "cosmic rays") -> Any:
    """Raises in the middle of a run, so many times."""
    left = [times]

    def hear(event: WorkerEvent) -> None:
        if event.kind == "progress" and event.step == 4 and left[0]:
            left[0] -= 1
            raise RuntimeError(message)

    return hear


# what runs


def test_every_run_has_its_row_once(design: IsoFlopDesign, undisturbed: Path) -> None:
    plans = {plan.id: plan for plan in design.runs()}
    records = {record.run_id: record for record in read_runs(undisturbed / "runs.jsonl")}
    assert sorted(records) == sorted(plans)
    assert [plan.steps for plan in plans.values()] == [20, 14]
    for run_id, record in records.items():
        plan = plans[run_id]
        assert record.status == "finished"
        assert (record.D_tokens, record.G, record.seed) == (plan.tokens, plan.G, plan.seed)
        assert record.C_flops == pytest.approx(plan.flops, rel=1e-12)
        assert record.C_flops == pytest.approx(plan.budget, rel=5e-3)
        losses = record.eval_loss_exits or ()
        assert len(losses) == plan.G
        assert record.eval_loss_final == losses[-1] < math.log(300)
        assert record.eval_loss_mean == sum(losses) / plan.G
    (path,) = (undisturbed / "designs").iterdir()
    assert IsoFlopDesign.from_yaml(path) == design


def test_evaluations_stand_at_their_steps(design: IsoFlopDesign, undisturbed: Path) -> None:
    rows = rows_of(undisturbed, "evaluations.jsonl")
    last = {record.run_id: record for record in read_runs(undisturbed / "runs.jsonl")}
    for plan in design.runs():
        own = [row for row in rows if row["run_id"] == plan.id]
        assert [row["step"] for row in own] == [*range(6, plan.steps, 6), plan.steps]
        assert [row["D_tokens"] for row in own] == [row["step"] * 32 for row in own]
        assert own[-1]["C_flops"] == pytest.approx(last[plan.id].C_flops, rel=1e-12)
        assert tuple(own[-1]["eval_loss_exits"]) == last[plan.id].eval_loss_exits


def test_what_is_finished_is_skipped(design: IsoFlopDesign, tmp_path: Path) -> None:
    Sweep(design, tmp_path, Here()).run()
    before = {name: (tmp_path / name).read_bytes() for name in ("runs.jsonl", "evaluations.jsonl")}
    executor = Here()
    outcome = Sweep(design, tmp_path, executor).run()
    assert (executor.submitted, outcome.done_now, len(outcome.records)) == ([], 0, 2)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def test_a_changed_design_runs_what_is_new(
    corpus: Path, design: IsoFlopDesign, tmp_path: Path
) -> None:
    Sweep(design, tmp_path, Here()).run()
    executor = Here()
    wider = design_of(corpus, seeds=(0, 1), granularities=(1,))
    outcome = Sweep(wider, tmp_path, executor).run()
    new = [plan.id for plan in wider.runs() if plan.seed == 1]
    assert (executor.submitted, outcome.done_now) == (new, 1)
    assert {record.run_id for record in outcome.records} == {plan.id for plan in wider.runs()}
    assert len(read_runs(tmp_path / "runs.jsonl")) == 3
    kept = [IsoFlopDesign.from_yaml(path) for path in (tmp_path / "designs").iterdir()]
    assert len(kept) == 2
    assert wider in kept


def test_models_stay_if_asked_for(corpus: Path, tmp_path: Path) -> None:
    from hf_familial import FamilialForCausalLM

    design = design_of(corpus, granularities=(1,))
    Sweep(design, tmp_path, Here(), keep_models=True, save_seconds=0).run()
    (folder,) = (tmp_path / "runs").iterdir()
    assert [path.name for path in folder.iterdir()] == ["model"]
    model = FamilialForCausalLM.from_pretrained(folder / "model")
    assert model.config.exits == list(design.runs()[0].exits)


def test_a_model_that_was_not_saved_is_not_believed(corpus: Path, tmp_path: Path) -> None:
    """A break between the last step and the model: the run is not over."""
    design = design_of(corpus, granularities=(1,))
    run_id = design.runs()[0].id
    folder = SweepFolder(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.Trainer.save_model", lambda *args, **choices: _die(args))
        with pytest.raises(Killed):
            Sweep(design, tmp_path, Here(), keep_models=True).run()
    assert folder.record(run_id) is None
    Sweep(design, tmp_path, Here(), keep_models=True).run()
    assert (tmp_path / "runs" / run_id / "model" / "model.safetensors").exists()
    assert len(read_runs(tmp_path / "runs.jsonl")) == 1


def _die(args: Any) -> None:
    raise Killed


# runs that go wrong


def test_nan_is_a_status(corpus: Path, tmp_path: Path) -> None:
    design = design_of(
        corpus,
        rule=Fixed(lr=1e18, batch_tokens=32),
        granularities=(1,),
        training={"max_grad_norm": 0.0, "warmup_steps": 0},
    )
    events: list[WorkerEvent] = []
    outcome = Sweep(design, tmp_path, Here(hear=events.append), save_seconds=0).run()
    (record,) = outcome.records
    assert (record.status, record.loss_final, outcome.failed) == ("diverged", None, {})
    assert record.D_tokens < design.runs()[0].tokens  # it stopped early
    assert all(event.loss is None or math.isfinite(event.loss) for event in events)
    for line in (tmp_path / "runs.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert not list((tmp_path / "runs").iterdir())
    executor = Here()
    Sweep(design, tmp_path, executor).run()
    assert executor.submitted == []


def test_worse_than_guessing_is_diverged(corpus: Path, tmp_path: Path) -> None:
    design = design_of(corpus, rule=Fixed(lr=3.0, batch_tokens=32), training={"max_grad_norm": 0.0})
    outcome = Sweep(design, tmp_path, Here()).run()
    for record in outcome.records:
        assert record.status == "diverged"
        assert record.eval_loss_final is None or record.eval_loss_final >= math.log(300)
    # one of them trained to its end
    tokens = {plan.id: plan.tokens for plan in design.runs()}
    assert any(record.D_tokens == tokens[record.run_id] for record in outcome.records)
    assert [record.status for record in read_runs(tmp_path / "runs.jsonl")] == ["diverged"] * 2


def test_few_held_out_rows_are_all_evaluated(corpus: Path, tmp_path: Path) -> None:
    """A batch that they do not fill was dropped, and every run called diverged."""
    training = {"max_eval_tokens": 48, "per_device_eval_batch_size": 16}
    outcome = Sweep(design_of(corpus, training=training), tmp_path, Here()).run()
    for record in outcome.records:
        assert record.status == "finished"
        assert record.eval_loss_final is not None
    points = [json.loads(x) for x in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert {row["run_id"] for row in points} == {record.run_id for record in outcome.records}


def test_a_run_without_an_evaluation_is_no_diverged_one(corpus: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    training = {"eval_strategy": "no"}
    sweep = Sweep(design_of(corpus, training=training), tmp_path, Here())
    sweep.display = SweepDisplay(console)
    for record in sweep.run().records:
        assert record.status == "finished"
        assert record.eval_loss_exits is None
        assert record.loss_final is not None
    assert console.file.getvalue().count("finished: no evaluation, ") == 2


def test_failures_are_counted_and_given_up(corpus: Path, tmp_path: Path) -> None:
    design = design_of(corpus, granularities=(1,))
    run_id = design.runs()[0].id
    executor = Here(hear=failing(99))
    outcome = Sweep(design, tmp_path, executor, retries=2).run()
    assert (executor.submitted, outcome.records) == ([run_id] * 3, ())
    failure = outcome.failed[run_id]
    assert (failure.attempts, failure.step) == (3, 0)
    assert failure.message == "RuntimeError: cosmic rays"
    assert "cosmic rays" in failure.trace
    (state,) = run_states(SweepFolder(tmp_path), design.runs(), retries=2)
    assert (state.state, state.failure) == ("failed", failure)
    # it stays given up until it is forgiven
    again = Here()
    assert list(Sweep(design, tmp_path, again, retries=2).run().failed) == [run_id]
    assert again.submitted == []
    assert Sweep(design, tmp_path, again, retries=2).retry() == 1
    outcome = Sweep(design, tmp_path, again, retries=2).run()
    assert (again.submitted, outcome.failed, len(outcome.records)) == ([run_id], {}, 1)


def test_one_failed_run_does_not_stop_the_others(
    design: IsoFlopDesign, undisturbed: Path, tmp_path: Path
) -> None:
    bad = design.runs()[0].id

    def hear(event: WorkerEvent) -> None:
        if event.run_id == bad and event.kind == "progress":
            raise RuntimeError("no")

    outcome = Sweep(design, tmp_path, Here(hear=hear), retries=1).run()
    assert list(outcome.failed) == [bad]
    assert [record.run_id for record in outcome.records] == [design.runs()[1].id]
    Sweep(design, tmp_path, Here(), retries=1).retry()
    Sweep(design, tmp_path, Here(), retries=1).run()
    assert_same_sweep(tmp_path, undisturbed)


def test_a_checkpoint_wipes_the_slate_clean(
    design: IsoFlopDesign, undisturbed: Path, tmp_path: Path
) -> None:
    """Every attempt fails, but gets on by two checkpoints first."""
    heard: list[WorkerEvent] = []

    def hear(event: WorkerEvent) -> None:
        heard.append(event)
        if event.kind == "progress" and len(heard) % 4 == 0:
            raise RuntimeError("again")

    executor = Here(hear=hear)
    outcome = Sweep(design, tmp_path, executor, retries=1, save_seconds=0).run()
    assert outcome.failed == {}
    assert len(executor.submitted) > 2 * 2 + 1  # more than one retry of each
    assert_same_sweep(tmp_path, undisturbed)


def test_another_length_than_planned_is_refused(
    design: IsoFlopDesign, undisturbed: Path, tmp_path: Path
) -> None:
    folder, plan = SweepFolder(tmp_path), design.runs()[0]
    record = next(r for r in read_runs(undisturbed / "runs.jsonl") if r.run_id == plan.id)
    for wrong in (replace(record, D_tokens=record.D_tokens - 32), replace(record, C_flops=1e9)):
        folder.write(wrong.to_json() + "\n", "runs", plan.id, RECORD)
        executor = Here(before=lambda task: _die(task))
        with pytest.raises(Killed):
            Sweep(design, tmp_path, executor).run()
        failure = json.loads((tmp_path / "runs" / plan.id / FAILURE).read_text())
        assert "but the plan was" in failure["message"]
        assert rows_of(tmp_path) == []
    Sweep(design, tmp_path, Here()).run()
    assert_same_sweep(tmp_path, undisturbed)


# breaks between two writings


def test_a_record_without_a_row_is_collected(
    design: IsoFlopDesign, undisturbed: Path, tmp_path: Path
) -> None:
    """The sweep died between the end of a run and its row."""
    with pytest.raises(Killed):
        Sweep(design, tmp_path, Here(hear=killed_at(1, "finished"))).run()
    assert rows_of(tmp_path) == []
    executor = Here()
    outcome = Sweep(design, tmp_path, executor).run()
    assert executor.submitted == [design.runs()[1].id]
    assert outcome.done_now == 2
    assert_same_sweep(tmp_path, undisturbed)


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_evaluations_that_were_written_in_part(
    design: IsoFlopDesign, undisturbed: Path, tmp_path: Path, kept: int
) -> None:
    """The sweep died after some of a run's evaluations, in the middle of a line."""
    with pytest.raises(Killed):
        Sweep(design, tmp_path, Here(hear=killed_at(1, "finished"))).run()
    lines = (tmp_path / "runs" / design.runs()[0].id / RUN_POINTS).read_text().splitlines()
    (tmp_path / "evaluations.jsonl").write_text(
        "".join(f"{line}\n" for line in lines[:kept]) + lines[kept][:30]
    )
    Sweep(design, tmp_path, Here()).run()
    assert_same_sweep(tmp_path, undisturbed)


@pytest.mark.parametrize("cut", [1, 2, 100])
def test_a_torn_last_row_is_mended(
    design: IsoFlopDesign, undisturbed: Path, tmp_path: Path, cut: int
) -> None:
    """The sweep died in the middle of a row, whose run still has all of it."""
    with pytest.raises(Killed):
        Sweep(design, tmp_path, Here(hear=killed_at(2, "finished"))).run()
    folder, plan = SweepFolder(tmp_path), design.runs()[1]
    record = folder.record(plan.id)
    assert record is not None
    points = (tmp_path / "runs" / plan.id / RUN_POINTS).read_text()
    for name, text in (("evaluations", points), ("runs", f"{record.to_json()}\n"[:-cut])):
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write(text)
    executor = Here()
    Sweep(design, tmp_path, executor).run()
    assert executor.submitted == []
    assert_same_sweep(tmp_path, undisturbed)


@pytest.mark.parametrize("line", ["{broken", '{"run_id": "x"}', "[]", "null"])
def test_a_wrong_line_is_named_and_left(
    design: IsoFlopDesign, undisturbed: Path, tmp_path: Path, line: str
) -> None:
    rows = (undisturbed / "runs.jsonl").read_text().splitlines()
    content = f"{rows[0]}\n{line}\n{rows[1]}\n"
    path = tmp_path / "runs.jsonl"
    path.write_text(content)
    executor = Here()
    with pytest.raises(RunRecordError, match=r"runs\.jsonl, line 2") as caught:
        Sweep(design, tmp_path, executor).run()
    assert (caught.value.path, caught.value.line) == (str(path), 2)
    assert path.read_text() == content
    assert (executor.submitted, executor.closed) == ([], 1)
    path.write_text(f"{rows[0]}\n{rows[1]}\n")
    assert Sweep(design, tmp_path, executor).run().done_now == 0


# one folder, one sweep


def test_two_sweeps_on_one_folder(design: IsoFlopDesign, tmp_path: Path) -> None:
    import os

    second, refused = Here(), []

    def before(task: RunTask) -> None:
        with pytest.raises(SweepLockedError, match=f"process {os.getpid()} on ") as caught:
            Sweep(design, tmp_path, second).run()
        with pytest.raises(SweepLockedError):
            Sweep(design, tmp_path, second).retry()
        refused.append(caught.value)

    outcome = Sweep(design, tmp_path, Here(before=before)).run()
    assert (len(refused), second.submitted, len(outcome.records)) == (2, [], 2)
    assert str(tmp_path) in str(refused[0])


def test_the_state_of_a_dead_sweep_is_not_believed(design: IsoFlopDesign, tmp_path: Path) -> None:
    import time

    folder, plans = SweepFolder(tmp_path), design.runs()
    for age, states in ((1.0, ["running", "waiting"]), (3600.0, ["waiting", "waiting"])):
        running = {plans[0].id: {"step": 3, "loss": 5.0}}
        state = {"pid": 1, "host": "gone", "time": time.time() - age, "running": running}
        folder.write(json.dumps(state), "state.json")
        assert [state.state for state in run_states(folder, plans)] == states


# data


def test_changed_data_stop_the_sweep(home: Path, tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "corpus")
    design, folder = design_of(data), tmp_path / "sweep"
    with pytest.raises(Killed):
        Sweep(design, folder, Here(hear=killed_at(5)), save_seconds=0).run()
    before = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    write_corpus(data, seed=1)
    _corpus.cache_clear()
    executor = Here()
    with pytest.raises(StoppedSweepError, match="have changed since this sweep began"):
        Sweep(design, folder, executor).run()
    assert (executor.submitted, executor.closed) == ([], 1)
    before.pop(folder / "state.json", None)
    assert {path: path.read_bytes() for path in folder.rglob("*.json*")} == before
    # the old ones are back
    write_corpus(data)
    _corpus.cache_clear()
    assert len(Sweep(design, folder, executor).run().records) == 2


def test_data_that_change_in_mid_sweep(home: Path, tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "corpus")
    design, folder = design_of(data), tmp_path / "sweep"

    def before(task: RunTask) -> None:
        if task.plan.G == 2:
            write_corpus(data, seed=1)
            _corpus.cache_clear()

    with pytest.raises(StoppedSweepError, match=r"changed since this sweep began (.|\n)*run the"):
        Sweep(design, folder, Here(before=before)).run()
    assert [row["G"] for row in rows_of(folder)] == [1]
    write_corpus(data)
    _corpus.cache_clear()
    assert Sweep(design, folder, Here()).run().done_now == 1


def test_data_that_vanish(home: Path, undisturbed: Path, tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "corpus")
    design, folder = design_of(data), tmp_path / "sweep"
    gone = tmp_path / "gone"

    def before(task: RunTask) -> None:
        if task.plan.G == 2:
            data.rename(gone)

    with pytest.raises(StoppedSweepError, match="must be a file or a folder that exists"):
        Sweep(design, folder, Here(before=before)).run()
    executor = Here()
    with pytest.raises(FileNotFoundError, match="`data` must be a file or a folder"):
        Sweep(design, folder, executor).run()
    assert executor.submitted == []
    gone.rename(data)
    assert Sweep(design, folder, executor).run().done_now == 1
    losses = [[row["eval_loss_exits"] for row in rows_of(f)] for f in (folder, undisturbed)]
    assert sorted(map(str, losses[0])) == sorted(map(str, losses[1]))


def test_too_little_data(home: Path, tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "corpus", documents=6, words=30)
    design = design_of(data, rule=Fixed(lr=1e-2, batch_tokens=320), budgets=(4.3e8,))
    with pytest.raises(StoppedSweepError, match="must fill one batch of 20 sequences"):
        Sweep(design, tmp_path / "sweep", Here()).run()
    assert rows_of(tmp_path / "sweep") == []


# arguments


@pytest.mark.parametrize(
    ("training", "match"),
    [
        ({"max_steps": 3}, "`training.max_steps` is set by `budgets`"),
        ({"seed": 3}, "`training.seed` is set by `seeds`"),
        ({"save_steps": 5}, "is set by the sweep's option `save_seconds`"),
        ({"wieght_decay": 0.1}, r"unknown; did you mean `weight_decay`"),
    ],
)
def test_wrong_training_arguments(
    corpus: Path, tmp_path: Path, training: dict[str, Any], match: str
) -> None:
    executor = Here()
    with pytest.raises(DesignError, match=match):
        Sweep(design_of(corpus, training=training), tmp_path / "s", executor).run()
    assert executor.submitted == []
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("choice", "value"),
    [("retries", -1), ("save_seconds", -0.5), ("save_seconds", math.nan), ("processes", 0)],
)
def test_wrong_options(design: IsoFlopDesign, tmp_path: Path, choice: str, value: float) -> None:
    with pytest.raises(DesignError, match=f"`{choice}` must be . or more, got {value}"):
        Sweep(design, tmp_path, Here(), **{choice: value})


def test_a_batch_that_processes_cannot_share(design: IsoFlopDesign, tmp_path: Path) -> None:
    with pytest.raises(DesignError, match="`processes` must divide the batch of run"):
        Sweep(design, tmp_path / "s", Here(), processes=3).run()
    assert not (tmp_path / "s").exists()

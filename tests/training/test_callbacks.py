"""Callbacks: FLOPs in the logs, an end at the budget, one row per run."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from reference import tiny_family
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments, default_data_collator

from hf_familial.flops import count_family, training_flops_per_token
from hf_familial.runs import Backbone, append_run, read_runs
from hf_familial.training.budget import flops_per_step, sequence_length, steps_for_budget, unwrap
from hf_familial.training.callbacks import (
    ExitProgressCallback,
    FlopBudgetCallback,
    FlopCounterCallback,
    RunRecordCallback,
    fitting,
)
from hf_familial.training.trainer import FamilialTrainer
from hf_familial.training.tuning import train_exits_only


EXITS, LENGTH, BATCH = [1, 2], 12, 2
PER_STEP_TOKENS = LENGTH * BATCH


def rows(count: int) -> Dataset:
    ids = torch.randint(8, 120, (count, LENGTH), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def trainer_of(
    folder: Path,
    *callbacks: TrainerCallback,
    kind: Any = FamilialTrainer,
    model: Any = None,
    **choices: Any,
) -> FamilialTrainer:
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return kind(
        model=model or tiny_family("llama", EXITS, depth=2),
        args=TrainingArguments(str(folder), **(defaults | choices)),
        train_dataset=rows(16),
        eval_dataset=rows(4),
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    )


def per_step() -> float:
    config = tiny_family("llama", EXITS, depth=2).config
    return training_flops_per_token(config, LENGTH).per_token * PER_STEP_TOKENS


class Interrupts(TrainerCallback):
    """Raises in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Stops(TrainerCallback):
    """Ends training early."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


# FLOPs in the logs


@pytest.mark.parametrize("every", [1, 2])
def test_flops_reach_the_history(tmp_path: Path, every: int) -> None:
    trainer = trainer_of(
        tmp_path, FlopCounterCallback(peak_flops=1e12), logging_steps=every, eval_strategy="steps"
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["flops"] for row in logged] == [per_step() * row["step"] for row in logged]
    assert [row["step"] for row in logged] == list(range(every, 5, every))
    for row in logged:
        assert row["flops_per_second"] > 0
        assert row["mfu"] == pytest.approx(row["flops_per_second"] / 1e12)
    assert all("flops" not in row for row in trainer.state.log_history if "loss" not in row)
    assert trainer.state.total_flos == 4 * per_step()


def test_without_a_peak_there_is_no_mfu(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, FlopCounterCallback(), max_steps=1)
    trainer.train()
    assert "flops" in trainer.state.log_history[0]
    assert "mfu" not in trainer.state.log_history[0]
    with pytest.raises(ValueError, match="`peak_flops` must be positive"):
        FlopCounterCallback(0)


def test_reporters_see_the_rate_too(tmp_path: Path) -> None:
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            if "loss" in logs:
                seen.append(logs["flops_per_second"])

    trainer = trainer_of(tmp_path, Reporter())
    trainer.add_callback(FlopCounterCallback())
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["flops_per_second"] for row in history] == seen
    assert all(rate > 0 for rate in seen)


def test_evaluations_do_not_slow_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.0, 51.0, 53.0, 53.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    callback, args = FlopCounterCallback(10.0), SimpleNamespace(world_size=2, n_gpu=1)
    state = SimpleNamespace(total_flos=100.0)
    callback.on_train_begin(args, state, None)
    callback.on_step_end(args, state, None)
    state.total_flos = 140.0
    assert callback.measure(args, state)["flops_per_second"] == 40.0
    callback.on_evaluate(args, state, None)
    callback.on_step_end(args, state, None)
    state.total_flos = 200.0
    assert callback.measure(args, state) == {"flops": 200.0, "flops_per_second": 30.0, "mfu": 1.5}


# budgets


@pytest.mark.parametrize(
    ("budget", "cost", "steps"),
    [(10, 1, 10), (10.5, 1, 11), (1, 1, 1), (0.3, 0.1, 3), (3e21, 1e18, 3000), (7e18, 3e18, 3)],
)
def test_steps_of_a_budget(budget: float, cost: float, steps: int) -> None:
    assert steps_for_budget(budget, cost) == steps


@pytest.mark.parametrize(
    ("budget", "cost", "message"),
    [
        (0, 1, "`budget` must be a positive number of FLOPs, got 0"),
        (math.inf, 1, "`budget` must be"),
        (1, math.nan, "`flops_per_step` must be"),
        (1e18, 2e18, "at least one step of 2e\\+18 FLOPs, got 1e\\+18"),
    ],
)
def test_a_budget_that_buys_nothing_is_refused(budget: float, cost: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steps_for_budget(budget, cost)


@pytest.mark.parametrize("max_steps", [3, 4])
def test_training_ends_with_the_budget(tmp_path: Path, max_steps: int) -> None:
    path = tmp_path / "runs.jsonl"
    budget = 2.5 * per_step()
    trainer = trainer_of(
        tmp_path, FlopBudgetCallback(budget), RunRecordCallback(path), max_steps=max_steps
    )
    cost = flops_per_step(trainer.model, trainer.args, LENGTH)
    assert cost == per_step()
    assert steps_for_budget(budget, cost) == 3
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.total_flos == 3 * per_step()
    (record,) = read_runs(path)
    assert record.status == "finished"
    assert record.C_flops == 3 * per_step() >= budget


def test_the_learning_rate_ends_with_the_budget(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=-1, lr_scheduler_type="linear")
    budget = 5 * per_step()
    trainer.args.max_steps = steps_for_budget(
        budget, flops_per_step(trainer.model, trainer.args, LENGTH)
    )
    trainer.add_callback(FlopBudgetCallback(budget, seq_length=LENGTH))
    trainer.train()
    assert trainer.state.global_step == 5
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    assert len(rates) == 5
    assert trainer.lr_scheduler.get_last_lr() == [0.0, 0.0]


@pytest.mark.parametrize("choices", [{"max_steps": 5}, {"max_steps": 1}, {"max_steps": -1}])
def test_a_schedule_that_ends_elsewhere_is_refused(tmp_path: Path, choices: Any) -> None:
    trainer = trainer_of(tmp_path, FlopBudgetCallback(2.5 * per_step()), **choices)
    with pytest.raises(ValueError, match="`max_steps` must be 3 for a budget of"):
        trainer.train()


# one row per run


def test_a_finished_run_leaves_its_row(tmp_path: Path) -> None:
    path = tmp_path / "out" / "runs.jsonl"
    trainer = trainer_of(
        tmp_path,
        RunRecordCallback(path, run_id="r", data="noise", code_version="x"),
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        learning_rate=0.01,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    (record,) = read_runs(path)
    config = trainer.model.config
    sizes, cost = count_family(config), training_flops_per_token(config, LENGTH).per_token
    assert (record.run_id, record.data, record.code_version) == ("r", "noise", "x")
    assert (record.status, record.seed, record.lr) == ("finished", 3, 0.01)
    assert (record.G, record.exits) == (2, (1, 2))
    assert (record.seq_len, record.vocab_size) == (LENGTH, 128)
    assert record.batch_tokens == 2 * PER_STEP_TOKENS
    assert record.D_tokens == 4 * 2 * PER_STEP_TOKENS
    assert record.C_flops == cost * record.D_tokens == trainer.state.total_flos
    assert (record.N_total, record.N_non_embedding) == (sizes["total"], sizes["non_embedding"])
    assert record.N_total == trainer.model.num_parameters() == record.N_active
    assert record.backbone == Backbone("llama", 32, 2)
    assert record.wall_s > 0
    assert record.tokens_per_s == pytest.approx(record.D_tokens / record.wall_s)
    # the last step was logged and evaluated, though no interval ended there
    last = {k: v for row in trainer.state.log_history if row["step"] == 4 for k, v in row.items()}
    assert record.loss_exits == (last["exit_0_loss"], last["exit_1_loss"])
    assert record.eval_loss_exits == (last["eval_exit_0_loss"], last["eval_exit_1_loss"])
    assert record.loss_mean == pytest.approx(last["loss"], rel=1e-5)
    assert record.eval_loss_mean == pytest.approx(last["eval_loss"], rel=1e-5)
    assert record.loss_final == record.loss_exits[-1]
    assert record.eval_loss_final == record.eval_loss_exits[-1]


@pytest.mark.parametrize("way", ["exits", "lora"])
def test_what_is_frozen_costs_no_gradient(tmp_path: Path, way: str) -> None:
    """Trainer, record and budget count what learns, by the exact count of such a step."""
    path, family, train = tmp_path / "runs.jsonl", tiny_family("llama", EXITS, depth=2), way
    if way == "exits":
        train_exits_only(family)
    else:
        train = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["model.exits.0"])
        family = get_peft_model(family, train)
    whole = training_flops_per_token(family.config, LENGTH).per_token
    cost = training_flops_per_token(family.config, LENGTH, train).per_token
    assert cost < 0.8 * whole
    budget = 2 * cost * PER_STEP_TOKENS
    trainer = trainer_of(
        tmp_path,
        FlopBudgetCallback(budget),
        RunRecordCallback(path),
        model=family,
        max_steps=2,
    )
    assert flops_per_step(trainer.model, trainer.args, LENGTH) == cost * PER_STEP_TOKENS
    trainer.train()
    (record,) = read_runs(path)
    assert trainer.state.global_step == 2
    assert record.C_flops == trainer.state.total_flos == budget
    # a second training of another part is counted anew
    trainer.pop_callback(FlopBudgetCallback)
    for parameter in trainer.model.parameters():
        parameter.requires_grad_(True)
    trainer.train()
    assert trainer.state.total_flos == 2 * whole * PER_STEP_TOKENS


def test_tokens_are_those_the_trainer_counted(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    trainer = trainer_of(
        tmp_path, RunRecordCallback(path), include_num_input_tokens_seen="all", max_steps=2
    )
    trainer.train()
    (record,) = read_runs(path)
    assert record.D_tokens == 2 * PER_STEP_TOKENS
    assert record.eval_loss_mean is record.eval_loss_exits is record.eval_loss_final is None


def test_a_run_that_stops_early_says_so(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    stops = Stops(2)
    trainer = trainer_of(
        tmp_path, stops, RunRecordCallback(path), eval_strategy="steps", eval_steps=50
    )
    trainer.train()
    (record,) = read_runs(path)
    assert record.status == "stopped"
    assert record.D_tokens == 2 * PER_STEP_TOKENS
    assert record.eval_loss_final is not None


def test_a_run_that_diverges_says_so(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    trainer = trainer_of(tmp_path, RunRecordCallback(path), max_steps=2)
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(math.nan)
    trainer.train()
    (record,) = read_runs(path)
    assert record.status == "diverged"
    assert record.loss_exits == (None, None)
    assert record.loss_mean is None


def test_a_run_that_fails_says_so_where_the_trainer_tells(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    callback = RunRecordCallback(path, run_id="r")
    trainer = trainer_of(tmp_path, callback, Interrupts(2))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not path.exists()
    for _ in range(2):
        callback.on_failure(trainer.args, trainer.state)
    (record,) = read_runs(path)
    assert (record.status, record.D_tokens) == ("failed", 2 * PER_STEP_TOKENS)


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("run_id", [None, "mine"])
def test_a_resumed_run_leaves_one_row(tmp_path: Path, run_id: str | None, restore: bool) -> None:
    path = tmp_path / "runs.jsonl"

    def run(*others: TrainerCallback, **inputs: Any) -> None:
        trainer = trainer_of(
            tmp_path,
            RunRecordCallback(path, run_id=run_id),
            *others,
            save_strategy="steps",
            save_steps=2,
            restore_callback_states_from_checkpoint=restore,
        )
        trainer.train(**inputs)

    with pytest.raises(KeyboardInterrupt):
        run(Interrupts(3))
    assert not path.exists()
    checkpoint = str(tmp_path / "checkpoint-2")
    run(resume_from_checkpoint=checkpoint)
    (record,) = read_runs(path)
    assert (record.status, record.D_tokens) == ("finished", 4 * PER_STEP_TOKENS)
    assert run_id in (None, record.run_id)
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    kept = saved["stateful_callbacks"]["RunRecordCallback"]["attributes"]
    assert kept["_name"] == record.run_id
    assert record.wall_s > kept["_wall_before"] > 0
    # once more, by processes that know its name from the checkpoint alone
    run(resume_from_checkpoint=checkpoint)
    run(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert read_runs(path) == [record]


def test_each_fresh_run_has_its_own_row(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    trainer = trainer_of(tmp_path, RunRecordCallback(path), max_steps=1)
    trainer.train()
    trainer.train()
    first, second = read_runs(path)
    assert first.run_id != second.run_id


def test_a_run_may_be_taken_up_with_a_record(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(tmp_path, **saving, max_steps=2).train()
    path = tmp_path / "runs.jsonl"
    trainer = trainer_of(tmp_path, RunRecordCallback(path), **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (record,) = read_runs(path)
    assert record.D_tokens == 4 * PER_STEP_TOKENS


def test_a_spoilt_file_does_not_cost_the_row(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text("{}\n")
    trainer_of(tmp_path, RunRecordCallback(path), max_steps=1).train()
    assert len(path.read_text().splitlines()) == 2


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    callback = RunRecordCallback(path)
    trainer = trainer_of(tmp_path, Stops(1), callback)
    callback_state = trainer.state
    trainer.train()
    (record,) = read_runs(path)
    callback._open, callback_state.is_world_process_zero = True, False
    callback.on_train_end(trainer.args, callback_state, trainer.control)
    assert read_runs(path) == [record]
    append_run(path, record)
    assert len(read_runs(path)) == 2


def test_wrapped_families_are_found() -> None:
    family = tiny_family("llama", EXITS, depth=2)
    assert unwrap(family) is family
    assert unwrap(nn.DataParallel(family)) is family
    assert unwrap(torch.compile(family, backend="eager")).config is family.config
    with pytest.raises(TypeError, match="needs a familial model, got Linear"):
        unwrap(nn.Linear(1, 1))


def test_rows_that_hide_their_length_need_it_given() -> None:
    assert sequence_length(SimpleNamespace(dataset=rows(1))) == LENGTH
    for dataset in (iter([]), rows(1).remove_columns("input_ids"), rows(1).to_iterable_dataset()):
        with pytest.raises(ValueError, match="`seq_length` is missing"):
            sequence_length(SimpleNamespace(dataset=dataset))


# the progress bar at the width of a terminal


def logs_of(count):
    return {"loss": 3.14159} | {f"exit_{k}_loss": 9.5 - 0.5 * k for k in range(count)}


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
@pytest.mark.parametrize("exits", [1, 4, 8, 16])
@pytest.mark.parametrize("steps", [350, 1_000_000])
def test_a_narrow_bar_still_shows_a_bar_and_the_deepest_exit(columns, exits, steps, monkeypatch):
    callback = ExitProgressCallback()
    state = SimpleNamespace(max_steps=steps, global_step=steps // 3, is_world_process_zero=True)
    callback.on_train_begin(None, state, None)
    bar = callback.training_bar
    bar.ncols, bar.dynamic_ncols = columns, None
    callback.on_step_end(None, state, None)
    callback.on_log(None, state, None, logs_of(exits))
    shown = tqdm.format_meter(**(bar.format_dict | {"ncols": columns, "elapsed": 5000}))
    assert len(shown) <= columns
    assert "█" in shown or "#" in shown
    deepest = 9.5 - 0.5 * (exits - 1)
    assert f"{deepest:.2f}" in shown
    callback.training_bar.close()


def test_losses_without_a_terminal_are_whole():
    assert fitting(logs_of(2), None) == "loss 3.142, exits 9.500 9.000"
    assert fitting({"loss": 1.0}, 5) == "loss 1.000"

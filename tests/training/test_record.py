"""The record of a run says what was run, whatever the lengths of its rows and batches."""

import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from reference import counted_training_flops, tiny_family
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_familial.flops import training_flops_per_token
from hf_familial.runs import RunRecord, read_runs
from hf_familial.training.callbacks import FlopBudgetCallback, RunRecordCallback
from hf_familial.training.trainer import FamilialTrainer


EXITS = [1, 2]
EQUAL = (12,) * 10
UNEQUAL = (4, 30, 9, 17, 30, 2, 9, 4, 17, 9)


def rows_of(lengths: tuple[int, ...]) -> Dataset:
    """Rows of which the first two tokens have no target."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(8, 120, (n,), generator=generator).tolist() for n in lengths]
    labels = [[-100] * 2 + row[2:] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


class Collator:
    """Pads rows on the right, and keeps what it made."""

    def __init__(self) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        def padded(name: str, value: int) -> torch.Tensor:
            columns = [torch.tensor(row[name]) for row in rows]
            return torch.nn.utils.rnn.pad_sequence(columns, True, value)

        batch = {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100)}
        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        batch["attention_mask"] = (torch.arange(batch["labels"].shape[1]) < lengths).long()
        self.batches.append(batch)
        return batch


def trainer_of(
    folder: Path,
    lengths: tuple[int, ...],
    *callbacks: TrainerCallback,
    kind: Any = None,
    **more: Any,
) -> FamilialTrainer:
    usual: dict[str, Any] = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return (kind or FamilialTrainer)(
        model=tiny_family("llama", EXITS, depth=2),
        args=TrainingArguments(str(folder), **(usual | more)),
        train_dataset=rows_of(lengths),
        eval_dataset=rows_of(EQUAL),
        data_collator=Collator(),
        callbacks=list(callbacks),
    )


@cache
def counted(length: int) -> int:
    """FLOPs of one sequence of the deepest exit's model, by running it."""
    return counted_training_flops(tiny_family("llama", [2], depth=2).config, length)


def assert_accounts(record: RunRecord, trainer: Trainer) -> None:
    """The record against what the collator gave and a slow count at every length."""
    config = trainer.model.config
    batches: Any = trainer.data_collator
    batches = batches.batches
    assert record.computed_tokens == sum(b["labels"].numel() for b in batches)
    assert record.D_tokens == sum(int(b["attention_mask"].sum()) for b in batches)
    assert record.target_tokens == sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    head = (config.num_exits - 1) * 3 * 2 * config.vocab_size * config.hidden_size
    flops = 0
    for ids in (b["input_ids"] for b in batches):
        flops += len(ids) * counted(ids.shape[1]) + ids.numel() * head
    assert record.C_flops == pytest.approx(flops, rel=1e-12)
    assert record.C_flops == trainer.state.total_flos
    assert record.seq_len == max(b["labels"].shape[1] for b in batches)


@pytest.mark.parametrize("lengths", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize(
    ("batch", "accumulation", "drop"),
    [(1, 1, False), (4, 1, False), (8, 1, False), (2, 2, False), (3, 2, True)],
)
def test_the_record_says_what_was_run(
    tmp_path: Path, lengths: tuple[int, ...], batch: int, accumulation: int, drop: bool
) -> None:
    """Short last batches, incomplete windows, rows of other lengths, padding."""
    trainer = trainer_of(
        tmp_path,
        lengths,
        RunRecordCallback(tmp_path / "runs.jsonl"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        dataloader_drop_last=drop,
    )
    trainer.train()
    (record,) = read_runs(tmp_path / "runs.jsonl")
    assert_accounts(record, trainer)
    if not drop:
        assert record.D_tokens == 2 * sum(lengths)
        assert record.target_tokens == 2 * sum(max(0, n - 2) for n in lengths)


@pytest.mark.parametrize("way", ["all", "non_padding"])
def test_the_trainers_own_count_changes_nothing(tmp_path: Path, way: str) -> None:
    """It counts padding or not, and the FLOPs followed it."""
    path = tmp_path / "runs.jsonl"
    more = {"include_num_input_tokens_seen": way}
    trainer = trainer_of(tmp_path, UNEQUAL, RunRecordCallback(path), **more)
    trainer.train()
    (record,) = read_runs(path)
    assert_accounts(record, trainer)
    seen = record.computed_tokens if way == "all" else record.D_tokens
    assert trainer.state.num_input_tokens_seen == seen


class Fails(TrainerCallback):
    """Raises after a step."""

    def __init__(self, step: int, error: type[BaseException]) -> None:
        self.step, self.error = step, error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise self.error


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_counts_as_one(tmp_path: Path, restore: bool) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 3}
    saving |= {"restore_callback_states_from_checkpoint": restore}
    through, path = tmp_path / "through.jsonl", tmp_path / "runs.jsonl"
    trainer_of(tmp_path / "through", UNEQUAL, RunRecordCallback(through), **saving).train()
    broken = trainer_of(
        tmp_path, UNEQUAL, RunRecordCallback(path), Fails(4, KeyboardInterrupt), **saving
    )
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer_of(tmp_path, UNEQUAL, RunRecordCallback(path), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (expected,), (found,) = read_runs(through), read_runs(path)
    for name in ("D_tokens", "target_tokens", "computed_tokens", "C_flops", "seq_len", "status"):
        assert getattr(found, name) == getattr(expected, name), name


def test_a_run_that_raises_counts_what_it_ran(tmp_path: Path) -> None:
    """The FLOPs since the last log too."""
    path, error = tmp_path / "runs.jsonl", ZeroDivisionError
    trainer = trainer_of(
        tmp_path, EQUAL, RunRecordCallback(path), Fails(3, error), logging_steps=99
    )
    with pytest.raises(error):
        trainer.train()
    (record,) = read_runs(path)
    cost = training_flops_per_token(trainer.model, EQUAL[0]).per_token
    assert (record.status, record.D_tokens) == ("failed", sum(EQUAL))
    assert record.C_flops == pytest.approx(sum(EQUAL) * cost, rel=1e-12)


@pytest.mark.parametrize("why", ["another trainer", "a checkpoint without counts"])
def test_what_nobody_counted_is_said_to_be_estimated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    path, saving = tmp_path / "runs.jsonl", {"save_strategy": "steps", "save_steps": 1}
    record = RunRecordCallback(path)
    if why == "another trainer":
        trainer_of(tmp_path, EQUAL, record, kind=Trainer).train()
    else:
        trainer_of(tmp_path, EQUAL, **saving).train()
        trainer = trainer_of(tmp_path, EQUAL, record, **saving)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    (row,) = read_runs(path)
    assert row.target_tokens is row.computed_tokens is None
    assert row.D_tokens == 6 * 4 * EQUAL[0]
    assert "were not counted" in caplog.text


def test_rows_of_older_versions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    trainer_of(tmp_path, EQUAL, RunRecordCallback(path)).train()
    row = json.loads(path.read_text())
    del row["target_tokens"], row["computed_tokens"]
    path.write_text(json.dumps(row) + "\n")
    (found,) = read_runs(path)
    assert found.target_tokens is found.computed_tokens is None
    assert found.D_tokens == 2 * sum(EQUAL)


# budgets


def test_longer_rows_reach_the_budget_sooner(tmp_path: Path) -> None:
    """The last step is logged, evaluated and saved as the last one of any run."""
    lengths, path = (10,) * 4 + (30,) * 16, tmp_path / "runs.jsonl"
    cost = training_flops_per_token(tiny_family("llama", EXITS, depth=2), 10).per_token
    budget = 4 * 40 * cost
    trainer = trainer_of(
        tmp_path,
        lengths,
        FlopBudgetCallback(budget),
        RunRecordCallback(path),
        max_steps=4,
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        eval_steps=99,
        save_strategy="steps",
        save_steps=99,
    )
    trainer.train()
    (record,) = read_runs(path)
    assert (trainer.state.global_step, record.status) == (2, "finished")
    assert record.C_flops == trainer.state.total_flos >= budget
    assert record.loss_final is not None
    assert record.eval_loss_final is not None
    assert (tmp_path / "checkpoint-2").is_dir()


def test_a_budget_that_short_batches_miss_is_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cost = training_flops_per_token(tiny_family("llama", EXITS, depth=2), 12).per_token
    trainer = trainer_of(
        tmp_path, EQUAL, FlopBudgetCallback(6 * 48 * cost), logging_steps=99, max_steps=6
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.total_flos == pytest.approx(2 * sum(EQUAL) * cost)
    assert "below its budget of" in caplog.text

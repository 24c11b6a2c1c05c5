"""Pretraining: a run taken up at any of its checkpoints is the run that had no break."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, TrainerCallback

from hf_familial import FamilialConfig, FamilialForCausalLM
from hf_familial.runs import read_runs
from hf_familial.training.callbacks import RunRecordCallback
from hf_familial.training.data import PackedData
from hf_familial.training.pretraining import (
    PretrainingArguments,
    PretrainingData,
    matmul_precision,
    pretrain,
)


LENGTH, VOCABULARY, STEPS = 12, 64, 8
CLOCKS = ("wall_s", "tokens_per_s")


class Killed(BaseException):
    """Nothing catches it."""


class KilledAfterSave(TrainerCallback):
    """Dies of its first checkpoint."""

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        raise Killed


def packed(blocks: int) -> PackedData:
    chance = random.Random(3)

    def rows(count: int) -> Dataset:
        ids = [[chance.randrange(VOCABULARY) for _ in range(LENGTH)] for _ in range(count)]
        return Dataset.from_dict({"input_ids": ids, "labels": ids})

    train, held_out = rows(blocks), rows(5)
    return PackedData(train, held_out, blocks * LENGTH, 0, 5 * LENGTH, 0, 1.0, "noise")


def family_of(exits: list[int], **text: Any) -> FamilialForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=exits[-1],
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        **text,
    )
    return FamilialForCausalLM(FamilialConfig(text_config=config, exits=exits))


def arguments_of(folder: Path, **choices: Any) -> PretrainingArguments:
    usual: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,  # where losses are logged: a log is a mean since the last one
        "save_total_limit": None,
        "seed": 5,
        "data_seed": 5,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
    }
    return PretrainingArguments(str(folder), **(usual | choices))


def run(
    folder: Path,
    exits: list[int],
    data: PackedData,
    checkpoint: Path | None = None,
    further: tuple[TrainerCallback, ...] = (),
    text: dict[str, Any] | None = None,
    **choices: Any,
) -> Any:
    recording = RunRecordCallback(str(folder / "runs.jsonl"), "run", seq_length=LENGTH)
    return pretrain(
        lambda: family_of(exits, **(text or {})),
        arguments_of(folder, **choices),
        data,
        checkpoint=None if checkpoint is None else str(checkpoint),
        callbacks=[*further, recording],
    )


def outcome_of(folder: Path, trainer: Any) -> tuple[Any, ...]:
    """The row without its clocks, every logged loss, and the weights."""
    record = json.loads((folder / "runs.jsonl").read_text().splitlines()[-1])
    row = {name: value for name, value in record.items() if name not in CLOCKS}
    logs = [
        {name: log[name] for name in log if "loss" in name and name != "train_loss"}
        | {"step": log["step"]}
        for log in trainer.state.log_history
    ]
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return row, logs, weights


def assert_equal(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    assert found[0] == wanted[0]
    assert [log for log in found[1] if len(log) > 1] == [log for log in wanted[1] if len(log) > 1]
    assert found[2].keys() == wanted[2].keys()
    assert all(torch.equal(found[2][name], wanted[2][name]) for name in wanted[2])


CASES: dict[str, tuple[list[int], int, dict[str, Any], dict[str, Any]]] = {
    # exits, blocks, choices of training, fields of the backbone
    "one exit": ([2], 64, {}, {}),
    "three exits": ([1, 2, 4], 64, {}, {}),
    "accumulation": ([1, 2, 4], 64, {"gradient_accumulation_steps": 3}, {}),
    "epochs": ([1, 2], 10, {}, {}),
    "epochs and accumulation": ([1, 2], 20, {"gradient_accumulation_steps": 2}, {}),
    "dropout": ([1, 2], 10, {}, {"attention_dropout": 0.2}),
    "a schedule of exits": (
        [1, 2, 4],
        64,
        {"exit_schedule": "gradual", "distillation_weight": 0.5},
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_taken_up_at_every_checkpoint(name: str, tmp_path: Path) -> None:
    exits, blocks, choices, text = CASES[name]
    data = packed(blocks)
    wanted = outcome_of(
        tmp_path / "whole", run(tmp_path / "whole", exits, data, text=text, **choices)
    )
    record = read_runs(tmp_path / "whole" / "runs.jsonl")[0]
    assert (record.status, record.G) == ("finished", len(exits))
    # the last step of an epoch may be a short one
    assert 0.9 * STEPS * record.batch_tokens < record.D_tokens <= STEPS * record.batch_tokens
    assert record.computed_tokens == record.D_tokens

    # one life for each checkpoint: it dies of the next one
    folder, checkpoint = tmp_path / "torn", None
    for step in range(2, STEPS + 1, 2):
        further = (KilledAfterSave(),)
        with pytest.raises(Killed):
            run(folder, exits, data, checkpoint, further, text=text, **choices)
        checkpoint = folder / f"checkpoint-{step}"
        assert checkpoint.is_dir()
        assert not (folder / f"checkpoint-{step + 2}").exists()
    assert not (folder / "runs.jsonl").exists()
    before_last = folder / f"checkpoint-{STEPS - 2}"
    found = run(folder, exits, data, before_last, text=text, **choices)
    assert_equal(outcome_of(folder, found), wanted)


def test_wall_time_of_all_lives(tmp_path: Path) -> None:
    """The clock goes on from the checkpoint's, not from nothing."""
    data = packed(64)
    with pytest.raises(Killed):
        run(tmp_path, [1, 2], data, further=(KilledAfterSave(),))
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    kept = json.loads(state.read_text())
    saved = kept["stateful_callbacks"]["RunRecordCallback"]["attributes"]
    assert saved["_wall_before"] > 0
    saved["_wall_before"] = 1000.0
    state.write_text(json.dumps(kept))
    run(tmp_path, [1, 2], data, tmp_path / "checkpoint-2")
    (record,) = read_runs(tmp_path / "runs.jsonl")
    assert 1000 < record.wall_s < 1060


def test_weights_follow_from_the_seed(tmp_path: Path) -> None:
    data, built = packed(64), []

    def build() -> FamilialForCausalLM:
        built.append(family_of([1, 2]))
        return built[-1]

    for seed, noise in ((5, 1), (5, 2), (6, 1)):
        torch.manual_seed(noise)
        arguments = arguments_of(tmp_path, seed=seed, max_steps=1, save_strategy="no")
        pretrain(build, arguments, data)
    first, same, other = (model.get_input_embeddings().weight for model in built)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("precision")
def test_precision_is_of_the_run_alone(tmp_path: Path) -> None:
    torch.set_float32_matmul_precision("high")
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(torch.get_float32_matmul_precision())

    choices = {"float32_matmul_precision": "medium", "save_strategy": "no", "max_steps": 2}
    run(tmp_path, [1, 2], packed(8), further=(Look(),), **choices)
    assert seen == ["medium", "medium"]
    assert torch.get_float32_matmul_precision() == "high"
    with pytest.raises(ZeroDivisionError), matmul_precision("highest"):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "high"
    with matmul_precision(None):
        assert torch.get_float32_matmul_precision() == "high"


def test_a_wrong_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be one of highest, high, medium, got 'low'"):
        PretrainingArguments(str(tmp_path), float32_matmul_precision="low", use_cpu=True)


def test_defaults_are_those_of_a_run_of_minutes() -> None:
    data, training = PretrainingData(), PretrainingArguments(use_cpu=True)
    assert (data.eval_fraction, data.max_eval_tokens) == (0.05, 131_072)
    assert (training.max_steps, training.learning_rate, training.save_total_limit) == (350, 3e-3, 1)
    assert training.lr_scheduler_type == "cosine"

"""Evaluations count every target of every row once, however the rows are batched."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from reference import tiny_family
from test_trainer import EVAL, EXITS, LENGTH, TRAIN, exit_losses_of, family_of, oracle, trainer_of
from transformers import TrainerCallback

from hf_familial.runs import read_runs
from hf_familial.training.callbacks import RunRecordCallback


def idle_rows(*where: int) -> Dataset:
    """The evaluation's rows, some of them without a target."""
    rows = EVAL.to_dict()
    for row in where:
        rows["labels"][row] = [-100] * LENGTH
    return Dataset.from_dict(rows)


def evaluate(folder: Path, data: Dataset, batch: int, **choices: Any) -> dict[str, float]:
    return trainer_of(folder, per_device_eval_batch_size=batch, **choices).evaluate(data)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("where", [(), (0,), (6,), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 7, 16])
def test_losses_do_not_depend_on_the_batch(
    tmp_path: Path, batch: int, where: tuple[int, ...], drop_last: bool
) -> None:
    """Means of batches would weigh tokens of short rows more; one without a target gave NaN."""
    data = idle_rows(*where)
    expected = oracle(family_of(), data.to_dict())
    metrics = evaluate(tmp_path, data, batch, dataloader_drop_last=drop_last)
    assert exit_losses_of(metrics, "eval_exit") == pytest.approx(expected.tolist(), rel=2e-6)
    assert metrics["eval_loss"] == pytest.approx(expected.mean().item(), rel=2e-6)


def test_all_rows_are_predicted_and_training_still_drops(tmp_path: Path) -> None:
    data = TRAIN.select(range(5))
    trainer = trainer_of(tmp_path, data=data, dataloader_drop_last=True, num_train_epochs=2)
    assert trainer.predict(EVAL).predictions.shape[0] == len(EVAL)
    trainer.train()
    assert trainer.args.dataloader_drop_last
    assert trainer.state.max_steps == 2 * (len(data) // 2)


def test_fewer_rows_than_a_batch_are_evaluated(tmp_path: Path) -> None:
    metrics = evaluate(tmp_path, EVAL.select([4]), 8, dataloader_drop_last=True)
    expected = oracle(family_of(), EVAL.select([4]).to_dict())
    assert exit_losses_of(metrics, "eval_exit") == pytest.approx(expected.tolist(), rel=2e-6)


def test_shifted_labels_are_counted_as_they_are(tmp_path: Path) -> None:
    labels = torch.tensor(EVAL["labels"][:])
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    data = EVAL.add_column("shift_labels", shifted.tolist())
    expected = evaluate(tmp_path, EVAL, 3)
    found = evaluate(tmp_path, data, 2, remove_unused_columns=False)
    assert exit_losses_of(found, "eval_exit") == pytest.approx(
        exit_losses_of(expected, "eval_exit"), rel=2e-6
    )


def test_the_balance_of_experts_is_no_part_of_an_evaluation(tmp_path: Path) -> None:
    """It is a statistic of a batch, and no loss of a token."""
    model = tiny_family("mixtral", EXITS)
    model.config.text_config.output_router_logits = True
    found = [evaluate(tmp_path, EVAL, batch, model=model)["eval_loss"] for batch in (1, 3, 7)]
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_an_evaluation_without_a_target_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "runs.jsonl"
    trainer = trainer_of(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.add_callback(RunRecordCallback(path))
    trainer.eval_dataset = idle_rows(*range(7))
    with caplog.at_level(logging.WARNING):
        trainer.train()
        metrics = trainer.evaluate()
    assert "evaluation `eval` has no loss, because all of its labels are -100" in caplog.text
    assert not any(name.endswith("loss") for name in metrics)
    (record,) = read_runs(path)
    assert record.status == "finished"
    assert record.eval_loss_exits is record.eval_loss_mean is None
    assert record.loss_final is not None
    assert "has no evaluation loss" in caplog.text


def test_the_best_model_is_found_beside_a_batch_without_a_target(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path,
        max_steps=3,
        learning_rate=0.3,
        per_device_eval_batch_size=1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_exit_2_loss",
    )
    trainer.eval_dataset = idle_rows(3)
    trainer.train()
    seen = [row["eval_exit_2_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert np.isfinite(seen).all()
    assert trainer.state.best_metric == min(seen)


class Breaks(TrainerCallback):
    """Spoils an exit before the last evaluation."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            with torch.no_grad():
                model.model.exits[0].norm.weight.fill_(float("nan"))


def test_a_broken_exit_still_shows(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    trainer = trainer_of(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.add_callback(Breaks())
    trainer.add_callback(RunRecordCallback(path))
    trainer.train()
    (record,) = read_runs(path)
    assert record.status == "diverged"
    assert record.eval_loss_exits is not None
    assert [loss is None for loss in record.eval_loss_exits] == [True, False, False]
    assert json.loads(path.read_text())["eval_loss_mean"] is None

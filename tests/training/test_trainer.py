"""Trainer: the losses it logs are those of plain loops over stock models, however it is run."""

import copy
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from reference import cross_entropy, logits, tiny_family, truncated_host
from transformers import (
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_familial import FamilialForCausalLM, FamilialTrainingArguments, describe
from hf_familial.runs import read_runs
from hf_familial.training.callbacks import ExitProgressCallback
from hf_familial.training.trainer import FamilialTrainer


EXITS = [1, 2, 4]
LENGTH = 12


def family_of() -> FamilialForCausalLM:
    return tiny_family("llama", EXITS)


def rows_of(count: int, seed: int) -> Dataset:
    """Rows whose numbers of targets differ widely."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, 120, (count, LENGTH), generator=generator)
    kept = torch.randint(2, LENGTH + 1, (count, 1), generator=generator)
    labels = ids.masked_fill(torch.arange(LENGTH) >= kept, -100)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


TRAIN, EVAL = rows_of(14, seed=0), rows_of(7, seed=1)


def trainer_of(
    folder: Path,
    model: FamilialForCausalLM | None = None,
    callbacks: list[TrainerCallback] | None = None,
    compute_metrics: Any = None,
    data: Dataset = TRAIN,
    arguments_class: type[TrainingArguments] = TrainingArguments,
    **choices: Any,
) -> FamilialTrainer:
    defaults = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return FamilialTrainer(
        model=model or family_of(),
        args=arguments_class(str(folder), **(defaults | choices)),
        train_dataset=data,
        eval_dataset=EVAL,
        data_collator=default_data_collator,
        callbacks=callbacks,
        compute_metrics=compute_metrics,
    )


def exit_losses_of(row: dict[str, float], prefix: str = "exit") -> list[float]:
    losses = [row[f"{prefix}_{k}_loss"] for k in range(len(EXITS))]
    assert f"{prefix}_{len(EXITS)}_loss" not in row
    return losses


def training_rows(trainer: FamilialTrainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss" in row]


def oracle(
    family: FamilialForCausalLM, rows: dict[str, list[list[int]]], denominator: int | None = None
) -> torch.Tensor:
    """Loss of every exit over some rows, by stock models and a loop over the targets."""
    ids, labels = torch.tensor(rows["input_ids"]), torch.tensor(rows["labels"])
    hosts = [truncated_host(family, k) for k in range(len(EXITS))]
    return torch.stack([cross_entropy(logits(host, ids), labels, denominator) for host in hosts])


class Snapshots(TrainerCallback):
    """Keeps a copy of the model as it is before every optimiser step."""

    def __init__(self) -> None:
        self.models: list[FamilialForCausalLM] = []

    def on_step_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.models.append(copy.deepcopy(model))


def batches_of(rows: Dataset, size: int) -> list[dict[str, list[list[int]]]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def updates(rows_each: int) -> Iterator[dict[str, list[list[int]]]]:
    """Rows of every optimiser step of two epochs; the last of an epoch has fewer."""
    for _ in range(2):
        yield from batches_of(TRAIN, rows_each)


# training


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("every", [1, 3])
def test_logged_losses_equal_a_plain_loop(tmp_path: Path, accumulation: int, every: int) -> None:
    snapshots = Snapshots()
    trainer = trainer_of(
        tmp_path,
        callbacks=[snapshots],
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        logging_steps=every,
    )
    trainer.train()
    steps = list(updates(2 * accumulation))
    assert len(steps) == len(snapshots.models) == trainer.state.global_step
    losses = [oracle(model, rows) for model, rows in zip(snapshots.models, steps, strict=True)]
    logged = training_rows(trainer)
    assert [row["step"] for row in logged] == list(range(every, len(steps) + 1, every))
    for row in logged:
        expected = torch.stack(losses[row["step"] - every : row["step"]]).mean(0)
        assert exit_losses_of(row) == pytest.approx(expected.tolist(), rel=2e-6)
        assert np.mean(exit_losses_of(row)) == pytest.approx(row["loss"], rel=1e-6)
    # the weights did move, and the exits differ
    assert losses[0].max() - losses[0].min() > 1e-3
    assert losses[0].mean() - losses[-1].mean() != pytest.approx(0, abs=1e-3)


def test_callbacks_see_the_losses_of_all_exits(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Listener(TrainerCallback):
        def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer_of(tmp_path, callbacks=[Listener()], max_steps=2).train()
    assert [exit_losses_of(logs) != [] for logs in seen[:2]] == [True, True]
    assert "exit_0_loss" not in seen[2]


def test_parameters_do_not_depend_on_the_accumulation(tmp_path: Path) -> None:
    trained = []
    for batch, accumulation in [(8, 1), (4, 2), (2, 4), (1, 8)]:
        trainer = trainer_of(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=2,
            optim="sgd",
            learning_rate=0.5,
            max_grad_norm=0,
        )
        trainer.train()
        trained.append((dict(trainer.model.named_parameters()), training_rows(trainer)))
    (whole, logged), *others = trained
    start = dict(family_of().named_parameters())
    assert max((whole[name] - start[name]).abs().max() for name in start) > 0.01
    for parameters, rows in others:
        for name, value in parameters.items():
            torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=2e-6)
        for row, expected in zip(rows, logged, strict=True):
            assert exit_losses_of(row) == pytest.approx(exit_losses_of(expected), rel=1e-5)


def test_checkpointed_layers_train_the_same(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        trainer = trainer_of(tmp_path, max_steps=2, gradient_checkpointing=checkpointing)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == checkpointing
        found.append([exit_losses_of(row) for row in training_rows(trainer)])
    np.testing.assert_allclose(*found, rtol=1e-6)


def test_resuming_changes_no_bit(tmp_path: Path) -> None:
    choices = {"gradient_accumulation_steps": 2, "max_steps": 6, "save_strategy": "steps"}
    choices |= {"save_steps": 3, "train_sampling_strategy": "random", "seed": 3}
    through = trainer_of(tmp_path, **choices)
    through.train()
    resumed = trainer_of(tmp_path, **choices)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in through.model.state_dict().items():
        assert (value - resumed.model.state_dict()[name]).abs().max() == 0.0, name
    assert [row["step"] for row in training_rows(resumed)] == [1, 2, 3, 4, 5, 6]
    for row, expected in zip(training_rows(resumed), training_rows(through), strict=True):
        assert exit_losses_of(row) == exit_losses_of(expected)
        assert row["loss"] == expected["loss"]


@pytest.mark.parametrize(
    "fields",
    [{"exits": [2, 3, 4]}, {"exits": [2, 4]}, {"num_exit_layers": 1}, {"exit_head": "own"}],
    ids=str,
)
def test_a_checkpoint_of_other_exits_is_not_resumed(tmp_path: Path, fields: dict) -> None:
    """Weights of other exits would be read in silence where their shapes are the same."""
    trainer_of(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    name, _ = next(iter(fields.items()))
    other = tiny_family("llama", **({"exits": EXITS} | fields))
    trainer = trainer_of(tmp_path, other, max_steps=2)
    for checkpoint in (True, str(tmp_path / "checkpoint-1")):
        with pytest.raises(ValueError, match=f"checkpoint-1.* has the `{name}`"):
            trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 0


def test_a_second_training_forgets_the_first(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=2, logging_steps=3)
    trainer.train()
    trainer.args.logging_steps = trainer.args.max_steps = 1
    model = copy.deepcopy(trainer.model)
    trainer.train()
    (row,) = training_rows(trainer)
    assert exit_losses_of(row) == pytest.approx(oracle(model, TRAIN[[0, 1]]).tolist(), rel=2e-6)


def test_the_log_shows_which_exit_broke(tmp_path: Path) -> None:
    model = family_of()
    with torch.no_grad():
        model.model.exits[1].norm.weight.fill_(float("nan"))
    trainer = trainer_of(tmp_path, model, max_steps=1)
    trainer.train()
    (row,) = training_rows(trainer)
    assert np.isnan(exit_losses_of(row)).tolist() == [False, True, False]
    assert row["loss"] == 0  # the host's filter of what is not finite


def test_micro_batches_without_a_target(tmp_path: Path) -> None:
    """The first of two has none: the step is that of the second alone."""
    rows = TRAIN.to_dict()
    idle = Dataset.from_dict(
        {
            "input_ids": rows["input_ids"][:4],
            "labels": [[-100] * LENGTH] * 2 + rows["labels"][2:4],
        }
    )
    trained = []
    for data, accumulation in [(idle, 2), (idle.select([2, 3]), 1)]:
        trainer = trainer_of(
            tmp_path,
            data=data,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0,
        )
        trainer.train()
        trained.append((trainer.model.state_dict(), exit_losses_of(training_rows(trainer)[0])))
    (found, losses), (right, expected) = trained
    assert losses == pytest.approx(expected, rel=1e-6)
    for name, value in right.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("by_processes", [True, False])
@pytest.mark.parametrize(
    "choices", [{}, {"distillation_weight": 0.5}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_a_step_without_a_target_moves_nothing(
    tmp_path: Path, choices: dict[str, Any], by_processes: bool
) -> None:
    """As in the host's Trainer on the host's model: a gradient of 0, and no NaN in the weights."""
    rows = TRAIN.to_dict()
    size = 2 * choices.get("gradient_accumulation_steps", 1)
    rows["labels"][size : 2 * size] = [[-100] * LENGTH] * size
    arguments = {"max_steps": 3, "optim": "sgd", "average_tokens_across_devices": by_processes}
    objective = FamilialTrainingArguments if "distillation_weight" in choices else TrainingArguments
    found = []
    for host in (False, True):
        snapshots = Snapshots()
        trainer = trainer_of(
            tmp_path,
            data=Dataset.from_dict(rows),
            callbacks=[snapshots],
            **(arguments | choices),
            arguments_class=objective,
        )
        if host:
            trainer = Trainer(
                truncated_host(family_of(), len(EXITS) - 1),
                trainer.args,
                default_data_collator,
                trainer.train_dataset,
                callbacks=[snapshots],
            )
        trainer.train()
        found.append([row["grad_norm"] for row in training_rows(trainer)])
        _, before, after = (model.state_dict() for model in snapshots.models)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    for first, second, third in found:
        assert (first > 0, second, third > 0) == (True, 0, True)


def test_rows_without_labels_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, data=TRAIN.remove_columns("labels"))
    with pytest.raises(ValueError, match="must have `labels` .*, got input_ids"):
        trainer.train()


def test_labels_of_the_answers_alone_are_refused(tmp_path: Path) -> None:
    """Read flat, they would train the answer after tokens of the prompt."""
    rows = {"input_ids": TRAIN["input_ids"][:], "labels": [row[-4:] for row in TRAIN["labels"][:]]}
    trainer = trainer_of(tmp_path, data=Dataset.from_dict(rows))
    with pytest.raises(ValueError, match=r"`labels` must have .* \(2, 12\) .* got \(2, 4\)"):
        trainer.train()


def test_label_smoothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`label_smoothing_factor` must be 0 .*, got 0.1"):
        trainer_of(tmp_path, label_smoothing_factor=0.1)


# evaluation


def test_evaluation_equals_a_plain_loop(tmp_path: Path) -> None:
    model = family_of()
    metrics = trainer_of(tmp_path, model).evaluate()
    expected = oracle(model, EVAL.to_dict())
    assert exit_losses_of(metrics, "eval_exit") == pytest.approx(expected.tolist(), rel=2e-6)
    assert metrics["eval_loss"] == pytest.approx(expected.mean().item(), rel=2e-6)


def test_evaluation_leaves_training_losses_alone(tmp_path: Path) -> None:
    rows = []
    for strategy in ("no", "steps"):
        trainer = trainer_of(
            tmp_path, max_steps=6, logging_steps=3, eval_strategy=strategy, eval_steps=1
        )
        trainer.train()
        rows.append([exit_losses_of(row) for row in training_rows(trainer)])
    assert rows[0] == rows[1]
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert len(evaluations) == 6
    for row in evaluations:
        mean = np.mean(exit_losses_of(row, "eval_exit"))
        assert mean == pytest.approx(row["eval_loss"], rel=1e-6)


def test_several_eval_sets_keep_their_names(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    metrics = trainer.evaluate({"a": EVAL, "b": TRAIN})
    exit_losses_of(metrics, "eval_a_exit")
    exit_losses_of(metrics, "eval_b_exit")
    assert "eval_exit_0_loss" not in metrics


def test_the_best_model_by_the_loss_of_one_exit(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path,
        max_steps=4,
        learning_rate=0.3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_exit_0_loss",
    )
    trainer.train()
    seen = {r["step"]: r["eval_exit_0_loss"] for r in trainer.state.log_history if "eval_loss" in r}
    best = min(seen, key=lambda step: seen[step])
    assert trainer.state.best_metric == seen[best]
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best}"
    assert trainer.evaluate()["eval_exit_0_loss"] == pytest.approx(seen[best], rel=1e-6)


def test_predictions_are_the_logits_of_the_deepest_exit(tmp_path: Path) -> None:
    model = family_of()
    output = trainer_of(tmp_path, model).predict(EVAL)
    assert isinstance(output.predictions, np.ndarray)
    assert output.predictions.shape == (7, LENGTH, model.vocab_size)
    expected = logits(truncated_host(model, 2), torch.tensor(EVAL["input_ids"][:]))
    np.testing.assert_allclose(output.predictions, expected, atol=1e-5)
    np.testing.assert_array_equal(output.label_ids, EVAL["labels"][:])
    exit_losses_of(output.metrics, "test_exit")


def test_predictions_without_labels(tmp_path: Path) -> None:
    output = trainer_of(tmp_path).predict(EVAL.remove_columns("labels"))
    assert output.predictions.shape[:2] == (7, LENGTH)
    assert not any("loss" in name for name in output.metrics)


@pytest.mark.parametrize("by_batch", [False, True])
def test_compute_metrics_still_works(tmp_path: Path, by_batch: bool) -> None:
    shapes = []

    def compute_metrics(found: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        shapes.append((found.predictions.shape[0], found.label_ids.shape[0]))
        return {"rows": float(sum(rows for rows, _ in shapes))}

    trainer = trainer_of(tmp_path, compute_metrics=compute_metrics, batch_eval_metrics=by_batch)
    metrics = trainer.evaluate()
    assert shapes == ([(4, 4), (3, 3)] if by_batch else [(7, 7)])
    assert metrics["eval_rows"] == 7
    exit_losses_of(metrics, "eval_exit")


def test_a_saved_family_tells_the_losses_that_were_measured(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run", max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "before"))
    assert {row.eval_loss for row in describe(tmp_path / "before", context=4).exits} == {None}
    losses = exit_losses_of(trainer.evaluate(), "eval_exit")
    trainer.save_model(str(tmp_path / "after"))
    assert [row.eval_loss for row in describe(tmp_path / "after", context=4).exits] == losses


def test_weights_that_are_not_one_for_each_exit_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one number for each of the 3 exits, got 2"):
        trainer_of(tmp_path, arguments_class=FamilialTrainingArguments, exit_weights="0.5,0.5")


# progress


def test_the_progress_bar_shows_every_exit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_of(
        tmp_path, max_steps=2, disable_tqdm=False, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    shown = capsys.readouterr()
    first = training_rows(trainer)[0]
    losses = " ".join(f"{loss:.3f}" for loss in exit_losses_of(first))
    assert f"loss {first['loss']:.3f}, exits {losses}" in shown.err
    (row,) = [row for row in trainer.state.log_history if "eval_loss" in row]
    losses = " ".join(f"{loss:.3f}" for loss in exit_losses_of(row, "eval_exit"))
    assert f"step 2: eval loss {row['eval_loss']:.4f}, exits {losses}" in shown.out
    assert "{" not in shown.out


def test_the_progress_bar_can_be_switched_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_of(tmp_path, max_steps=2)
    assert trainer.pop_callback(ExitProgressCallback) is None
    trainer.train()
    shown = capsys.readouterr()
    assert "it/s" not in shown.err
    assert shown.out.count("'exit_2_loss'") == 2


# several processes

RUN = """
    import json, sys
    from pathlib import Path
    sys.path[:0] = [{tests!r}, {here!r}]
    from hf_familial.training.callbacks import RunRecordCallback
    from test_trainer import EVAL, TRAIN, trainer_of

    batch, accumulation, averaged = map(int, sys.argv[2:])
    trainer = trainer_of(
        Path(sys.argv[1]),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        average_tokens_across_devices=bool(averaged),
        max_steps=3,
        logging_steps=1,
        optim="sgd",
        max_grad_norm=0,
        ddp_find_unused_parameters=False,
    )
    trainer.train_dataset = TRAIN.select(range(8))
    trainer.add_callback(RunRecordCallback(sys.argv[1] + "/runs.jsonl"))
    trainer.train()
    whole = trainer.evaluate(TRAIN.select(range(8)))
    partial, few = trainer.evaluate(EVAL), trainer.evaluate(EVAL.select([4]))
    if trainer.is_world_process_zero():
        found = [trainer.args.world_size, trainer.state.log_history, whole, partial, few]
        Path(sys.argv[1], "found.json").write_text(json.dumps(found))
    # a process that leaves while the other still hears it may abort
    trainer.accelerator.wait_for_everyone()
    trainer.end()
"""


def run_script(folder: Path, processes: int, *choices: int) -> list[Any]:
    folder.mkdir()
    here = Path(__file__).resolve().parent
    script = folder / "run.py"
    script.write_text(textwrap.dedent(RUN).format(tests=str(here.parent), here=str(here)))
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        launcher += [str(processes)]
    command = [*launcher, str(script), str(folder), *map(str, choices)]
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=os.environ | offline, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_two_processes_log_what_one_does(tmp_path: Path) -> None:
    one = run_script(tmp_path / "one", 1, 4, 1, 1)
    two = run_script(tmp_path / "two", 2, 2, 1, 1)
    accumulated = run_script(tmp_path / "accumulated", 2, 1, 2, 1)
    assert [run[0] for run in (one, two, accumulated)] == [1, 2, 2]
    records = [read_runs(tmp_path / n / "runs.jsonl")[0] for n in ("one", "two", "accumulated")]
    for name in ("D_tokens", "target_tokens", "computed_tokens", "C_flops", "seq_len"):
        assert len({getattr(record, name) for record in records}) == 1, name
    for _, history, *evaluations in (two, accumulated):
        for row, expected in zip(history, one[1], strict=True):
            assert row.keys() == expected.keys()
            if "loss" in row:
                assert exit_losses_of(row) == pytest.approx(exit_losses_of(expected), rel=1e-5)
                assert row["loss"] == pytest.approx(np.mean(exit_losses_of(row)), rel=1e-6)
        # rows that fill up the last batch of the second process do not count twice
        for metrics, right in zip(evaluations, one[2:], strict=True):
            found, expected = (exit_losses_of(row, "eval_exit") for row in (metrics, right))
            assert found == pytest.approx(expected, rel=1e-5)
        for metrics in evaluations:
            mean = np.mean(exit_losses_of(metrics, "eval_exit"))
            assert mean == pytest.approx(metrics["eval_loss"], rel=1e-6)


@pytest.mark.slow
def test_two_processes_that_average_their_own_means(tmp_path: Path) -> None:
    _, history, whole, *_ = run_script(tmp_path / "two", 2, 2, 1, 0)
    for row in history:
        if "loss" in row:
            assert np.mean(exit_losses_of(row)) == pytest.approx(row["loss"], rel=1e-6)
    mean = np.mean(exit_losses_of(whole, "eval_exit"))
    assert mean == pytest.approx(whole["eval_loss"], rel=1e-6)

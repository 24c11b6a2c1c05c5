"""Any trainer, made to train every exit: gradients are those of one backward per exit."""

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import tiny_model
from datasets import Dataset
from reference import gradients, gradients_by_exit, tiny_family
from torch import nn
from transformers import Trainer, TrainingArguments, logging

import hf_familial as hff


EXITS, LENGTH = [1, 2, 4], 10
HOSTS = ["llama", "gemma2", "mixtral"]  # plain; logits that are capped; experts that are balanced


def family_of(model_type: str = "llama", **fields: Any) -> Any:
    return tiny_family(model_type, EXITS, **fields)


def rows_of(count: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 120, (count, LENGTH), generator=generator)
    kept = torch.randint(2, LENGTH + 1, (count, 1), generator=generator)
    labels = ids.masked_fill(torch.arange(LENGTH) >= kept, -100)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


ROWS = rows_of(12)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class ReadsLogits(Trainer):
    """A trainer with a loss of its own, computed from logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")  # a trainer may change its batch
        outputs = model(**inputs)
        loss = cross_entropy(outputs.logits, labels) ** 2
        return (loss, outputs) if return_outputs else loss


class ReadsLoss(Trainer):
    """A trainer that scales the loss of the model."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (2 * outputs.loss, outputs) if return_outputs else 2 * outputs.loss


class ReadsStates(Trainer):
    """A trainer that calls the headless model and multiplies by the output embeddings itself."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        model = self.accelerator.unwrap_model(model)
        labels = inputs.pop("labels")
        states = model.base_model(**inputs, use_cache=False).last_hidden_state
        logits = states @ model.get_output_embeddings().weight.T
        loss = cross_entropy(logits, labels)
        return (loss, {"logits": logits}) if return_outputs else loss


class Compares(Trainer):
    """A trainer that compares two texts under the model and under a frozen copy of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ref_model = copy.deepcopy(self.model).eval()
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._batches = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, ids = inputs["labels"], inputs["input_ids"]
        chosen = cross_entropy(model(input_ids=ids).logits, labels)
        rejected = cross_entropy(model(input_ids=ids.flip(0)).logits, labels)
        with torch.no_grad():
            before = cross_entropy(self.ref_model(input_ids=ids).logits, labels)
        margin = rejected - chosen + before
        metrics = self._metrics["train" if model.training else "eval"]
        metrics["margin"].append(margin.item())
        self._batches += 1
        metrics["batches"] = [self._batches]
        loss = -nn.functional.logsigmoid(margin)
        return (loss, {"margin": margin}) if return_outputs else loss


STYLES = [ReadsLogits, ReadsLoss, ReadsStates, Compares]


def trainer_of(base: type, folder: Path, model: Any, rows: Dataset = ROWS, **given: Any) -> Any:
    defaults = {"per_device_train_batch_size": 4, "learning_rate": 0.02, "logging_steps": 1}
    defaults |= {"per_device_eval_batch_size": 4, "save_strategy": "no", "disable_tqdm": True}
    defaults |= {"report_to": "none", "use_cpu": True, "seed": 3}
    args = TrainingArguments(str(folder), **defaults | given)
    return base(model=model, args=args, train_dataset=rows, eval_dataset=ROWS.select(range(6)))


def gradients_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Return the gradients of one step on the first batch."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.zero_grad()
    trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))
    return dict(gradients(trainer.model))


def assert_close(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, gradient in right.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("fields", [{}, {"exit_head": "own", "num_exit_layers": 1}], ids=str)
@pytest.mark.parametrize("model_type", HOSTS)
@pytest.mark.parametrize("style", STYLES)
def test_gradients_are_the_weighted_sum_over_exits(
    style: type, model_type: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model, weights = family_of(model_type, **fields), (0.5, 0.2, 0.3)
    right = gradients_by_exit(
        lambda m: trainer_of(style, tmp_path, m), gradients_of, model, weights
    )
    trainer = trainer_of(hff.multi_exit(style, exit_weights=weights), tmp_path, model)
    assert_close(gradients_of(trainer), right)


@pytest.mark.parametrize("given", [{"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_gradients_with_options_of_the_host(given: dict[str, Any], tmp_path: Path) -> None:
    model, weights = family_of(), (1 / 3,) * 3
    plain = lambda m: trainer_of(ReadsLogits, tmp_path, m, **given)  # noqa: E731
    right = gradients_by_exit(plain, gradients_of, model, weights)
    found = gradients_of(trainer_of(hff.multi_exit(ReadsLogits), tmp_path, model, **given))
    for name, gradient in right.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < (2e-2 if "bf16" in given else 1e-5), name


def test_the_backbone_runs_once_for_all_exits(tmp_path: Path) -> None:
    model = family_of()
    runs: list[int] = []
    model.model.backbone.layers[0].register_forward_hook(lambda *_: runs.append(1))
    gradients_of(trainer_of(hff.multi_exit(ReadsLogits), tmp_path, model))
    assert len(runs) == 1


def test_other_inputs_for_another_exit_get_a_pass_of_their_own(tmp_path: Path) -> None:
    class Shifts(ReadsLogits):
        calls = 0

        def compute_loss(self, model, inputs, *args: Any, **kwargs: Any):
            type(self).calls += 1
            inputs["input_ids"] = (inputs["input_ids"] + type(self).calls % len(EXITS)) % 100
            return super().compute_loss(model, inputs, *args, **kwargs)

    model, weights = family_of(), (1 / 3,) * 3
    right = gradients_by_exit(
        lambda m: trainer_of(Shifts, tmp_path, m), gradients_of, model, weights
    )
    assert Shifts.calls == 3
    assert_close(gradients_of(trainer_of(hff.multi_exit(Shifts), tmp_path, model)), right)


def test_a_drawn_exit_has_the_expected_gradient(tmp_path: Path) -> None:
    weights = (0.5, 0.2, 0.3)
    drawn = hff.multi_exit(ReadsLogits, exits="sample", exit_weights=weights)
    trainer = trainer_of(drawn, tmp_path, family_of())
    whole = gradients_of(
        trainer_of(hff.multi_exit(ReadsLogits, exit_weights=weights), tmp_path, family_of())
    )
    by_exit: dict[int, Any] = {}
    counts = [0] * len(EXITS)
    for step in range(400):
        trainer.state.global_step = step
        k = trainer._drawn_exit()
        counts[k] += 1
        if k not in by_exit:
            by_exit[k] = gradients_of(trainer)
    # 400 draws: three standard deviations are at most 0.075
    assert all(abs(n / 400 - w) < 0.075 for n, w in zip(counts, weights, strict=True))
    for name, gradient in whole.items():
        expected = sum(w * by_exit[k][name] for k, w in enumerate(weights))
        torch.testing.assert_close(expected, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_drawn_exit_runs_the_layers_below_it_only(tmp_path: Path) -> None:
    model = family_of()
    trainer = trainer_of(
        hff.multi_exit(ReadsLogits, exits="sample", exit_weights=[1, 0, 0]), tmp_path, model
    )
    runs: list[int] = []
    model.model.backbone.layers[1].register_forward_hook(lambda *_: runs.append(1))
    found = gradients_of(trainer)
    assert not runs
    deep = {n: g for n, g in found.items() if n.startswith("model.backbone.layers.3.")}
    assert deep
    assert all(not g.any() for g in deep.values())


def test_metrics_are_kept_by_exit_and_counters_count_a_batch_once(tmp_path: Path) -> None:
    trainer = trainer_of(hff.multi_exit(Compares), tmp_path, family_of(), max_steps=3)
    trainer.train()
    assert trainer._batches == 3
    metrics = trainer._metrics["train"]
    by_exit = [metrics[f"exit_{k}_margin"] for k in range(3)]
    assert [len(values) for values in by_exit] == [3, 3, 3]
    assert metrics["margin"] == [value for step in zip(*by_exit, strict=True) for value in step]
    assert metrics["batches"] == [3]
    assert "exit_0_batches" not in metrics


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logged_losses_of_exits_average_to_the_loss(accumulate: int, tmp_path: Path) -> None:
    base = hff.multi_exit(ReadsLogits)
    trainer = trainer_of(
        base,
        tmp_path,
        family_of(),
        max_steps=4,
        gradient_accumulation_steps=accumulate,
        logging_steps=2,
    )
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == 2
    for row in logs:
        mean = sum(row[f"exit_{k}_loss"] for k in range(3)) / 3
        assert row["loss"] == pytest.approx(mean, rel=1e-4)


def test_an_evaluation_has_the_loss_of_each_exit(tmp_path: Path) -> None:
    model = family_of()
    trainer = trainer_of(hff.multi_exit(ReadsLogits), tmp_path, model)
    metrics = trainer.evaluate()
    for k in range(3):
        plain = trainer_of(ReadsLogits, tmp_path, copy.deepcopy(model))
        plain.model.config.default_exit = k
        right = plain.evaluate()["eval_loss"]
        assert metrics[f"eval_exit_{k}_loss"] == pytest.approx(right, rel=1e-5)
    mean = sum(metrics[f"eval_exit_{k}_loss"] for k in range(3)) / 3
    assert metrics["eval_loss"] == pytest.approx(mean)


@pytest.mark.parametrize("exits", ["all", "sample"])
def test_a_resumed_run_equals_an_unbroken_one(exits: str, tmp_path: Path) -> None:
    base = hff.multi_exit(Compares, exits=exits)
    given = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(base, tmp_path / "whole", family_of(), **given)
    whole.train()
    broken = trainer_of(base, tmp_path / "whole", family_of(), **given)
    broken.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(broken.model.state_dict()[name], tensor), name
    assert broken.state.total_flos == whole.state.total_flos


def test_a_reference_runs_the_exit_that_learns_or_the_one_named(tmp_path: Path) -> None:
    for named, right in ((None, [0, 1, 2]), (-1, [2, 2, 2]), (0, [0, 0, 0])):
        trainer = trainer_of(hff.multi_exit(Compares, reference_exit=named), tmp_path, family_of())
        seen: list[int] = []
        head = trainer.ref_model.head
        trainer.ref_model.head = lambda k, head=head, seen=seen: (seen.append(k), head(k))[1]
        gradients_of(trainer)
        assert seen == right


@pytest.mark.parametrize(("exits", "right"), [("all", {0}), ("sample", {0, 1})])
def test_generation_uses_the_named_or_the_drawn_exit(
    exits: str, right: set[int], tmp_path: Path
) -> None:
    class Generates(ReadsLogits):
        seen: list[int]

        def _prepare_inputs(self, inputs):
            inputs = super()._prepare_inputs(inputs)
            with torch.no_grad():
                text = self.model.generate(inputs["input_ids"][:1], max_new_tokens=2, min_length=12)
            assert text.shape == (1, LENGTH + 2)
            return inputs

    model = family_of()
    trainer = trainer_of(
        hff.multi_exit(Generates, exits=exits, generation_exit=0), tmp_path, model, max_steps=12
    )
    seen: set[int] = set()
    resolve = model.config.resolve_exit
    run = type(model.model.members).member_segment

    def member_segment(members: Any, k: int) -> Any:
        seen.add(resolve(k))
        return run(members, k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.model.members), "member_segment", member_segment)
        trainer.train()
    assert seen == right


def test_flops_are_those_of_the_passes(tmp_path: Path) -> None:
    model = family_of()
    plain = trainer_of(hff.FamilialTrainer, tmp_path, model, max_steps=2)
    plain.train()
    logits = trainer_of(hff.multi_exit(ReadsLogits), tmp_path, model, max_steps=2)
    logits.train()
    assert logits.state.total_flos == pytest.approx(plain.state.total_flos)
    compares = trainer_of(hff.multi_exit(Compares), tmp_path, model, max_steps=2)
    compares.train()
    # two passes that learn, and one forward pass of the reference: a third of a training step
    assert compares.state.total_flos == pytest.approx(
        plain.state.total_flos * (2 + 1 / 3), rel=0.05
    )
    first = trainer_of(
        hff.multi_exit(ReadsLogits, exits="sample", exit_weights=[1, 0, 0]),
        tmp_path,
        model,
        max_steps=2,
    )
    first.train()
    assert first.state.total_flos < 0.5 * plain.state.total_flos


def test_flops_of_a_training_leave_out_its_evaluations(tmp_path: Path) -> None:
    totals = []
    for given in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = trainer_of(
            hff.multi_exit(ReadsLogits), tmp_path, family_of(), max_steps=3, **given
        )
        trainer.train()
        totals.append(trainer.state.total_flos)
    assert totals[0] == totals[1] > 0


def test_plain_use_of_one_exit_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.get_logger("hf_familial.models.familial.modeling_base")
    logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    model, ids = family_of().train(), torch.tensor([[8, 9, 10]])
    quiet = [
        lambda: model(ids, exit_idx=-1), lambda: model(ids, labels=ids),
        lambda: model.eval()(ids), lambda: model.train().model(ids, output_exits=True),
    ]  # fmt: skip
    for call in quiet:
        call()
    with torch.no_grad():
        model.train()(ids)
    gradients_of(trainer_of(hff.multi_exit(ReadsStates), tmp_path, model))
    assert not caplog.records
    for call in (lambda: model(ids), lambda: model.model(ids), lambda: model(ids)):
        call()
    (record,) = caplog.records
    assert "trains exit 2 only" in record.message
    assert "multi_exit" in record.message


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = family_of(exit_head="own")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = trainer_of(hff.multi_exit(ReadsStates), tmp_path, model)
    gradients_of(trainer)
    assert model.model.active_exit is None
    assert model.get_output_embeddings() is model.lm_head
    assert model.config.default_exit == -1
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("an error of the loss")

    model.lm_head.register_forward_hook(fails)
    with pytest.raises(OSError, match="of the loss"):
        gradients_of(trainer_of(hff.multi_exit(ReadsLogits), tmp_path, model))
    assert model.model.active_exit is None


def test_old_log_probabilities_of_one_exit_are_rejected(tmp_path: Path) -> None:
    trainer = trainer_of(hff.multi_exit(ReadsLogits), tmp_path, family_of())
    batch = next(iter(trainer.get_train_dataloader())) | {"old_per_token_logps": torch.zeros(4, 9)}
    with pytest.raises(ValueError, match=r'old_per_token_logps.*exits="sample"'):
        trainer.compute_loss(trainer.model, batch)


def test_classes_and_options_that_cannot_work_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="subclass of `transformers.Trainer`"):
        hff.multi_exit(nn.Linear)
    with pytest.raises(ValueError, match='`exits` must be "all" or "sample"'):
        hff.multi_exit(Trainer, exits="some")
    with pytest.raises(TypeError, match=r"swap the bases"):
        type("Both", (ReadsLogits, hff.FamilialTrainer), {})
    type("Both", (hff.FamilialTrainer, ReadsLogits), {})
    plain, base = tiny_model("llama"), hff.multi_exit(ReadsLogits)
    with pytest.raises(TypeError, match="needs a FamilialForCausalLM, got a LlamaForCausalLM"):
        trainer_of(base, tmp_path, plain)
    model, two = family_of(), hff.multi_exit(ReadsLogits, exit_weights=[1, 2])
    with pytest.raises(ValueError, match="one number for each of the 3 exits"):
        trainer_of(two, tmp_path, model)
    args = hff.FamilialTrainingArguments(str(tmp_path), distillation_weight=1.0, use_cpu=True)
    with pytest.raises(ValueError, match="distillation needs the loss of `Trainer`"):
        base(model=model, args=args)
    three = hff.multi_exit(Trainer, exit_weights=[1, 2, 3])
    with pytest.raises(ValueError, match="set it in one of the two"):
        three(model=model, args=args)


def test_one_class_for_equal_options() -> None:
    assert hff.multi_exit(ReadsLogits) is hff.multi_exit(ReadsLogits)
    assert hff.multi_exit(ReadsLogits).__name__ == "MultiExitReadsLogits"
    assert issubclass(hff.multi_exit(hff.FamilialTrainer, exits="sample"), hff.FamilialTrainer)
    assert issubclass(hff.FamilialTrainer, Trainer)


def test_a_loss_function_of_the_user_trains_every_exit(tmp_path: Path) -> None:
    def loss_function(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return cross_entropy(outputs.logits, labels)

    def trainer(base: type, model: Any) -> Any:
        args = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True)
        return base(model=model, args=args, train_dataset=ROWS, compute_loss_func=loss_function)

    model, weights = family_of(), (1 / 3,) * 3
    right = gradients_by_exit(lambda m: trainer(Trainer, m), gradients_of, model, weights)
    assert_close(gradients_of(trainer(hff.FamilialTrainer, model)), right)

"""What the trainer trains on: weights, schedules and distillation reach the loss of every step."""

from __future__ import annotations

import pytest
import torch
from backbones import tiny_model
from datasets import Dataset
from transformers import TrainerCallback

from hf_familial import FamilialForCausalLM, FamilialTrainer, FamilialTrainingArguments


EXITS = [1, 2, 4]


class Weights(TrainerCallback):
    """Weights that a trainer's model was given, step by step."""

    def __init__(self, model: FamilialForCausalLM) -> None:
        self.seen: list[tuple[float, ...]] = []
        self.outputs: list[dict] = []
        model.register_forward_hook(self.hook, with_kwargs=True)

    def hook(self, module, args, kwargs, output) -> None:
        if module.training:
            self.seen.append(kwargs["exit_weights"])
            self.outputs.append({"loss": output.loss.item(), "exits": output.exit_losses})
            assert output.logits is None


def run(tmp_path, steps: int = 6, resume: str | None = None, **fields):
    """A tiny run; the trainer and what its model was given."""
    torch.manual_seed(0)
    model = FamilialForCausalLM.from_backbone(tiny_model("llama"), exits=EXITS)
    ids = torch.randint(8, 100, (16, 12), generator=torch.Generator().manual_seed(0)).tolist()
    args = FamilialTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_steps=3,
        **fields,
    )
    seen = Weights(model)
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    trainer = FamilialTrainer(model=model, args=args, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


def test_weights_enter_the_loss(tmp_path) -> None:
    trainer, seen = run(tmp_path, exit_weights="1,1,2")
    weights = torch.tensor([0.25, 0.25, 0.5])
    for output, log in zip(seen.outputs, trainer.state.log_history, strict=False):
        assert output["loss"] == pytest.approx((output["exits"] * weights).sum().item(), rel=1e-5)
        assert log["exit_2_loss"] == pytest.approx(output["exits"][2].item(), rel=1e-5)


def test_schedule_follows_the_optimiser_steps(tmp_path) -> None:
    _, seen = run(tmp_path, exit_schedule="rotating", gradient_accumulation_steps=2)
    active = [tuple(weight > 0 for weight in weights) for weights in seen.seen]
    turns = [(True, False, True), (False, True, True)]
    assert active == [turns[step % 2] for step in range(6) for _ in range(2)]


def test_resume_goes_on_with_the_schedule(tmp_path) -> None:
    _, whole = run(tmp_path / "whole", exit_schedule="decay")
    _, rest = run(
        tmp_path / "rest", exit_schedule="decay", resume=str(tmp_path / "whole" / "checkpoint-3")
    )
    assert rest.seen == whole.seen[3:]
    for ours, right in zip(rest.outputs, whole.outputs[3:], strict=True):
        torch.testing.assert_close(ours["exits"], right["exits"], rtol=0, atol=0)


def test_distillation_adds_to_the_loss_and_pulls_exits_to_the_deepest(tmp_path) -> None:
    _, seen = run(tmp_path, distillation_weight=1.0, distillation_temperature=2.0)
    assert all(output["loss"] > output["exits"].mean().item() for output in seen.outputs)


def test_number_of_weights_must_fit(tmp_path) -> None:
    with pytest.raises(ValueError, match="3 exits, got 2"):
        run(tmp_path, exit_weights="1,2")

"""One training of a family, started by `accelerate launch`, or alone for comparison.

Arguments: a folder, the source of the family, the trainer, rows of each process at a step, and
`--resume`. The folder gets the log, and in `final` the weights.
"""

import json
import os
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from test_multi_exit import cross_entropy
from transformers import Trainer, default_data_collator

import hf_familial as hff
from hf_familial import FamilialForCausalLM
from hf_familial.training.args import FamilialTrainingArguments


class ReadsLogits(Trainer):
    """A trainer that computes a loss of its own. All rows have as many targets, so means add up."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


TRAINERS = {
    "familial": hff.FamilialTrainer,
    "logits": hff.multi_exit(ReadsLogits),
}


def family_of(source: str):
    """Load a family, build one from a config, or start from a pretrained model."""
    how, _, path = source.partition(":")
    if how == "backbone":
        return FamilialForCausalLM.from_backbone(path, exits=[1, 2, 4], num_exit_layers=1)
    if how == "config":
        torch.manual_seed(0)
        return FamilialForCausalLM(hff.FamilialConfig.from_pretrained(path))
    return FamilialForCausalLM.from_pretrained(path)


def train(folder: str, source: str, kind: str, rows: int, resume: bool) -> None:
    """Train for four steps with a checkpoint after two."""
    args = FamilialTrainingArguments(
        folder,
        per_device_train_batch_size=rows,
        max_steps=4,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_epsilon=1e-3,
        max_grad_norm=1.0,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=2,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        # with `use_cpu`, accelerate would run neither DeepSpeed nor FSDP
        use_cpu="LOCAL_RANK" not in os.environ,
        ddp_backend="gloo" if "LOCAL_RANK" in os.environ else None,
    )
    model = family_of(source)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 120, (16, 12), generator=generator)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    trainer = TRAINERS[kind](
        model,
        args,
        default_data_collator,
        train_dataset=data,
        eval_dataset=data.select(range(4)),
    )
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(f"{folder}/final")
    if trainer.is_world_process_zero():
        found = {"wrapper": type(trainer.model_wrapped).__name__, "log": trainer.state.log_history}
        with open(f"{folder}/log.json", "w", encoding="utf-8") as file:
            json.dump(found, file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate shards on accelerators only, so take CPUs for GPUs
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
        PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    folder, source, kind, rows, *rest = sys.argv[1:]
    train(folder, source, kind, int(rows), "--resume" in rest)

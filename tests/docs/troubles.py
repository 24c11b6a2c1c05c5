"""Mistakes whose messages docs/troubleshooting.md explains, and the messages that they cause.

`PYTHONPATH=src:tests python tests/docs/troubles.py` writes the messages of today into the page.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from backbones import tiny_model
from datasets import Dataset
from docs.blocks import ROOT
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
)

import hf_familial as hff
from hf_familial.toy import toy_decoder
from hf_familial.training import DataArguments, prepare_data, train_exits_only


PAGE = ROOT / "docs" / "troubleshooting.md"
# a heading with its name, then the message under it
ENTRY = re.compile(r"^## [^\n]*\{ #([\w-]+) \}\n\n```text\n(.*?)\n```$", re.M | re.S)

FAMILY = {"exits": [2, 4], "num_exit_layers": 0}


def family(**fields: object) -> hff.FamilialForCausalLM:
    """Build a tiny family with exits after 2 and 4 layers."""
    return hff.FamilialForCausalLM.from_backbone(tiny_model("llama", 4), **(FAMILY | fields))


def trainer(rows: dict[str, list], **arguments: object) -> hff.FamilialTrainer:
    """Build a trainer of a tiny family on a few rows."""
    args = hff.FamilialTrainingArguments(
        "out", max_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True, **arguments
    )
    return hff.FamilialTrainer(family(), args, train_dataset=Dataset.from_dict(rows))


IDS = torch.arange(4)[None] + 1


def load_without_package() -> None:
    """Load a family in a process that has not imported the package."""
    family().save_pretrained("family")
    code = "from transformers import AutoModelForCausalLM as A; A.from_pretrained('family')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, input=""
    )
    raise ValueError(re.split(r"^\w*Error: ", done.stderr, flags=re.M)[-1].strip())


def export_twice() -> None:
    family().save_pretrained("family")
    for _ in range(2):
        hff.export_exit("family", 0, "member")


def export_pickle() -> None:
    model = family()
    model.config.save_pretrained("family")
    torch.save(model.state_dict(), "family/pytorch_model.bin")
    hff.export_exit("family", 0, "member")


def no_padding() -> None:
    _, tokenizer = toy_decoder()
    tokenizer.pad_token = None
    DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": [1, 2]}])


def no_end_of_text() -> None:
    _, tokenizer = toy_decoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    tokenizer.save_pretrained("tokenizer")
    Path("text.txt").write_text("one\ntwo\n" * 100)
    prepare_data(DataArguments(train_files=["text.txt"], tokenizer_name="tokenizer"))


def little_text() -> None:
    Path("text.txt").write_text("one\ntwo\n")
    prepare_data(DataArguments(train_files=["text.txt"], vocab_size=300, cache_dir="cache"))


def drafts_on_recurrent() -> None:
    host = hff.FamilialForCausalLM.from_backbone(tiny_model("falcon_h1", 4), exits=[2, 4])
    host.eval().relay_generate(IDS, max_new_tokens=2)


def other_checkpoint() -> None:
    rows = {"input_ids": [[1, 2]] * 4, "labels": [[1, 2]] * 4}
    first = hff.FamilialTrainingArguments(
        "out", max_steps=1, use_cpu=True, save_steps=1, disable_tqdm=True
    )
    hff.FamilialTrainer(family(), first, train_dataset=Dataset.from_dict(rows)).train()
    hff.FamilialTrainer(family(exits=[1, 4]), first, train_dataset=Dataset.from_dict(rows)).train(
        resume_from_checkpoint=True
    )


def grown_cache() -> None:
    model = family().eval()
    cache = model(IDS, exit_idx=0, use_cache=True).past_key_values
    model(IDS, past_key_values=cache)


def wrapped() -> None:
    hff.evaluate_exits(AutoModelForCausalLM.from_config(tiny_model("llama", 4).config), [])


def full_device() -> None:
    hff.choose_exit(family(), memory="1KB")


TROUBLES: dict[str, Callable[[], object]] = {
    "familial-unknown": load_without_package,
    "exits": lambda: family(exits=[2, 3]),
    "both": lambda: family(num_exits=2),
    "model-type": lambda: hff.FamilialConfig(text_config={"model_type": "lama"}, exits=[1]),
    "unsupported": lambda: hff.FamilialForCausalLM.from_backbone(tiny_model("bert", 2), exits=[2]),
    "nothing-learns": lambda: train_exits_only(family(exit_norm="shared")),
    "labels": lambda: trainer({"input_ids": [[1, 2]] * 4}).train(),
    "shapes": lambda: family()(IDS, labels=IDS[:, :2]),
    "padding": no_padding,
    "scheme": lambda: hff.FamilialTrainingArguments("out", exit_weights="unifrom"),
    "weights": lambda: trainer(
        {"input_ids": [[1, 2]] * 4, "labels": [[1, 2]] * 4}, exit_weights="1,1,1"
    ).train(),
    "smoothing": lambda: hff.FamilialTrainingArguments("out", label_smoothing_factor=0.1),
    "resume": other_checkpoint,
    "end-of-text": no_end_of_text,
    "little-text": little_text,
    "exit-idx": lambda: family()(IDS, exit_idx=5),
    "relay-beams": lambda: family().eval().relay_generate(IDS, num_beams=2, max_new_tokens=2),
    "relay-exit-idx": lambda: family().eval().relay_generate(IDS, exit_idx=0, max_new_tokens=2),
    "recurrent": drafts_on_recurrent,
    "cache": grown_cache,
    "not-a-family": wrapped,
    "overwrite": export_twice,
    "pickle": export_pickle,
    "no-exit-fits": full_device,
}


def message_of(name: str) -> str:
    """Return the message that a mistake causes, run in an empty folder."""
    logging.disable(logging.WARNING)
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(folder)
        try:
            TROUBLES[name]()
        except Exception as error:  # of any type: its text is compared
            text = error.args[0] if isinstance(error, KeyError) else str(error)
            return text.replace(os.path.realpath(folder), "/home/me")
        finally:
            os.chdir(here)
            logging.disable(logging.NOTSET)
    raise AssertionError(f"{name} raises nothing.")


def wrapped_lines(text: str) -> str:
    """Return a message in lines of at most 88 characters, as the page shows it."""
    return textwrap.fill(" ".join(text.split()), 88, break_on_hyphens=False)


def main() -> None:
    """Write the messages into the page."""

    def renewed(entry: re.Match[str]) -> str:
        return entry[0].replace(f"\n{entry[2]}\n", f"\n{wrapped_lines(message_of(entry[1]))}\n")

    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(ENTRY.sub(renewed, page), encoding="utf-8")


if __name__ == "__main__":
    main()

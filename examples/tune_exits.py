"""Turn a pretrained decoder into a family and tune its exits.

    python examples/tune_exits.py --backbone HuggingFaceTB/SmolLM2-135M
    python examples/tune_exits.py --backbone FOLDER --train lora
    python examples/tune_exits.py --smoke

`--train exits` (the default) freezes the backbone. Only norms, private layers and own heads of the
early exits learn, and the deepest exit keeps its weights bit for bit. `--train lora` adds low-rank
updates of the backbone with peft. `--train full` trains everything. Choose exits, or distil from
the deepest exit:

    python examples/tune_exits.py --backbone FOLDER --exits 10 15 20 30
    python examples/tune_exits.py --backbone FOLDER --distillation_weight 1 \\
        --max_steps 500

The text is the same as for `pretrain.py`, by default the source code of Python's standard library.

Output: loss and agreement with the deepest exit on held-out text, as in this table from `--smoke`:

    exit  depth   loss  after  agreement   after  bits/byte  after
       0      1  5.545  5.459      40.6%    1.7%      8.003  7.879
       3      4  5.549  5.549     100.0%  100.0%      8.009  8.009

`--output_dir` then contains the family (or adapter), the table as `exits.json`, and `exits.png`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig, get_peft_model
from rich.table import Table
from transformers import AutoConfig, PreTrainedModel, default_data_collator, set_seed

from hf_familial import (
    FamilialConfig,
    FamilialForCausalLM,
    FamilialTrainer,
    FamilialTrainingArguments,
    evaluate_exits,
)
from hf_familial.evaluation import ExitEvaluation, plot_exits
from hf_familial.paths import check_output_folder
from hf_familial.scripts import arguments, console, loading, run
from hf_familial.toy import toy_decoder
from hf_familial.training import DataArguments, PackedData, prepare_data, train_exits_only


TRAINED = ("exits", "lora", "full")


@dataclass
class TuningArguments:
    """The pretrained decoder, its exits, and the parameters to train."""

    _argument_group_name: ClassVar = "the family"
    _help_arguments: ClassVar = dict.fromkeys(
        ("backbone", "exits", "num_exit_layers", "exit_head", "train", "lora_rank"), ""
    )

    backbone: str | None = field(
        default=None, metadata={"help": "Pretrained decoder: a folder or Hub name."}
    )
    exits: list[int] | None = field(
        default=None,
        metadata={"help": "Depths of the exits. Default: 1/3, 1/2, 2/3 and all of the layers."},
    )
    num_exit_layers: int = field(
        default=1,
        metadata={"help": "Private layers per early exit, copied from the backbone."},
    )
    exit_head: str = field(
        default="shared", metadata={"help": "Exit heads: shared or own.", "metavar": "NAME"}
    )
    train: str = field(
        default="exits", metadata={"help": "Train exits, lora or full.", "metavar": "NAME"}
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_targets: str = field(
        default=r"model\.backbone\..*\.(q_proj|k_proj|v_proj|o_proj)",
        metadata={"help": "Regular expression for the modules with LoRA.", "metavar": "REGEX"},
    )
    eval_batches: int = field(default=16, metadata={"help": "Held-out batches to measure on."})

    def __post_init__(self) -> None:
        """Check the values before a model is loaded."""
        if self.backbone is None:
            raise ValueError(
                "`--backbone` is missing. Pass a folder or Hub name of a decoder, or try `--smoke`."
            )
        if self.train not in TRAINED:
            words = ", ".join(TRAINED)
            raise ValueError(f"`--train` must be one of {words}, got {self.train!r}.")


@dataclass
class TuningData(DataArguments):
    """The data arguments."""

    _argument_group_name: ClassVar = "the text"
    _help_arguments: ClassVar = {
        "dataset_name": "Dataset on the Hub, or a folder.",
        "train_files": "Text, jsonl or parquet files, or folders.",
        "seq_length": "Tokens in a training sequence.",
    }


@dataclass
class TuneTrainingArguments(FamilialTrainingArguments):
    """The training arguments, with defaults for a short tuning."""

    _argument_group_name: ClassVar = "the training"
    _help_arguments: ClassVar = {
        "output_dir": "Folder to save to.",
        "max_steps": "Number of optimiser steps.",
        "per_device_train_batch_size": "Sequences per device and step.",
        "learning_rate": "Highest learning rate.",
        "bf16": "Compute in bfloat16.",
        "exit_weights": "Weights of the exits' losses.",
        "distillation_weight": "Weight of distillation.",
    }

    output_dir: str | None = field(default="outputs/tune_exits")
    max_steps: int = field(default=200)
    per_device_train_batch_size: int = field(default=4)
    per_device_eval_batch_size: int = field(default=4)
    learning_rate: float = field(default=5e-4)
    lr_scheduler_type: str = field(default="cosine")
    warmup_steps: float = field(default=0.05)
    logging_steps: float = field(default=10)
    save_strategy: str = field(default="no")


def smoke(folder: Path) -> dict[str, Any]:
    """Return arguments for a tiny untrained decoder and a little text."""
    model, tokenizer = toy_decoder()
    model.save_pretrained(folder / "decoder")
    tokenizer.save_pretrained(folder / "decoder")
    places = {"output_dir": str(folder / "family"), "cache_dir": str(folder / "cache")}
    text = {"max_train_bytes": 40_000, "max_eval_tokens": 4_096, "seq_length": 64}
    steps = {"max_steps": 10, "logging_steps": 2, "learning_rate": 0.01, "use_cpu": True}
    return {"backbone": str(folder / "decoder"), "eval_batches": 4, **places, **text, **steps}


def default_exits(num_hidden_layers: int) -> list[int]:
    """Return depths at a third, a half, two thirds and all of the layers."""
    shares = (1 / 3, 1 / 2, 2 / 3, 1)
    return sorted({max(1, round(num_hidden_layers * share)) for share in shares})


def trainable(model: FamilialForCausalLM, args: TuningArguments) -> PreTrainedModel:
    """Return the model with the chosen parameters trainable, wrapped by peft for `lora`."""
    if args.train == "exits":
        train_exits_only(model)
        return model
    if args.train == "full":
        return model
    config = LoraConfig(
        r=args.lora_rank,
        target_modules=args.lora_targets,
        modules_to_save=model.exit_module_names(),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def measure(
    model: FamilialForCausalLM, data: PackedData, args: TuningArguments, batch_size: int
) -> ExitEvaluation:
    """Measure the quality of every exit on held-out text."""
    with console().status("measuring every exit on held-out text"):
        return evaluate_exits(
            model,
            data.eval,
            batch_size=batch_size,
            max_batches=args.eval_batches,
            bytes_per_token=data.eval_bytes_per_token,
        )


def show(before: ExitEvaluation, after: ExitEvaluation) -> None:
    """Show loss and agreement of every exit before and after the tuning."""
    table = Table(title="Held-out text, before and after tuning", title_justify="left")
    for name in ("exit", "depth", "loss", "after", "agreement", "after", "bits/byte", "after"):
        table.add_column(name, justify="right")
    for old, new in zip(before.rows, after.rows, strict=True):
        pairs = [("loss", ".3f"), ("agreement", ".1%"), ("bits_per_byte", ".3f")]
        cells = [format(getattr(row, key), style) for key, style in pairs for row in (old, new)]
        table.add_row(str(old.exit_idx), str(old.depth), *cells)
    console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and tune."""
    classes = [TuningArguments, TuningData, TuneTrainingArguments]
    with arguments(__doc__, classes, smoke=smoke, argv=argv) as (tuning, data_args, args, _):
        tune(tuning, data_args, args)


def tune(tuning: TuningArguments, data_args: TuningData, args: TuneTrainingArguments) -> None:
    """Measure, tune and measure again. Save the family, the table and a figure."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_familial").setLevel("INFO" if args.should_log else "WARNING")
    data_args.tokenizer_name = data_args.tokenizer_name or tuning.backbone
    # check all arguments before any text is read
    check_output_folder("--output_dir", args.output_dir)
    with loading("--backbone", tuning.backbone):
        text_config = AutoConfig.from_pretrained(tuning.backbone).get_text_config(decoder=True)
    exits = tuning.exits or default_exits(text_config.num_hidden_layers)
    choices = {"num_exit_layers": tuning.num_exit_layers, "exit_head": tuning.exit_head}
    FamilialConfig(text_config=text_config, exits=exits, **choices)
    args.schedule(exits, 1)
    data, tokenizer = prepare_data(data_args)
    set_seed(args.seed)
    model = FamilialForCausalLM.from_backbone(tuning.backbone, exits=exits, **choices)
    before = measure(model, data, tuning, args.eval_batch_size)
    trainer = FamilialTrainer(
        model=trainable(model, tuning),
        args=args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    training = trainer.train().metrics
    sequences = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    training["train_tokens"] = trainer.state.global_step * sequences * data_args.seq_length
    trainer.model.config.use_cache = True  # the Trainer of Transformers switched it off
    trainer.save_model()
    after = measure(model, data, tuning, args.eval_batch_size)
    if trainer.is_world_process_zero():
        folder = Path(args.output_dir)
        show(before, after)
        result = {"before": before.to_dict(), "after": after.to_dict(), "training": training}
        (folder / "exits.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        plot_exits(after, folder / "exits.png")
        console().print(f"Saved the family, exits.json and exits.png in {folder}", soft_wrap=True)
    trainer.end()


if __name__ == "__main__":
    run(main)

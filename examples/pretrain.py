"""Pretrain a family: one training run gives one model per exit.

    accelerate launch examples/pretrain.py
    accelerate launch examples/pretrain.py --train_files notes/ --num_exits 3
    python examples/pretrain.py --smoke

Without arguments the script trains a new Llama with four exits and some million parameters on the
source code of Python's standard library. Nothing is downloaded. Other models and texts:

    accelerate launch examples/pretrain.py --dataset_name roneneldan/TinyStories --streaming
    accelerate launch examples/pretrain.py --backbone Qwen/Qwen3-0.6B --exits 8 16 28 --bf16 \\
        --learning_rate 1e-4 --dataset_name roneneldan/TinyStories --streaming

Read the arguments from a file, or continue a stopped run:

    accelerate launch examples/pretrain.py pretrain.yaml --max_steps 500
    accelerate launch examples/pretrain.py --resume_from_checkpoint last

`accelerate launch --cpu` starts one process. Two processes on the CPU need `--multi_gpu`:

    accelerate launch --multi_gpu --num_processes 2 examples/pretrain.py --use_cpu

Output: a text from each exit, then a table like this one from `--smoke`:

                                without     FLOPs    eval               bits
    exit  depth  parameters  embeddings    /token    loss  perplexity  /byte
       0      1      18,400       8,800  4.07e+04  4.8926      133.29  5.669
       3      4      44,704      35,104  1.05e+05  4.9111      135.79  5.690

`--output_dir` then contains the checkpoint, the tokenizer, `members.json` (the table) and
`losses.png` (the loss of every exit over the training tokens).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.panel import Panel
from rich.text import Text
from transformers import AutoConfig, PreTrainedTokenizerBase, TrainingArguments, set_seed

from hf_familial import FamilialConfig, FamilialForCausalLM, evenly_spaced_exits
from hf_familial.isoflop.yaml_file import read_yaml
from hf_familial.models.familial.configuration_familial import check_model_type
from hf_familial.paths import check_output_folder
from hf_familial.scripts import arguments, console, loading, run
from hf_familial.training import (
    FamilialTrainer,
    PackedData,
    PretrainingArguments,
    PretrainingData,
    last_complete_checkpoint,
    member_rows,
    plot_losses,
    prepare_data,
    pretrain,
    print_members,
    save_members,
)


PROMPT_TOKENS, SAMPLE_TOKENS = 24, 48


@dataclass
class ModelArguments:
    """The backbone, pretrained or new, and its exits."""

    _argument_group_name: ClassVar = "the family"
    _help_arguments: ClassVar = dict.fromkeys(
        ("backbone", "model_type", "hidden_size", "num_hidden_layers", "exits", "num_exits")
        + ("num_exit_layers", "exit_head"),
        "",
    )

    backbone: str | None = field(
        default=None, metadata={"help": "Pretrained decoder or family to start from."}
    )
    model_type: str = field(
        default="llama", metadata={"help": "Architecture of a new backbone.", "metavar": "NAME"}
    )
    hidden_size: int = field(default=192, metadata={"help": "Width of a new backbone."})
    num_hidden_layers: int = field(default=8, metadata={"help": "Layers of a new backbone."})
    num_attention_heads: int = field(
        default=4, metadata={"help": "Attention heads of a new backbone."}
    )
    intermediate_size: int = field(
        default=512, metadata={"help": "Width of the MLPs of a new backbone."}
    )
    exits: list[int] | None = field(
        default=None, metadata={"help": "Depths of the exits, the last one all layers."}
    )
    num_exits: int = field(default=4, metadata={"help": "Evenly spaced exits, if no --exits."})
    num_exit_layers: int = field(default=0, metadata={"help": "Private layers per early exit."})
    exit_norm: str = field(
        default="own", metadata={"help": "Exit norms: own or shared.", "metavar": "NAME"}
    )
    exit_head: str = field(
        default="shared",
        metadata={"help": "Exit heads: shared or own.", "metavar": "NAME"},
    )

    def __post_init__(self) -> None:
        """Check the architecture and the exits of a new family before any text is read."""
        if self.backbone is None:
            self.family_config()

    def family_config(self, **fields: object) -> FamilialConfig:
        """Return the config of a new family. `fields` are added to the config of its backbone."""
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        fields |= {name: getattr(self, name) for name in sizes}
        fields["num_key_value_heads"] = self.num_attention_heads
        check_model_type(self.model_type)
        exits = self.exits or evenly_spaced_exits(self.num_hidden_layers, self.num_exits)
        text_config = AutoConfig.for_model(self.model_type, **fields)
        return FamilialConfig(text_config=text_config, **(self.exit_fields() | {"exits": exits}))

    def exit_fields(self) -> dict[str, Any]:
        """Return the fields of a family's config that describe its exits."""
        names = ("exits", "num_exit_layers", "exit_norm", "exit_head")
        return {name: getattr(self, name) for name in names}


@dataclass
class TextArguments(PretrainingData):
    """The data arguments."""

    _argument_group_name: ClassVar = "the text"
    _help_arguments: ClassVar = {
        "dataset_name": "Dataset on the Hub, or a folder.",
        "train_files": "Text, jsonl or parquet files, or folders.",
        "streaming": "Stream the text instead of loading it.",
        "tokenizer_name": "Pretrained tokenizer, else a new one.",
        "seq_length": "Tokens in a training sequence.",
    }


@dataclass
class TrainArguments(PretrainingArguments):
    """The training arguments."""

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


def smoke(folder: Path) -> dict[str, Any]:
    """Return arguments for a tiny family, a little text and a few steps."""
    places = {"output_dir": str(folder / "family"), "cache_dir": str(folder / "cache")}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    text = {"vocab_size": 300, "seq_length": 32, "max_train_bytes": 40_000, "max_eval_tokens": 2048}
    steps = {"max_steps": 8, "logging_steps": 2, "learning_rate": 0.01, "use_cpu": True}
    return places | sizes | text | steps


def command_line(given: list[str]) -> list[str]:
    """Return the arguments, with those of a YAML or JSON file that is the first word.

    Later arguments override those of the file.
    """
    if not given or not given[0].endswith((".yaml", ".yml", ".json")):
        return given
    fields = read_yaml(given[0], "file") or {}
    if not isinstance(fields, dict):
        raise ValueError(f"{given[0]} must be a mapping of arguments, such as `max_steps: 500`.")
    from_file = []
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        texts = [json.dumps(v) if isinstance(v, dict) else str(v) for v in values]
        from_file += [f"--{name}", *texts] if value is not None else []
    return from_file + given[1:]


def build_model(
    args: ModelArguments, tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> FamilialForCausalLM:
    """Build a new family, or load one, or create one from a pretrained decoder."""
    if args.backbone is not None:
        model = load_backbone(args)
    else:
        config = args.family_config(
            vocab_size=len(tokenizer),
            max_position_embeddings=max(1024, seq_length),
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = FamilialForCausalLM(config)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model has only {rows} embeddings. "
            "Use the tokenizer of the backbone."
        )
    return model


def load_backbone(args: ModelArguments) -> FamilialForCausalLM:
    """Load a family, or create one from a pretrained decoder."""
    config = AutoConfig.from_pretrained(args.backbone)
    # trained weights stay in float32; `--bf16` changes only the computation
    if config.model_type != FamilialConfig.model_type:
        num_exits = args.num_exits if args.exits is None else None
        return FamilialForCausalLM.from_backbone(
            args.backbone, num_exits=num_exits, dtype=torch.float32, **args.exit_fields()
        )
    if args.exits not in (None, config.exits):
        raise ValueError(
            f"`{args.backbone}` is a family with exits {config.exits}. Remove `--exits`."
        )
    return FamilialForCausalLM.from_pretrained(args.backbone, dtype=torch.float32)


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """Return the checkpoint to resume from. `last` is the newest complete one of the output."""
    checkpoint = args.resume_from_checkpoint
    if checkpoint in ("last", "true", "True"):
        folder = Path(args.output_dir)
        checkpoint = last_complete_checkpoint(folder)
        if checkpoint is None:
            raise ValueError(
                f"`--resume_from_checkpoint`: folder `{folder}` has no complete checkpoint."
            )
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise ValueError(f"`--resume_from_checkpoint`: folder `{checkpoint}` does not exist.")
    return checkpoint


def last_metrics(trainer: FamilialTrainer) -> dict[str, float]:
    """Return the evaluation of the last step. Evaluate now if there was none."""
    last = [row for row in trainer.state.log_history if "eval_exit_0_loss" in row][-1:]
    if last and last[0]["step"] == trainer.state.global_step:
        return last[0]
    return trainer.evaluate()


def show_results(trainer: FamilialTrainer, data: PackedData, seq_length: int) -> None:
    """Show samples, a table and a figure. Only the first process prints them."""
    metrics = last_metrics(trainer)
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    model.eval()
    # every process generates, because each may have only a shard of the weights
    samples = [
        sample(model, trainer.processing_class, data, k) for k in range(len(model.config.exits))
    ]
    if not trainer.is_world_process_zero():
        return
    folder = Path(args.output_dir)
    out = console()
    for k, depth in enumerate(model.config.exits):
        text = Text(samples[k])
        out.print(Panel(text, title=f"exit {k} (depth {depth})", title_align="left"))
    rows = member_rows(model, metrics, seq_length, data.eval_bytes_per_token)
    print_members(rows, out)
    save_members(rows, folder / "members.json")
    tokens = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * seq_length
    plot_losses(trainer.state.log_history, model.config.exits, tokens, folder / "losses.png")
    out.print(f"Saved the checkpoint, members.json and losses.png in {folder}", soft_wrap=True)


def sample(
    model: FamilialForCausalLM, tokenizer: PreTrainedTokenizerBase, data: PackedData, exit_idx: int
) -> str:
    """Return what one exit writes after the first tokens of the evaluation text."""
    prompt = torch.tensor([data.eval[0]["input_ids"][:PROMPT_TOKENS]], device=model.device)
    set_seed(0)
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        exit_idx=exit_idx,
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=True,
        top_p=0.9,
        temperature=0.8,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, train, and show the results."""
    words = command_line(sys.argv[1:] if argv is None else list(argv))
    classes = [ModelArguments, TextArguments, TrainArguments]
    with arguments(__doc__, classes, smoke=smoke, argv=words) as (model_args, text, args, _):
        train(model_args, text, args)


def train(model_args: ModelArguments, text: TextArguments, args: TrainArguments) -> None:
    """Prepare the text, train, and show the results."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_familial").setLevel("INFO" if args.should_log else "WARNING")
    # check all arguments before any text is read
    checkpoint = checkpoint_to_resume(args)
    check_output_folder("--output_dir", args.output_dir)
    if model_args.backbone is None:
        args.schedule(model_args.family_config().exits, 1)
    if model_args.backbone is not None:
        with loading("--backbone", model_args.backbone):
            AutoConfig.from_pretrained(model_args.backbone)
        text.tokenizer_name = text.tokenizer_name or model_args.backbone
    data, tokenizer = prepare_data(text)
    trainer = pretrain(
        lambda: build_model(model_args, tokenizer, text.seq_length),
        args,
        data,
        tokenizer,
        checkpoint=checkpoint,
    )
    trainer.model.config.use_cache = True  # the Trainer of Transformers switched it off
    trainer.save_model()
    show_results(trainer, data, text.seq_length)
    trainer.end()


if __name__ == "__main__":
    run(main)

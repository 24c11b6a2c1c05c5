"""Pretrain a family: one run, one model per exit.

With no arguments: a Llama of a few million parameters with four exits, on the source code of the
running Python's own standard library, with a tokenizer trained on it. Nothing is downloaded.

    accelerate launch examples/pretrain.py
    accelerate launch examples/pretrain.py --dataset_name roneneldan/TinyStories --streaming
    accelerate launch examples/pretrain.py --train_files notes/ --num_exits 3 --max_steps 500
    accelerate launch examples/pretrain.py --backbone Qwen/Qwen3-0.6B --exits 8 16 28 --bf16 \\
        --learning_rate 1e-4 --dataset_name roneneldan/TinyStories --streaming
    accelerate launch examples/pretrain.py pretrain.yaml --max_steps 500
    accelerate launch examples/pretrain.py --resume_from_checkpoint last
    python examples/pretrain.py --smoke

Two processes on the CPU, which `accelerate launch --cpu` alone would not start:

    accelerate launch --multi_gpu --num_processes 2 examples/pretrain.py --use_cpu

It leaves in `--output_dir` the checkpoint, the tokenizer, `members.json` (the table it prints) and
`losses.png` (the loss of every exit over the tokens seen).
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
from transformers.trainer_utils import get_last_checkpoint

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
    """The family: a pretrained backbone, or the sizes of a new one, and its exits."""

    _argument_group_name: ClassVar = "the family"

    backbone: str | None = field(
        default=None,
        metadata={"help": "Pretrained decoder or family to go on from; by default a new one."},
    )
    model_type: str = field(
        default="llama", metadata={"help": "Architecture of a new backbone, any of transformers."}
    )
    hidden_size: int = field(default=192, metadata={"help": "Width of a new backbone."})
    num_hidden_layers: int = field(default=8, metadata={"help": "Depth of a new backbone."})
    num_attention_heads: int = field(default=4, metadata={"help": "Heads of a new backbone."})
    intermediate_size: int = field(default=512, metadata={"help": "MLP width of a new backbone."})
    exits: list[int] | None = field(
        default=None, metadata={"help": "Depth of every exit, the last one the full depth."}
    )
    num_exits: int = field(
        default=4, metadata={"help": "Without --exits: this many, evenly spaced."}
    )
    num_exit_layers: int = field(
        default=0, metadata={"help": "Private decoder layers of each early exit."}
    )
    exit_norm: str = field(default="own", metadata={"help": "own or shared"})
    exit_head: str = field(default="shared", metadata={"help": "shared or own"})

    def __post_init__(self) -> None:
        """Refuse a wrong architecture or wrong exits, before any text is read."""
        if self.backbone is None:
            self.family_config()

    def family_config(self, **fields: object) -> FamilialConfig:
        """The config of a new family; `fields` are further ones of its backbone."""
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        fields |= {name: getattr(self, name) for name in sizes}
        fields["num_key_value_heads"] = self.num_attention_heads
        check_model_type(self.model_type)
        exits = self.exits or evenly_spaced_exits(self.num_hidden_layers, self.num_exits)
        text_config = AutoConfig.for_model(self.model_type, **fields)
        return FamilialConfig(text_config=text_config, **(self.exit_fields() | {"exits": exits}))

    def exit_fields(self) -> dict[str, Any]:
        """What a family is told of its exits."""
        names = ("exits", "num_exit_layers", "exit_norm", "exit_head")
        return {name: getattr(self, name) for name in names}


@dataclass
class TextArguments(PretrainingData):
    """The data arguments, in a group of their own."""

    _argument_group_name: ClassVar = "the text"


def smoke(folder: Path) -> dict[str, Any]:
    """A tiny family, a little text and a few steps."""
    places = {"output_dir": str(folder / "family"), "cache_dir": str(folder / "cache")}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    text = {"vocab_size": 300, "seq_length": 32, "max_train_bytes": 40_000, "max_eval_tokens": 2048}
    steps = {"max_steps": 8, "logging_steps": 2, "learning_rate": 0.01, "use_cpu": True}
    return places | sizes | text | steps


def command_line(given: list[str]) -> list[str]:
    """The arguments given; a YAML or JSON file may stand before them, and they win over it."""
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
    """A new family, a pretrained family, or a family around a pretrained decoder."""
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
            f"the vocabulary does not match: the tokenizer has {len(tokenizer)} tokens, the "
            f"embedding of the model only {rows}; use the backbone's own tokenizer."
        )
    return model


def load_backbone(args: ModelArguments) -> FamilialForCausalLM:
    """Go on from a family as it is, or make one of a decoder."""
    config = AutoConfig.from_pretrained(args.backbone)
    # weights to be trained are kept in full precision; --bf16 computes in half
    if config.model_type != FamilialConfig.model_type:
        num_exits = args.num_exits if args.exits is None else None
        return FamilialForCausalLM.from_backbone(
            args.backbone, num_exits=num_exits, dtype=torch.float32, **args.exit_fields()
        )
    if args.exits not in (None, config.exits):
        raise ValueError(
            f"`{args.backbone}` is a family with exits {config.exits}; leave out --exits."
        )
    return FamilialForCausalLM.from_pretrained(args.backbone, dtype=torch.float32)


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint asked for; `last` means the newest one in the output folder."""
    wanted = args.resume_from_checkpoint
    if wanted in ("last", "true", "True"):
        folder = Path(args.output_dir)
        wanted = get_last_checkpoint(args.output_dir) if folder.is_dir() else None
        if wanted is None:
            raise ValueError(f"nothing to resume: `{folder}` holds no checkpoint.")
    if wanted is not None and not Path(wanted).is_dir():
        raise ValueError(f"nothing to resume: there is no folder `{wanted}`.")
    return wanted


def last_metrics(trainer: FamilialTrainer) -> dict[str, float]:
    """The evaluation of the last step, made now if there was none."""
    last = [row for row in trainer.state.log_history if "eval_exit_0_loss" in row][-1:]
    if last and last[0]["step"] == trainer.state.global_step:
        return last[0]
    return trainer.evaluate()


def show_results(trainer: FamilialTrainer, data: PackedData, seq_length: int) -> None:
    """Samples, table and picture; the first process shows them."""
    metrics = last_metrics(trainer)
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    model.eval()
    # in every process: where the weights are sharded, all take part in generating
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
    out.print(f"Checkpoint, members.json and losses.png are in {folder}", soft_wrap=True)


def sample(
    model: FamilialForCausalLM, tokenizer: PreTrainedTokenizerBase, data: PackedData, exit_idx: int
) -> str:
    """What one exit writes after the first tokens of the evaluation text."""
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
    """Parse, train, report."""
    words = command_line(sys.argv[1:] if argv is None else list(argv))
    classes = [ModelArguments, TextArguments, PretrainingArguments]
    with arguments(__doc__, classes, smoke=smoke, argv=words) as (model_args, text, args, _):
        train(model_args, text, args)


def train(model_args: ModelArguments, text: TextArguments, args: PretrainingArguments) -> None:
    """Prepare the text, train, and show what came of it."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_familial").setLevel("INFO" if args.should_log else "WARNING")
    # all that can be wrong with what was given, before any text is read
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
    trainer.model.config.use_cache = True  # the host switches it off for training
    trainer.save_model()
    show_results(trainer, data, text.seq_length)
    trainer.end()


if __name__ == "__main__":
    run(main)

"""Memory and time of `multi_exit`, which trains every exit with the loss of a trainer of trl.

    python benchmarks/multi_exit.py            # about 5 minutes on one core; needs `trl`
    python benchmarks/multi_exit.py --quick    # under 50 seconds
    python benchmarks/multi_exit.py --save     # also saves the result in benchmarks/results/

Each variant runs training steps of one Llama (8 layers, 4 exits) in a process of its own. `one` is
`SFTTrainer` on the deepest exit, `all` and `sample` are `multi_exit(SFTTrainer)`, `passes` runs one
plain step for each exit, and `familial` is `FamilialTrainer`. Memory is the peak above that before
the first step. Times are medians of processor time. The limit of `all` over `one` is the ratio of
their FLOPs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from typing import Any

import torch
from common import child, finish, peak_mebibytes
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import LlamaConfig, PreTrainedTokenizerFast, TrainingArguments, logging

import hf_familial as hff
from hf_familial.flops import training_flops_per_token


EXITS, LAYERS = [2, 4, 6, 8], 8
SIZES = {False: (4, 256, 32_768, 4), True: (2, 64, 8_192, 2)}  # rows, length, vocabulary, steps
VARIANTS = ("one", "all", "sample", "passes", "familial")


def family(exits: list[int], vocab_size: int) -> Any:
    """Return a family whose head costs as much as its layers."""
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": LAYERS}
    text_config = LlamaConfig(vocab_size=vocab_size, num_attention_heads=4, **sizes, **special)
    return hff.FamilialForCausalLM(hff.FamilialConfig(text_config=text_config, exits=exits))


def build_trainer(variant: str, quick: bool, folder: str) -> Any:
    """Return the trainer of a variant."""
    rows, length, vocab_size, _ = SIZES[quick]
    model = family([LAYERS] if variant == "one" else EXITS, vocab_size)
    ids = torch.randint(8, vocab_size, (rows, length)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    common = {"per_device_train_batch_size": rows, "report_to": "none", "use_cpu": True}
    if variant == "familial":
        return hff.FamilialTrainer(model, TrainingArguments(folder, **common), train_dataset=data)
    from trl import SFTConfig, SFTTrainer

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    bpe = Tokenizer(BPE(vocab=words, merges=[], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    plain = variant in ("one", "passes")
    kind = "sample" if variant == "sample" else "all"
    return (SFTTrainer if plain else hff.multi_exit(SFTTrainer, exits=kind))(
        model=model,
        args=SFTConfig(folder, max_length=length, gradient_checkpointing=False, **common),
        train_dataset=data,
        processing_class=tokenizer,
    )


def measure(variant: str, quick: bool) -> dict[str, float]:
    """Run training steps of one variant. Return its peak memory and the seconds of a step."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(variant, quick, folder)
        trainer.current_gradient_accumulation_steps = 1
        batch = next(iter(trainer.get_train_dataloader()))
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = peak_mebibytes(reset=True)
        seconds = []
        for step in range(SIZES[quick][3] + 1):
            trainer.state.global_step = step
            begun = time.process_time()
            for k in range(len(EXITS)) if variant == "passes" else [-1]:
                trainer.model.config.default_exit = k
                trainer.training_step(trainer.model, dict(batch))
            seconds.append(time.process_time() - begun)
        return {
            "mib": peak_mebibytes() - before,
            "seconds": statistics.median(seconds[1:]),
        }


def main() -> int:
    """Measure all variants, print the numbers, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Use a smaller model.")
    parser.add_argument("--save", action="store_true", help="Save in benchmarks/results/.")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    quick = ["--quick"] if args.quick else []
    if args.variant:
        print(json.dumps(measure(args.variant, args.quick)))
        return 0
    found = {name: child("--variant", name, *quick) for name in VARIANTS}
    metrics = {f"{key}_{name}": value for name, row in found.items() for key, value in row.items()}
    for name in VARIANTS[1:]:
        for key in ("mib", "seconds"):
            metrics[f"{key}_{name}_over_one"] = found[name][key] / found["one"][key]
    metrics["seconds_all_over_passes"] = found["all"]["seconds"] / found["passes"]["seconds"]
    _, length, vocab_size, _ = SIZES[args.quick]
    models = (family(exits, vocab_size) for exits in (EXITS, [LAYERS]))
    costs = [training_flops_per_token(model, length).per_token for model in models]
    metrics["flops_all_over_one"] = costs[0] / costs[1]
    for key, value in metrics.items():
        print(f"{key:30s} {value:10.3f}")
    targets = {"mib_all_over_one": ("<=", 1.15), "seconds_all_over_passes": ("<=", 1.0)}
    return finish("multi_exit", metrics, targets, args.save)


if __name__ == "__main__":
    sys.exit(main())

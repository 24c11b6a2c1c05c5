"""The first text of a model by relay, compared with `generate` of Transformers.

    python benchmarks/first_text.py            # some minutes; trains the relay's family first
    python benchmarks/first_text.py --quick    # under 50 seconds: no trained family, shorter texts
    python benchmarks/first_text.py --save     # also saves the result in benchmarks/results/
    python benchmarks/first_text.py --model FOLDER [FOLDER ...]    # pretrained decoders too

Greedy, batch 1, one thread, processor time. A fresh copy of a family writes a text of n tokens with
the default `relay_generate` (`first`), then another one (`later`). `generate` writes the same two
texts. The families are the trained one of benchmarks/relay.py and untrained ones, tiny or with the
shape of the given decoders, with exits after one and two thirds of the layers. Results are times
divided by the time of `generate`, medians over the prompts. 1 is as fast, the goal is at most 1.05.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import clock, finish
from relay_family import relay_family
from transformers import AutoModelForCausalLM

from hf_familial import FamilialConfig, FamilialForCausalLM


ZOO = ("llama", "qwen3", "gemma2", "mistral", "qwen3_moe")
SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4,
    "moe_intermediate_size": 64, "num_experts_per_tok": 2, "max_position_embeddings": 512,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
PROMPT, GOAL = 24, 1.05


def families(models: list[str], quick: bool) -> Iterator[tuple[str, FamilialForCausalLM]]:
    """Return families by name. None has written a text yet."""
    for model_type in ZOO:
        config = FamilialConfig(text_config={"model_type": model_type, **SIZES}, exits=[2, 4, 6])
        yield model_type, FamilialForCausalLM(config)
    for folder in models:
        host = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        depth = host.config.num_hidden_layers
        exits = [depth // 3, 2 * depth // 3, depth]
        yield Path(folder).name, FamilialForCausalLM.from_backbone(host, exits=exits)
    if not quick:
        yield "trained", FamilialForCausalLM.from_pretrained(relay_family(), dtype=torch.float32)


def fresh(family: FamilialForCausalLM) -> FamilialForCausalLM:
    """Return a new model with the same weights and no state of earlier texts."""
    memo = {id(p): p for p in (*family.parameters(), *family.buffers())}
    return copy.deepcopy(family, memo)


def ratios(family: FamilialForCausalLM, new: int, prompts: int) -> dict[str, float]:
    """Return the relative times of the first and the next text, and count different texts."""
    seconds = clock()
    asked: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "use_cache": True}
    found: dict[str, list[float]] = {"first": [], "later": []}
    differing = 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(prompts):
        model = fresh(family)
        for name in found:
            ids = torch.randint(5, family.config.vocab_size, (1, PROMPT), generator=generator)
            mask = torch.ones_like(ids)
            start = seconds()
            text = model.relay_generate(ids, attention_mask=mask, **asked)
            middle = seconds()
            plain = model.generate(ids, attention_mask=mask, **asked)
            found[name].append((middle - start) / (seconds() - middle))
            differing += not torch.equal(text, plain)
    return {k: statistics.median(v) for k, v in found.items()} | {"differing": differing}


@torch.no_grad()
def main() -> int:
    """Measure, print the numbers, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="No trained family, shorter texts.")
    parser.add_argument("--save", action="store_true", help="Save in benchmarks/results/.")
    parser.add_argument("--model", nargs="*", default=[], help="Folders of ordinary decoders.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    metrics: dict[str, float] = {}
    for name, family in families(args.model, args.quick):
        family.eval().generation_config.eos_token_id = None  # all texts get the same length
        ratios(family, 8, 1)  # warm-up
        for new in (32,) if args.quick else (32, 64, 128, 256):
            for key, value in ratios(family, new, 3 if args.quick else 5).items():
                metrics[f"{name}_{key}_{new}"] = value
            line = {k: metrics[f"{name}_{k}_{new}"] for k in ("first", "later", "differing")}
            print(f"{name:12s} {new:4d} tokens", line, flush=True)
    targets: dict[str, tuple[str, float]] = {
        key: ("<=", 0 if "_differing_" in key else GOAL) for key in metrics
    }
    return finish("first_text", metrics, targets, args.save and not args.quick)


if __name__ == "__main__":
    sys.exit(main())

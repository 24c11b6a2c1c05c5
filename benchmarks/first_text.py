"""The first text of a model by relay, against the host's `generate`: what it costs to begin.

    python benchmarks/first_text.py            # some minutes; trains the relay's family first
    python benchmarks/first_text.py --quick    # under 50 seconds: no trained family, shorter texts
    python benchmarks/first_text.py --save     # also keeps the result in benchmarks/results/
    python benchmarks/first_text.py --model FOLDER [FOLDER ...]    # pretrained decoders too

Greedy, batch 1, one thread, processor time. A fresh copy of the family writes a text of n tokens by
`relay_generate` as it comes (`first`), then another (`later`); `generate` writes both beside them.
Families: the trained one of benchmarks/relay.py, and untrained ones, tiny and
of the decoders given, with exits after a third and two thirds of the layers. The figures are times
over `generate`'s, medians over the prompts: 1 is as fast as `generate`, the goal is 1.05 at most.
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
    """Families by name, none of which has written a text."""
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
    """The same weights in a model that knows nothing of earlier texts."""
    memo = {id(p): p for p in (*family.parameters(), *family.buffers())}
    return copy.deepcopy(family, memo)


def ratios(family: FamilialForCausalLM, new: int, prompts: int) -> dict[str, float]:
    """Times of the first and of the next text over `generate`'s, and texts that differ."""
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
    """Measure, print, end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no trained family, shorter texts")
    parser.add_argument("--save", action="store_true", help="keep the result")
    parser.add_argument("--model", nargs="*", default=[], help="folders of plain decoders")
    args = parser.parse_args()
    torch.set_num_threads(1)
    metrics: dict[str, float] = {}
    for name, family in families(args.model, args.quick):
        family.eval().generation_config.eos_token_id = None  # all texts of one length
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

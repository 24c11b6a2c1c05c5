"""A relay compared with `generate` of Transformers and its `assistant_early_exit`.

    python benchmarks/relay.py            # some minutes, more if the family must be trained first
    python benchmarks/relay.py --quick    # under 50 seconds, a smaller family
    python benchmarks/relay.py --save     # also saves the result in benchmarks/results/

One family (relay_family.py), greedy, batch 1, one thread. The prompts are the beginnings of source
files that the family was not trained on. For every prompt these run in turn, in one process:

- generate: the deepest member as an ordinary model of Transformers;
- assistant: the same with `assistant_early_exit`, with its best exit, number of drafts and
  confidence, found on other prompts;
- plain: the decoding of this package without drafts, `FixedExit(-1)`;
- relay: the default `SpeculativeRelay()`. `scanned` has its best settings, found on other prompts.

`of_limit` is the speed of the relay relative to `plain`, without the pass over the prompt, as a
share of a limit. The limit assumes that a verification takes the time of one token. For rounds with
t tokens and k drafts it is t / ((k + 1) a / L + (L - a) / L). The draft exit is at depth a of L
layers.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from common import clock, finish, interleaved, paired_ratio
from relay_family import relay_family
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_familial import FamilialForCausalLM, FixedExit, SpeculativeRelay
from hf_familial.training import DataArguments
from hf_familial.training.data.corpus import load_corpus


PROMPT = 96
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Texts = dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class Assistant:
    """A setting of `assistant_early_exit`: depth, drafts per round, lowest confidence."""

    depth: int
    drafts: int
    confidence: float


def prompts(folder: Any, count: int) -> list[torch.Tensor]:
    """Return the beginnings of held-out files, each of shape `(1, PROMPT)`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for row in load_corpus(DataArguments(eval_fraction=0.05)).eval:
        ids = tokenizer(row["text"][: 20 * PROMPT], return_tensors="pt").input_ids
        if ids.shape[1] >= PROMPT:
            found.append(ids[:, :PROMPT].to(DEVICE))
        if len(found) == count:
            return found
    raise ValueError(f"The corpus has only {len(found)} files with {PROMPT} tokens, not {count}.")


def plain_host(family: FamilialForCausalLM) -> Any:
    """Return the deepest member as an ordinary model that shares the family's weights."""
    host = AutoModelForCausalLM.from_config(copy.deepcopy(family.config.text_config))
    host.model.load_state_dict(family.model.backbone.state_dict(), assign=True)
    host.lm_head.weight = family.lm_head.weight
    return host.to(family.device).eval()


class Runs:
    """The compared ways to write `new` tokens after prompts, and the texts they wrote."""

    def __init__(self, family: FamilialForCausalLM, ids: list[torch.Tensor], new: int) -> None:
        self.family, self.host, self.ids, self.new = family, plain_host(family), ids, new
        self.texts: Texts = {}
        self.stats: dict[str, list[Any]] = {}
        for model in (self.family, self.host):
            model.generation_config.eos_token_id = None  # all texts get the same length

    def turns(self, name: str) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        """Return the arguments of `generate` for the next prompt."""
        self.texts[name], self.stats[name] = [], []
        for ids in itertools.cycle(self.ids):
            mask = torch.ones_like(ids)
            yield ids, {"attention_mask": mask, "do_sample": False, "use_cache": True}

    def generate(self, name: str, setting: Assistant | None = None) -> Callable[[], None]:
        """Return a function that generates with Transformers, with or without its early exit."""
        turns = self.turns(name)

        def run() -> None:
            ids, arguments = next(turns)
            if setting is not None:
                # Transformers changes these settings, so reset them for every text
                config = self.host.generation_config
                config.num_assistant_tokens = setting.drafts
                config.num_assistant_tokens_schedule = "constant"
                config.assistant_confidence_threshold = setting.confidence
                arguments["assistant_early_exit"] = setting.depth
            self.texts[name] += self.host.generate(ids, max_new_tokens=self.new, **arguments)

        return run

    def relay(self, name: str, relay: Any, new: int | None = None) -> Callable[[], None]:
        """Return a function that generates by relay."""
        turns = self.turns(name)

        def run() -> None:
            ids, arguments = next(turns)
            out = self.family.relay_generate(
                ids,
                relay=relay,
                max_new_tokens=new or self.new,
                return_dict_in_generate=True,
                **arguments,
            )
            self.texts[name] += out.sequences
            self.stats[name].append(out.relay_stats)

        return run

    def differing(self, first: str, second: str) -> int:
        """Return the number of prompts after which two ways wrote different texts."""
        pairs = zip(self.texts[first], self.texts[second], strict=True)
        return sum(not torch.equal(a, b) for a, b in pairs)


def best_of(variants: Mapping[Any, Callable[[], None]], repeats: int) -> tuple[Any, dict]:
    """Return the fastest setting, and the seconds of each."""
    seconds = interleaved(variants, repeats, clock())
    medians = {setting: statistics.median(values) for setting, values in seconds.items()}
    return min(medians, key=medians.__getitem__), medians


def assistants(family: FamilialForCausalLM, quick: bool) -> list[Assistant]:
    """Return the settings of `assistant_early_exit` to try, its defaults included."""
    drafts, confidences = ((3, 20), (0.4,)) if quick else ((2, 3, 5, 8, 20), (0.0, 0.4))
    depths = family.config.exits[:-1]
    return list(itertools.starmap(Assistant, itertools.product(depths, drafts, confidences)))


def relays(family: FamilialForCausalLM, quick: bool) -> list[SpeculativeRelay]:
    """Return the settings of `SpeculativeRelay` to try."""
    lengths: tuple[int | str, ...] = ("auto", 3) if quick else ("auto", 2, 3, 4, 6)
    exits = range(family.config.num_exits - 1)
    return [SpeculativeRelay(k, length) for k, length in itertools.product(exits, lengths)]


def scan(runs: Runs, quick: bool) -> tuple[Assistant, SpeculativeRelay]:
    """Return the best setting of `assistant_early_exit` and of `SpeculativeRelay`."""
    repeats = 1 if quick else 2
    ways = {
        setting: runs.generate(str(setting), setting) for setting in assistants(runs.family, quick)
    }
    assistant, seconds = best_of(ways, repeats)
    for setting, value in sorted(seconds.items(), key=lambda item: item[1]):
        print(f"{setting!s:50s} {1e3 * value / runs.new:8.2f} ms per token")
    ours = {setting: runs.relay(str(setting), setting) for setting in relays(runs.family, quick)}
    relay, seconds = best_of(ours, repeats)
    for setting, value in sorted(seconds.items(), key=lambda item: item[1]):
        print(f"{setting!s:50s} {1e3 * value / runs.new:8.2f} ms per token")
    return assistant, relay


def compare(runs: Runs, assistant: Assistant, relay: SpeculativeRelay, suffix: str) -> dict:
    """Run all ways in turn over all prompts. Return ratios, counts and different texts."""
    seconds = interleaved(
        {
            "generate": runs.generate("generate"),
            "assistant": runs.generate("assistant", assistant),
            "plain": runs.relay("plain", FixedExit(-1)),
            "relay": runs.relay("relay", SpeculativeRelay()),
            "scanned": runs.relay("scanned", relay),
            "prompt": runs.relay("prompt", FixedExit(-1), new=1),
        },
        len(runs.ids) - 1,
        clock(),
    )
    metrics = {
        f"{name}_ms_per_token{suffix}": 1e3 * statistics.median(values) / runs.new
        for name, values in seconds.items()
        if name != "prompt"
    }
    for first, second in (
        ("assistant", "relay"),
        ("assistant", "scanned"),
        ("generate", "relay"),
        ("generate", "scanned"),
        ("generate", "plain"),
        ("generate", "assistant"),
        ("plain", "relay"),
        ("plain", "scanned"),
    ):
        key = f"{second}_speedup_over_{first}{suffix}"
        metrics[key] = paired_ratio(seconds[first], seconds[second])
    for name in ("relay", "scanned"):
        metrics |= {
            f"{name}_{key}{suffix}": value for key, value in of_limit(runs, seconds, name).items()
        }
    for name in ("assistant", "plain", "relay", "scanned"):
        metrics[f"{name}_texts_that_differ{suffix}"] = runs.differing("generate", name)
    metrics[f"texts{suffix}"] = len(runs.ids)
    return metrics


def of_limit(runs: Runs, seconds: dict[str, list[float]], name: str) -> dict[str, float]:
    """Return counts of a relay's rounds, and its speed as a share of the limit."""
    stats = runs.stats[name][1:]  # without the first text, a warm-up
    total = {key: sum(getattr(s, key) for s in stats) for key in ("rounds", "drafted", "accepted")}
    tokens, drafts = runs.new * len(stats) / total["rounds"], total["drafted"] / total["rounds"]
    share = runs.family.config.exits[stats[0].exits[0]] / runs.family.config.num_hidden_layers
    limit = tokens / ((drafts + 1) * share + 1 - share)
    plain, relay = (
        [a - b for a, b in zip(seconds[way], seconds["prompt"], strict=True)]
        for way in ("plain", name)
    )
    return {
        "acceptance": total["accepted"] / max(1, total["drafted"]),
        "tokens_per_round": tokens,
        "drafts_per_round": drafts,
        "limit": limit,
        "of_limit": paired_ratio(plain, relay) / limit,
    }


TARGETS = {
    "relay_speedup_over_assistant": (">=", 1.5),
    "relay_speedup_over_generate": (">=", 1.3),
    "relay_of_limit": (">=", 0.85),
    "plain_speedup_over_generate": (">=", 1.25),
    "relay_texts_that_differ": ("<=", 0),
    "plain_texts_that_differ": ("<=", 0),
}


@torch.no_grad()
def main() -> int:
    """Measure, print the numbers, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Smaller family, fewer prompts.")
    parser.add_argument("--save", action="store_true", help="Save in benchmarks/results/.")
    parser.add_argument("--prompts", type=int, default=None)
    parser.add_argument("--family", default=None, help="Folder of another family.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.family or relay_family(args.quick)
    began, new = time.perf_counter(), 32 if args.quick else 64
    family = FamilialForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(DEVICE)
    scanned = 2 if args.quick else 3
    ids = prompts(folder, scanned + (args.prompts or (5 if args.quick else 21)))
    assistant, relay = scan(Runs(family, ids[:scanned], new), args.quick)
    print(f"best settings: {assistant}, {relay}")
    metrics = compare(Runs(family, ids[scanned:], new), assistant, relay, "")
    half = copy.deepcopy(family).to(torch.bfloat16)
    metrics |= compare(Runs(half, ids[scanned:], new), assistant, relay, "_bf16")
    metrics["fused_mib"] = family.accelerator.fused.nbytes / 2**20
    metrics["seconds"] = time.perf_counter() - began
    for key, value in metrics.items():
        print(f"{key:45s} {value:10.3f}")
    # the limit does not apply to the smaller family, whose time is not mostly arithmetic
    targets = {key: goal for key, goal in TARGETS.items() if not (args.quick and "limit" in key)}
    return finish("relay", metrics, targets, args.save and not args.quick)


if __name__ == "__main__":
    sys.exit(main())

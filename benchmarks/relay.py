"""A relay against the host's `generate` and against its `assistant_early_exit`.

    python benchmarks/relay.py            # some minutes; trains the family first, if there is none
    python benchmarks/relay.py --quick    # under 50 seconds, a smaller family
    python benchmarks/relay.py --save     # also keeps the result in benchmarks/results/

One family (relay_family.py), greedy, batch 1, one thread; prompts are the beginnings of source
files that it was not trained on. For every prompt in turn, in one process:

- generate: the deepest member as a plain model of the host's class;
- assistant: the same with `assistant_early_exit`, at the best of its settings (exit, number of
  drafts, confidence), found on other prompts;
- plain: this package's engine without drafts, `FixedExit(-1)`;
- relay: `SpeculativeRelay()` as it comes; `scanned` at the best of its settings, found likewise.

`of_limit` is the speed of the relay over `plain`, without the prompt's pass, as a share of what a
round of t tokens and k drafts allows where a checking pass costs what one token's does:
t / ((k + 1) a / L + (L - a) / L), with the draft exit at depth a of L.
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
    """A setting of the host's early exit: depth, drafts per round, confidence that ends a draft."""

    depth: int
    drafts: int
    confidence: float


def prompts(folder: Any, count: int) -> list[torch.Tensor]:
    """Beginnings of held-out files, each `(1, PROMPT)`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for row in load_corpus(DataArguments(eval_fraction=0.05)).eval:
        ids = tokenizer(row["text"][: 20 * PROMPT], return_tensors="pt").input_ids
        if ids.shape[1] >= PROMPT:
            found.append(ids[:, :PROMPT].to(DEVICE))
        if len(found) == count:
            return found
    raise ValueError(f"the corpus holds only {len(found)} files of {PROMPT} tokens, not {count}")


def plain_host(family: FamilialForCausalLM) -> Any:
    """The deepest member as the host's own model, on the family's weights."""
    host = AutoModelForCausalLM.from_config(copy.deepcopy(family.config.text_config))
    host.model.load_state_dict(family.model.backbone.state_dict(), assign=True)
    host.lm_head.weight = family.lm_head.weight
    return host.to(family.device).eval()


class Runs:
    """Ways to write `new` tokens after prompts that take turns; they keep what they wrote."""

    def __init__(self, family: FamilialForCausalLM, ids: list[torch.Tensor], new: int) -> None:
        self.family, self.host, self.ids, self.new = family, plain_host(family), ids, new
        self.texts: Texts = {}
        self.stats: dict[str, list[Any]] = {}
        for model in (self.family, self.host):
            model.generation_config.eos_token_id = None  # all texts of one length

    def turns(self, name: str) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        """The next prompt, and what every way of generating is given."""
        self.texts[name], self.stats[name] = [], []
        for ids in itertools.cycle(self.ids):
            mask = torch.ones_like(ids)
            yield ids, {"attention_mask": mask, "do_sample": False, "use_cache": True}

    def generate(self, name: str, setting: Assistant | None = None) -> Callable[[], None]:
        """The host, plain or with its early exit."""
        turns = self.turns(name)

        def run() -> None:
            ids, arguments = next(turns)
            if setting is not None:
                # the host changes them as it goes; every text starts from the same
                config = self.host.generation_config
                config.num_assistant_tokens = setting.drafts
                config.num_assistant_tokens_schedule = "constant"
                config.assistant_confidence_threshold = setting.confidence
                arguments["assistant_early_exit"] = setting.depth
            self.texts[name] += self.host.generate(ids, max_new_tokens=self.new, **arguments)

        return run

    def relay(self, name: str, relay: Any, new: int | None = None) -> Callable[[], None]:
        """The family, by relay."""
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
        """Number of prompts after which two of them wrote different texts."""
        pairs = zip(self.texts[first], self.texts[second], strict=True)
        return sum(not torch.equal(a, b) for a, b in pairs)


def best_of(variants: Mapping[Any, Callable[[], None]], repeats: int) -> tuple[Any, dict]:
    """The fastest setting, and the seconds of each."""
    seconds = interleaved(variants, repeats, clock())
    medians = {setting: statistics.median(values) for setting, values in seconds.items()}
    return min(medians, key=medians.__getitem__), medians


def assistants(family: FamilialForCausalLM, quick: bool) -> list[Assistant]:
    """The settings of the host's early exit to choose from; its own defaults are among them."""
    drafts, confidences = ((3, 20), (0.4,)) if quick else ((2, 3, 5, 8, 20), (0.0, 0.4))
    depths = family.config.exits[:-1]
    return list(itertools.starmap(Assistant, itertools.product(depths, drafts, confidences)))


def relays(family: FamilialForCausalLM, quick: bool) -> list[SpeculativeRelay]:
    """The settings of our own to choose from."""
    lengths: tuple[int | str, ...] = ("auto", 3) if quick else ("auto", 2, 3, 4, 6)
    exits = range(family.config.num_exits - 1)
    return [SpeculativeRelay(k, length) for k, length in itertools.product(exits, lengths)]


def scan(runs: Runs, quick: bool) -> tuple[Assistant, SpeculativeRelay]:
    """The best setting of the host's early exit and of ours."""
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
    """All ways in turn over all prompts: ratios, counts, texts that differ."""
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
    """Rounds of a relay, and its speed over plain decoding as a share of what they allow."""
    stats = runs.stats[name][1:]  # the first text was a warm-up
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
    """Measure, print, end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller family, fewer prompts")
    parser.add_argument("--save", action="store_true", help="keep the result")
    parser.add_argument("--prompts", type=int, default=None)
    parser.add_argument("--family", default=None, help="folder of another family")
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
    # the smaller family is too narrow for its arithmetic to be what a round costs
    targets = {key: goal for key, goal in TARGETS.items() if not (args.quick and "limit" in key)}
    return finish("relay", metrics, targets, args.save and not args.quick)


if __name__ == "__main__":
    sys.exit(main())

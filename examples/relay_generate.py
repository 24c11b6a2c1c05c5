"""Generate by relay: see which exit each token came from, and what it saved.

    python examples/relay_generate.py --model outputs/pretrain
    python examples/relay_generate.py --model outputs/pretrain --prompt "def main(" --draft_exit 1
    python examples/relay_generate.py --model outputs/pretrain --relay confidence --target 0.95 \\
        --texts docs/
    python examples/relay_generate.py --model outputs/pretrain --relay handoff --below 0.4
    python examples/relay_generate.py --smoke

`--relay speculative` (the default) writes the text of the deepest exit, sooner; `confidence` lets a
token leave at the first exit that is sure enough, with thresholds found on `--texts` for a wanted
agreement; `handoff` starts shallow and goes deep for good when it gets too hard. The table compares
with plain `generate` at full depth, in this process.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import hf_familial as hff
from hf_familial.models.familial.configuration_familial import check_choice
from hf_familial.paths import no_such_path
from hf_familial.scripts import arguments, console, loading, progress, run
from hf_familial.toy import toy_family


# from the shallowest exit to the deepest; told apart in either theme, and without red and green
COLOURS = ("bright_yellow", "bright_cyan", "bright_magenta", "bright_blue", "white")


@dataclass
class RelayArguments:
    """The family, the prompt, and when to go deeper."""

    model: str | None = field(default=None, metadata={"help": "Family, by name or folder."})
    prompt: str = field(default="import os\n\n\ndef ", metadata={"help": "What to go on from."})
    relay: str = field(
        default="speculative", metadata={"help": "speculative, confidence, handoff or fixed"}
    )
    draft_exit: int = field(default=0, metadata={"help": "Speculative: exit that drafts."})
    draft_length: str = field(default="auto", metadata={"help": "Speculative: auto or a number."})
    threshold: float | None = field(
        default=None, metadata={"help": "Confidence: the same for all exits, instead of --target."}
    )
    target: float = field(
        default=0.95, metadata={"help": "Confidence: share of tokens as of the deepest exit."}
    )
    texts: str | None = field(
        default=None,
        metadata={"help": "Confidence: file or folder of texts to find thresholds on."},
    )
    below: float = field(
        default=0.5, metadata={"help": "Handoff: mean confidence to hand over at."}
    )
    exit_idx: int = field(default=-1, metadata={"help": "Fixed: the exit."})
    max_new_tokens: int = field(default=96, metadata={"help": "Tokens to write."})
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of the best token."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling."})
    seed: int = field(default=0, metadata={"help": "Of sampling."})
    repeats: int = field(default=3, metadata={"help": "Runs to take the median time of."})

    def __post_init__(self) -> None:
        """Refuse what makes no sense, before a model is read."""
        check_choice("--relay", self.relay, ("speculative", "confidence", "handoff", "fixed"))
        if self.texts is not None and not Path(self.texts).exists():
            raise no_such_path(self.texts)
        if self.draft_length != "auto" and not self.draft_length.isdigit():
            raise ValueError(f"`--draft_length` must be auto or a number, got {self.draft_length}.")
        if self.model is None:
            raise ValueError(
                "`--model` is missing: the folder of a family, as of pretrain.py; or try `--smoke`."
            )
        for name in ("max_new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be 1 or more, got {getattr(self, name)}.")
        if self.relay == "confidence" and self.threshold is None and not self.texts:
            raise ValueError(
                "`--relay confidence` needs `--threshold`, or `--texts` to find thresholds on."
            )


def smoke(folder: Path) -> dict[str, Any]:
    """A tiny family that learnt nothing, and this file to find thresholds on."""
    model, tokenizer = toy_family()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"model": str(folder), "texts": __file__, "max_new_tokens": 48}


def relay_of(
    args: RelayArguments, model: hff.FamilialForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> tuple[Any, hff.RelayPolicy]:
    """The policy, and the calibration that it came from, if any."""
    if args.relay == "speculative":
        length: Any = "auto" if args.draft_length == "auto" else int(args.draft_length)
        return None, hff.SpeculativeRelay(args.draft_exit, length)
    if args.relay == "handoff":
        return None, hff.HandoffRelay(below=args.below)
    if args.relay == "fixed":
        return None, hff.FixedExit(args.exit_idx)
    if args.threshold is not None:
        return None, hff.ConfidenceRelay(args.threshold)
    calibration = hff.calibrate(model, blocks(args, tokenizer), target=args.target)
    return calibration, calibration.relay


def blocks(args: RelayArguments, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Pieces of the calibration texts, 128 tokens each and at most 200."""
    path = Path(args.texts or "")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if not files or not path.exists():
        raise ValueError(f"`--texts` must be a file or a folder of files, got {args.texts}.")
    text = "\n\n".join(p.read_text(encoding="utf-8", errors="ignore") for p in files)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [ids[i : i + 128] for i in range(0, len(ids) - 127, 128)]
    if len(pieces) < 2:
        raise ValueError(f"`--texts` must hold 256 tokens or more, got {len(ids)}.")
    return [{"input_ids": piece} for piece in pieces[:: max(1, len(pieces) // 200)][:200]]


def timed(call: Any, name: str, repeats: int, seed: int) -> tuple[Any, float]:
    """What a call returns, and its median time in seconds."""
    times = []
    for _ in progress(range(repeats), name):
        torch.manual_seed(seed)
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return result, sorted(times)[len(times) // 2]


def coloured(
    tokenizer: PreTrainedTokenizerBase, output: hff.RelayOutput, prompt_length: int
) -> Text:
    """The text, each token in the colour of its exit."""
    ids, exits = output.sequences[0].tolist(), output.relay_stats.token_exits[0].tolist()
    text = Text(tokenizer.decode(ids[:prompt_length]), style="dim")
    written = tokenizer.decode(ids[:prompt_length])
    for i, exit_idx in enumerate(exits, start=prompt_length + 1):
        # decoded with all before it: a token alone may be part of a letter
        longer = tokenizer.decode(ids[:i])
        text.append(longer[len(written) :], style=colour_of(exit_idx, output.relay_stats.exits))
        written = longer
    return text


def colour_of(exit_idx: int, exits: tuple[int, ...]) -> str:
    """The deepest exit is white, the others take the colours in turn."""
    if exit_idx not in exits[:-1]:
        return COLOURS[-1]
    return COLOURS[exits.index(exit_idx) % (len(COLOURS) - 1)]


def legend(stats: hff.RelayStats, depths: list[int]) -> Text:
    """Which colour is which exit, and how many tokens came from it."""
    text, total = Text(), stats.token_exits.numel()
    for k in stats.exits:
        count = int((stats.token_exits == k).sum())
        text.append("■ ", style=colour_of(k, stats.exits))
        text.append(f"exit {k} (depth {depths[k]}): {count / total:.0%}   ")
    return text


def comparison(
    stats: hff.RelayStats, seconds: float, plain_seconds: float, tokens: int, same: bool
) -> Table:
    """The relay against plain `generate`."""
    table = Table(title="against plain generate at full depth", title_justify="left")
    for name in ("", "ms per token", "speed", "layer passes", "FLOPs", "tokens per round"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row(
        "generate", f"{1e3 * plain_seconds / tokens:.2f}", "1.00 x",
        f"{stats.plain_layer_passes:,}", f"{stats.plain_flops:.3g}", "1.00",
    )  # fmt: skip
    new = stats.token_exits.shape[1]
    table.add_row(
        "relay", f"{1e3 * seconds / new:.2f}", f"{plain_seconds / tokens * new / seconds:.2f} x",
        f"{stats.layer_passes:,}", f"{stats.flops:.3g}", f"{stats.tokens_per_round:.2f}",
    )  # fmt: skip
    drafts = f"{stats.accepted} of {stats.drafted} drafts accepted; " if stats.drafted else ""
    table.caption = f"{drafts}the text is {'the same' if same else 'another'}"
    table.caption += f"\n{stats.note}" if stats.note else ""
    table.caption_justify = "left"
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Load, find thresholds if asked to, generate both ways, compare."""
    with arguments(__doc__, [RelayArguments], smoke=smoke, argv=argv) as (args, _):
        with loading("--model", args.model):
            model: Any = hff.FamilialForCausalLM.from_pretrained(args.model)
            tokenizer = AutoTokenizer.from_pretrained(args.model)
        compare(args, model.eval(), tokenizer)


def compare(
    args: RelayArguments, model: hff.FamilialForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Generate plainly and by relay, and show the text and the costs of both."""
    out = console()
    with out.status("looking for thresholds" if args.relay == "confidence" else "starting"):
        calibration, relay = relay_of(args, model, tokenizer)
    if calibration is not None:
        chosen = calibration.chosen
        out.print(
            f"thresholds { {k: round(v, 4) for k, v in chosen.thresholds.items()} } on "
            f"{calibration.num_tokens} held-out tokens: agreement {chosen.agreement:.3f}, "
            f"{chosen.layers_per_token:.2f} of {model.config.exits[-1]} layers per token"
        )
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    asked = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "max_new_tokens": args.max_new_tokens,
        "do_sample": args.do_sample,
        "return_dict_in_generate": True,
    }
    if args.do_sample:
        asked["temperature"] = args.temperature
    model.relay_generate(**asked, relay=relay)  # the first call also compares fused passes
    plain, plain_seconds = timed(
        lambda: model.generate(**asked), "generate", args.repeats, args.seed
    )
    output, seconds = timed(
        lambda: model.relay_generate(**asked, relay=relay), "relay", args.repeats, args.seed
    )
    prompt_length = asked["input_ids"].shape[1]
    out.print(Panel(coloured(tokenizer, output, prompt_length), title=type(relay).__name__))
    out.print(legend(output.relay_stats, model.config.exits))
    tokens = plain.sequences.shape[1] - prompt_length
    same = torch.equal(plain.sequences, output.sequences)
    out.print(comparison(output.relay_stats, seconds, plain_seconds, tokens, same))


if __name__ == "__main__":
    run(main)

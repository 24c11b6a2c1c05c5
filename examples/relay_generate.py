"""Generate a text by relay, colour each token by its exit, and measure the speed.

    python examples/relay_generate.py --model outputs/pretrain
    python examples/relay_generate.py --model outputs/pretrain --relay handoff
    python examples/relay_generate.py --smoke

`--relay speculative` (the default) writes the same text as the deepest exit in less time. With
`confidence` each token leaves at the first exit that is confident enough. The thresholds are found
on `--texts` for a target agreement with the deepest exit. `handoff` starts at a shallow exit and
changes to the deepest one when the text becomes difficult:

    python examples/relay_generate.py --model outputs/pretrain --relay confidence --target 0.95 \\
        --texts docs/
    python examples/relay_generate.py --model outputs/pretrain --relay handoff --below 0.4

Output: the coloured text, and a comparison with `generate` at full depth in the same process, as in
this table from `--smoke`:

              ms per token   speed  layer passes     FLOPs  tokens per round
    generate          8.54  1.00 x           252  5.95e+06              1.00
    relay             4.96  1.72 x           300  7.87e+06              1.55
    17 of 29 drafts were accepted. The texts are equal.
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


# of the exits from the shallowest to the deepest: visible on dark and light terminals, and for
# people who do not see red and green
COLOURS = ("bright_yellow", "bright_cyan", "bright_magenta", "bright_blue", "white")


@dataclass
class RelayArguments:
    """The family, the prompt, and the rule that chooses an exit."""

    model: str | None = field(
        default=None, metadata={"help": "Family to load: a folder or Hub name."}
    )
    prompt: str = field(default="import os\n\n\ndef ", metadata={"help": "Text to continue."})
    max_new_tokens: int = field(default=96, metadata={"help": "Tokens to generate."})
    relay: str = field(
        default="speculative",
        metadata={"help": "speculative, confidence, handoff or fixed.", "metavar": "NAME"},
    )
    draft_exit: int = field(default=0, metadata={"help": "speculative: exit that drafts."})
    draft_length: str = field(
        default="auto",
        metadata={"help": "speculative: tokens per draft, or auto.", "metavar": "N"},
    )
    texts: str | None = field(
        default=None,
        metadata={
            "help": "confidence: file or folder of texts to find thresholds on.",
            "metavar": "PATH",
        },
    )
    target: float = field(
        default=0.95, metadata={"help": "confidence: target agreement with the deepest exit."}
    )
    threshold: float | None = field(
        default=None, metadata={"help": "confidence: threshold of all exits, replaces --target."}
    )
    below: float = field(
        default=0.5, metadata={"help": "handoff: change exits below this mean confidence."}
    )
    exit_idx: int = field(default=-1, metadata={"help": "fixed: exit to use."})
    do_sample: bool = field(default=False, metadata={"help": "Sample tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})
    repeats: int = field(default=3, metadata={"help": "Repetitions, for a median time."})

    def __post_init__(self) -> None:
        """Check the values before a model is loaded."""
        check_choice("--relay", self.relay, ("speculative", "confidence", "handoff", "fixed"))
        if self.texts is not None and not Path(self.texts).exists():
            raise no_such_path(self.texts)
        if self.draft_length != "auto" and not self.draft_length.isdigit():
            raise ValueError(f"`--draft_length` must be auto or a number, got {self.draft_length}.")
        if self.model is None:
            raise ValueError(
                "`--model` is missing. Pass the folder of a family, for example from pretrain.py, "
                "or try `--smoke`."
            )
        for name in ("max_new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be 1 or more, got {getattr(self, name)}.")
        if self.relay == "confidence" and self.threshold is None and not self.texts:
            raise ValueError("`--relay confidence` needs `--threshold` or `--texts`.")


def smoke(folder: Path) -> dict[str, Any]:
    """Return arguments for a tiny untrained family, with this file as its texts."""
    model, tokenizer = toy_family()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"model": str(folder), "texts": __file__, "max_new_tokens": 48}


def relay_of(
    args: RelayArguments, model: hff.FamilialForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> tuple[Any, hff.RelayPolicy]:
    """Return the calibration, or `None`, and the relay policy."""
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
    """Return at most 200 pieces of the calibration texts, of 128 tokens each."""
    path = Path(args.texts or "")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if not files or not path.exists():
        raise ValueError(f"`--texts` must be a file or a folder of files, got {args.texts}.")
    text = "\n\n".join(p.read_text(encoding="utf-8", errors="ignore") for p in files)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [ids[i : i + 128] for i in range(0, len(ids) - 127, 128)]
    if len(pieces) < 2:
        raise ValueError(f"`--texts` must contain 256 tokens or more, got {len(ids)}.")
    return [{"input_ids": piece} for piece in pieces[:: max(1, len(pieces) // 200)][:200]]


def timed(call: Any, name: str, repeats: int, seed: int) -> tuple[Any, float]:
    """Call several times. Return the result and the median time in seconds."""
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
    """Return the text with each token in the colour of its exit."""
    ids, exits = output.sequences[0].tolist(), output.relay_stats.token_exits[0].tolist()
    text = Text(tokenizer.decode(ids[:prompt_length]), style="dim")
    written = tokenizer.decode(ids[:prompt_length])
    for i, exit_idx in enumerate(exits, start=prompt_length + 1):
        # decode the whole text, because one token can be a part of a letter
        longer = tokenizer.decode(ids[:i])
        text.append(longer[len(written) :], style=colour_of(exit_idx, output.relay_stats.exits))
        written = longer
    return text


def colour_of(exit_idx: int, exits: tuple[int, ...]) -> str:
    """Return white for the deepest exit, else one of the colours."""
    if exit_idx not in exits[:-1]:
        return COLOURS[-1]
    return COLOURS[exits.index(exit_idx) % (len(COLOURS) - 1)]


def legend(stats: hff.RelayStats, depths: list[int]) -> Text:
    """Return the colour of each exit and the share of tokens that it wrote."""
    text, total = Text(), stats.token_exits.numel()
    for k in stats.exits:
        count = int((stats.token_exits == k).sum())
        text.append("■ ", style=colour_of(k, stats.exits))
        text.append(f"exit {k} (depth {depths[k]}): {count / total:.0%}   ")
    return text


def comparison(
    stats: hff.RelayStats, seconds: float, plain_seconds: float, tokens: int, same: bool
) -> Table:
    """Return a table that compares the relay with `generate`."""
    table = Table(title="Relay and generate at full depth", title_justify="left")
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
    counts = f"{stats.accepted} of {stats.drafted} drafts were accepted. " if stats.drafted else ""
    table.caption = f"{counts}The texts are {'equal' if same else 'different'}."
    table.caption += f"\n{stats.note}" if stats.note else ""
    table.caption_justify = "left"
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Load the family and compare the relay with `generate`."""
    with arguments(__doc__, [RelayArguments], smoke=smoke, argv=argv) as (args, _):
        with loading("--model", args.model):
            model: Any = hff.FamilialForCausalLM.from_pretrained(args.model)
            tokenizer = AutoTokenizer.from_pretrained(args.model)
        compare(args, model.eval(), tokenizer)


def compare(
    args: RelayArguments, model: hff.FamilialForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Generate with `generate` and by relay, and show the text and the speed of both."""
    out = console()
    with out.status("finding thresholds" if args.relay == "confidence" else "starting"):
        calibration, relay = relay_of(args, model, tokenizer)
    if calibration is not None:
        chosen = calibration.chosen
        out.print(
            f"Thresholds: { {k: round(v, 4) for k, v in chosen.thresholds.items()} }. On "
            f"{calibration.num_tokens} held-out tokens the agreement is {chosen.agreement:.3f}, "
            f"with {chosen.layers_per_token:.2f} of {model.config.exits[-1]} layers per token."
        )
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    options = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "max_new_tokens": args.max_new_tokens,
        "do_sample": args.do_sample,
        "return_dict_in_generate": True,
    }
    if args.do_sample:
        options["temperature"] = args.temperature
    model.relay_generate(**options, relay=relay)  # the first call is slower
    plain, plain_seconds = timed(
        lambda: model.generate(**options), "generate", args.repeats, args.seed
    )
    output, seconds = timed(
        lambda: model.relay_generate(**options, relay=relay), "relay", args.repeats, args.seed
    )
    prompt_length = options["input_ids"].shape[1]
    out.print(Panel(coloured(tokenizer, output, prompt_length), title=type(relay).__name__))
    out.print(legend(output.relay_stats, model.config.exits))
    tokens = plain.sequences.shape[1] - prompt_length
    same = torch.equal(plain.sequences, output.sequences)
    out.print(comparison(output.relay_stats, seconds, plain_seconds, tokens, same))


if __name__ == "__main__":
    run(main)

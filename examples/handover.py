"""One text, two processes: a device holds the first layers of a family, another process the rest.

    python examples/handover.py                           # a tiny family with random weights
    python examples/handover.py --family runs/family --prompt "def main():" --dtype bf16

The device loads only what `export_exit(format="familial")` writes of the family. For each of the
three modes a second process is started, and bytes go through a pipe: `split` (every token passes
both), `migrate` (the text moves with its keys and values) and `migrate-light` (without them). It
prints what travelled, and whether the tokens are those of one process.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, HfArgumentParser

from hf_familial import FamilialConfig, FamilialForCausalLM
from hf_familial.generation import (
    MODES,
    RelayState,
    ShallowSide,
    deep_side,
    serve,
    split,
    upper_part,
)
from hf_familial.hub.export import export_exit


@dataclass
class Arguments:
    """The family, and what to say."""

    family: str | None = field(default=None, metadata={"help": "Folder; a tiny family if none."})
    exit_idx: int = field(default=0, metadata={"help": "Exit at which the text is handed over."})
    prompt: str = field(default="def main():", metadata={"help": "Where the text begins."})
    max_new_tokens: int = field(default=32, metadata={"help": "Tokens to generate."})
    dtype: str | None = field(default=None, metadata={"help": "fp32, bf16, int8; none: as it is."})


def other_process(connection: Connection, family: str, exit_idx: int, mode: str) -> None:
    """What the second process does, for one text."""
    torch.set_num_threads(1)
    model = FamilialForCausalLM.from_pretrained(family).eval()
    side = (upper_part if mode == "split" else deep_side)(model, exit_idx)
    del model  # an upper part lets go of everything below the exit
    connection.send_bytes(b"ready")
    if mode == "split":
        serve(side, connection.send_bytes, connection.recv_bytes)
        return
    text = side.resume(RelayState.from_bytes(connection.recv_bytes()))
    found = {"tokens": text.generate().tolist()}
    cost = text.recomputed
    found["recomputed"] = cost.layer_passes if cost else 0
    connection.send_bytes(json.dumps(found).encode())


def hand_over(
    side: ShallowSide, ids: torch.Tensor, mode: str, arguments: Arguments, family: str
) -> dict[str, Any]:
    """Hand one text to a second process; what comes of it, and what travelled."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(
        target=other_process, args=(there, family, arguments.exit_idx, mode), daemon=True
    )
    process.start()
    there.close()  # so that its end is noticed here
    assert here.recv_bytes() == b"ready"
    messages: list[int] = []

    def send(payload: bytes) -> None:
        messages.append(len(payload))
        here.send_bytes(payload)

    text = side.start(ids, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    state = text.state("migrate" if mode == "migrate" else "migrate-light", arguments.dtype)
    if mode == "split":
        found = {"tokens": split(text, send, here.recv_bytes, arguments.dtype), "recomputed": 0}
    else:
        send(state.to_bytes())
        found = json.loads(here.recv_bytes())
    process.join()
    return found | {"messages": messages, "bytes_per_token": state.bytes_per_token}


def make_family(folder: Path) -> str:
    """A family that has learnt nothing, for a look at the bytes."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    text = {"model_type": "llama", "num_hidden_layers": 6, "vocab_size": 300, **sizes}
    torch.manual_seed(0)
    FamilialForCausalLM(FamilialConfig(text_config=text, exits=[2, 6])).save_pretrained(folder)
    return str(folder)


def main() -> None:
    """Hand a text over in each mode, and compare with one process."""
    arguments: Arguments
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        family = arguments.family or make_family(Path(name) / "family")
        if arguments.family:
            tokenizer = AutoTokenizer.from_pretrained(family)
            ids = tokenizer(arguments.prompt, return_tensors="pt").input_ids
        else:
            ids = torch.randint(3, 300, (1, 16), generator=torch.Generator().manual_seed(1))
        export_exit(family, arguments.exit_idx, Path(name) / "device", format="familial")
        device = FamilialForCausalLM.from_pretrained(Path(name) / "device").eval()
        config = FamilialConfig.from_pretrained(family)
        side = ShallowSide(device, config.exits[arguments.exit_idx])
        rows = {mode: hand_over(side, ids, mode, arguments, family) for mode in MODES}
        # for comparison alone: neither process needs the whole
        whole = FamilialForCausalLM.from_pretrained(family).eval()
    count = arguments.max_new_tokens
    expected = whole.generate(ids, max_new_tokens=count, do_sample=False)
    table = Table("mode", "bytes per token", "messages", "bytes sent", "layer passes again", "same")
    for mode, row in rows.items():
        same = torch.equal(torch.as_tensor(row["tokens"]), expected)
        sent, passes = row["messages"], str(row["recomputed"])
        numbers = (f"{row['bytes_per_token']:.0f}", str(len(sent)), f"{sum(sent):,}", passes)
        table.add_row(mode, *numbers, "yes" if same else "no")
    Console().print(table)
    if arguments.family:
        print(tokenizer.decode(expected[0]))


if __name__ == "__main__":
    main()

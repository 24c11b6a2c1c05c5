"""One text, two processes: a device holds the first layers of a family, another process the rest.

    python examples/handover.py --family outputs/pretrain
    python examples/handover.py --family outputs/pretrain --exit_idx 1 --dtype bf16
    python examples/handover.py --smoke

The device loads only what `export_exit(format="familial")` writes of the family. For each of the
three modes a second process is started, and bytes go through a pipe: `split` (every token passes
both), `migrate` (the text moves with its keys and values) and `migrate-light` (without them). The
table says what travelled, and whether the tokens are those of one process; with `--dtype bf16` or
`int8` less travels, rounded, and they may differ.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer
from transformers.utils import logging

from hf_familial import FamilialConfig, FamilialForCausalLM
from hf_familial.handoff import (
    MODES,
    DeviceSide,
    HandoffState,
    run_device,
    run_server,
    server_side,
)
from hf_familial.hub.export import export_exit
from hf_familial.models.familial.configuration_familial import check_choice
from hf_familial.scripts import arguments, console, loading, progress, run
from hf_familial.toy import toy_family


@dataclass
class HandoverArguments:
    """The family, what to say, and how much of it travels."""

    family: str | None = field(default=None, metadata={"help": "Folder of a family."})
    exit_idx: int = field(default=0, metadata={"help": "Exit at which the text is handed over."})
    prompt: str = field(default="def main():", metadata={"help": "Where the text begins."})
    max_new_tokens: int = field(default=32, metadata={"help": "Tokens to generate."})
    dtype: str | None = field(
        default=None,
        metadata={"help": "How numbers travel: fp32, bf16 or int8; else as they are."},
    )

    def __post_init__(self) -> None:
        """Refuse what makes no sense, before a model is read."""
        if self.family is None:
            raise ValueError(
                "`--family` is missing: a folder, as of pretrain.py; or try `--smoke`."
            )
        if self.dtype is not None:
            check_choice("--dtype", self.dtype, ("fp32", "bf16", "int8"))
        if self.max_new_tokens < 1:
            raise ValueError(f"`--max_new_tokens` must be 1 or more, got {self.max_new_tokens}.")


def other_process(connection: Connection, family: str, exit_idx: int, mode: str) -> None:
    """What the second process does, for one text."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    model = FamilialForCausalLM.from_pretrained(family).eval()
    side = server_side(model, exit_idx, keep_lower=mode != "split")
    del model  # without `keep_lower` the side lets go of everything below the exit
    connection.send_bytes(b"ready")
    if mode == "split":
        run_server(side, connection.send_bytes, connection.recv_bytes)
        return
    text = side.resume(HandoffState.from_bytes(connection.recv_bytes()))
    found = {"tokens": text.generate().tolist()}
    cost = text.recomputed
    found["recomputed"] = cost.layer_passes if cost else 0
    connection.send_bytes(json.dumps(found).encode())


def hand_over(
    side: DeviceSide, ids: torch.Tensor, mode: str, args: HandoverArguments
) -> dict[str, Any]:
    """Hand one text to a second process; what comes of it, and what travelled."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(
        target=other_process, args=(there, args.family, args.exit_idx, mode), daemon=True
    )
    process.start()
    there.close()  # so that its end is noticed here
    assert here.recv_bytes() == b"ready"
    messages: list[int] = []

    def send(payload: bytes) -> None:
        messages.append(len(payload))
        here.send_bytes(payload)

    text = side.start(ids, max_new_tokens=args.max_new_tokens, do_sample=False)
    state = text.state("migrate" if mode == "migrate" else "migrate-light", args.dtype)
    if mode == "split":
        found = {"tokens": run_device(text, send, here.recv_bytes, args.dtype), "recomputed": 0}
    else:
        send(state.to_bytes())
        found = json.loads(here.recv_bytes())
    process.join()
    return found | {"messages": messages, "bytes_per_token": state.bytes_per_token}


def smoke(folder: Path) -> dict[str, Any]:
    """A tiny family that learnt nothing, for a look at the bytes."""
    model, tokenizer = toy_family()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"family": str(folder)}


def show(rows: dict[str, dict[str, Any]], expected: torch.Tensor) -> None:
    """What travelled in each mode, and whether the text is that of one process."""
    table = Table(title="Handed over to another process", title_justify="left")
    table.add_column("mode")
    for name in ("bytes per token", "messages", "bytes sent", "layer passes again", "same text"):
        table.add_column(name, justify="right")
    for mode, row in rows.items():
        same = torch.equal(torch.as_tensor(row["tokens"]), expected)
        sent, passes = row["messages"], str(row["recomputed"])
        numbers = (f"{row['bytes_per_token']:.0f}", str(len(sent)), f"{sum(sent):,}", passes)
        table.add_row(mode, *numbers, "yes" if same else "no")
    console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Hand a text over in each mode, and compare with one process."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with arguments(__doc__, [HandoverArguments], smoke=smoke, argv=argv) as (args, _):
        with loading("--family", args.family):
            config = FamilialConfig.from_pretrained(args.family)
            tokenizer = AutoTokenizer.from_pretrained(args.family)
        ids = tokenizer(args.prompt, return_tensors="pt").input_ids
        with tempfile.TemporaryDirectory() as folder:
            export_exit(args.family, args.exit_idx, Path(folder) / "device", format="familial")
            device = FamilialForCausalLM.from_pretrained(Path(folder) / "device").eval()
        side = DeviceSide(device, config.exits[args.exit_idx])
        modes = progress(MODES, "handing over")
        rows = {mode: hand_over(side, ids, mode, args) for mode in modes}
        # for comparison alone: neither process needs the whole
        whole = FamilialForCausalLM.from_pretrained(args.family).eval()
        expected = whole.generate(ids, max_new_tokens=args.max_new_tokens, do_sample=False)
        console().print(Panel(Text(tokenizer.decode(expected[0])), title="one process"))
        show(rows, expected)


if __name__ == "__main__":
    run(main)

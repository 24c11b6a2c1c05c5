"""Move a text between two processes: a device with the first layers, and a server.

    python examples/handoff.py --family outputs/pretrain
    python examples/handoff.py --family outputs/pretrain --dtype bf16
    python examples/handoff.py --smoke

The device loads only the part of the family up to the exit, which `export_exit(format="familial")`
writes. The script starts a second process for each of the three modes and sends bytes through a
pipe. In `split`, both processes work on every token. In `migrate`, the text moves once, with its
keys and values. In `migrate-light` it moves without them, and the server computes them again.

The table shows how many bytes each mode sends, and whether the tokens equal those of one process.
`--dtype bf16` and `--dtype int8` send fewer bytes. They round, so the tokens may differ.
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
class HandoffArguments:
    """The family, the prompt, and the format in which numbers are sent."""

    family: str | None = field(default=None, metadata={"help": "Folder of the family."})
    exit_idx: int = field(default=0, metadata={"help": "Exit up to which the device runs."})
    prompt: str = field(default="def main():", metadata={"help": "Start of the text."})
    max_new_tokens: int = field(default=32, metadata={"help": "Tokens to generate."})
    dtype: str | None = field(
        default=None,
        metadata={"help": "Format to send numbers in: fp32, bf16 or int8. Default: the model's."},
    )

    def __post_init__(self) -> None:
        """Check the arguments before a model is loaded."""
        if self.family is None:
            raise ValueError(
                "`--family` is missing: pass the folder of a family (pretrain.py writes one), "
                "or try `--smoke`."
            )
        if self.dtype is not None:
            check_choice("--dtype", self.dtype, ("fp32", "bf16", "int8"))
        if self.max_new_tokens < 1:
            raise ValueError(f"`--max_new_tokens` must be 1 or more, got {self.max_new_tokens}.")


def other_process(connection: Connection, family: str, exit_idx: int, mode: str) -> None:
    """Run the second process for one text."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    model = FamilialForCausalLM.from_pretrained(family).eval()
    side = server_side(model, exit_idx, keep_lower=mode != "split")
    del model  # the server has dropped the lower layers: keep no other reference to them
    connection.send_bytes(b"ready")
    if mode == "split":
        run_server(side, connection.send_bytes, connection.recv_bytes)
        return
    text = side.resume(HandoffState.from_bytes(connection.recv_bytes()))
    result = {"tokens": text.generate().tolist()}
    cost = text.recomputed
    result["recomputed"] = cost.layer_passes if cost else 0
    connection.send_bytes(json.dumps(result).encode())


def hand_off(
    side: DeviceSide, ids: torch.Tensor, mode: str, args: HandoffArguments
) -> dict[str, Any]:
    """Move one text to a second process. Return its tokens and the sizes of all messages."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(
        target=other_process, args=(there, args.family, args.exit_idx, mode), daemon=True
    )
    process.start()
    there.close()  # so that `here` sees the end of the second process
    assert here.recv_bytes() == b"ready"
    messages: list[int] = []

    def send(payload: bytes) -> None:
        messages.append(len(payload))
        here.send_bytes(payload)

    text = side.start(ids, max_new_tokens=args.max_new_tokens, do_sample=False)
    state = text.state("migrate" if mode == "migrate" else "migrate-light", args.dtype)
    if mode == "split":
        result = {"tokens": run_device(text, send, here.recv_bytes, args.dtype), "recomputed": 0}
    else:
        send(state.to_bytes())
        result = json.loads(here.recv_bytes())
    process.join()
    return result | {"messages": messages, "bytes_per_token": state.bytes_per_token}


def smoke(folder: Path) -> dict[str, Any]:
    """Save a tiny untrained family in `folder`. It is enough to count bytes."""
    model, tokenizer = toy_family()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"family": str(folder)}


def show(rows: dict[str, dict[str, Any]], expected: torch.Tensor) -> None:
    """Print the bytes sent in each mode, and whether the text equals that of one process."""
    table = Table(title="Hand-off to another process", title_justify="left")
    table.add_column("mode", no_wrap=True)
    for name in ("bytes per token", "messages", "bytes sent", "layer passes repeated", "same text"):
        table.add_column(name, justify="right")
    for mode, row in rows.items():
        same = torch.equal(torch.as_tensor(row["tokens"]), expected)
        sent, passes = row["messages"], str(row["recomputed"])
        numbers = (f"{row['bytes_per_token']:.0f}", str(len(sent)), f"{sum(sent):,}", passes)
        table.add_row(mode, *numbers, "yes" if same else "no")
    console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the hand-off in each mode, and compare its text with that of one process."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with arguments(__doc__, [HandoffArguments], smoke=smoke, argv=argv) as (args, _):
        with loading("--family", args.family):
            config = FamilialConfig.from_pretrained(args.family)
            tokenizer = AutoTokenizer.from_pretrained(args.family)
        ids = tokenizer(args.prompt, return_tensors="pt").input_ids
        with tempfile.TemporaryDirectory() as folder:
            export_exit(args.family, args.exit_idx, Path(folder) / "device", format="familial")
            device = FamilialForCausalLM.from_pretrained(Path(folder) / "device").eval()
        side = DeviceSide(device, config.exits[args.exit_idx])
        modes = progress(MODES, "hand-off")
        rows = {mode: hand_off(side, ids, mode, args) for mode in modes}
        # only for the comparison with one process
        whole = FamilialForCausalLM.from_pretrained(args.family).eval()
        expected = whole.generate(ids, max_new_tokens=args.max_new_tokens, do_sample=False)
        console().print(Panel(Text(tokenizer.decode(expected[0])), title="one process"))
        show(rows, expected)


if __name__ == "__main__":
    run(main)

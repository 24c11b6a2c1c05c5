"""Push a family and its members to the Hub, or find the member that fits.

    python examples/push_exits.py outputs/pretrain me/family
    python examples/push_exits.py outputs/pretrain me/family --dry_run
    python examples/push_exits.py --smoke

FOLDER is the output of a training (`examples/pretrain.py` or `save_pretrained`). The family goes to
REPO, and each member to `REPO-depth<depth>`. A member is an ordinary model that Transformers loads
without this package. If you run the script again, it sends only changed files. Log in first with
`hf auth login`. `--dry_run` saves the members in a temporary folder and sends nothing.

Output: the members and their state, as in this table from `--smoke`:

    exit  depth  parameters  cache (bytes)  repository
       0      1      26,784        524,288  me/family-depth1  108,336 bytes, not sent
       1      2      37,088      1,048,576  me/family-depth2  150,480 bytes, not sent
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from hf_familial import choose_exit, describe, export_exit, push_exits_to_hub, push_family_to_hub
from hf_familial.hub import ExitDescription
from hf_familial.scripts import arguments, console, loading, progress, run
from hf_familial.toy import toy_family


POSITIONAL = {"folder": "Folder of the family.", "repo": "Repository on the Hub: user/name."}


@dataclass
class PushArguments:
    """The members to push, and their repositories."""

    exits: list[int] | None = field(
        default=None, metadata={"help": "Members to push. Default: all."}
    )
    private: bool = field(default=False, metadata={"help": "Make new repositories private."})
    dry_run: bool = field(default=False, metadata={"help": "Send nothing."})
    memory: str | None = field(
        default=None,
        metadata={
            "help": "Find the deepest member that fits, for example in 2GB.",
            "metavar": "SIZE",
        },
    )
    context: int | None = field(
        default=None, metadata={"help": "Tokens of text in the KV cache, for --memory."}
    )
    base_model: str | None = field(
        default=None,
        metadata={
            "help": "Pretrained model that the family was created from.",
            "metavar": "REPO",
        },
    )


def smoke(folder: Path) -> dict[str, Any]:
    """Return arguments for a dry run of a tiny family."""
    model, tokenizer = toy_family()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"folder": str(folder), "repo": "me/family", "memory": "1500000", "dry_run": True}


def chosen(rows: Sequence[ExitDescription], exits: Sequence[int] | None) -> list[ExitDescription]:
    """Return the chosen members.

    Raises:
        IndexError: If an exit does not exist.
    """
    for k in exits or ():
        if not -len(rows) <= k < len(rows):
            raise IndexError(f"`--exits` must be within the {len(rows)} exits, got {k}.")
    numbers = range(len(rows)) if exits is None else sorted({k % len(rows) for k in exits})
    return [rows[k] for k in numbers]


def try_out(folder: str, members: Sequence[ExitDescription]) -> dict[int, str]:
    """Save each member in a temporary folder and return its size as text."""
    found = {}
    for row in progress(members, "saving members"):
        with tempfile.TemporaryDirectory() as place:
            report = export_exit(folder, row.exit_idx, Path(place) / "member")
        found[row.exit_idx] = f"{report.nbytes:,} bytes, not sent"
    return found


def push(folder: str, repo: str, members: Sequence[ExitDescription], args: Any) -> dict[int, str]:
    """Push the family, then the members. Return the state of each member."""
    options = {"private": args.private or None, "base_model": args.base_model}
    pushed = list(push_family_to_hub(folder, repo, **options).pushed)
    exits = [row.exit_idx for row in members]
    pushed += push_exits_to_hub(folder, repo, exits=exits, **options).pushed
    states = {row.exit_idx: "pushed" if row.changed else "up to date" for row in pushed}
    console().print(f"family: {pushed[0].place.repo_id}, {states.pop(None)}")
    return states


def show(repo: str, members: Sequence[ExitDescription], states: dict[int, str]) -> None:
    """Show the size, repository and state of every member."""
    table = Table(title="Members on the Hub", title_justify="left")
    for name in ("exit", "depth", "parameters", "cache (bytes)"):
        table.add_column(name, justify="right")
    table.add_column("repository", overflow="fold")
    table.add_column("")
    for row in members:
        cache = "none" if row.cache_bytes is None else f"{row.cache_bytes:,}"
        numbers = (str(row.exit_idx), str(row.depth), f"{row.parameters:,}", cache)
        table.add_row(*numbers, f"{repo}-depth{row.depth}", states[row.exit_idx])
    console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Describe the members, choose and push them."""
    with arguments(__doc__, [PushArguments], smoke=smoke, positional=POSITIONAL, argv=argv) as (
        args,
        place,
    ):
        with loading("FOLDER", place.folder):
            rows = describe(place.folder, context=args.context).exits
        members = chosen(rows, args.exits)
        if args.memory is not None:
            choice = choose_exit(place.folder, memory=args.memory, context=args.context)
            console().print(f"{choice}\nThe deepest member that fits is exit {choice.exit_idx}.")
        if args.dry_run:
            states = try_out(place.folder, members)
        else:
            states = push(place.folder, place.repo, members, args)
        show(place.repo, members, states)


if __name__ == "__main__":
    run(main)

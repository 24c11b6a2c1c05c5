"""Put a family and its members on the Hub, and say which member fits where.

    python examples/push_exits.py outputs/pretrain me/family
    python examples/push_exits.py outputs/pretrain me/family --exits 0 -1 --private
    python examples/push_exits.py outputs/pretrain me/family --memory 2GB --dry_run
    python examples/push_exits.py --smoke

FOLDER is what training left (`examples/pretrain.py`, `save_pretrained`). The family goes to REPO,
its members to `REPO-depth<depth>`, each an ordinary model that stock transformers loads. Doing the
same again sends only what changed. Log in before: `hf auth login`. `--dry_run` writes the members
to a temporary folder, as a push does, and sends nothing; `--smoke` is a dry run of something tiny.
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


POSITIONAL = {"folder": "Folder of the family.", "repo": "Where to: user/name."}


@dataclass
class PushArguments:
    """What goes where."""

    exits: list[int] | None = field(
        default=None, metadata={"help": "Members to push; all by default."}
    )
    private: bool = field(default=False, metadata={"help": "Make new repositories private."})
    base_model: str | None = field(
        default=None, metadata={"help": "Repository of the decoder that the family was made of."}
    )
    memory: str | None = field(
        default=None,
        metadata={"help": "Say which member fits in it: a number of bytes, or 2GB, 512MiB."},
    )
    context: int | None = field(default=None, metadata={"help": "Tokens of text, for the memory."})
    dry_run: bool = field(default=False, metadata={"help": "Send nothing."})


def smoke(folder: Path) -> dict[str, Any]:
    """A tiny family, of which nothing is sent."""
    model, tokenizer = toy_family()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"folder": str(folder), "repo": "me/family", "memory": "1500000", "dry_run": True}


def wanted(rows: Sequence[ExitDescription], exits: Sequence[int] | None) -> list[ExitDescription]:
    """The members asked for.

    Raises:
        IndexError: If there is no exit of that number.
    """
    for k in exits or ():
        if not -len(rows) <= k < len(rows):
            raise IndexError(f"`--exits` must be within the {len(rows)} exits, got {k}.")
    chosen = range(len(rows)) if exits is None else sorted({k % len(rows) for k in exits})
    return [rows[k] for k in chosen]


def try_out(folder: str, members: Sequence[ExitDescription]) -> dict[int, str]:
    """Write members one at a time, as a push does, and say what each would send."""
    found = {}
    for row in progress(members, "writing members"):
        with tempfile.TemporaryDirectory() as place:
            report = export_exit(folder, row.exit_idx, Path(place) / "member")
        found[row.exit_idx] = f"{report.nbytes:,} bytes, not sent"
    return found


def push(folder: str, repo: str, members: Sequence[ExitDescription], args: Any) -> dict[int, str]:
    """Push the family, then the members; what became of each."""
    options = {"private": args.private or None, "base_model": args.base_model}
    pushed = list(push_family_to_hub(folder, repo, **options).pushed)
    exits = [row.exit_idx for row in members]
    pushed += push_exits_to_hub(folder, repo, exits=exits, **options).pushed
    states = {row.exit_idx: "pushed" if row.changed else "up to date" for row in pushed}
    console().print(f"family: {pushed[0].place.repo_id}, {states.pop(None)}")
    return states


def show(repo: str, members: Sequence[ExitDescription], states: dict[int, str]) -> None:
    """Every member, what it weighs, and where it is now."""
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
    """Describe, choose, push."""
    with arguments(__doc__, [PushArguments], smoke=smoke, positional=POSITIONAL, argv=argv) as (
        args,
        place,
    ):
        with loading("FOLDER", place.folder):
            rows = describe(place.folder, context=args.context).exits
        members = wanted(rows, args.exits)
        if args.memory is not None:
            choice = choose_exit(place.folder, memory=args.memory, context=args.context)
            console().print(f"{choice}\nthe deepest that fits: exit {choice.exit_idx}")
        if args.dry_run:
            states = try_out(place.folder, members)
        else:
            states = push(place.folder, place.repo, members, args)
        show(place.repo, members, states)


if __name__ == "__main__":
    run(main)

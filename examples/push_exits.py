"""Put a family and its members on the Hub, and say which member fits where.

    python examples/push_exits.py outputs/pretrain me/family
    python examples/push_exits.py outputs/pretrain me/family --exits 0 -1 --private True
    python examples/push_exits.py outputs/pretrain me/family --memory 2e9 --dry_run True

The first argument is a folder that training left (`examples/pretrain.py`, `save_pretrained`). The
family goes to the second, its members to `<repo>-depth<depth>`, each an ordinary model that stock
transformers loads. Doing the same again sends only what changed. Log in before: `hf auth login`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from hf_familial import choose_exit, describe, push_exits_to_hub, push_family_to_hub


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
    memory: float | None = field(
        default=None, metadata={"help": "Say which member fits in so many bytes."}
    )
    context: int | None = field(default=None, metadata={"help": "Tokens of text, for the memory."})
    dry_run: bool = field(default=False, metadata={"help": "Push nothing."})


def main() -> None:
    """Describe, choose, push."""
    if len(sys.argv) < 3 or sys.argv[1].startswith("-") or sys.argv[2].startswith("-"):
        sys.exit(f"usage: {sys.argv[0]} FOLDER REPO [--exits K ...] [--memory BYTES] ...")
    folder, repo_id = sys.argv[1:3]
    (args,) = HfArgumentParser(PushArguments).parse_args_into_dataclasses(sys.argv[3:])
    for row in describe(folder, context=args.context).exits:
        cache = "no cache" if row.cache_bytes is None else f"{row.cache_bytes:,} bytes of cache"
        print(f"exit {row.exit_idx}: depth {row.depth}, {row.parameters:,} parameters, {cache}")
    if args.memory is not None:
        choice = choose_exit(folder, memory=int(args.memory), context=args.context)
        print(f"{choice}\nthe deepest that fits: exit {choice.exit_idx}")
    if args.dry_run:
        return
    options = {"private": args.private or None, "base_model": args.base_model}
    family = push_family_to_hub(folder, repo_id, **options)
    members = push_exits_to_hub(folder, repo_id, exits=args.exits, **options)
    for row in (*family.pushed, *members.pushed):
        print(f"{row.place.repo_id}: {'pushed' if row.changed else 'up to date'}")


if __name__ == "__main__":
    main()

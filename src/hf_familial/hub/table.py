"""The table of a family: what every member weighs and costs, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .._wording import metric, size


if TYPE_CHECKING:
    from .describe import FamilyDescription


UNMEASURED = (
    "No loss is recorded here: `evaluate_exits` measures it; `FamilialTrainer.save_model` after an "
    "evaluation records it."
)


def heading(family: FamilyDescription) -> str:
    """Return the two lines above the table."""
    stored = "" if family.stored_bytes is None else f", {size(family.stored_bytes)} stored"
    return (
        f"{family.name}: {len(family.exits)} exits on {family.backbone}, "
        f"{family.parameters:,} parameters{stored}\n"
        f"FLOPs per token, KV bytes per token, cache: at {family.context:,} tokens, batch 1, "
        f"{family.dtype}; loss in nats per token"
    )


def notes(family: FamilyDescription) -> list[str]:
    """Return what to know of the numbers, a sentence each."""
    found = []
    if not all(row.exact for row in family.exits):
        found.append("FLOPs and cache are estimates: this host does not run without data.")
    if all(row.eval_loss is None for row in family.exits):
        found.append(UNMEASURED)
    return found


def text_of(family: FamilyDescription) -> str:
    """Return the description as it is printed."""
    rows = [HEADINGS, *cells_of(family)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        " ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join([heading(family), *lines, *notes(family)])


HEADINGS = (
    "exit",
    "depth",
    "params",
    "no emb.",
    "fp32",
    "bf16",
    "prefill",
    "decode",
    "KV/tok",
    "cache",
    "loss",
)


def cells_of(family: FamilyDescription) -> Iterator[Sequence[str]]:
    """The cells of the table, one row per exit."""
    for row in family.exits:
        yield (
            str(row.exit_idx),
            str(row.depth),
            metric(row.parameters),
            metric(row.non_embedding),
            size(row.weight_bytes["float32"]),
            size(row.weight_bytes["bfloat16"]),
            metric(row.prefill_flops_per_token),
            metric(row.decode_flops_per_token),
            "-" if row.kv_bytes_per_token is None else f"{row.kv_bytes_per_token:,}",
            size(row.cache_bytes),
            "-" if row.eval_loss is None else f"{row.eval_loss:.4f}",
        )

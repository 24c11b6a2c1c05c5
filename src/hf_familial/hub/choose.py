"""Choose the deepest member that fits a device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from .._wording import parse_size
from ..errors import NoExitFitsError
from ..models.familial import FamilialConfig, FamilialForCausalLM
from .description import ExitDescription, FamilyDescription, describe, resolve_dtype


@dataclass(frozen=True)
class ExitVerdict:
    """The verdict on one member: whether it fits, and why.

    Attributes:
        exit_idx (`int`): Index into `config.exits`, 0 the shallowest.
        depth (`int`): Backbone layers below it.
        fits (`bool`): Whether it is within every limit.
        reason (`str`): The numbers, in one line.
    """

    exit_idx: int
    depth: int
    fits: bool
    reason: str


@dataclass(frozen=True)
class ExitChoice:
    """The result of [`choose_exit`].

    Attributes:
        exit_idx (`int`): The deepest exit that fits.
        depth (`int`): Backbone layers below it.
        verdicts (`tuple[ExitVerdict, ...]`): On every exit, shallowest first.
        description ([`FamilyDescription`]): The numbers they rest on.
    """

    exit_idx: int
    depth: int
    verdicts: tuple[ExitVerdict, ...]
    description: FamilyDescription

    def __str__(self) -> str:
        return _lines(self.verdicts)


def choose_exit(
    model_or_path: str | os.PathLike[str] | FamilialForCausalLM | FamilialConfig,
    *,
    memory: float | str | None = None,
    flops_per_token: float | None = None,
    context: int | None = None,
    dtype: str | torch.dtype | None = None,
    **where: Any,
) -> ExitChoice:
    """Choose the deepest member that fits.

    Args:
        model_or_path (`str`, `os.PathLike`, [`FamilialForCausalLM`] or [`FamilialConfig`]): As in
            [`describe`]; no weights are read.
        memory (`int` or `str`, *optional*): Bytes, as a number or as in `"2GB"` and `"512MiB"`, for
            the weights and for the cache of one text of `context` tokens; what the layers hold in
            passing is not counted.
        flops_per_token (`float`, *optional*): FLOPs of one more token after `context` tokens.
        context (`int`, *optional*): As in [`describe`].
        dtype (`str` or `torch.dtype`, *optional*): As in [`describe`].
        **where: `revision`, `token`, `endpoint`, as in [`describe`].

    Returns:
        [`ExitChoice`]

    Raises:
        NoExitFitsError: If none does; it says why, exit by exit.
        ValueError: If neither limit is given, or one is no positive number; else as in
            [`describe`].

    Example:
        >>> choice = choose_exit("me/family", memory=2 * 1024**3, context=2048, dtype="bfloat16")
        >>> model = FamilialForCausalLM.from_pretrained("me/family", max_exit=choice.exit_idx)
    """
    memory = _check_limits(memory, flops_per_token)
    found = describe(model_or_path, context=context, dtype=dtype, **where)
    return pick_exit(found, judge_exits(found, memory, flops_per_token))


def judge_exits(
    family: FamilyDescription,
    memory: float | str | None = None,
    flops_per_token: float | None = None,
) -> tuple[ExitVerdict, ...]:
    """Compare every member with the limits of [`choose_exit`], shallowest first."""
    limit = _check_limits(memory, flops_per_token)
    return tuple(_judge(row, family, limit, flops_per_token) for row in family.exits)


def pick_exit(family: FamilyDescription, verdicts: tuple[ExitVerdict, ...]) -> ExitChoice:
    """Return the deepest member that fits; raise `NoExitFitsError` if none does."""
    fitting = [verdict for verdict in verdicts if verdict.fits]
    if not fitting:
        raise NoExitFitsError(
            f"no member of `{family.name}` fits: {_lines(verdicts, '; ')}", verdicts
        )
    return ExitChoice(fitting[-1].exit_idx, fitting[-1].depth, verdicts, family)


def _check_limits(memory: float | str | None, flops_per_token: float | None) -> float | None:
    """Return the limit on memory in bytes, if there is one."""
    memory = parse_size(memory) if isinstance(memory, str) else memory
    if memory is None and flops_per_token is None:
        raise ValueError("give `memory`, `flops_per_token`, or both: there is no limit.")
    for name, limit in (("memory", memory), ("flops_per_token", flops_per_token)):
        if limit is not None and not isinstance(limit, Real):
            raise ValueError(f"`{name}` must be a number, got {limit!r}.")
        if limit is not None and not limit > 0:
            raise ValueError(f"`{name}` must be more than 0, got {limit!r}.")
    return memory


def _judge(
    row: ExitDescription,
    family: FamilyDescription,
    memory: float | None,
    flops_per_token: float | None,
) -> ExitVerdict:
    """Compare one member with the limits."""
    checks = []
    if memory is not None:
        weights = row.parameters * resolve_dtype(family.dtype).itemsize
        need = weights + (row.cache_bytes or 0)
        cache = "a cache of unknown size"
        if row.cache_bytes is not None:
            cache = f"{row.cache_bytes:,} of cache at {family.context} tokens"
        text = f"{need:,} bytes ({weights:,} of {family.dtype} weights, {cache})"
        checks.append((need <= memory, f"{text} {{}} {memory:,}"))
    if flops_per_token is not None:
        # without a cache, each further token costs the whole text again
        again = row.prefill_flops_per_token * (family.context + 1)
        flops = row.decode_flops_per_token or again
        checks.append((flops <= flops_per_token, f"{flops:.4g} FLOPs {{}} {flops_per_token:.4g}"))
    reason = ", ".join(text.format("within" if ok else "over") for ok, text in checks)
    return ExitVerdict(row.exit_idx, row.depth, all(ok for ok, _ in checks), reason)


def _lines(verdicts: tuple[ExitVerdict, ...], between: str = "\n") -> str:
    return between.join(
        f"exit {v.exit_idx} (depth {v.depth}) {'fits' if v.fits else 'does not fit'}: {v.reason}"
        for v in verdicts
    )

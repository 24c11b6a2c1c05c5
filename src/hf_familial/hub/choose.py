"""Choice of the deepest member that fits a device."""

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
    """The result of comparing one member with the limits of a device.

    Attributes:
        exit_idx (`int`): Index into `config.exits`. Exit 0 is the shallowest.
        depth (`int`): Backbone layers below the exit.
        fits (`bool`): Whether the member is within all limits.
        reason (`str`): The numbers and limits, in one line.
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
        depth (`int`): Backbone layers below that exit.
        verdicts (`tuple[ExitVerdict, ...]`): One per exit, shallowest first.
        description ([`FamilyDescription`]): Sizes and costs of all members.
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
    """Return the deepest member that fits a memory limit, a compute limit, or both.

    This function reads no weights. All errors of [`describe`] are possible too.

    Args:
        model_or_path (`str`, `os.PathLike`, [`FamilialForCausalLM`] or [`FamilialConfig`]): The
            family: a folder, a repository on the Hub, a model in memory, or a config.
        memory (`int` or `str`, *optional*): Memory for the weights and for the KV cache of one text
            of `context` tokens, as a number of bytes or as text like `"2GB"` or `"512MiB"`. The
            temporary activations of the layers are not counted.
        flops_per_token (`float`, *optional*): Maximum FLOPs of one more token after `context`
            tokens.
        context (`int`, *optional*): Tokens of text. Defaults to the limit of the backbone, at most
            4096.
        dtype (`str` or `torch.dtype`, *optional*): Dtype of the weights and of the KV cache.
            Defaults to that of the checkpoint.
        **where: `revision`, `token` and `endpoint` of [`describe`].

    Returns:
        [`ExitChoice`]

    Raises:
        NoExitFitsError: If no member fits. The message lists the reason for each exit.
        ValueError: If there is no limit, or if a limit is not a positive number.

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
    """Compare each member with the limits of [`choose_exit`], shallowest first."""
    limit = _check_limits(memory, flops_per_token)
    return tuple(_judge(row, family, limit, flops_per_token) for row in family.exits)


def pick_exit(family: FamilyDescription, verdicts: tuple[ExitVerdict, ...]) -> ExitChoice:
    """Return the deepest member that fits. Raise `NoExitFitsError` if no member fits."""
    fitting = [verdict for verdict in verdicts if verdict.fits]
    if not fitting:
        raise NoExitFitsError(
            f"no member of `{family.name}` fits: {_lines(verdicts, '; ')}", verdicts
        )
    return ExitChoice(fitting[-1].exit_idx, fitting[-1].depth, verdicts, family)


def _check_limits(memory: float | str | None, flops_per_token: float | None) -> float | None:
    """Check both limits, and return the memory limit in bytes or `None`."""
    memory = parse_size(memory) if isinstance(memory, str) else memory
    if memory is None and flops_per_token is None:
        raise ValueError("`memory` and `flops_per_token` are both None. Pass one of them, or both.")
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
        # without a cache, each further token runs the whole text again
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

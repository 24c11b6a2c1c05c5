"""Description of a family: size and cost of each member, computed without its weights."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .._wording import metric, near_words, size
from ..checkpoints.safetensors_file import FLOATS, TensorEntry
from ..errors import HubUnavailableError
from ..flops import count_family, member_flops, member_parameters
from ..models import is_family, is_family_config
from ..models.familial import FamilialConfig, FamilialForCausalLM
from ._losses import read_losses
from ._source import ONCE, Source, find_source


logger = logging.getLogger(__name__)

# dtypes for which the size of a member is shown
DTYPES = ("float32", "bfloat16", "float16")
LONGEST_CONTEXT = 4096

HEADINGS = (
    *("exit", "depth", "params", "no emb.", "fp32", "bf16"),
    *("prefill", "decode", "KV/tok", "cache", "loss"),
)
UNMEASURED = (
    "There is no recorded loss. Measure it with `evaluate_exits`, or save the family with "
    "`FamilialTrainer.save_model` after an evaluation."
)


@dataclass(frozen=True)
class ExitDescription:
    """Size and cost of one member.

    Attributes:
        exit_idx (`int`): Index into `config.exits`. Exit 0 is the shallowest.
        depth (`int`): Backbone layers below the exit.
        parameters (`int`): Number of all parameters of the member. A shared parameter counts once.
        non_embedding (`int`): Number of parameters without the token embedding and the output head.
        weight_bytes (`Mapping[str, int]`): Bytes of all parameters, for each dtype.
        stored_bytes (`int`, *optional*): Bytes of the member's tensors in the checkpoint.
        prefill_flops_per_token (`float`): Mean FLOPs per token of reading `context` tokens, with
            logits at every position.
        decode_flops_per_token (`float`, *optional*): FLOPs of one more token after the context.
            `None` if the backbone does not use a Transformers cache.
        cache_bytes (`int`, *optional*): Bytes of the KV cache of one text of `context` tokens,
            other cached states included.
        kv_bytes_per_token (`int`, *optional*): Bytes that one more token adds to the cache.
        exact (`bool`): `True` if FLOPs and cache were counted operation by operation. `False` if
            they are estimates.
        eval_loss (`float`, *optional*): Recorded evaluation loss, in nats per token.
    """

    exit_idx: int
    depth: int
    parameters: int
    non_embedding: int
    weight_bytes: Mapping[str, int]
    stored_bytes: int | None
    prefill_flops_per_token: float
    decode_flops_per_token: float | None
    cache_bytes: int | None
    kv_bytes_per_token: int | None
    exact: bool
    eval_loss: float | None


@dataclass(frozen=True)
class FamilyDescription:
    """Sizes and costs of all members of a family, returned by [`describe`].

    Attributes:
        name (`str`): Folder, repository, or name of the model.
        backbone (`str`): `model_type` of the backbone.
        hidden_size (`int`): Width of the hidden states.
        vocab_size (`int`): Rows of the token embedding.
        num_exit_layers (`int`): Private layers of each early exit.
        parameters (`int`): Parameters of the whole family. A shared parameter counts once.
        stored_bytes (`int`, *optional*): Bytes of all tensors in the checkpoint.
        dtype (`str`): Dtype of weights and cache that the numbers in `exits` assume.
        context (`int`): Tokens of text that FLOPs and cache in `exits` assume.
        exits (`tuple[ExitDescription, ...]`): One per member, shallowest first.
    """

    name: str
    backbone: str
    hidden_size: int
    vocab_size: int
    num_exit_layers: int
    parameters: int
    stored_bytes: int | None
    dtype: str
    context: int
    exits: tuple[ExitDescription, ...]

    def __str__(self) -> str:
        """Return the table that `hf-familial describe` prints, in 80 columns."""
        stored = "" if self.stored_bytes is None else f", {size(self.stored_bytes)} stored"
        heading = (
            f"{self.name}: {len(self.exits)} exits on {self.backbone}, "
            f"{self.parameters:,} parameters{stored}\n"
            f"FLOPs per token, KV bytes per token, cache: at {self.context:,} tokens, batch 1, "
            f"{self.dtype}; loss in nats per token"
        )
        rows = [HEADINGS, *map(_cells, self.exits)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            " ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        if not all(row.exact for row in self.exits):
            lines.append("FLOPs and cache are estimates. This backbone does not run without data.")
        if all(row.eval_loss is None for row in self.exits):
            lines.append(UNMEASURED)
        return "\n".join([heading, *lines])

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain Python values, with the exits as a list of dicts."""
        return asdict(self) | {"exits": [asdict(row) for row in self.exits]}


def describe(
    model_or_path: str | os.PathLike[str] | FamilialForCausalLM | FamilialConfig,
    *,
    context: int | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    local_files_only: bool = False,
) -> FamilyDescription:
    """Return the size and cost of each member of a family.

    The function reads no weights, neither from a folder nor from the Hub. It reads `config.json`,
    the headers of the safetensors files, and small files with recorded losses.

    Args:
        model_or_path (`str`, `os.PathLike`, [`FamilialForCausalLM`] or [`FamilialConfig`]): The
            family: a folder, a repository on the Hub, a model in memory, or a config.
        context (`int`, *optional*): Tokens of text. Defaults to the limit of the backbone, at most
            4096.
        dtype (`str` or `torch.dtype`, *optional*): Dtype of the weights and of the KV cache.
            Defaults to that of the checkpoint.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str` or `bool`, *optional*): Token for the Hub.
        endpoint (`str`, *optional*): Address of the Hub. Defaults to https://huggingface.co.
        local_files_only (`bool`, *optional*, defaults to `False`): Whether to read only the local
            cache of the Hub. The cache is also used in offline mode, and if the Hub does not
            answer.

    Returns:
        [`FamilyDescription`]

    Raises:
        FileNotFoundError: If the folder does not exist or has no checkpoint.
        HubError: If the Hub cannot be read.
        ValueError: If `model_or_path` is not a family, or if `context` or `dtype` is wrong.

    Example:
        >>> for row in describe("me/family", context=2048).exits:
        ...     print(row.depth, row.parameters, row.kv_bytes_per_token)
    """
    tensors, losses = None, None
    config: FamilialConfig
    given: Any = model_or_path
    if is_family(given) or is_family_config(given):
        config = getattr(given, "config", given)
        text_config = config.text_config
        name = str(config.name_or_path or text_config.name_or_path or text_config.model_type)
    else:
        where = {"revision": revision, "token": token, "endpoint": endpoint}
        source = find_source(model_or_path, local_files_only=local_files_only, **where)
        name, (config, tensors, losses) = source.name, _read(source)
    kind = resolve_dtype(dtype or _own_dtype(model_or_path, config, tensors))
    context = _resolve_context(config, context)
    stored = _stored_bytes(config, tensors) if tensors else [None] * config.num_exits
    rows = []
    for k, member in enumerate(member_flops(config, context, kind)):
        counts = member.parameters
        rows.append(
            ExitDescription(
                exit_idx=k,
                depth=config.exits[k],
                parameters=counts.total,
                non_embedding=counts.non_embedding,
                weight_bytes={n: counts.total * getattr(torch, n).itemsize for n in DTYPES},
                stored_bytes=stored[k],
                prefill_flops_per_token=member.prefill_flops_per_token,
                decode_flops_per_token=member.decode_flops_per_token,
                cache_bytes=member.cache.bytes if member.cache else None,
                kv_bytes_per_token=member.cache.per_token if member.cache else None,
                exact=member.exact and (member.cache is None or member.cache.exact),
                eval_loss=losses[k] if losses else None,
            )
        )
    return FamilyDescription(
        name=name,
        backbone=config.text_config.model_type,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_exit_layers=config.num_exit_layers,
        parameters=count_family(config)["total"],
        stored_bytes=sum(tensor.nbytes for tensor in tensors.values()) if tensors else None,
        dtype=str(kind).removeprefix("torch."),
        context=context,
        exits=tuple(rows),
    )


def _cells(row: ExitDescription) -> tuple[str, ...]:
    """Return the cells of one table row, in the order of `HEADINGS`."""
    return (
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


def _read(source: Source) -> tuple[FamilialConfig, Any, Any]:
    """Return config, tensors and losses. If the Hub does not answer, read the local cache."""
    cached = source.cached() if source.folder is None else None
    asked = replace(source, retry=ONCE) if cached else source
    try:
        config = asked.config()
        return config, asked.tensors(), read_losses(asked, config)
    except HubUnavailableError as error:
        if cached is None or cached.read_text("config.json") is None:
            raise
        logger.warning("Reading `%s` from the local cache: %s", source.name, error)
        config = cached.config()
        return config, cached.tensors(), read_losses(cached, config)


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return a floating-point dtype of torch, given the dtype or its name.

    Raise `ValueError` for anything else.
    """
    kind = dtype
    if isinstance(dtype, str):
        kind = getattr(torch, dtype.removeprefix("torch."), None)  # type: ignore[assignment]
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(
            f"`dtype` must be a floating-point dtype, such as {', '.join(DTYPES)}, got {dtype!r}"
            f"{near_words(dtype, DTYPES, 1) or '.'}"
        )
    return kind


def _own_dtype(
    model: Any, config: FamilialConfig, tensors: Mapping[str, TensorEntry] | None
) -> str | torch.dtype:
    """Return the dtype of a model, or of most bytes of a checkpoint, or of the config."""
    if is_family(model):
        return model.dtype
    sizes: Counter[str] = Counter()
    for tensor in (tensors or {}).values():
        sizes[tensor.dtype] += tensor.nbytes
    known = [FLOATS[name] for name, _ in sizes.most_common() if name in FLOATS]
    return known[0] if known else config.dtype or config.text_config.dtype or "float32"


def _resolve_context(config: FamilialConfig, context: int | None) -> int:
    if context is None:
        limit = getattr(config.text_config, "max_position_embeddings", None) or LONGEST_CONTEXT
        return min(LONGEST_CONTEXT, limit)
    if not isinstance(context, int) or isinstance(context, bool) or context < 1:
        raise ValueError(f"`context` must be a number of tokens, 1 or more, got {context!r}.")
    return context


def _stored_bytes(config: FamilialConfig, tensors: Mapping[str, TensorEntry]) -> list[int | None]:
    """Return the bytes of the tensors in the checkpoint that each member needs."""
    with torch.device("meta"):
        family = FamilialForCausalLM(config)
    parameters = list(family.named_parameters(remove_duplicate=False))
    stored: list[int | None] = []
    for k in range(config.num_exits):
        needed = {id(p) for p in member_parameters(family, k)}
        names = [name for name, p in parameters if id(p) in needed]
        # compare names only up to the layer index, because files may split fused tensors
        starts = tuple({re.sub(r"(\.\d+\.).*", r"\1", name) for name in names})
        stored.append(sum(t.nbytes for name, t in tensors.items() if name.startswith(starts)))
    return stored

"""A plain member as config and tensor names: those of a stock checkpoint of its host.

A plain member is the backbone and the head of the family cut at its exit, under the names that the
host's own files have. This module handles configs and names only, no weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..models.familial import FamilialConfig
from .cuts import BACKBONE, HEAD, check_cut, cut_config, cut_names, find_layout


# model_type -> how names begin in the host's files where they do not in its modules
FILE_NAMES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "bailing_hybrid": (("model.embed_tokens.", "model.word_embeddings."),),
    "gpt_neox": (("lm_head.", "embed_out."),),
    "nemotron_h": (("model.", "backbone."),),
}

# what a config says of code beside it: a member is of transformers' own class, and has none
CODE = ("auto_map", "custom_pipelines")


def check_not_quantised(called: str, config: FamilialConfig, quantised: bool = False) -> None:
    """Raise `CheckpointError` for a quantised family: a member cannot take over its tensors.

    Args:
        called (`str`): What the message calls the family.
        config ([`FamilialConfig`]): Its config, which may say so, as may that of its backbone.
        quantised (`bool`, *optional*, defaults to `False`): Whether it is known already.
    """
    configs = (config, config.text_config)
    if quantised or any(getattr(c, "quantization_config", None) is not None for c in configs):
        raise CheckpointError(
            f"{called} is quantised: its tensors are no copies of a member's. Export the family in "
            "its original precision, then quantise the member."
        )


def plain_config(
    config: FamilialConfig, exit_idx: int, dtype: str | None = None, verified: bool = False
) -> Any:
    """Build the config of a plain member: of the host's class, with the member's layers only.

    Args:
        config ([`FamilialConfig`]): Of the family; not changed.
        exit_idx (`int`): Exit at which the member ends.
        dtype (`str`, *optional*): Name of the dtype of its weights; defaults to the family's.
        verified (`bool`, *optional*, defaults to `False`): Whether the member will be checked
            numerically, so that types never tried may pass.

    Returns:
        `PreTrainedConfig`: Of the class of `config.text_config`.

    Raises:
        CutError: If the member is not what a truncated host computes.
        IndexError: If there is no such exit.
    """
    check_cut(config, exit_idx, verified)
    text_config = cut_config(config, exit_idx).text_config
    layout = find_layout(text_config)
    text_config.architectures = [layout.architecture]
    for name in CODE:
        text_config.__dict__.pop(name, None)
    if getattr(text_config, "output_router_logits", False) and not layout.routed:
        # hosts balance what they ask for, and fail where there is none
        text_config.output_router_logits = False
    text_config.dtype = dtype or config.dtype or text_config.dtype
    return text_config


def plain_tensors(
    config: FamilialConfig, exit_idx: int, names: Iterable[str], in_files: bool = True
) -> dict[str, str]:
    """Return which tensors of a family a plain member has, and under which names.

    Args:
        config ([`FamilialConfig`]): Of the family.
        exit_idx (`int`): Exit at which the member ends.
        names (`Iterable[str]`): Names of all tensors of the family.
        in_files (`bool`, *optional*, defaults to `True`): Whether these are names in files;
            otherwise in modules, which differ for some hosts.

    Returns:
        `dict[str, str]`: Name in the family to name in the plain member.

    Raises:
        CutError: If a tensor that the member needs is missing.
        IndexError: If there is no such exit.
    """
    layout = find_layout(cut_config(config, exit_idx).text_config)
    starts = {BACKBONE: f"{layout.decoder}.", HEAD: f"{layout.head}."}
    in_host = FILE_NAMES.get(config.text_config.model_type, ()) if in_files else ()
    result = {}
    for source, name in cut_names(config, exit_idx, names, layout).items():
        start = next((start for start in starts if name.startswith(start)), None)
        if start is not None:
            result[source] = _renamed(starts[start] + name[len(start) :], in_host)
    return result


def _renamed(name: str, starts: Iterable[tuple[str, str]]) -> str:
    for old, new in starts:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def add_old_names(config: Any, folder: Path) -> None:
    """Add to a member's `config.json` the names that transformers 4 has for rotary embeddings.

    It reads `rope_theta`, `rope_scaling` and `partial_rotary_factor`, and would take its defaults
    where a file has `rope_parameters` alone. Nothing is added where the defaults are right, nor for
    types whose rotary embeddings differ by layer. transformers 5 reads the same from both.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in rope:
        return
    usual = type(config)().rope_parameters or {}
    names = ("rope_theta", "partial_rotary_factor")
    fields = {n: rope[n] for n in names if rope.get(n) not in (None, usual.get(n))}
    scaling = {n: value for n, value in rope.items() if n not in names}
    if scaling != {n: value for n, value in usual.items() if n not in names}:
        fields["rope_scaling"] = scaling
    if fields:
        path = folder / "config.json"
        fields |= json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")

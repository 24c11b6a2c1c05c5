"""The config and tensor names of a plain member: an ordinary checkpoint of the backbone's class.

A plain member is the backbone and the head of the family cut at its exit. Its tensors have the
names that files of the backbone's class use. This module has configs and names only, no weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..models.familial import FamilialConfig
from .cuts import BACKBONE, HEAD, check_cut, cut_config, cut_names, find_layout


# model_type -> (prefix of names in memory, prefix of the same names in files)
FILE_NAMES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "bailing_hybrid": (("model.embed_tokens.", "model.word_embeddings."),),
    "gpt_neox": (("lm_head.", "embed_out."),),
    "nemotron_h": (("model.", "backbone."),),
}

# config fields about custom code; a plain member needs none, because its class is in Transformers
CODE = ("auto_map", "custom_pipelines")


def check_not_quantised(called: str, config: FamilialConfig, quantised: bool = False) -> None:
    """Raise `CheckpointError` if a family is quantised, because a member needs plain tensors.

    Args:
        called (`str`): The name of the family in the message.
        config ([`FamilialConfig`]): The config of the family.
        quantised (`bool`, *optional*, defaults to `False`): Raise in any case, because the caller
            found quantised tensors.
    """
    configs = (config, config.text_config)
    if quantised or any(getattr(c, "quantization_config", None) is not None for c in configs):
        raise CheckpointError(
            f"{called} is quantised, so its tensors cannot be copied to a member. Export the "
            "family in its original precision, then quantise the member."
        )


def plain_config(
    config: FamilialConfig, exit_idx: int, dtype: str | None = None, verified: bool = False
) -> Any:
    """Build the config of a plain member, in the class of the backbone's config.

    Args:
        config ([`FamilialConfig`]): The config of the family. It is not changed.
        exit_idx (`int`): The exit where the member ends.
        dtype (`str`, *optional*): The dtype of its weights, for example `"bfloat16"`. Defaults to
            the family's dtype.
        verified (`bool`, *optional*, defaults to `False`): Set to `True` if the caller compares the
            logits afterwards. Then untested model types are accepted.

    Returns:
        `PreTrainedConfig`: The config, of the same class as `config.text_config`.

    Raises:
        CutError: If a shallower backbone would not compute the same results as the exit.
        IndexError: If the family does not have this exit.

    Example:
        >>> plain_config(family.config, exit_idx=0).num_hidden_layers
    """
    check_cut(config, exit_idx, verified)
    text_config = cut_config(config, exit_idx).text_config
    layout = find_layout(text_config)
    text_config.architectures = [layout.architecture]
    for name in CODE:
        text_config.__dict__.pop(name, None)
    if getattr(text_config, "output_router_logits", False) and not layout.routed:
        # without routed layers, a balancing loss from router logits would fail
        text_config.output_router_logits = False
    text_config.dtype = dtype or config.dtype or text_config.dtype
    return text_config


def plain_tensors(
    config: FamilialConfig, exit_idx: int, names: Iterable[str], in_files: bool = True
) -> dict[str, str]:
    """Return the tensors of a plain member, as a dict from family names to member names.

    Args:
        config ([`FamilialConfig`]): The config of the family.
        exit_idx (`int`): The exit where the member ends.
        names (`Iterable[str]`): The names of all tensors of the family.
        in_files (`bool`, *optional*, defaults to `True`): Whether to return the names in checkpoint
            files. With `False` they are the names in memory, which differ for some backbones.

    Returns:
        `dict[str, str]`: The name in the plain member, by the name in the family.

    Raises:
        CutError: If a tensor that the member needs is missing.
        IndexError: If the family does not have this exit.

    Example:
        >>> plain_tensors(family.config, exit_idx=0, names=family.state_dict())
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
    """Add the rotary embedding fields of Transformers 4 to the `config.json` of a member.

    Transformers 4 reads `rope_theta`, `rope_scaling` and `partial_rotary_factor`. It ignores
    `rope_parameters` and would use its defaults. Transformers 5 reads both forms.

    Nothing is added if the defaults are right, or if rotary embeddings differ by layer.
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
        # Transformers 5 then ignores `rope_parameters`, and its own default of `rope_theta` may
        # differ from that of the class
        fields |= {n: rope[n] for n in names if rope.get(n) is not None}
    if fields:
        path = folder / "config.json"
        fields |= json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")

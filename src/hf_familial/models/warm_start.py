"""The code of `from_backbone`, which turns a pretrained model into a family."""

from __future__ import annotations

import copy
import os
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from . import is_family_config
from .backbone_verification import check_unverified, decoder_of
from .familial.backbones import can_tie, unsupported_backbone
from .familial.configuration_familial import evenly_spaced_exits
from .zero3 import gathered, is_partitioned, partition


# arguments of `from_backbone` that users misspell
OPTIONS = ("exits", "num_exits", "exit_norm", "exit_head", "num_exit_layers")
# attributes that a quantiser of Transformers sets on a model
QUANTISED = set(
    "hf_quantizer is_quantized quantization_method is_loaded_in_4bit is_loaded_in_8bit".split()
)
# fields of its config that list the modules to leave unquantised
SKIPPED = ("modules_to_not_convert", "llm_int8_skip_modules")


def load_host(backbone: Any, **kwargs: Any) -> PreTrainedModel:
    """Load the causal LM, or return it if it is a model already. Raise if it has no head."""
    for name in kwargs:
        if close := get_close_matches(name, OPTIONS, 1, 0.8):
            raise TypeError(f"`from_backbone` has no argument `{name}`. Did you mean `{close[0]}`?")
    if isinstance(backbone, PreTrainedModel):
        if kwargs:
            raise TypeError(
                f"Arguments {sorted(kwargs)} do not apply to a loaded model. Pass its name or path."
            )
        host = backbone
    elif isinstance(backbone, (str, os.PathLike)):
        host = AutoModelForCausalLM.from_pretrained(backbone, **kwargs)
    else:
        raise TypeError(
            f"`backbone` must be a name, a path or a causal LM, got {type(backbone).__name__}."
        )
    if is_family_config(host.config):
        raise ValueError("`backbone` is a family already. Load it with `from_pretrained`.")
    if host.get_output_embeddings() is None:
        raise unsupported_backbone(
            host.config.model_type, f"{type(host).__name__} has no language model head"
        )
    return host


def family_of(
    cls: Any,
    host: PreTrainedModel,
    exits: list[int] | None,
    num_exits: int | None,
    **fields: Any,
) -> Any:
    """Build a family that shares the modules of a causal LM, without a second copy of weights."""
    if exits is not None and num_exits is not None:
        raise ValueError(f"Pass `exits` or `num_exits`, not both, got {exits} and {num_exits}.")
    check_unverified(host, private_layers=bool(fields.get("num_exit_layers")))
    text_config = host.config.get_text_config(decoder=True)
    if num_exits is not None:
        exits = evenly_spaced_exits(text_config.num_hidden_layers, num_exits)
    # the new config would overwrite the choice of kernels in `text_config`, so pass it on
    attention, experts = text_config._attn_implementation, text_config._experts_implementation
    config = cls.config_class(
        text_config=text_config,
        exits=exits,
        dtype=host.dtype,
        attn_implementation=attention,
        **fields,
    )
    text_config._experts_implementation = experts
    if can_tie(text_config):
        # the weights decide, because a checkpoint with a separate head is not tied
        config.tie_word_embeddings = _is_tied(host)
    with torch.device("meta"):
        family = cls(config)
    model = family.model
    model.backbone = decoder_of(host)
    family.lm_head = host.get_output_embeddings()
    partitioned = any(map(is_partitioned, host.parameters()))
    copied = [model.decoder.norm, family.lm_head]
    if config.num_exit_layers:
        copied += model.decoder.layers
    with gathered(copied):
        model.exits = model.build_exits(keep=True)
        family.exit_heads = family.build_exit_heads(keep=True)
    if partitioned:
        partition(family)
    if host.can_generate():
        family.generation_config = copy.deepcopy(host.generation_config)
        if not model.spec.cache:
            family.generation_config.use_cache = False
    # Store the name in `text_config` only. Adapters would use a name of the family itself as that
    # of its checkpoint, which does not exist yet.
    if not text_config.name_or_path:
        text_config.name_or_path = host.name_or_path
    _take_quantisation(family, host)
    family.tie_weights()
    return family.train(host.training)


def _take_quantisation(family: Any, host: PreTrainedModel) -> None:
    """Copy the attributes that saving and loading of quantised weights need."""
    if getattr(host, "hf_quantizer", None) is None:
        return  # not quantised, or the user has dequantised it
    for name in QUANTISED & vars(host).keys():
        setattr(family, name, vars(host)[name])
    config = copy.deepcopy(host.hf_quantizer.quantization_config)
    plain = [n for n, module in family.named_modules() if _is_plain_linear(module)]
    for field in SKIPPED:
        if hasattr(config, field):
            # list the unquantised modules by their names in the family, own heads included
            setattr(config, field, [*(getattr(config, field) or ()), *plain])
    family.config.quantization_config = config


def _is_plain_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D) and type(module.weight) is nn.Parameter


def _is_tied(host: PreTrainedModel) -> bool:
    """Return whether the output head of a model is tied to its embedding."""
    head: Any = host.get_output_embeddings()
    return getattr(head, "weight", None) is getattr(host.get_input_embeddings(), "weight", 0)

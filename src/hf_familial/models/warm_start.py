"""From a pretrained decoder to a family: its modules, and copies of them for the early exits."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from . import is_family_config
from .backbone_verification import check_unverified, decoder_of
from .familial.backbones import can_tie, unsupported_backbone
from .familial.configuration_familial import evenly_spaced_exits


# what a quantiser of transformers sets on a model, and where its config says what it leaves alone
QUANTISED = set(
    "hf_quantizer is_quantized quantization_method is_loaded_in_4bit is_loaded_in_8bit".split()
)
SKIPPED = ("modules_to_not_convert", "llm_int8_skip_modules")


def load_host(backbone: Any, **kwargs: Any) -> PreTrainedModel:
    """Return the causal LM to start from, loaded or as given; raise if it has no head."""
    if isinstance(backbone, PreTrainedModel):
        if kwargs:
            raise TypeError(
                f"{sorted(kwargs)} cannot be applied to a model in memory; pass a name or a path."
            )
        host = backbone
    elif isinstance(backbone, (str, os.PathLike)):
        host = AutoModelForCausalLM.from_pretrained(backbone, **kwargs)
    else:
        raise TypeError(
            "`backbone` must be a name, a path or a causal language model, got "
            f"{type(backbone).__name__}."
        )
    if is_family_config(host.config):
        raise ValueError("`backbone` is a family already; load it with `from_pretrained`.")
    if host.get_output_embeddings() is None:
        raise unsupported_backbone(
            host.config.model_type, f"{type(host).__name__} has no language-model head"
        )
    return host


def family_of(
    cls: Any,
    host: PreTrainedModel,
    exits: list[int] | None,
    num_exits: int | None,
    **fields: Any,
) -> Any:
    """Build a family around a host's modules, without allocating its weights twice."""
    if exits is not None and num_exits is not None:
        raise ValueError(f"give `exits` or `num_exits`, not both: got {exits} and {num_exits}.")
    check_unverified(host, private_layers=bool(fields.get("num_exit_layers")))
    text_config = host.config.get_text_config(decoder=True)
    if num_exits is not None:
        exits = evenly_spaced_exits(text_config.num_hidden_layers, num_exits)
    # a config writes its own choice of kernels, here none, over its sub-config's
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
        # what the host does: a head that a checkpoint holds beside the embedding is not tied
        config.tie_word_embeddings = _is_tied(host)
    with torch.device("meta"):
        family = cls(config)
    model = family.model
    model.backbone = decoder_of(host)
    model.exits = model.build_exits(keep=True)
    family.lm_head = host.get_output_embeddings()
    family.exit_heads = family.build_exit_heads(keep=True)
    if host.can_generate():
        family.generation_config = copy.deepcopy(host.generation_config)
        if not model.spec.cache:
            family.generation_config.use_cache = False
    # `text_config` names the decoder. A name of the family itself would be taken for its
    # checkpoint, by adapters above all, and there is none yet.
    if not text_config.name_or_path:
        text_config.name_or_path = host.name_or_path
    _take_quantisation(family, host)
    family.tie_weights()
    return family.train(host.training)


def _take_quantisation(family: Any, host: PreTrainedModel) -> None:
    """Take over what the host's class needs to save quantised weights and to load them again."""
    if getattr(host, "hf_quantizer", None) is None:
        return  # also where the weights were made whole and the quantiser was taken off by hand
    for name in QUANTISED & vars(host).keys():
        setattr(family, name, vars(host)[name])
    config = copy.deepcopy(host.hf_quantizer.quantization_config)
    plain = [n for n, module in family.named_modules() if _is_plain_linear(module)]
    for field in SKIPPED:
        if hasattr(config, field):
            # what is not quantised, under its names in a family: heads of early exits among it
            setattr(config, field, [*(getattr(config, field) or ()), *plain])
    family.config.quantization_config = config


def _is_plain_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D) and type(module.weight) is nn.Parameter


def _is_tied(host: PreTrainedModel) -> bool:
    """Return whether the output head of a host is its embedding."""
    head: Any = host.get_output_embeddings()
    return getattr(head, "weight", None) is getattr(host.get_input_embeddings(), "weight", 0)

"""Members of a family in memory, built as separate models that share its weights."""

from __future__ import annotations

import copy
import re
from itertools import chain
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from ..errors import CutError
from ..models import is_family
from ..models.backbone_verification import VERIFIED
from ..models.familial import FamilialForCausalLM
from .cuts import check_cut, cut_config, cut_names, find_layout
from .plain import check_not_quantised, plain_config, plain_tensors
from .safetensors_file import to_dtype


TOLERANCE = 1e-5  # allowed difference of logits, relative to the largest one


def merged_family(model: Any) -> Any:
    """Return a family without adapters. For a `PeftModel`, merge the active ones into a copy."""
    model = getattr(model, "_orig_mod", model)  # unwrap a compiled model
    wrapped = hasattr(model, "get_base_model")
    family = model.get_base_model() if wrapped else model
    if not is_family(family):
        return model
    if wrapped and hasattr(model.base_model, "merge_and_unload"):
        # peft merges in place
        return copy.deepcopy(model).merge_and_unload()
    if wrapped:
        kinds = ", ".join(str(config.peft_type.value) for config in model.peft_config.values())
        raise ValueError(
            f"an adapter of type {kinds} cannot be merged into weights. Export the family without "
            "it (`model.get_base_model()`), and save the adapter separately."
        )
    if getattr(model, "peft_config", None):
        raise ValueError(
            "the family has adapters that were added with `add_adapter` or `load_adapter`: "
            f"{', '.join(model.peft_config)}. Save them with `save_pretrained(folder)`, load the "
            "family again, and export `PeftModel.from_pretrained(family, folder)`."
        )
    return model


def plain_model(
    family: FamilialForCausalLM, exit_idx: int, dtype: torch.dtype | None = None
) -> Any:
    """Build a plain member that shares the family's weights. Use it only to save it."""
    config, weights = family.config, weights_of(family)
    tried = config.text_config.model_type in VERIFIED
    member_config = plain_config(config, exit_idx, verified=True)
    with torch.device("meta" if tried else family.device):
        member: Any = AutoModelForCausalLM.from_config(member_config)
    names = plain_tensors(config, exit_idx, weights, in_files=False)
    _fill(member, {name: weights[source] for source, name in names.items()})
    if not tried:
        _check_logits(family, exit_idx, member.eval())
    return _finish(member, family, dtype)


def cut_model(
    family: FamilialForCausalLM, exit_idx: int, dtype: torch.dtype | None = None
) -> FamilialForCausalLM:
    """Build the family cut at an exit. It shares the family's weights. Use it only to save it."""
    config, weights = family.config, weights_of(family)
    check_cut(config, exit_idx)
    smaller = cut_config(config, exit_idx)
    layout = find_layout(smaller.text_config)
    with torch.device("meta"):
        member = FamilialForCausalLM(smaller)
    names = cut_names(config, exit_idx, weights, layout)
    _fill(member, {name: weights[source] for source, name in names.items()})
    return _finish(member, family, dtype)


def weights_of(family: FamilialForCausalLM) -> dict[str, torch.Tensor]:
    """Return the tensors of a family in memory.

    Raises:
        CheckpointError: If the family is quantised.
        ValueError: If weights are offloaded, not loaded, or sharded over processes.
    """
    weights = family.state_dict()
    # quantisation in place leaves tensors or modules of another class
    quantiser = getattr(family, "hf_quantizer", None)
    quantised = quantiser is not None or not all(map(_is_plain, weights.values()))
    check_not_quantised("the family in memory", family.config, quantised)
    if any(weight.device.type == "meta" for weight in weights.values()):
        raise ValueError(
            "the family has no weights in memory, because they are offloaded or not loaded. Export "
            "it from its folder."
        )
    if any(hasattr(weight, "full_tensor") for weight in weights.values()):
        raise ValueError(
            "the weights are sharded over several processes. First save the family in all of them "
            "with `trainer.save_model(folder)`, or with `accelerator.get_state_dict(model)` and "
            "`save_pretrained(folder, state_dict=...)`. Then export that folder in one process."
        )
    return weights


def _is_plain(weight: object) -> bool:
    # a tensor that is sharded over processes has another class, but is not quantised
    return type(weight) is torch.Tensor or hasattr(weight, "full_tensor")


def _fill(member: Any, weights: dict[str, torch.Tensor]) -> None:
    """Assign weights to a model without copying them."""
    own = member.state_dict()
    for name in weights.keys() & own.keys():
        found, right = weights[name], own[name]
        if (found.shape, found.is_floating_point()) != (right.shape, right.is_floating_point()):
            raise CutError(
                f"`{name}` must be {right.dtype} of shape {tuple(right.shape)} in a "
                f"`{type(member).__name__}`, got {found.dtype} of {tuple(found.shape)}. The family "
                "was quantised or changed in place. Export the original family."
            )
    missing, unexpected = member.load_state_dict(weights, strict=False, assign=True)
    member.tie_weights()
    tied = set(member.all_tied_weights_keys)
    if unexpected or set(missing) - tied:
        raise CutError(
            f"this member does not have the tensors of a `{type(member).__name__}` with "
            f"{member.config.num_hidden_layers} layers: missing "
            f"{sorted(set(missing) - tied)[:3]}, unexpected {sorted(unexpected)[:3]}."
        )


def _finish(member: Any, family: FamilialForCausalLM, dtype: torch.dtype | None) -> Any:
    member.generation_config = copy.deepcopy(family.generation_config)
    if dtype is not None:
        kinds = loaded_dtypes(member.config, dtype)
        for name, tensor in chain(member.named_parameters(), member.named_buffers()):
            if name in kinds:
                # this replaces the member's data and does not change the family's tensor
                tensor.data = to_dtype(name, tensor.data, kinds[name])
    return member


def _check_logits(family: FamilialForCausalLM, exit_idx: int, member: Any) -> None:
    """Raise `CutError` if the logits of a member differ from its exit's on random tokens."""
    size = family.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, size, (2, 24), generator=torch.Generator().manual_seed(0))
    training = family.training
    try:
        with torch.no_grad():
            right = family.eval()(ids.to(family.device), exit_idx=exit_idx, use_cache=False).logits
            found = member(ids.to(family.device), use_cache=False).logits
    finally:
        family.train(training)
    error = (found - right).abs().max() / right.abs().max()
    if not error <= TOLERANCE:
        raise CutError(
            f"exit {exit_idx} of a `{family.config.text_config.model_type}` family cannot become a "
            f"separate model: the logits of a truncated host differ by {error.item():.1e}."
        )


def loaded_dtypes(config: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype of each tensor after `from_pretrained(dtype=dtype)`, by name."""
    # some model classes keep tensors in float32, such as the correction biases of a router
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    kept = {re.compile(k.replace("*", ".*")): v for k, v in model._get_dtype_plan(dtype).items()}
    tensors = {}
    for name, tensor in model.state_dict().items():
        # a tensor without a pattern keeps the dtype from its module
        wanted = next((v for pattern, v in kept.items() if pattern.search(name)), tensor.dtype)
        tensors[name] = tensor.to(wanted)
    written = revert_weight_conversion(model, tensors)
    return {name: tensor.dtype for name, tensor in (tensors | written).items()}

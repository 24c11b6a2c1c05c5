"""Members of a family in memory, as models of their own that share its weights."""

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


TOLERANCE = 1e-5  # of logits, relative to the largest: the same operations on the same weights


def merged_family(model: Any) -> Any:
    """Return a family without adapters: of a `PeftModel` a copy, the active ones merged."""
    model = getattr(model, "_orig_mod", model)  # of `torch.compile`
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
            f"an adapter of type {kinds} cannot be merged into the weights of a member: export the "
            "family itself (`model.get_base_model()`) and keep the adapter beside it."
        )
    if getattr(model, "peft_config", None):
        raise ValueError(
            "the family holds adapters that were added in place (`add_adapter`, `load_adapter`), "
            f"{', '.join(model.peft_config)}: save them with `save_pretrained(folder)`, load the "
            "family again, and export `PeftModel.from_pretrained(family, folder)`."
        )
    return model


def plain_model(
    family: FamilialForCausalLM, exit_idx: int, dtype: torch.dtype | None = None
) -> Any:
    """Build a plain member that shares the family's weights and is fit for saving only."""
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
    """Build the family cut at an exit, as `plain_model` builds a plain member."""
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
    """Return the tensors of a family in memory."""
    weights = family.state_dict()
    # whoever quantises a model in place puts tensors of another class, or modules, where they were
    quantiser = getattr(family, "hf_quantizer", None)
    quantised = quantiser is not None or not all(map(_is_plain, weights.values()))
    check_not_quantised("the family in memory", family.config, quantised)
    if any(weight.device.type == "meta" for weight in weights.values()):
        raise ValueError(
            "the family has no weights in memory: they are offloaded or were never loaded. Export "
            "it from its folder."
        )
    if any(hasattr(weight, "full_tensor") for weight in weights.values()):
        raise ValueError(
            "the family's weights are sharded over several processes, each of which holds a part: "
            "save the family first, in all of them (`trainer.save_model(folder)`, or "
            "`accelerator.get_state_dict(model)` and `save_pretrained(folder, state_dict=...)`), "
            "then export it from that folder, in one."
        )
    return weights


def _is_plain(weight: object) -> bool:
    # one that is spread over processes is no quantised one
    return type(weight) is torch.Tensor or hasattr(weight, "full_tensor")


def _fill(member: Any, weights: dict[str, torch.Tensor]) -> None:
    """Give a model its weights without copying them."""
    own = member.state_dict()
    for name in weights.keys() & own.keys():
        found, right = weights[name], own[name]
        if (found.shape, found.is_floating_point()) != (right.shape, right.is_floating_point()):
            raise CutError(
                f"`{name}` is {found.dtype} of {tuple(found.shape)} where a "
                f"`{type(member).__name__}` has {right.dtype} of {tuple(right.shape)}: the family "
                "was quantised or changed in place. Export it as it was before."
            )
    missing, unexpected = member.load_state_dict(weights, strict=False, assign=True)
    member.tie_weights()
    tied = set(member.all_tied_weights_keys)
    if unexpected or set(missing) - tied:
        raise CutError(
            f"a `{type(member).__name__}` of {member.config.num_hidden_layers} layers has other "
            f"tensors than this member: missing {sorted(set(missing) - tied)[:3]}, unexpected "
            f"{sorted(unexpected)[:3]}."
        )


def _finish(member: Any, family: FamilialForCausalLM, dtype: torch.dtype | None) -> Any:
    member.generation_config = copy.deepcopy(family.generation_config)
    if dtype is not None:
        kinds = loaded_dtypes(member.config, dtype)
        for name, tensor in chain(member.named_parameters(), member.named_buffers()):
            if name in kinds:
                # a parameter is the member's own, its data the family's: those stay as they are
                tensor.data = to_dtype(name, tensor.data, kinds[name])
    return member


def _check_logits(family: FamilialForCausalLM, exit_idx: int, member: Any) -> None:
    """Compare a member with its exit on random tokens."""
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
            f"model of its own: the logits of a truncated host differ by {error.item():.1e}."
        )


def loaded_dtypes(config: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype of every tensor that `from_pretrained(dtype=...)` gives, by name."""
    # a host keeps some tensors in float32 whatever is asked for, such as the correction biases of a
    # router; its own class knows which
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    kept = {re.compile(k.replace("*", ".*")): v for k, v in model._get_dtype_plan(dtype).items()}
    tensors = {}
    for name, tensor in model.state_dict().items():
        # what no pattern names has the dtype that its own module made it in
        wanted = next((v for pattern, v in kept.items() if pattern.search(name)), tensor.dtype)
        tensors[name] = tensor.to(wanted)
    written = revert_weight_conversion(model, tensors)
    return {name: tensor.dtype for name, tensor in (tensors | written).items()}

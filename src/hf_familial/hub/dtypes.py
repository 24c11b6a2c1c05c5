"""The dtype of every tensor of a model that its host loads in one dtype.

A host keeps some tensors in float32 whatever dtype is asked for: the correction biases of a router,
the norms of some families in float16. Its own class knows which.
"""

from __future__ import annotations

import copy
import re
from itertools import chain
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from .safetensors_io import to_dtype


def loaded_dtypes(config: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Ask a host for the dtypes that `from_pretrained(dtype=...)` gives; no weights are made.

    Args:
        config (`PreTrainedConfig`): Of a host or of a family; not changed.
        dtype (`torch.dtype`): What is asked for.

    Returns:
        `dict[str, torch.dtype]`: By the name of a tensor, both in memory and in files.
    """
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


def convert_model(model: Any, dtype: torch.dtype) -> None:
    """Convert a model's tensors as its host loads them; tensors that others hold stay as they are.

    Args:
        model (`PreTrainedModel`): With weights.
        dtype (`torch.dtype`): What is asked for.

    Raises:
        CheckpointError: If a value is too large for its new dtype.
    """
    wanted = loaded_dtypes(model.config, dtype)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name in wanted:
            tensor.data = to_dtype(name, tensor.data, wanted[name])


__all__ = ["convert_model", "loaded_dtypes"]

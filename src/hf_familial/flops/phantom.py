"""A family without weights that runs like one with: shapes flow, nothing is allocated."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..models import is_family_config
from ..models.familial import FamilialConfig, FamilialForCausalLM


# Hosts that walk over the positions one by one, too slow at the length of training. Their FLOPs are
# a quadratic in the length, so three short sequences tell them all.
RECURRENT = frozenset({"falcon_mamba", "jamba", "mamba", "recurrent_gemma", "zamba"})
SHORT = (8, 16, 24)


def config_of(model_or_config: Any) -> FamilialConfig:
    """The config of a family, given itself or its model.

    Raises:
        TypeError: If it is not a family.
    """
    config = getattr(model_or_config, "config", model_or_config)
    if not is_family_config(config):
        raise TypeError(
            "FLOPs and parameters are counted for a familial model or its config, got "
            f"{type(model_or_config).__name__}."
        )
    return config


def phantom(config: FamilialConfig) -> FamilialForCausalLM:
    """The family on the meta device, with kernels whose shapes do not depend on data."""
    config = copy.deepcopy(config)
    for part in (config, config.text_config):
        part._attn_implementation = "eager"
        part._experts_implementation = "batched_mm"
    with torch.device("meta"):
        return FamilialForCausalLM(config).train()


@contextmanager
def fake(family: nn.Module) -> Iterator[None]:
    """Gives a model on the meta device fake tensors, with which a host sees that it is traced."""
    logger, seen = logging.getLogger("torch._subclasses.fake_tensor"), {}
    disabled, logger.disabled = logger.disabled, True
    try:
        with FakeTensorMode(), torch.device("cpu"):
            for module in family.modules():
                holders: tuple[Any, Any] = (module._parameters, module._buffers)
                for tensors in holders:
                    for name, tensor in tensors.items():
                        if tensor is not None and id(tensor) not in seen:
                            # kept beside the original, whose id must not be given to another
                            seen[id(tensor)] = (_faked(tensor), tensor)
                        if tensor is not None:
                            tensors[name] = seen[id(tensor)][0]
            yield
    finally:
        logger.disabled = disabled


def _faked(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    trained = isinstance(tensor, nn.Parameter)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if trained else empty


def walks(config: FamilialConfig, length: int) -> bool:
    """Whether a sequence is too long for a host that walks over its positions one by one."""
    return config.text_config.model_type in RECURRENT and length > SHORT[-1]


def quadratic(counts: list[int], length: int) -> int:
    """Value at a length of the quadratic through its values at the lengths `SHORT`."""
    first, second, third = counts
    steps = (length - SHORT[0]) / (SHORT[1] - SHORT[0])
    slope, curve = second - first, third - 2 * second + first
    return round(first + steps * slope + steps * (steps - 1) / 2 * curve)

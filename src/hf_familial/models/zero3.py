"""Construction of a family whose parameters DeepSpeed ZeRO-3 partitions over the processes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

from torch import nn
from transformers import modeling_utils
from transformers.integrations import deepspeed_config, is_deepspeed_zero3_enabled


@contextmanager
def construction(model: nn.Module) -> Iterator[None]:
    """Build the modules of `model` from whole parameters inside a `with` block.

    Exits are copies of modules, and a copy of a partitioned parameter is empty. So partitioning
    stops for the block. If it was active before, the parameters are partitioned at the end.
    """
    with ExitStack() as stack:
        if is_deepspeed_zero3_enabled() and not modeling_utils._is_ds_init_called:
            # otherwise `from_config` would partition the backbone alone
            stack.enter_context(modeling_utils.set_zero3_state())
        outer = _partitioner()
        if outer is None:
            yield
            return
        with _paused():
            yield
            partition(model, outer.dtype)


def _partitioner() -> Any:
    """Return the active `deepspeed.zero.Init`, or `None`."""
    module: Any = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    active = module and module.top_level_context
    return active if active is not None and active.patched else None


@contextmanager
def _paused() -> Iterator[None]:
    partition_parameters: Any = import_module("deepspeed.runtime.zero.partition_parameters")
    partition_parameters.shutdown_init_context()
    try:
        yield
    finally:
        partition_parameters.restore_init_context()


def partition(model: nn.Module, dtype: Any = None) -> None:
    """Partition all parameters that are whole, after converting them to a floating dtype."""
    deepspeed: Any = import_module("deepspeed")
    whole = [p for p in model.parameters() if not is_partitioned(p)]
    for parameter in whole:
        if dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    if whole and not any(parameter.is_meta for parameter in whole):
        deepspeed.zero.Init(module=model, config_dict_or_path=deepspeed_config(), dtype=dtype)


def is_partitioned(parameter: Any) -> bool:
    """Return whether ZeRO-3 has partitioned a parameter."""
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Gather the partitioned parameters of some modules for reading inside a `with` block."""
    parameters: set[Any] = {p for m in modules for p in m.parameters() if is_partitioned(p)}
    if not parameters:
        yield
        return
    deepspeed: Any = import_module("deepspeed")
    ordered = sorted(parameters, key=lambda parameter: parameter.ds_id)
    with deepspeed.zero.GatheredParameters(ordered):
        yield

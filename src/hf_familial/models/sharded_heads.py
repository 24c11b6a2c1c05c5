"""Output heads that FSDP2 shards, read whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def gather_head(head: Any, read: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return `read` as a forward pass of a head that FSDP2 shards, which gathers its weight.

    It takes tensors by position, since FSDP2 hooks these into the graph. The result is `None` if
    the head is sharded by other means, or something else takes part in its call.
    """
    if not _is_sharded_linear(head) or hasattr(head, "_hf_hook"):
        return None
    # FSDP2 puts one hook of each kind on what it shards
    if max(len(head._forward_hooks), len(head._forward_pre_hooks)) > 1:
        return None
    from torch.distributed.fsdp import register_fsdp_forward_method

    @torch.compiler.disable
    def gathered(*tensors: torch.Tensor) -> Any:
        # a method for the time of this call
        vars(head)["_read"] = read
        register_fsdp_forward_method(head, "_read")
        try:
            return vars(head)["_read"](*tensors)
        finally:
            del vars(head)["_read"]

    return gathered


def _is_sharded_linear(head: Any) -> bool:
    """Return whether FSDP2 shards a linear map as a unit, alone or with other modules."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    # of a class that `fully_shard` makes on the fly
    return isinstance(head, FSDPModule) and nn.Linear in type(head).__bases__

"""The loss of output heads that FSDP2 shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def gather_head(head: Any, read: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a function that gathers a head sharded by FSDP2 and calls `read`.

    Pass tensors by position, because FSDP2 adds its gradient hooks only to these. The result is
    `None` if the head is sharded in another way or has other hooks.
    """
    if not _is_sharded_linear(head) or hasattr(head, "_hf_hook"):
        return None
    # FSDP2 itself adds one hook of each kind
    if max(len(head._forward_hooks), len(head._forward_pre_hooks)) > 1:
        return None
    from torch.distributed.fsdp import register_fsdp_forward_method

    @torch.compiler.disable
    def gathered(*tensors: torch.Tensor) -> Any:
        # FSDP2 gathers weights for methods of the head, so add one for the time of this call
        vars(head)["_read"] = read
        register_fsdp_forward_method(head, "_read")
        try:
            return vars(head)["_read"](*tensors)
        finally:
            del vars(head)["_read"]

    return gathered


def _is_sharded_linear(head: Any) -> bool:
    """Return whether FSDP2 shards this linear map, alone or with other modules."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    # `fully_shard` creates a subclass of both
    return isinstance(head, FSDPModule) and nn.Linear in type(head).__bases__

"""Checkpoints of families and members as files: safetensors, indexes, names, cuts.

This room never opens the Hub: [`FamilyFiles`] is given a callable that fetches files.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .plain import plain_config, plain_tensors

_LAZY = {"plain_config": ".plain", "plain_tensors": ".plain"}

__all__ = ["plain_config", "plain_tensors"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)

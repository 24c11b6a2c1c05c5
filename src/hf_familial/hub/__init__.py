"""Members of a family as checkpoints: export, the Hub, import."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .export import ExportReport, export_exit, export_family

# imported when it is first asked for: sizes and places need no torch
_LAZY = {
    "export_exit": ".export",
    "export_family": ".export",
    "ExportReport": ".export",
}

__all__ = [
    "ExportReport",
    "export_exit",
    "export_family",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)

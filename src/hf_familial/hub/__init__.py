"""Export of members, pushes to the Hub, descriptions of families, and importers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ._cards import RepoRevision
    from ._client import Retry
    from .choose import ExitChoice, ExitVerdict, choose_exit
    from .description import ExitDescription, FamilyDescription, describe
    from .export import ExportReport, export_exit, export_family
    from .importers import from_layerskip, import_ruyi, open_ruyi
    from .push import Pushed, PushReport, push_exits_to_hub, push_family_to_hub

# imported on first use, because importing torch and transformers takes seconds
_MODULES = {
    "._cards": ("RepoRevision",),
    "._client": ("Retry",),
    ".choose": ("ExitChoice", "ExitVerdict", "choose_exit"),
    ".description": ("ExitDescription", "FamilyDescription", "describe"),
    ".export": ("ExportReport", "export_exit", "export_family"),
    ".importers": ("from_layerskip", "import_ruyi", "open_ruyi"),
    ".push": ("PushReport", "Pushed", "push_exits_to_hub", "push_family_to_hub"),
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ExitChoice",
    "ExitDescription",
    "ExitVerdict",
    "ExportReport",
    "FamilyDescription",
    "PushReport",
    "Pushed",
    "RepoRevision",
    "Retry",
    "choose_exit",
    "describe",
    "export_exit",
    "export_family",
    "from_layerskip",
    "import_ruyi",
    "open_ruyi",
    "push_exits_to_hub",
    "push_family_to_hub",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)

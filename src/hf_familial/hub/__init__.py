"""The Hub and members of a family: export, push, describe, choose, import."""

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

# imported when it is first asked for: torch and transformers take seconds
_LAZY = {
    "choose_exit": ".choose",
    "describe": ".description",
    "ExitChoice": ".choose",
    "ExitDescription": ".description",
    "ExitVerdict": ".choose",
    "export_exit": ".export",
    "export_family": ".export",
    "ExportReport": ".export",
    "FamilyDescription": ".description",
    "from_layerskip": ".importers",
    "import_ruyi": ".importers",
    "open_ruyi": ".importers",
    "push_exits_to_hub": ".push",
    "push_family_to_hub": ".push",
    "Pushed": ".push",
    "PushReport": ".push",
    "RepoRevision": "._cards",
    "Retry": "._client",
}

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

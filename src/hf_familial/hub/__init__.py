"""Members of a family as checkpoints: export, the Hub, import."""

from .export import ExportReport, export_exit, export_family
from .plain import plain_config, plain_tensors


__all__ = [
    "ExportReport",
    "export_exit",
    "export_family",
    "plain_config",
    "plain_tensors",
]

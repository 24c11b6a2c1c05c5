"""The familial model, its relay policies, and the checks of a backbone.

`models.familial` contains the files that are copied into every checkpoint. A family that was loaded
with `trust_remote_code=True` has classes of its own. Use `is_family` instead of `isinstance`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig


if TYPE_CHECKING:
    from .backbone_verification import BackboneReport, verify_backbone
    from .early_exit_policies import ConfidenceRelay, EarlyExitRelay, HandoffRelay, confidence

_LAZY = {
    "BackboneReport": ".backbone_verification",
    "ConfidenceRelay": ".early_exit_policies",
    "EarlyExitRelay": ".early_exit_policies",
    "HandoffRelay": ".early_exit_policies",
    "confidence": ".early_exit_policies",
    "verify_backbone": ".backbone_verification",
}

__all__ = [
    "BackboneReport",
    "ConfidenceRelay",
    "EarlyExitRelay",
    "HandoffRelay",
    "confidence",
    "is_family",
    "is_family_config",
    "verify_backbone",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def is_family_config(x: Any) -> bool:
    """Return whether `x` is the config of a family, even if its class is from a checkpoint."""
    return isinstance(x, PreTrainedConfig) and x.model_type == "familial"


def is_family(x: Any) -> bool:
    """Return whether `x` is a family with heads. A wrapper, for example of peft, is not one."""
    return isinstance(x, PreTrainedModel) and is_family_config(x.config) and hasattr(x, "lm_head")

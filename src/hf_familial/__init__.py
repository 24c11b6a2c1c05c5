"""Familial models: one training run produces several language models of different depth.

A family is a decoder of Transformers with several exits on one backbone. Each exit is a language
model of its own, called a member.

Example:
    >>> import hf_familial as hff
    >>> model = hff.FamilialForCausalLM.from_backbone("Qwen/Qwen3-0.6B", exits=[8, 16, 28])
    >>> model.save_pretrained("family")  # after training, for example with `hff.FamilialTrainer`
    >>> hff.export_exit("family", 0, "member")  # an ordinary Qwen3 checkpoint of 8 layers

The import registers the model with the Auto classes of Transformers. All other names are imported
on first use.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .errors import HandoffError, NoExitFitsError
    from .evaluation import calibrate, evaluate_exits
    from .handoff import DeviceSide, HandoffState, server_side
    from .hub.choose import ExitChoice, choose_exit
    from .hub.description import FamilyDescription, describe
    from .hub.export import export_exit, export_family
    from .hub.importers import from_layerskip, import_ruyi
    from .hub.push import push_exits_to_hub, push_family_to_hub
    from .isoflop import IsoFlopDesign
    from .models.backbone_verification import BackboneReport, verify_backbone
    from .models.early_exit_policies import ConfidenceRelay, EarlyExitRelay, HandoffRelay
    from .models.familial import (
        Distillation,
        FamilialCausalLMOutput,
        FamilialConfig,
        FamilialForCausalLM,
        FamilialModel,
        FamilialModelOutput,
        FamilialPreTrainedModel,
        FixedExit,
        RelayCache,
        RelayOutput,
        RelayPolicy,
        RelayStats,
        SpeculativeRelay,
        evenly_spaced_exits,
        relay_decode,
    )
    from .training._multi_exit import multi_exit
    from .training.args import FamilialTrainingArguments
    from .training.trainer import FamilialTrainer


__version__ = "0.1.0.dev0"

_LAZY = {
    "BackboneReport": ".models.backbone_verification",
    "calibrate": ".evaluation",
    "choose_exit": ".hub.choose",
    "ConfidenceRelay": ".models.early_exit_policies",
    "describe": ".hub.description",
    "DeviceSide": ".handoff",
    "EarlyExitRelay": ".models.early_exit_policies",
    "evaluate_exits": ".evaluation",
    "ExitChoice": ".hub.choose",
    "export_exit": ".hub.export",
    "export_family": ".hub.export",
    "FamilialTrainer": ".training.trainer",
    "FamilialTrainingArguments": ".training.args",
    "FamilyDescription": ".hub.description",
    "from_layerskip": ".hub.importers",
    "HandoffError": ".errors",
    "HandoffRelay": ".models.early_exit_policies",
    "HandoffState": ".handoff",
    "import_ruyi": ".hub.importers",
    "IsoFlopDesign": ".isoflop",
    "NoExitFitsError": ".errors",
    "multi_exit": ".training._multi_exit",
    "push_exits_to_hub": ".hub.push",
    "push_family_to_hub": ".hub.push",
    "server_side": ".handoff",
    "verify_backbone": ".models.backbone_verification",
}
_MODELS = (
    "Distillation",
    "FamilialCausalLMOutput",
    "FamilialConfig",
    "FamilialForCausalLM",
    "FamilialModel",
    "FamilialModelOutput",
    "FamilialPreTrainedModel",
    "FixedExit",
    "RelayCache",
    "RelayOutput",
    "RelayPolicy",
    "RelayStats",
    "SpeculativeRelay",
    "evenly_spaced_exits",
    "relay_decode",
)
_LAZY |= dict.fromkeys(_MODELS, ".models.familial")

__all__ = [
    "BackboneReport",
    "ConfidenceRelay",
    "DeviceSide",
    "Distillation",
    "EarlyExitRelay",
    "ExitChoice",
    "FamilialCausalLMOutput",
    "FamilialConfig",
    "FamilialForCausalLM",
    "FamilialModel",
    "FamilialModelOutput",
    "FamilialPreTrainedModel",
    "FamilialTrainer",
    "FamilialTrainingArguments",
    "FamilyDescription",
    "FixedExit",
    "HandoffError",
    "HandoffRelay",
    "HandoffState",
    "IsoFlopDesign",
    "NoExitFitsError",
    "RelayCache",
    "RelayOutput",
    "RelayPolicy",
    "RelayStats",
    "SpeculativeRelay",
    "__version__",
    "calibrate",
    "choose_exit",
    "describe",
    "evaluate_exits",
    "evenly_spaced_exits",
    "export_exit",
    "export_family",
    "from_layerskip",
    "import_ruyi",
    "multi_exit",
    "push_exits_to_hub",
    "push_family_to_hub",
    "relay_decode",
    "server_side",
    "verify_backbone",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


# The console script sets `STARTING`. Its commands register the models when they need one.
if not getattr(sys.modules.get("hf_familial_command"), "STARTING", False):
    import_module(".models.familial", __name__)

"""IsoFLOP designs and sweeps: which runs a budget pays for, and their doing, whatever happens."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..errors import (
        DesignError,
        RefusedRunsError,
        StoppedSweepError,
        SweepError,
        SweepLockedError,
    )
    from .design.backbones import BackboneTemplate
    from .design.grid import IsoFlopDesign
    from .design.outlook import Bracket, brackets
    from .design.plans import Refusal, RunPlan
    from .design.rate import MachineRate, calibrate_rate
    from .design.rules import ExpectedLaw, Fixed, Measured, MeasuredRow, StepLaw
    from .sweep.display import BarDisplay, Display, LineDisplay, display_for
    from .sweep.executors import Executor, LocalExecutor
    from .sweep.folder import SweepFolder
    from .sweep.loop import Sweep, SweepOutcome
    from .sweep.ray_executor import RayExecutor
    from .sweep.status import Failure, RunState, survey
    from .sweep.tasks import Event, Task

# imported when it is first asked for: a slip in a design's file is found before torch is there
_LAZY = {
    "BackboneTemplate": ".design.backbones",
    "BarDisplay": ".sweep.display",
    "Bracket": ".design.outlook",
    "brackets": ".design.outlook",
    "calibrate_rate": ".design.rate",
    "DesignError": "..errors",
    "Display": ".sweep.display",
    "display_for": ".sweep.display",
    "Event": ".sweep.tasks",
    "Executor": ".sweep.executors",
    "ExpectedLaw": ".design.rules",
    "Failure": ".sweep.status",
    "Fixed": ".design.rules",
    "IsoFlopDesign": ".design.grid",
    "LineDisplay": ".sweep.display",
    "LocalExecutor": ".sweep.executors",
    "MachineRate": ".design.rate",
    "Measured": ".design.rules",
    "MeasuredRow": ".design.rules",
    "RayExecutor": ".sweep.ray_executor",
    "Refusal": ".design.plans",
    "RefusedRunsError": "..errors",
    "RunPlan": ".design.plans",
    "RunState": ".sweep.status",
    "StepLaw": ".design.rules",
    "StoppedSweepError": "..errors",
    "survey": ".sweep.status",
    "Sweep": ".sweep.loop",
    "SweepError": "..errors",
    "SweepFolder": ".sweep.folder",
    "SweepLockedError": "..errors",
    "SweepOutcome": ".sweep.loop",
    "Task": ".sweep.tasks",
}

__all__ = [
    "BackboneTemplate",
    "BarDisplay",
    "Bracket",
    "DesignError",
    "Display",
    "Event",
    "Executor",
    "ExpectedLaw",
    "Failure",
    "Fixed",
    "IsoFlopDesign",
    "LineDisplay",
    "LocalExecutor",
    "MachineRate",
    "Measured",
    "MeasuredRow",
    "RayExecutor",
    "Refusal",
    "RefusedRunsError",
    "RunPlan",
    "RunState",
    "StepLaw",
    "StoppedSweepError",
    "Sweep",
    "SweepError",
    "SweepFolder",
    "SweepLockedError",
    "SweepOutcome",
    "Task",
    "brackets",
    "calibrate_rate",
    "display_for",
    "survey",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)

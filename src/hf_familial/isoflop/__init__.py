"""IsoFLOP designs and sweeps: which runs a budget pays for, and their doing, whatever happens."""

from .design.backbones import BackboneTemplate
from .design.fields import DesignError
from .design.grid import IsoFlopDesign
from .design.outlook import Bracket, brackets
from .design.plans import Refusal, RefusedRunsError, RunPlan
from .design.rate import MachineRate, calibrate_rate
from .design.rules import ExpectedLaw, Fixed, Measured, MeasuredRow, StepLaw
from .sweep.display import BarDisplay, Display, LineDisplay, display_for
from .sweep.executors import Executor, LocalExecutor
from .sweep.folder import SweepError, SweepFolder, SweepLockedError
from .sweep.loop import StoppedSweepError, Sweep, SweepOutcome
from .sweep.ray_executor import RayExecutor
from .sweep.status import Failure, RunState, survey
from .sweep.tasks import Event, Task


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

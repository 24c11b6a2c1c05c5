"""IsoFLOP designs and sweeps: which runs a budget pays for, and their doing, whatever happens."""

from .backbones import BackboneTemplate
from .design import IsoFlopDesign
from .display import BarDisplay, Display, LineDisplay, display_for
from .executors import Executor, LocalExecutor
from .fields import DesignError
from .folder import SweepError, SweepFolder, SweepLockedError
from .outlook import Bracket, brackets
from .plans import Refusal, RefusedRunsError, RunPlan
from .rate import MachineRate, calibrate_rate
from .ray_executor import RayExecutor
from .rules import ExpectedLaw, Fixed, Measured, MeasuredRow, StepLaw
from .status import Failure, RunState, survey
from .sweep import StoppedSweepError, Sweep, SweepOutcome
from .tasks import Event, Task


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

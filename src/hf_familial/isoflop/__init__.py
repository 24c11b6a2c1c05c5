"""IsoFLOP designs: which runs a budget pays for, how long they take, and what their ids are."""

from .backbones import BackboneTemplate
from .design import IsoFlopDesign
from .fields import DesignError
from .outlook import Bracket, brackets
from .plans import Refusal, RefusedRunsError, RunPlan
from .rate import MachineRate, calibrate_rate
from .rules import ExpectedLaw, Fixed, Measured, MeasuredRow, StepLaw


__all__ = [
    "BackboneTemplate",
    "Bracket",
    "DesignError",
    "ExpectedLaw",
    "Fixed",
    "IsoFlopDesign",
    "MachineRate",
    "Measured",
    "MeasuredRow",
    "Refusal",
    "RefusedRunsError",
    "RunPlan",
    "StepLaw",
    "brackets",
    "calibrate_rate",
]

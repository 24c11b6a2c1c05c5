"""IsoFLOP designs, which plan training runs of equal FLOPs, and sweeps, which execute them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ._display import SweepDisplay
    from ._folder import SweepFolder
    from ._messages import Failure, RunTask, WorkerEvent
    from .backbones import BackboneTemplate
    from .design import IsoFlopDesign
    from .estimate import BudgetCheck, MachineRate, calibrate_rate, check_budgets, print_runs
    from .executors import Executor, LocalExecutor
    from .plan import InfeasibleRun, RunPlan
    from .ray import RayExecutor
    from .rules import ExpectedLaw, Fixed, Measured, MeasuredRow, StepLaw
    from .sweep import RunState, Sweep, SweepOutcome, run_states

# imported on first use, so that a mistake in a design file is found before torch is imported
_MODULES = {
    "._display": "SweepDisplay",
    "._folder": "SweepFolder",
    "._messages": "Failure RunTask WorkerEvent",
    ".backbones": "BackboneTemplate",
    ".design": "IsoFlopDesign",
    ".estimate": "BudgetCheck MachineRate calibrate_rate check_budgets print_runs",
    ".executors": "Executor LocalExecutor",
    ".plan": "InfeasibleRun RunPlan",
    ".ray": "RayExecutor",
    ".rules": "ExpectedLaw Fixed Measured MeasuredRow StepLaw",
    ".sweep": "RunState Sweep SweepOutcome run_states",
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "BackboneTemplate",
    "BudgetCheck",
    "Executor",
    "ExpectedLaw",
    "Failure",
    "Fixed",
    "InfeasibleRun",
    "IsoFlopDesign",
    "LocalExecutor",
    "MachineRate",
    "Measured",
    "MeasuredRow",
    "RayExecutor",
    "RunPlan",
    "RunState",
    "RunTask",
    "StepLaw",
    "Sweep",
    "SweepDisplay",
    "SweepFolder",
    "SweepOutcome",
    "WorkerEvent",
    "calibrate_rate",
    "check_budgets",
    "print_runs",
    "run_states",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""The error types of the package, one tree, each below the built-in type that its callers expect.

The classes that travel with a checkpoint raise built-in types; everything else raises these or
`ValueError`, `TypeError` and `ImportError`. The standard library suffices to import this module.
"""

from __future__ import annotations

from typing import Any


# --- checkpoints and members ----------------------------------------------------------------------


class CheckpointError(ValueError):
    """Raised when a checkpoint is damaged, or cannot be read without risk."""


class PickleCheckpointError(CheckpointError):
    """Raised when weights are pickles, which can run any code while they are read."""


class CutError(ValueError):
    """Raised when a family cannot be cut at an exit."""


class NoExitFitsError(ValueError):
    """Raised when no member is within the given limits.

    Attributes:
        verdicts (`tuple[ExitVerdict, ...]`): The reason for each exit.
    """

    def __init__(self, message: str, verdicts: tuple[Any, ...]) -> None:
        self.verdicts = verdicts
        super().__init__(message)


# --- the Hub --------------------------------------------------------------------------------------


class HubError(OSError):
    """Raised when a request to the Hub fails."""


class HubAuthError(HubError):
    """Raised when there is no token, or the Hub does not know it (401)."""


class HubPermissionError(HubError):
    """Raised when the token lacks the permission (403)."""


class HubNotFoundError(HubError):
    """Raised when a repository, revision or file does not exist or is not visible (404)."""


class HubUnavailableError(HubError):
    """Raised when the Hub could not be reached, or was overloaded, at every attempt."""


# --- hand-off -------------------------------------------------------------------------------------


class HandoffError(ValueError):
    """Raised when the state of a text, or its bytes, cannot be right."""


# --- training data and runs -----------------------------------------------------------------------


class DataError(ValueError):
    """Raised when a corpus, or an argument about it, cannot be used as given."""


class EmptyCorpusError(DataError):
    """Raised when a split holds no document, or too few tokens for one block."""


class TextColumnError(DataError):
    """Raised when a data set has no text column of the given name."""


class TokenizerError(DataError):
    """Raised when a tokenizer has no end-of-text token to separate documents with."""


class UnknownFileTypeError(DataError):
    """Raised when the name of a file does not say how to read it."""


class RunRecordError(ValueError):
    """Raised when a field of a run record is wrong.

    Attributes:
        field (`str`): Name of the field; empty if the row as a whole is wrong.
        path (`str`, *optional*): File that holds the row.
        line (`int`, *optional*): Line of the row in that file, from 1.
    """

    def __init__(
        self, message: str, field: str = "", path: str | None = None, line: int | None = None
    ) -> None:
        self.field, self.path, self.line, self.reason = field, path, line, message
        super().__init__(message if path is None else f"{path}, line {line}: {message}")


# --- IsoFLOP sweeps -------------------------------------------------------------------------------


class DesignError(ValueError):
    """Raised when a field of a design is wrong.

    Attributes:
        field (`str`): Name of the field, dotted inside another; empty if the whole is wrong.
    """

    def __init__(self, message: str, field: str = "") -> None:
        self.field = field
        super().__init__(message)


class InfeasibleDesignError(ValueError):
    """Raised when some runs of a design are infeasible.

    Attributes:
        infeasible (`tuple[InfeasibleRun, ...]`): The runs, each with a size or budget that fits.
    """

    def __init__(self, infeasible: tuple[Any, ...]) -> None:
        self.infeasible = infeasible
        lines = "\n".join(f"  {run}" for run in infeasible)
        runs = "1 run of this design is" if len(infeasible) == 1 else f"{len(infeasible)} runs are"
        super().__init__(f"{runs} infeasible:\n{lines}")


class CorpusChangedError(ValueError):
    """Raised when the data differ from those that the sweep began with."""


class SweepError(OSError):
    """Raised when a sweep cannot continue. Finished runs are kept."""


class SweepLockedError(SweepError):
    """Raised when another sweep holds the folder."""


class StoppedSweepError(SweepError):
    """Raised when all runs share one fault, such as a full disk or missing data."""


# --- scaling laws ---------------------------------------------------------------------------------


class ScalingError(ValueError):
    """The base of all errors about fits and plans."""


class TableError(ValueError):
    """Raised when a file or its columns cannot be read as a table of runs."""


class AnalysisError(ScalingError):
    """Raised when a file is not a `fit.json`, or was written by an incompatible version."""


class UnknownLawError(ScalingError):
    """Raised when no law has the given name."""


class MissingColumnError(ScalingError):
    """Raised when a table lacks a column that the law needs.

    Attributes:
        missing (`tuple[str, ...]`): Names of the columns.
    """

    def __init__(self, message: str, missing: tuple[str, ...] = ()) -> None:
        self.missing = missing
        super().__init__(message)


class BadRowsError(ScalingError):
    """Raised when rows hold values that no law takes (not finite, not positive, given twice).

    Attributes:
        rows (`tuple[int, ...]`): Numbers of the rows in the given table, from 0.
    """

    def __init__(self, message: str, rows: tuple[int, ...] = ()) -> None:
        self.rows = rows
        super().__init__(message)


class TooFewError(ScalingError):
    """Raised when there are too few rows, or too few different values of a variable.

    Attributes:
        what (`str`): `"rows"`, or the name of the variable.
        got (`int`): Number present.
        needed (`int`): Number required.
    """

    def __init__(self, message: str, what: str = "rows", got: int = 0, needed: int = 0) -> None:
        self.what, self.got, self.needed = what, got, needed
        super().__init__(message)


class NotIdentifiedError(ScalingError):
    """Raised when the rows leave a coefficient, or a combination of several, undetermined.

    Attributes:
        parameters (`tuple[str, ...]`): Parameters that the undetermined direction moves.
        condition (`float`): Condition number of the Jacobian in normalised columns.
    """

    def __init__(
        self, message: str, parameters: tuple[str, ...] = (), condition: float = float("inf")
    ) -> None:
        self.parameters, self.condition = parameters, condition
        super().__init__(message)


class NoOptimumError(ScalingError):
    """Raised when no start of the search converged."""


class NoMinimumError(ScalingError):
    """Raised when the loss at equal compute has no minimum within the given sizes.

    Attributes:
        budget (`float`): The compute, in FLOPs.
    """

    def __init__(self, message: str, budget: float = float("nan")) -> None:
        self.budget = budget
        super().__init__(message)


# --- warnings -------------------------------------------------------------------------------------


class BiasWarning(UserWarning):
    """The sizes of the sampled runs bias the optima that are read off them."""


class DomainWarning(UserWarning):
    """A law is evaluated outside the runs that it was fitted on."""

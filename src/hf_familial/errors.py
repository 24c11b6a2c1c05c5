"""The error types of the package. Each is a subclass of a built-in type such as `ValueError`.

The code that is copied into checkpoints raises built-in types only. This module imports only the
standard library.
"""

from __future__ import annotations

from typing import Any


# --- checkpoints and members ----------------------------------------------------------------------


class CheckpointError(ValueError):
    """Raised when a checkpoint is damaged, or reading it would not be safe."""


class PickleCheckpointError(CheckpointError):
    """Raised when weights are pickle files, because loading a pickle can run any code."""


class CutError(ValueError):
    """Raised when no member can be cut from a family at the given exit."""


class NoExitFitsError(ValueError):
    """Raised when no member is within the given limits.

    Attributes:
        verdicts (`tuple[ExitVerdict, ...]`): For each exit, the reason why it does not fit.
    """

    def __init__(self, message: str, verdicts: tuple[Any, ...]) -> None:
        self.verdicts = verdicts
        super().__init__(message)


# --- the Hub --------------------------------------------------------------------------------------


class HubError(OSError):
    """Raised when a request to the Hub fails."""


class HubAuthError(HubError):
    """Raised when there is no token, or the Hub rejects it (HTTP 401)."""


class HubPermissionError(HubError):
    """Raised when the token does not have the permission (HTTP 403)."""


class HubNotFoundError(HubError):
    """Raised when a repository, revision or file does not exist or is private (HTTP 404)."""


class HubUnavailableError(HubError):
    """Raised when all attempts to reach the Hub failed, or the Hub was overloaded."""


# --- hand-off -------------------------------------------------------------------------------------


class HandoffError(ValueError):
    """Raised when a message or state of a hand-off is damaged or does not match the model."""


# --- training data and runs -----------------------------------------------------------------------


class DataError(ValueError):
    """Raised when a corpus, or an argument about it, cannot be used."""


class EmptyCorpusError(DataError):
    """Raised when a split has no documents, or too few tokens for one block."""


class TextColumnError(DataError):
    """Raised when a data set has no text column of the given name."""


class TokenizerError(DataError):
    """Raised when a tokenizer has no end-of-text token, which separates documents."""


class UnknownFileTypeError(DataError):
    """Raised when a file has an unknown extension."""


class RunRecordError(ValueError):
    """Raised when a field of a run record is wrong.

    Attributes:
        field (`str`): Name of the field, or empty if the whole row is wrong.
        path (`str`, *optional*): File that contains the row.
        line (`int`, *optional*): Line number of the row in that file, starting at 1.
    """

    def __init__(
        self, message: str, field: str = "", path: str | None = None, line: int | None = None
    ) -> None:
        self.field, self.path, self.line, self.reason = field, path, line, message
        super().__init__(message if path is None else f"{path}, line {line}: {message}")


# --- IsoFLOP sweeps -------------------------------------------------------------------------------


class DesignError(ValueError):
    """Raised when a field of an IsoFLOP design is wrong.

    Attributes:
        field (`str`): Name of the field, such as `backbone.fields`, or empty if the whole design is
            wrong.
    """

    def __init__(self, message: str, field: str = "") -> None:
        self.field = field
        super().__init__(message)


class InfeasibleDesignError(ValueError):
    """Raised when some runs of a design are infeasible.

    Attributes:
        infeasible (`tuple[InfeasibleRun, ...]`): These runs, each with a size or budget that would
            work.
    """

    def __init__(self, infeasible: tuple[Any, ...]) -> None:
        self.infeasible = infeasible
        lines = "\n".join(f"  {run}" for run in infeasible)
        runs = "1 run of this design is" if len(infeasible) == 1 else f"{len(infeasible)} runs are"
        super().__init__(f"{runs} infeasible:\n{lines}")


class CorpusChangedError(ValueError):
    """Raised when the training data of a sweep changed after its start."""


class SweepError(OSError):
    """Raised when a sweep cannot continue. The results of finished runs stay in its folder."""


class SweepLockedError(SweepError):
    """Raised when another process runs a sweep in the same folder."""


class StoppedSweepError(SweepError):
    """Raised when a fault affects all runs, such as a full disk or missing data."""


# --- scaling laws ---------------------------------------------------------------------------------


class ScalingError(ValueError):
    """The base class of errors about fits and plans."""


class TableError(ValueError):
    """Raised when a file or its columns cannot be read as a table of runs."""


class AnalysisError(ScalingError):
    """Raised when a file is not a `fit.json`, or was written by an incompatible version."""


class UnknownLawError(ScalingError):
    """Raised when no law has the given name."""


class MissingColumnError(ScalingError):
    """Raised when a table lacks a column that the law needs.

    Attributes:
        missing (`tuple[str, ...]`): Names of the missing columns.
    """

    def __init__(self, message: str, missing: tuple[str, ...] = ()) -> None:
        self.missing = missing
        super().__init__(message)


class BadRowsError(ScalingError):
    """Raised when rows have values that a fit cannot use (not finite, not positive, repeated).

    Attributes:
        rows (`tuple[int, ...]`): Indices of the rows in the table, starting at 0.
    """

    def __init__(self, message: str, rows: tuple[int, ...] = ()) -> None:
        self.rows = rows
        super().__init__(message)


class TooFewError(ScalingError):
    """Raised when there are too few rows, or too few different values of a variable.

    Attributes:
        what (`str`): `"rows"`, or the name of the variable.
        got (`int`): Number in the table.
        needed (`int`): Number that the fit needs.
    """

    def __init__(self, message: str, what: str = "rows", got: int = 0, needed: int = 0) -> None:
        self.what, self.got, self.needed = what, got, needed
        super().__init__(message)


class NotIdentifiedError(ScalingError):
    """Raised when the data do not determine a coefficient, or a combination of several.

    Attributes:
        parameters (`tuple[str, ...]`): Names of the coefficients in that combination.
        condition (`float`): Condition number of the Jacobian with normalised columns.
    """

    def __init__(
        self, message: str, parameters: tuple[str, ...] = (), condition: float = float("inf")
    ) -> None:
        self.parameters, self.condition = parameters, condition
        super().__init__(message)


class NoOptimumError(ScalingError):
    """Raised when the search did not converge from any start."""


class NoMinimumError(ScalingError):
    """Raised when the loss at equal FLOPs has no minimum within the given sizes.

    Attributes:
        budget (`float`): FLOPs of each run in the comparison.
    """

    def __init__(self, message: str, budget: float = float("nan")) -> None:
        self.budget = budget
        super().__init__(message)


# --- warnings -------------------------------------------------------------------------------------


class BiasWarning(UserWarning):
    """The warning that the choice of model sizes biases the optima of an IsoFLOP comparison."""


class DomainWarning(UserWarning):
    """The warning that a law is evaluated outside the range of the runs that it was fitted on."""

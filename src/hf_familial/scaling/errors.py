"""Why a fit was refused: every refusal has a type, and every type is a `ValueError`."""

from __future__ import annotations


class ScalingError(ValueError):
    """What every refusal of this room inherits from."""


class UnknownLawError(ScalingError):
    """No law of the catalogue has this name."""


class MissingColumnError(ScalingError):
    """The table lacks a column that the law needs.

    Attributes:
        missing (`tuple[str, ...]`): Names of the columns.
    """

    def __init__(self, message: str, missing: tuple[str, ...] = ()) -> None:
        self.missing = missing
        super().__init__(message)


class BadRowsError(ScalingError):
    """Rows hold values no law can take: not numbers, not finite, not positive, given twice.

    Attributes:
        rows (`tuple[int, ...]`): Their numbers in the table that was given, from 0.
    """

    def __init__(self, message: str, rows: tuple[int, ...] = ()) -> None:
        self.rows = rows
        super().__init__(message)


class TooFewError(ScalingError):
    """Too few rows, or too few different values of a variable.

    Attributes:
        what (`str`): `"rows"`, or the name of the variable.
        got (`int`): How many there are.
        needed (`int`): How many it takes.
    """

    def __init__(self, message: str, what: str = "rows", got: int = 0, needed: int = 0) -> None:
        self.what, self.got, self.needed = what, got, needed
        super().__init__(message)


class NotIdentifiedError(ScalingError):
    """The rows leave a coefficient, or a combination of several, undetermined.

    Attributes:
        parameters (`tuple[str, ...]`): Those that the undetermined direction moves.
        condition (`float`): Condition number of the Jacobian in normalised columns.
    """

    def __init__(
        self, message: str, parameters: tuple[str, ...] = (), condition: float = float("inf")
    ) -> None:
        self.parameters, self.condition = parameters, condition
        super().__init__(message)


class NoOptimumError(ScalingError):
    """No start of the search led anywhere: the law cannot take these rows."""


class NoMinimumError(ScalingError):
    """The loss at equal compute has no minimum between the smallest and the largest size.

    Attributes:
        budget (`float`): The compute, in FLOPs.
    """

    def __init__(self, message: str, budget: float = float("nan")) -> None:
        self.budget = budget
        super().__init__(message)

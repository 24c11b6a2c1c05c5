"""The result of a fit: a frozen record of the answer and of everything that led to it."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from ..errors import ScalingError
from .data import DroppedRow, RunTable
from .laws import get_law
from .laws.law import Law


Objective = Literal["log_huber", "huber", "mse"]

SCHEMA = 1  # of `Fit.to_dict`


class FitStatus(enum.StrEnum):
    """The end of a fit.

    Attributes:
        CONVERGED: At an optimum inside the bounds.
        AT_BOUND: At an optimum with a coefficient on its bound; see `Fit.bounds_hit`.
        NOT_CONVERGED: The search ran out of steps: the values are the best it saw, no optimum.
    """

    CONVERGED = "converged"
    AT_BOUND = "at_bound"
    NOT_CONVERGED = "not_converged"


@dataclass(frozen=True)
class LargestLosses:
    """Outlier rule: leave out the `count` rows with the largest losses, and those that tie."""

    count: int


@dataclass(frozen=True)
class FarResiduals:
    """Outlier rule: fit, leave out rows far from the fit, fit again.

    Attributes:
        threshold (`float`): Distance in robust standard deviations (1.4826 times the median
            absolute deviation of the residuals).
        rounds (`int`): Most times this is done; it ends when no row is far.
    """

    threshold: float = 5.0
    rounds: int = 3


Outliers = LargestLosses | FarResiduals


@dataclass(frozen=True)
class Settings:
    """Every choice a fit was made with.

    Attributes:
        objective (`str`): `"log_huber"`: Huber's function of differences of log losses (Hoffmann
            et al., 2203.15556, appendix D.3); `"huber"`: of differences of losses; `"mse"`: half
            the square of differences of losses. Each is summed over rows with their weights.
        delta (`float`): Where Huber's function turns linear, in nats per token, for `"log_huber"`
            in log losses.
        fixed (`Mapping[str, float]`): Parameters that were given.
        tied (`Mapping[str, str]`): Parameters held equal to another.
        bounds (`Mapping[str, tuple[float, float]]`): Bounds in place of the law's.
        starts (`Mapping[str, tuple[float, ...]]`): Values of the grid in place of the law's.
        polished (`int`): Starts that were followed to their optimum.
        outliers (`LargestLosses` or `FarResiduals`, *optional*): Rule for leaving rows out.
        max_steps (`int`): Most steps of the search.
    """

    objective: Objective = "log_huber"
    delta: float = 1e-3
    fixed: Mapping[str, float] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    starts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    polished: int = 8
    outliers: Outliers | None = None
    max_steps: int = 200


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted law.

    Attributes:
        law ([`Law`]): The law.
        status ([`FitStatus`]): How the search ended.
        values (`Mapping[str, float]`): Every parameter by name, fixed and tied ones included.
        objective (`float`): Sum over rows at the optimum, see `Settings.objective`.
        data ([`RunTable`]): The rows used, with the weights used; `data.dropped` are those left
            out, and why.
        settings ([`Settings`]): Every choice.
        free (`tuple[str, ...]`): Parameters that were fitted.
        bounds_hit (`tuple[str, ...]`): Free parameters that ended on a bound.
        condition (`float`): Condition number of the Jacobian of the residuals at the optimum, its
            columns brought to the same length.
        grid (`int`): Points of the grid of starts.
        starts (`int`): Starts that were followed.
        agreement (`float`): Share of those starts that ended within 1% of the best objective.
        exact_agreement (`float`): The same within 1e-6 of it.
        steps (`int`): Steps of the search.
    """

    law: Law
    status: FitStatus
    values: Mapping[str, float]
    objective: float
    data: RunTable
    settings: Settings
    free: tuple[str, ...]
    bounds_hit: tuple[str, ...]
    condition: float
    grid: int
    starts: int
    agreement: float
    exact_agreement: float
    steps: int

    @property
    def dropped(self) -> tuple[DroppedRow, ...]:
        """Rows left out, and why."""
        return self.data.dropped

    def predict(self, **variables: Any) -> np.ndarray:
        """Return the loss at the fitted values; see `Law.predict`."""
        return self.law.predict(self.values, **variables)

    def fitted(self) -> np.ndarray:
        """Return the predicted loss of every row used, of shape (rows,), in nats per token."""
        columns = {name: self.data.columns[name] for name in self.law.variable_names}
        return np.broadcast_to(self.predict(**columns), self.data.loss.shape)

    def residuals(self) -> np.ndarray:
        """Return measured minus predicted, (rows,): log losses for `"log_huber"`, else nats."""
        if self.settings.objective == "log_huber":
            return np.log(self.data.loss) - np.log(self.fitted())
        return self.data.loss - self.fitted()

    def to_dict(self, data: bool = True) -> dict[str, Any]:
        """Return the JSON form; without the rows (`data=False`) it cannot be read back."""
        return {
            "schema": SCHEMA,
            "law": self.law.name,
            "status": str(self.status),
            "values": dict(self.values),
            "settings": _settings_to_dict(self.settings),
            **{name: _listed(getattr(self, name)) for name in _PLAIN},
            "data": self.data.to_dict() if data else None,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], find_law: Callable[[str], Law] = get_law) -> Fit:
        """Read `to_dict`'s form; `find_law` finds laws of your own by name.

        Raises:
            ScalingError: If the form is of another version, or without rows.
            UnknownLawError: If the law is not known.
        """
        if record.get("schema") != SCHEMA:
            raise ScalingError(
                f"A fit's `schema` must be {SCHEMA}, got {record.get('schema')!r}: it was written "
                "by another version, or is no fit."
            )
        if record.get("data") is None:
            raise ScalingError("This fit was written without its rows (`data=False`).")
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v := record[k], list) else v for k in _PLAIN
        }
        return cls(
            law=find_law(record["law"]),
            status=FitStatus(record["status"]),
            values=dict(record["values"]),
            settings=_settings_from_dict(record["settings"]),
            data=RunTable.from_dict(record["data"]),
            **plain,
        )


# fields of a fit that JSON holds as they are
_PLAIN = (
    "objective", "free", "bounds_hit", "condition", "grid", "starts", "agreement",
    "exact_agreement", "steps",
)  # fmt: skip
_RULES: Mapping[str, Callable[..., Outliers]] = {
    rule.__name__: rule for rule in (LargestLosses, FarResiduals)
}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _settings_to_dict(settings: Settings) -> dict[str, Any]:
    record = asdict(settings)
    if settings.outliers is not None:
        record["outliers"] = {"rule": type(settings.outliers).__name__, **record["outliers"]}
    record["starts"] = {key: list(values) for key, values in settings.starts.items()}
    # JSON has no infinity
    record["bounds"] = {
        key: [edge if math.isfinite(edge) else None for edge in edges]
        for key, edges in settings.bounds.items()
    }
    return record


def _settings_from_dict(record: Mapping[str, Any]) -> Settings:
    outliers = record["outliers"]
    if outliers is not None:
        options = {key: value for key, value in outliers.items() if key != "rule"}
        outliers = _RULES[outliers["rule"]](**options)
    starts = {key: tuple(values) for key, values in record["starts"].items()}
    bounds = {
        key: (-math.inf if low is None else low, math.inf if high is None else high)
        for key, (low, high) in record["bounds"].items()
    }
    return Settings(**{**record, "starts": starts, "bounds": bounds, "outliers": outliers})

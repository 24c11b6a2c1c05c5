"""The result of a fit: the fitted values, the rows and all settings, in one frozen record."""

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

SCHEMA = 1  # version of the form that `Fit.to_dict` returns


class FitStatus(enum.StrEnum):
    """The state in which the search of a fit ended.

    Attributes:
        CONVERGED: The search found an optimum inside the bounds.
        AT_BOUND: The search found an optimum with a coefficient on its bound. `Fit.bounds_hit`
            names it.
        NOT_CONVERGED: The search ran out of steps. The values are the best ones so far, but they
            are not an optimum.
    """

    CONVERGED = "converged"
    AT_BOUND = "at_bound"
    NOT_CONVERGED = "not_converged"


@dataclass(frozen=True)
class LargestLosses:
    """An outlier rule that leaves out the `count` rows with the largest losses, and ties."""

    count: int


@dataclass(frozen=True)
class FarResiduals:
    """An outlier rule that fits, leaves out the rows far from the fit, and fits again.

    Attributes:
        threshold (`float`): The largest distance of a row that stays, in robust standard
            deviations (1.4826 times the median absolute deviation of the residuals).
        rounds (`int`): Largest number of rounds. They end earlier if no row is far.
    """

    threshold: float = 5.0
    rounds: int = 3


Outliers = LargestLosses | FarResiduals


@dataclass(frozen=True)
class Settings:
    """All settings of a fit.

    Attributes:
        objective (`str`): The function to minimise, summed over the weighted rows. `"log_huber"`
            is Huber's function of the differences of log losses (Hoffmann et al., 2203.15556,
            appendix D.3). `"huber"` is the same of the differences of losses. `"mse"` is half the
            square of the differences of losses.
        delta (`float`): The difference above which Huber's function is linear. Its unit is the
            log of the loss for `"log_huber"`, else nats per token.
        fixed (`Mapping[str, float]`): Values of parameters that were not fitted.
        tied (`Mapping[str, str]`): Parameters that equal another one.
        bounds (`Mapping[str, tuple[float, float]]`): Bounds that replace the law's own.
        starts (`Mapping[str, tuple[float, ...]]`): Grid values that replace the law's own.
        polished (`int`): Number of starting points that were followed to their optimum.
        outliers (`LargestLosses` or `FarResiduals`, *optional*): The rule for leaving rows out.
        max_steps (`int`): Largest number of search steps.
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
    """A law fitted to runs, with its rows and settings.

    Attributes:
        law ([`Law`]): The law.
        status ([`FitStatus`]): The state in which the search ended.
        values (`Mapping[str, float]`): Every parameter by name, also the fixed and tied ones.
        objective (`float`): The minimised sum over the rows, see `Settings.objective`.
        data ([`RunTable`]): The rows and weights used. `data.dropped` lists the rows left out.
        settings ([`Settings`]): All settings.
        free (`tuple[str, ...]`): Names of the parameters that were fitted.
        bounds_hit (`tuple[str, ...]`): Names of the fitted parameters that ended on a bound.
        condition (`float`): Condition number of the residuals' Jacobian at the optimum, with
            columns scaled to the same length. If it is large, the rows barely separate the
            effects of some parameters.
        grid (`int`): Number of grid points that were tried.
        starts (`int`): Number of starting points that were followed to their optimum.
        agreement (`float`): Share of those starts that ended within 1% of the best objective.
        exact_agreement (`float`): Share of those starts that ended within 1e-6 of it (relative).
        steps (`int`): Number of search steps.
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
        """The rows that were left out, each with the reason."""
        return self.data.dropped

    def predict(self, **variables: Any) -> np.ndarray:
        """Return the loss that the fitted law predicts, in nats per token. See `Law.predict`.

        Example:
            >>> fitted.predict(N=1e9, D=2e10, G=4)  # 1e9 parameters, 2e10 tokens, 4 exits
        """
        return self.law.predict(self.values, **variables)

    def fitted(self) -> np.ndarray:
        """Return the predicted loss of every row used, shape (rows,), in nats per token."""
        columns = {name: self.data.columns[name] for name in self.law.variable_names}
        return np.broadcast_to(self.predict(**columns), self.data.loss.shape)

    def residuals(self) -> np.ndarray:
        """Return measured minus predicted loss of every row, shape (rows,).

        With the objective `"log_huber"` both are logarithms, else nats per token.
        """
        if self.settings.objective == "log_huber":
            return np.log(self.data.loss) - np.log(self.fitted())
        return self.data.loss - self.fitted()

    def to_dict(self, data: bool = True) -> dict[str, Any]:
        """Return the JSON form. `from_dict` cannot read it without the rows (`data=False`)."""
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
        """Build a fit from the form that `to_dict` returns.

        Args:
            record (`Mapping`): The JSON form, with its rows.
            find_law (`Callable`): A function from a name to a [`Law`]. Pass one if the law is not
                in `LAWS`.

        Raises:
            ScalingError: If another version wrote the form, or it has no rows.
            UnknownLawError: If `find_law` does not find the law.
        """
        if record.get("schema") != SCHEMA:
            raise ScalingError(
                f"`schema` of a fit must be {SCHEMA}, got {record.get('schema')!r}. Another "
                "version wrote it, or it is not a fit."
            )
        if record.get("data") is None:
            raise ScalingError(
                "This fit was saved without its rows (`data=False`) and cannot be loaded."
            )
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


# fields of a fit that JSON stores unchanged
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

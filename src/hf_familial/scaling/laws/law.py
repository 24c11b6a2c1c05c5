"""A scaling law as data: variables, parameters, columns, an outer function, and its domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from ...errors import MissingColumnError, ScalingError
from ._duals import Dual, grad_of, value_of


# `x.N`, `p.alpha`: columns of a table and parameters, by name
Namespace = SimpleNamespace

# columns(x, p): one array, `Dual` or number per linear parameter
Columns = Callable[[Namespace, Namespace], Sequence[Any]]


@dataclass(frozen=True)
class Variable:
    """A quantity that a run has and a law reads.

    Attributes:
        name (`str`): Name of its column.
        symbol (`str`): LaTeX.
        unit (`str`): Unit of its numbers; "1" where they have none.
        meaning (`str`): What it counts.
        minimum (`float`): Smallest lawful value.
        maximum (`float`): Smallest value that is too large.
        open_minimum (`bool`): Whether `minimum` itself is unlawful.
        levels (`int`): Different values it takes to identify the law.
    """

    name: str
    symbol: str
    unit: str
    meaning: str
    minimum: float = 0.0
    maximum: float = math.inf
    open_minimum: bool = True
    levels: int = 3

    def lawful(self, values: np.ndarray) -> np.ndarray:
        """Return which values are in range, booleans of their shape; NaN and infinity never are."""
        above = values > self.minimum if self.open_minimum else values >= self.minimum
        return above & (values < self.maximum) & np.isfinite(values)

    @property
    def range_text(self) -> str:
        """The lawful values in words, such as `> 0 and finite`."""
        sign = ">" if self.open_minimum else ">="
        top = "finite" if math.isinf(self.maximum) else f"< {self.maximum:g}"
        return f"{sign} {self.minimum:g} and {top}"


LOSS = Variable("loss", "L", "nats per token", "mean cross entropy of held-out or training tokens")


@dataclass(frozen=True)
class Parameter:
    """A coefficient of a law.

    Attributes:
        name (`str`): Its key in `Fit.values`.
        symbol (`str`): LaTeX.
        meaning (`str`): What it stands for, with its unit.
        bounds (`tuple[float, float]`): Smallest and largest value.
        starts (`tuple[float, ...]`): Values the grid of starts tries. A linear parameter needs
            one only if the law's columns read it.
        scale (`str`): `"log"` if the search moves its logarithm (it is then positive), else
            `"linear"`.
    """

    name: str
    symbol: str
    meaning: str
    bounds: tuple[float, float] = (-math.inf, math.inf)
    starts: tuple[float, ...] = ()
    scale: Literal["linear", "log"] = "linear"

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not low <= high:
            raise ScalingError(f"`bounds` of `{self.name}` must be (low, high), got {self.bounds}.")
        if self.scale == "log" and low < 0:
            raise ScalingError(f"`{self.name}` moves in logs: its bounds must not be negative.")


@dataclass(frozen=True)
class Published:
    """Values of a law's parameters as someone printed them.

    Attributes:
        values (`Mapping[str, float]`): By parameter.
        source (`str`): arXiv number or URL, and the table or equation.
        note (`str`): Data they were fitted on, or how sure they are.
    """

    values: Mapping[str, float]
    source: str
    note: str = ""

    @classmethod
    def of(cls, source: str, note: str = "", **values: float) -> Published:
        """Return published values given by name."""
        return cls(values, source, note)


@dataclass(frozen=True)
class Domain:
    """The range in which a law was fitted, and the cases in which it is known to fail.

    Attributes:
        ranges (`Mapping[str, tuple[float, float]]`): By variable, of the runs behind the values.
        architectures (`tuple[str, ...]`): Of `"dense"`, `"moe"`, `"sparse"` and `"familial"`.
        settings (`str`): Data, schedule, how N and the FLOPs were counted.
        failures (`tuple[str, ...]`): Known failure modes, one sentence each.
    """

    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    architectures: tuple[str, ...] = ("dense",)
    settings: str = ""
    failures: tuple[str, ...] = ()

    def outside(self, **variables: Any) -> tuple[str, ...]:
        """Return one sentence for every variable that leaves its range; none inside the domain."""
        sentences = []
        for name, value in variables.items():
            low, high = self.ranges.get(name, (-math.inf, math.inf))
            small, large = float(np.min(value)), float(np.max(value))
            for got, bad, edge, side in (
                (small, small < low, low, "below"),
                (large, large > high, high, "above"),
            ):
                if bad:
                    sentences.append(
                        f"`{name}` = {got:.4g} is {side} {edge:.4g}, the edge of the runs this "
                        "law was fitted on."
                    )
        return tuple(sentences)


@dataclass(frozen=True)
class Link:
    """The weight of a column as a function of its linear parameter.

    Attributes:
        weight (`Callable`): `weight(value, p)`, the factor of the column.
        value (`Callable`): `value(weight, p)`, the parameter that gives this factor.
    """

    weight: Callable[[Any, Namespace], Any]
    value: Callable[[Any, Namespace], Any]


@dataclass(frozen=True)
class Outer:
    """The function of the sum of a law's terms, where that sum is not the loss itself.

    Attributes:
        apply (`Callable`): `apply(total, x, p)`, the loss.
        invert (`Callable`): `invert(loss, x, p)`, the sum of terms that gives this loss.
    """

    apply: Callable[[Any, Namespace, Namespace], Any]
    invert: Callable[[Any, Namespace, Namespace], Any]


@dataclass(frozen=True)
class Law:
    """A scaling law as data: the loss is `outer(sum_j weight_j * column_j)`.

    A law is written once, in plain numpy over `x.N`, `p.alpha` and the like; its gradient follows
    by forward-mode differentiation. Its linear parameters only weight columns, so that least
    squares finds them once the nonlinear ones are given: this makes it fast to fit.

    Attributes:
        name (`str`): Its key in `LAWS`.
        title (`str`): One line for people.
        formula (`str`): LaTeX, without dollar signs.
        formula_text (`str`): The same in ASCII.
        source (`str`): arXiv number or URL.
        variables (`tuple[Variable, ...]`): What it reads.
        linear (`tuple[Parameter, ...]`): One per column, in its order.
        nonlinear (`tuple[Parameter, ...]`): Exponents and the like.
        columns (`Callable`): `columns(x, p)`: as many arrays of shape (rows,), or numbers, as
            there are linear parameters. `x` holds the variables and `p` every parameter; a column
            may read linear ones, but should then depend on them weakly.
        links (`Mapping[str, Link]`): For a linear parameter that is not its column's weight, such
            as the `N_c` of `(N_c / N) ** alpha`.
        outer (`Outer`, *optional*): Function of the sum; without it the sum is the loss.
        published (`Mapping[str, Published]`): Values by label.
        domain (`Domain`): Where it holds.
        notes (`str`): Conventions and open questions.
        family (`str`): `"familial"`, `"dense"`, `"sparse"`, or `"rule"` for what is no loss.
        target (`Variable`): What it predicts.
    """

    name: str
    title: str
    formula: str
    formula_text: str
    source: str
    variables: tuple[Variable, ...]
    linear: tuple[Parameter, ...]
    nonlinear: tuple[Parameter, ...]
    columns: Columns
    links: Mapping[str, Link] = field(default_factory=dict)
    outer: Outer | None = None
    published: Mapping[str, Published] = field(default_factory=dict)
    domain: Domain = field(default_factory=Domain)
    notes: str = ""
    family: str = "dense"
    target: Variable = LOSS

    def __post_init__(self) -> None:
        names = self.names
        if len(set(names)) < len(names):
            raise ScalingError(f"Parameters of `{self.name}` must differ in name, got {names}.")
        for label, given in self.published.items():
            if set(given.values) != set(names):
                raise ScalingError(
                    f"Published values {label!r} of `{self.name}` must name {sorted(names)}, got "
                    f"{sorted(given.values)}."
                )

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """All parameters: linear ones first."""
        return self.linear + self.nonlinear

    @property
    def names(self) -> tuple[str, ...]:
        """Names of `parameters`, in their order."""
        return tuple(parameter.name for parameter in self.parameters)

    @property
    def variable_names(self) -> tuple[str, ...]:
        """Names of `variables`, in their order."""
        return tuple(variable.name for variable in self.variables)

    def parameter(self, name: str) -> Parameter:
        """Return the parameter of this name, or raise `ScalingError`."""
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise ScalingError(f"`{self.name}` has parameters {list(self.names)}, not {name!r}.")

    def terms(self, x: Namespace, p: Namespace) -> list[Any]:
        """Return every column times its weight; `x` and `p` hold arrays or `Dual`s."""
        columns = self.columns(x, p)
        return [
            self.weight(parameter.name, p) * column
            for parameter, column in zip(self.linear, columns, strict=True)
        ]

    def weight(self, name: str, p: Namespace) -> Any:
        """Return the factor of a linear parameter's column."""
        value = getattr(p, name)
        return self.links[name].weight(value, p) if name in self.links else value

    def evaluate(self, x: Namespace, p: Namespace) -> Any:
        """Return the loss for arrays or `Dual`s; nothing is checked."""
        total, *rest = self.terms(x, p)
        for term in rest:
            total = total + term
        return total if self.outer is None else self.outer.apply(total, x, p)

    def predict(self, values: Mapping[str, Any], **variables: Any) -> np.ndarray:
        """Return the loss at given values of the parameters and variables.

        Args:
            values (`Mapping[str, float]`): Every parameter by name; arrays broadcast with the
                variables, so values of shape (draws, 1) give (draws, rows).
            variables (`float` or array): Every variable by name, in its unit.

        Returns:
            `np.ndarray`: In the unit of `target` (nats per token for a loss).

        Example:
            >>> law = get_law("hoffmann")
            >>> law.predict(law.published["hoffmann"].values, N=70e9, D=1.4e12)
        """
        x, p, shape = self._namespaces(values, variables)
        return np.array(np.broadcast_to(value_of(self.evaluate(x, p)), shape), dtype=np.float64)

    def gradient(self, values: Mapping[str, Any], **variables: Any) -> np.ndarray:
        """Return the derivatives of `predict` by every parameter: one more axis, as `names`."""
        x, p, shape = self._namespaces(values, variables)
        duals = {name: Dual(value, {name: 1.0}) for name, value in vars(p).items()}
        grad = grad_of(self.evaluate(x, Namespace(**duals)))
        return np.stack([np.broadcast_to(grad.get(name, 0.0), shape) for name in self.names], -1)

    def _namespaces(
        self, values: Mapping[str, Any], variables: Mapping[str, Any]
    ) -> tuple[Namespace, Namespace, tuple[int, ...]]:
        """Check and convert the arguments of `predict`; the shape is what they broadcast to."""
        missing = tuple(name for name in self.variable_names if name not in variables)
        if missing:
            raise MissingColumnError(
                f"`{self.name}` reads {list(self.variable_names)}; missing: {list(missing)}.",
                missing,
            )
        absent = [name for name in self.names if name not in values]
        if absent:
            raise ScalingError(
                f"`values` of `{self.name}` must give {list(self.names)}; missing: {absent}."
            )
        x = {name: np.asarray(variables[name], np.float64) for name in self.variable_names}
        p = {name: np.asarray(values[name], np.float64) for name in self.names}
        shape = np.broadcast_shapes(*(np.shape(v) for v in [*x.values(), *p.values()]))
        return Namespace(**x), Namespace(**p), shape

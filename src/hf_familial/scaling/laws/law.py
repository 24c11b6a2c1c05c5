"""The classes that describe a scaling law: its variables, parameters, formula and domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from ...errors import MissingColumnError, ScalingError
from ._duals import Dual, grad_of, value_of


# `x.N` is a column of the table, and `p.alpha` is a parameter
Namespace = SimpleNamespace

# columns(x, p) returns one array, `Dual` or number for each linear parameter
Columns = Callable[[Namespace, Namespace], Sequence[Any]]


@dataclass(frozen=True)
class Variable:
    """A variable of a law, such as N (parameters) or D (tokens). Every run has a value of it.

    Attributes:
        name (`str`): Name of its column in a table of runs.
        symbol (`str`): Its symbol in LaTeX.
        unit (`str`): Unit of its values, "1" if they have none.
        meaning (`str`): Description of the variable.
        minimum (`float`): Lower limit of valid values.
        maximum (`float`): Upper limit. Valid values are smaller than it.
        open_minimum (`bool`): Whether valid values must be larger than `minimum`.
        levels (`int`): Smallest number of different values that a fit needs.
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
        """Return a mask of the valid values. NaN and infinity are never valid."""
        above = values > self.minimum if self.open_minimum else values >= self.minimum
        return above & (values < self.maximum) & np.isfinite(values)

    @property
    def range_text(self) -> str:
        """The range of valid values, such as `"> 0 and finite"`."""
        sign = ">" if self.open_minimum else ">="
        top = "finite" if math.isinf(self.maximum) else f"< {self.maximum:g}"
        return f"{sign} {self.minimum:g} and {top}"


LOSS = Variable("loss", "L", "nats per token", "mean cross entropy on held-out or training tokens")


@dataclass(frozen=True)
class Parameter:
    """A parameter (coefficient) of a law, such as alpha.

    Attributes:
        name (`str`): Its key in `Fit.values`.
        symbol (`str`): Its symbol in LaTeX.
        meaning (`str`): Description of the parameter, with its unit.
        bounds (`tuple[float, float]`): Smallest and largest value.
        starts (`tuple[float, ...]`): Its values on the grid of starting points. A linear parameter
            needs them only if the law's columns use it.
        scale (`str`): `"log"` if the search moves its logarithm, so that it stays positive. Else
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
            raise ScalingError(
                f'`bounds` of `{self.name}` must not be negative because its `scale` is "log", '
                f"got {self.bounds}."
            )


@dataclass(frozen=True)
class Published:
    """Published values of a law's parameters.

    Attributes:
        values (`Mapping[str, float]`): Every parameter by name.
        source (`str`): The arXiv number or URL, and the table or equation.
        note (`str`): A remark on the data behind the values, or on their quality.
    """

    values: Mapping[str, float]
    source: str
    note: str = ""

    @classmethod
    def of(cls, source: str, note: str = "", **values: float) -> Published:
        """Build published values from keyword arguments: `Published.of("arXiv ...", E=1.69)`."""
        return cls(values, source, note)


@dataclass(frozen=True)
class Domain:
    """The range in which a law was fitted, and its known limits.

    Attributes:
        ranges (`Mapping[str, tuple[float, float]]`): Smallest and largest value of a variable in
            the runs behind the published values.
        architectures (`tuple[str, ...]`): Some of `"dense"`, `"moe"`, `"sparse"`, `"familial"`.
        settings (`str`): Data and schedule of those runs, and the way to count N and FLOPs.
        failures (`tuple[str, ...]`): Known limits of the law, one or two sentences each.
    """

    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    architectures: tuple[str, ...] = ("dense",)
    settings: str = ""
    failures: tuple[str, ...] = ()

    def outside(self, **variables: Any) -> tuple[str, ...]:
        """Return one sentence for each variable that is outside its range.

        Example:
            >>> get_law("hoffmann").domain.outside(N=1e12, D=1e11)
            ('`N` = 1e+12 is above 1.6e+10, the edge of the runs this law was fitted on.',)
        """
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
    """The relation between a linear parameter and the weight of its column, if they differ.

    Attributes:
        weight (`Callable`): `weight(value, p)` returns the weight for a value of the parameter.
        value (`Callable`): `value(weight, p)` is the inverse function.
    """

    weight: Callable[[Any, Namespace], Any]
    value: Callable[[Any, Namespace], Any]


@dataclass(frozen=True)
class Outer:
    """The function from the sum of a law's terms to the loss. Without it the sum is the loss.

    Attributes:
        apply (`Callable`): `apply(total, x, p)` returns the loss for a sum of terms.
        invert (`Callable`): `invert(loss, x, p)` is the inverse function.
    """

    apply: Callable[[Any, Namespace, Namespace], Any]
    invert: Callable[[Any, Namespace, Namespace], Any]


@dataclass(frozen=True)
class Law:
    """A scaling law: the loss is `outer(sum_j weight_j * column_j)`.

    You write the columns in plain numpy, with variables such as `x.N` and parameters such as
    `p.alpha`. The gradient follows by forward-mode differentiation. Linear parameters only weight
    columns, so least squares can find them when the nonlinear ones are known. This makes fits
    fast.

    Attributes:
        name (`str`): Its key in `LAWS`.
        title (`str`): A title of one line.
        formula (`str`): The formula in LaTeX, without dollar signs.
        formula_text (`str`): The formula in ASCII.
        source (`str`): The arXiv number or URL.
        variables (`tuple[Variable, ...]`): The variables, such as N and D.
        linear (`tuple[Parameter, ...]`): The linear parameters, in the order of the columns.
        nonlinear (`tuple[Parameter, ...]`): The other parameters, such as exponents.
        columns (`Callable`): `columns(x, p)` returns one array of shape (rows,), or a number, for
            each linear parameter. `x` has all variables and `p` all parameters. A column should
            depend on linear parameters only weakly.
        links (`Mapping[str, Link]`): Links of the linear parameters that are not the weight of
            their column, such as the `N_c` of `(N_c / N) ** alpha`.
        outer (`Outer`, *optional*): The function of the sum. Without it the sum is the loss.
        published (`Mapping[str, Published]`): Published values by label.
        domain (`Domain`): The range and the limits of the law.
        notes (`str`): Conventions and open questions.
        family (`str`): `"familial"`, `"dense"`, `"sparse"`, or `"rule"` if it does not predict a
            loss.
        target (`Variable`): The quantity that it predicts.
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
            raise ScalingError(f"The parameters of `{self.name}` must differ in name, got {names}.")
        for label, given in self.published.items():
            if set(given.values) != set(names):
                raise ScalingError(
                    f"`published` values {label!r} of `{self.name}` must name {sorted(names)}, got "
                    f"{sorted(given.values)}."
                )

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """All parameters, the linear ones first."""
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
        """Return the terms of the law, each a column times its weight, from arrays or `Dual`s."""
        columns = self.columns(x, p)
        return [
            self.weight(parameter.name, p) * column
            for parameter, column in zip(self.linear, columns, strict=True)
        ]

    def weight(self, name: str, p: Namespace) -> Any:
        """Return the weight of a linear parameter's column."""
        value = getattr(p, name)
        return self.links[name].weight(value, p) if name in self.links else value

    def evaluate(self, x: Namespace, p: Namespace) -> Any:
        """Return the loss for arrays or `Dual`s, without checks."""
        total, *rest = self.terms(x, p)
        for term in rest:
            total = total + term
        return total if self.outer is None else self.outer.apply(total, x, p)

    def predict(self, values: Mapping[str, Any], **variables: Any) -> np.ndarray:
        """Return the loss for given values of the parameters and variables.

        Args:
            values (`Mapping[str, float]`): Every parameter by name. Arrays broadcast with the
                variables. Shapes (draws, 1) and (rows,) result in (draws, rows).
            variables (`float` or array): Every variable by name, in its unit.

        Returns:
            `np.ndarray`: The loss in the unit of `target` (nats per token).

        Example:
            >>> law = get_law("hoffmann")
            >>> law.predict(law.published["hoffmann"].values, N=70e9, D=1.4e12)
        """
        x, p, shape = self._namespaces(values, variables)
        return np.array(np.broadcast_to(value_of(self.evaluate(x, p)), shape), dtype=np.float64)

    def gradient(self, values: Mapping[str, Any], **variables: Any) -> np.ndarray:
        """Return the derivatives of `predict` by every parameter.

        The arguments are those of `predict`. The result has one more axis, in the order of `names`.
        """
        x, p, shape = self._namespaces(values, variables)
        duals = {name: Dual(value, {name: 1.0}) for name, value in vars(p).items()}
        grad = grad_of(self.evaluate(x, Namespace(**duals)))
        return np.stack([np.broadcast_to(grad.get(name, 0.0), shape) for name in self.names], -1)

    def _namespaces(
        self, values: Mapping[str, Any], variables: Mapping[str, Any]
    ) -> tuple[Namespace, Namespace, tuple[int, ...]]:
        """Check and convert the arguments of `predict`. Also return their broadcast shape."""
        missing = tuple(name for name in self.variable_names if name not in variables)
        if missing:
            raise MissingColumnError(
                f"`{self.name}` needs the variables {list(self.variable_names)}, missing: "
                f"{list(missing)}.",
                missing,
            )
        absent = [name for name in self.names if name not in values]
        if absent:
            raise ScalingError(
                f"`values` of `{self.name}` must contain {list(self.names)}, missing: {absent}."
            )
        x = {name: np.asarray(variables[name], np.float64) for name in self.variable_names}
        p = {name: np.asarray(values[name], np.float64) for name in self.names}
        shape = np.broadcast_shapes(*(np.shape(v) for v in [*x.values(), *p.values()]))
        return Namespace(**x), Namespace(**p), shape

"""Numbers with their derivatives, so that a law written in numpy also computes its gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin


class Dual(NDArrayOperatorsMixin):
    """An array with its derivatives by named parameters, which broadcast to its shape.

    Arithmetic and the functions in `UNARY` and `BINARY` work on it (forward-mode
    differentiation). A parameter that is missing in `grad` has the derivative zero.
    """

    __slots__ = ("grad", "value")

    def __init__(self, value: Any, grad: Mapping[str, Any]) -> None:
        self.value, self.grad = value, grad

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__" or kwargs:
            return NotImplemented
        if ufunc in UNARY:
            (x,) = inputs
            value, slope = UNARY[ufunc](x.value)
            return Dual(value, {name: slope * part for name, part in x.grad.items()})
        if ufunc in BINARY:
            first, second = inputs
            value, left, right = BINARY[ufunc](value_of(first), value_of(second))
            grad: dict[str, Any] = {}
            for x, slope_of in ((first, left), (second, right)):
                for name, part in grad_of(x).items():
                    term = slope_of() * part
                    grad[name] = grad[name] + term if name in grad else term
            return Dual(value, grad)
        return NotImplemented

    def __repr__(self) -> str:
        return f"Dual({self.value!r}, {dict(self.grad)!r})"


def value_of(x: Any) -> Any:
    """Return the array of a `Dual`, or the number itself."""
    return x.value if isinstance(x, Dual) else x


def grad_of(x: Any) -> Mapping[str, Any]:
    """Return the derivatives of a `Dual`, or an empty mapping for a plain number."""
    return x.grad if isinstance(x, Dual) else {}


def _exp(x: Any) -> tuple[Any, Any]:
    value = np.exp(x)
    return value, value


def _expm1(x: Any) -> tuple[Any, Any]:
    value = np.expm1(x)
    return value, value + 1


def _sqrt(x: Any) -> tuple[Any, Any]:
    value = np.sqrt(x)
    return value, 0.5 / value


def _power(x: Any, y: Any) -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    # the value and the slope share one logarithm, which is faster than `np.power`
    log = np.log(x)
    value = np.exp(y * log)
    return value, lambda: y * value / x, lambda: value * log


# function -> its value and its slope
UNARY: dict[Any, Callable[[Any], tuple[Any, Any]]] = {
    np.exp: _exp,
    np.expm1: _expm1,
    np.log: lambda x: (np.log(x), 1 / x),
    np.sqrt: _sqrt,
    np.square: lambda x: (x * x, 2 * x),
    np.negative: lambda x: (-x, -1.0),
    np.positive: lambda x: (x, 1.0),
}

# function -> its value and two functions that compute its slopes when they are needed
BINARY: dict[Any, Callable[[Any, Any], tuple[Any, Callable[[], Any], Callable[[], Any]]]] = {
    np.add: lambda x, y: (x + y, lambda: 1.0, lambda: 1.0),
    np.subtract: lambda x, y: (x - y, lambda: 1.0, lambda: -1.0),
    np.multiply: lambda x, y: (x * y, lambda: y, lambda: x),
    np.divide: lambda x, y: (x / y, lambda: 1 / y, lambda: -x / (y * y)),
    np.power: _power,
    np.minimum: lambda x, y: (np.minimum(x, y), lambda: x <= y, lambda: x > y),
    np.maximum: lambda x, y: (np.maximum(x, y), lambda: x >= y, lambda: x < y),
}

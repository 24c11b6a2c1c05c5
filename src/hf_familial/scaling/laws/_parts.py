"""Variables, parameters and links that several laws of the catalogue share."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .law import Link, Namespace, Parameter, Variable


N = Variable(
    "N", "N", "parameters", "model size, with or without embeddings, counted alike in all runs"
)
D = Variable("D", "D", "tokens", "training tokens; a repeated token counts each time")
D_UNIQUE = Variable("D_unique", "U_D", "tokens", "number of different training tokens", levels=1)
X = Variable("X", "X", "any", "the only variable: parameters, tokens or FLOPs, for example")


def _count(name: str, symbol: str, meaning: str, minimum: float = 0.0) -> Variable:
    return Variable(name, symbol, "1", meaning, minimum, open_minimum=False, levels=2)


G = _count("G", "G", "granularity: number of exits, the deepest included", 1)
U = _count("U", "U", "number of exits shallower than this one")
V = _count("V", "V", "number of exits deeper than this one")
EXPERTS = _count("E", "E", "number of experts in every routed layer", 1)
S = Variable(
    "S", "S", "1", "sparsity: share of weights (or experts) that are not used", maximum=1.0,
    open_minimum=False, levels=2,
)  # fmt: skip
EXPERT_GRANULARITY = Variable(
    "G_expert", "G", "1", "width of the dense feed-forward layer divided by that of an expert"
)

# The grid of exponents spans a wide range. It is dense near the published values.
EXPONENTS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.85, 1.0, 1.25, 1.5)
FEW_EXPONENTS = (0.08, 0.15, 0.25, 0.35, 0.5, 0.7, 1.0)


def floor(name: str = "E") -> Parameter:
    """Build the parameter of the irreducible loss. It is linear, and 0 or more."""
    return Parameter(name, name, "irreducible loss, nats per token", (0.0, math.inf))


def factor(
    name: str,
    symbol: str | None = None,
    meaning: str = "weight of its term",
    starts: tuple[float, ...] = (),
) -> Parameter:
    """Build the parameter of a positive column weight. The search moves its logarithm."""
    return Parameter(name, symbol or name, meaning, (0.0, math.inf), starts, "log")


def exponent(
    name: str,
    symbol: str | None = None,
    meaning: str = "exponent",
    starts: tuple[float, ...] = EXPONENTS,
    bounds: tuple[float, float] = (0.0, 5.0),
) -> Parameter:
    """Build the parameter of an exponent, by default between 0 and 5."""
    return Parameter(name, symbol or f"\\{name}", meaning, bounds, starts)


def power_link(exponent_of: Callable[[Namespace], Any]) -> Link:
    """Return the link of a parameter whose power weights its column: `N_c` in `(N_c / N) ** a`."""
    return Link(partial(_to_power, exponent_of), partial(_from_power, exponent_of))


# These are named functions, not lambdas, so that a law can be pickled for another process.
def _to_power(exponent_of: Callable[[Namespace], Any], value: Any, p: Namespace) -> Any:
    return value ** exponent_of(p)


def _from_power(exponent_of: Callable[[Namespace], Any], weight: Any, p: Namespace) -> Any:
    return weight ** (1 / exponent_of(p))


def exp(total: Any, *_: Any) -> Any:
    """Return the exponential. The other arguments of a `Link` or `Outer` are ignored."""
    return np.exp(total)


def log(loss: Any, *_: Any) -> Any:
    """Return the logarithm. The other arguments of a `Link` or `Outer` are ignored."""
    return np.log(loss)


EXP_LINK = Link(exp, log)  # for a parameter that is the logarithm of its column's weight
SIZE_FACTOR = factor("A", meaning="weight of the size term, nats per token x parameters^alpha")
DATA_FACTOR = factor("B", meaning="weight of the data term, nats per token x tokens^beta")
ALPHA = exponent("alpha", meaning="exponent of size")
BETA = exponent("beta", meaning="exponent of data")
FEW_ALPHA = exponent("alpha", meaning="exponent of size", starts=FEW_EXPONENTS)
FEW_BETA = exponent("beta", meaning="exponent of data", starts=FEW_EXPONENTS)

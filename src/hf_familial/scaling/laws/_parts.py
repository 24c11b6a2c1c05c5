"""Parts of the laws in the catalogue: variables, kinds of parameters, links."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .law import Link, Namespace, Parameter, Variable


N = Variable("N", "N", "parameters", "model size; count embeddings or not, but always alike")
D = Variable("D", "D", "tokens", "training tokens, repeated ones each time")
D_UNIQUE = Variable("D_unique", "U_D", "tokens", "different training tokens", levels=1)
X = Variable("X", "X", "any", "the one variable: parameters, tokens, FLOPs, ...")


def _count(name: str, symbol: str, meaning: str, minimum: float = 0.0) -> Variable:
    return Variable(name, symbol, "1", meaning, minimum, open_minimum=False, levels=2)


G = _count("G", "G", "granularity: exits of a familial model, the deepest counted", 1)
U = _count("U", "U", "exits shallower than this one")
V = _count("V", "V", "exits deeper than this one")
EXPERTS = _count("E", "E", "experts of every routed layer", 1)
S = Variable(
    "S", "S", "1", "sparsity: share of weights, or of experts, that take no part", maximum=1.0,
    open_minimum=False, levels=2,
)  # fmt: skip
EXPERT_GRANULARITY = Variable(
    "G_expert", "G", "1", "how many times narrower an expert is than the dense feed-forward"
)

# starts of exponents: wide, and dense where published ones lie
EXPONENTS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.85, 1.0, 1.25, 1.5)
FEW_EXPONENTS = (0.08, 0.15, 0.25, 0.35, 0.5, 0.7, 1.0)


def floor(name: str = "E") -> Parameter:
    """Return the loss that no size and no data take away: linear, zero at least."""
    return Parameter(name, name, "irreducible loss, nats per token", (0.0, math.inf))


def factor(
    name: str,
    symbol: str | None = None,
    meaning: str = "weight of its term",
    starts: tuple[float, ...] = (),
) -> Parameter:
    """Return a positive weight of a column, searched in logs."""
    return Parameter(name, symbol or name, meaning, (0.0, math.inf), starts, "log")


def exponent(
    name: str,
    symbol: str | None = None,
    meaning: str = "exponent",
    starts: tuple[float, ...] = EXPONENTS,
    bounds: tuple[float, float] = (0.0, 5.0),
) -> Parameter:
    """Return an exponent, positive unless its bounds say otherwise."""
    return Parameter(name, symbol or f"\\{name}", meaning, bounds, starts)


def power_link(exponent_of: Callable[[Namespace], Any]) -> Link:
    """Link a parameter that weights its column by a power, as `N_c` in `(N_c / N) ** a`."""
    return Link(partial(_to_power, exponent_of), partial(_from_power, exponent_of))


# functions with names, not lambdas: a law can be sent to another process
def _to_power(exponent_of: Callable[[Namespace], Any], value: Any, p: Namespace) -> Any:
    return value ** exponent_of(p)


def _from_power(exponent_of: Callable[[Namespace], Any], weight: Any, p: Namespace) -> Any:
    return weight ** (1 / exponent_of(p))


def exp(total: Any, *_: Any) -> Any:
    """Return the exponential; for `Link` and `Outer`, whose other arguments it ignores."""
    return np.exp(total)


def log(loss: Any, *_: Any) -> Any:
    """Return the logarithm; for `Link` and `Outer`, whose other arguments it ignores."""
    return np.log(loss)


EXP_LINK = Link(exp, log)  # a parameter that is the logarithm of its column's weight
SIZE_FACTOR = factor(
    "A", meaning="weight of the size term, nats per token times parameters to alpha"
)
DATA_FACTOR = factor("B", meaning="weight of the data term, nats per token times tokens to beta")
ALPHA = exponent("alpha", meaning="exponent of size")
BETA = exponent("beta", meaning="exponent of data")
FEW_ALPHA = exponent("alpha", meaning="exponent of size", starts=FEW_EXPONENTS)
FEW_BETA = exponent("beta", meaning="exponent of data", starts=FEW_EXPONENTS)

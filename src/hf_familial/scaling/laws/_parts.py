"""What the laws of the catalogue are made of: variables, kinds of parameters, links."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .law import Link, Namespace, Parameter, Variable


N = Variable("N", "N", "parameters", "model size; count embeddings or not, but always alike")
D = Variable("D", "D", "tokens", "training tokens, repeated ones each time")
G = Variable(
    "G", "G", "1", "granularity: exits of a familial model, the deepest counted", minimum=1,
    open_minimum=False, levels=2,
)  # fmt: skip
U = Variable(
    "U", "U", "1", "exits shallower than this one", open_minimum=False, levels=2
)  # fmt: skip
V = Variable("V", "V", "1", "exits deeper than this one", open_minimum=False, levels=2)
S = Variable(
    "S", "S", "1", "sparsity: share of weights, or of experts, that take no part", maximum=1.0,
    open_minimum=False, levels=2,
)  # fmt: skip
EXPERTS = Variable(
    "E", "E", "1", "experts of every routed layer", minimum=1, open_minimum=False, levels=2
)
EXPERT_GRANULARITY = Variable(
    "G_expert", "G", "1", "how many times narrower an expert is than the dense feed-forward",
    levels=3,
)  # fmt: skip
D_UNIQUE = Variable("D_unique", "U_D", "tokens", "different training tokens", levels=1)
X = Variable("X", "X", "any", "the one variable: parameters, tokens, FLOPs, ...")

# starts of exponents: wide, and dense where published ones lie
EXPONENTS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.85, 1.0, 1.25, 1.5)
FEW_EXPONENTS = (0.08, 0.15, 0.25, 0.35, 0.5, 0.7, 1.0)


def floor(name: str = "E", symbol: str | None = None) -> Parameter:
    """The loss that no size and no data take away: linear, zero at least."""
    return Parameter(name, symbol or name, "irreducible loss, nats per token", (0.0, math.inf))


def factor(
    name: str, symbol: str | None = None, meaning: str = "", starts: tuple[float, ...] = ()
) -> Parameter:
    """A positive weight of a column, searched in logs."""
    return Parameter(
        name, symbol or name, meaning or "weight of its term", (0.0, math.inf), starts, "log"
    )


def exponent(
    name: str,
    symbol: str | None = None,
    meaning: str = "",
    starts: tuple[float, ...] = EXPONENTS,
    bounds: tuple[float, float] = (0.0, 5.0),
) -> Parameter:
    """An exponent, positive unless its bounds say otherwise."""
    return Parameter(name, symbol or f"\\{name}", meaning or "exponent", bounds, starts)


def power_link(exponent_of: Callable[[Namespace], Any]) -> Link:
    """A parameter that weights its column by a power of itself, as `N_c` in `(N_c / N) ** a`."""
    return Link(partial(_to_power, exponent_of), partial(_from_power, exponent_of))


# functions with names, not lambdas: a law can be sent to another process
def _to_power(exponent_of: Callable[[Namespace], Any], value: Any, p: Namespace) -> Any:
    return value ** exponent_of(p)


def _from_power(exponent_of: Callable[[Namespace], Any], weight: Any, p: Namespace) -> Any:
    return weight ** (1 / exponent_of(p))


def _exp(value: Any, p: Namespace) -> Any:
    return np.exp(value)


def _log(weight: Any, p: Namespace) -> Any:
    return np.log(weight)


# a parameter that is the logarithm of its column's weight
EXP_LINK = Link(_exp, _log)

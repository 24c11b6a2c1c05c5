"""Laws of dense models in which size and data act on each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .law import Law, Namespace
from .parts import D_UNIQUE, EXP_LINK, FEW_EXPONENTS, D, N, exponent, factor, floor
from .vocabulary import Domain, Parameter, Published


# --- Data-constrained -------------------------------------------------------------------------


def _saturating(total: Any, unique: Any, rate: Any) -> Any:
    repeats = np.maximum(total / unique - 1, 0.0)
    return unique * (1 + rate * (1 - np.exp(-repeats / rate)))


def _muennighoff(x: Namespace, p: Namespace) -> Sequence[Any]:
    unique = np.minimum(x.D, x.D_unique)
    # the optimal size for that many tokens: where alpha A N^-alpha = beta B D^-beta
    matched = (p.alpha * p.A / (p.beta * p.B)) ** (1 / p.alpha) * unique ** (p.beta / p.alpha)
    size = _saturating(x.N, np.minimum(x.N, matched), p.R_N)
    data = _saturating(x.D, unique, p.R_D)
    return 1.0, size**-p.alpha, data**-p.beta


MUENNIGHOFF = Law(
    name="muennighoff",
    title="Muennighoff et al., repeated data",
    formula=r"L = E + A N'^{-\alpha} + B D'^{-\beta},\quad D' = U_D + U_D R_D^* \left(1 - "
    r"e^{-(D/U_D - 1)/R_D^*}\right),\; N' \text{ alike from } U_N",
    formula_text=(
        "L = E + A N'^-alpha + B D'^-beta, D' = U (1 + R_D (1 - exp(-(D/U - 1)/R_D))), "
        "U = min(D, D_unique); N' alike with U_N = min(N, N*(U))"
    ),
    source="arXiv 2305.16264, eqs. 5, 6 and 18",
    variables=(N, D, D_UNIQUE),
    linear=(
        floor(),
        factor("A", meaning="weight of the size term", starts=(520.8,)),
        factor("B", meaning="weight of the data term", starts=(1487.7,)),
    ),
    nonlinear=(
        exponent("alpha", meaning="exponent of size", starts=FEW_EXPONENTS),
        exponent("beta", meaning="exponent of data", starts=FEW_EXPONENTS),
        factor("R_N", "R_N^*", "excess sizes worth having", (2.0, 5.0, 15.0)),
        factor("R_D", "R_D^*", "repetitions worth having", (5.0, 15.0, 45.0)),
    ),
    columns=_muennighoff,
    published={
        "muennighoff": Published(
            {
                "E": math.exp(0.6254804),
                "A": math.exp(6.255414),
                "B": math.exp(7.3049974),
                "alpha": 0.3526596,
                "beta": 0.3526596,
                "R_N": 5.309743,
                "R_D": 15.387756,
            },
            "arXiv 2305.16264, appendix B",
            "C4; alpha and beta tied; R_N and R_D fitted on 182 selected runs, the rest fixed.",
        )
    },
    domain=Domain(
        ranges={"N": (7e6, 9e9), "D": (1e8, 9e11)},
        settings="C4, up to 1500 epochs.",
        failures=(
            "Runs that repetition makes worse were left out of the published fit: the law knows "
            "no overfitting.",
        ),
    ),
    notes="With fresh data (D_unique >= D) and N below N*(D) it is Hoffmann's law.",
)


# --- Farseer ----------------------------------------------------------------------------------


REFERENCE = 1e9  # parameters; where the search's coordinates of Farseer's law are centred


def _bend(size: Any, exponent: Any) -> Any:
    """((N / reference)^exponent - 1) / exponent: a logarithm at exponent zero."""
    return np.expm1(exponent * np.log(size / REFERENCE)) / exponent


def _farseer(x: Namespace, p: Namespace) -> Sequence[Any]:
    exponent_of_data = np.exp(p.c_1 + p.s_1 * _bend(x.N, p.alpha))
    size, data = p.s_3 * _bend(x.N, p.gamma), p.s_2 * _bend(x.N, p.beta)
    return np.exp(size), np.exp(data - exponent_of_data * np.log(x.D))


def farseer_values(printed: Mapping[str, float]) -> dict[str, float]:
    """The parameters of `farseer` from those of the paper.

    Args:
        printed (`Mapping[str, float]`): `a_1, b_1, alpha, a_2, b_2, beta, a_3, b_3, gamma` of
            L = exp(a_3 N^gamma + b_3) + exp(a_2 N^beta + b_2) D^-exp(a_1 N^alpha + b_1), arXiv
            2506.10972, eq. 3.

    Returns:
        `dict[str, float]`: For `Law.predict`.
    """
    values: dict[str, float] = {}
    for at, name in ((1, "alpha"), (2, "beta"), (3, "gamma")):
        height = printed[f"a_{at}"] * REFERENCE ** printed[name]
        values |= {f"c_{at}": printed[f"b_{at}"] + height, f"s_{at}": height * printed[name]}
        values[name] = printed[name]
    return values


def _bent(name: str, starts: tuple[float, ...]) -> Parameter:
    return exponent(name, meaning="how that slope bends", starts=starts, bounds=(-2.0, 2.0))


FARSEER = Law(
    name="farseer",
    title="Farseer: the exponent of data depends on size",
    formula=r"L = e^{c_3 + s_3 h_\gamma} + e^{c_2 + s_2 h_\beta} D^{-\exp(c_1 + s_1 h_\alpha)},"
    r"\quad h_\gamma = \frac{(N/10^9)^\gamma - 1}{\gamma}",
    formula_text=(
        "L = exp(c_3 + s_3 h(gamma)) + exp(c_2 + s_2 h(beta)) D^-exp(c_1 + s_1 h(alpha)), "
        "h(gamma) = ((N/1e9)^gamma - 1)/gamma"
    ),
    source="arXiv 2506.10972, eq. 3",
    variables=(N, D),
    linear=(
        Parameter("c_3", "c_3", "log of the loss that data cannot take away, at N = 1e9"),
        Parameter("c_2", "c_2", "log of the weight of the data term, at N = 1e9"),
    ),
    nonlinear=(
        Parameter("s_3", "s_3", "slope of the former in ln N", starts=(-0.3, -0.1, -0.03)),
        _bent("gamma", (-0.2, 0.15, 0.4)),
        Parameter("s_2", "s_2", "slope of the latter in ln N", starts=(-1.5, -0.5, 0.0)),
        _bent("beta", (-0.3, -0.05, 0.2)),
        Parameter("c_1", "c_1", "log of the exponent of data, N = 1e9", starts=(-1.5, -1.0, -0.5)),
        Parameter("s_1", "s_1", "its slope in ln N", starts=(-0.2, -0.05, 0.05)),
        _bent("alpha", (-0.2, 0.15)),
    ),
    columns=_farseer,
    links={"c_3": EXP_LINK, "c_2": EXP_LINK},
    domain=Domain(
        settings="About 1000 runs; loss in the paper's own unit.",
        failures=("Nine parameters: on less than two decades of N its exponents are loose.",),
    ),
    notes=(
        "The paper writes exp(a_3 N^gamma + b_3) and so on; its a and b go to infinity where an "
        "exponent passes zero, so the same function is written with its value c and slope s at "
        "N = 1e9: s = a gamma 1e9^gamma, c = b + a 1e9^gamma (`farseer_values`). The printed "
        "values could not be read for this catalogue."
    ),
)  # fmt: skip

CATALOGUE = (MUENNIGHOFF, FARSEER)

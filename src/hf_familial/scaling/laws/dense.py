"""Laws of dense models (one exit, all weights used), and the power law of one variable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ._parts import (
    ALPHA,
    BETA,
    D_UNIQUE,
    DATA_FACTOR,
    EXP_LINK,
    EXPONENTS,
    FEW_ALPHA,
    FEW_BETA,
    SIZE_FACTOR,
    D,
    N,
    X,
    exponent,
    factor,
    floor,
    power_link,
)
from .law import Domain, Law, Namespace, Outer, Parameter, Published


def _hoffmann(x: Namespace, p: Namespace) -> Sequence[Any]:
    return 1.0, x.N**-p.alpha, x.D**-p.beta


HOFFMANN = Law(
    name="hoffmann",
    title="Hoffmann et al. (Chinchilla), approach 3",
    formula=r"L = E + A N^{-\alpha} + B D^{-\beta}",
    formula_text="L = E + A N^-alpha + B D^-beta",
    source="arXiv 2203.15556, eq. 2",
    variables=(N, D),
    linear=(floor(), SIZE_FACTOR, DATA_FACTOR),
    nonlinear=(ALPHA, BETA),
    columns=_hoffmann,
    published={
        "hoffmann": Published.of(
            "arXiv 2203.15556, eq. 10",
            "Does not fit the paper's own runs: see arXiv 2404.10102.",
            E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28,
        ),
        "hoffmann_unrounded": Published.of(
            "LaTeX source of arXiv 2203.15556",
            E=math.exp(0.5267228), A=math.exp(6.0073404), B=math.exp(6.0179186),
            alpha=0.33917084, beta=0.2849083,
        ),
        "besiroglu": Published.of(
            "arXiv 2404.10102, table 1",
            "Refit of 240 runs that were read from a figure of arXiv 2203.15556.",
            E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658,
        ),
        "muennighoff": Published.of(
            "arXiv 2305.16264, eq. 20",
            "Fitted on C4, with alpha and beta tied.",
            E=1.87, A=521.0, B=1488.0, alpha=0.353, beta=0.353,
        ),
        "krajewski": Published.of(
            "arXiv 2402.07871, table 1, dense row",
            "Fitted on C4. E is that of the MoE law of the same paper.",
            E=0.47, A=16.3, B=26.7, alpha=0.126, beta=0.127,
        ),
    },
    domain=Domain(
        ranges={"N": (4.4e7, 1.6e10), "D": (5e9, 5e11)},
        settings="MassiveText below one epoch, cosine schedule matched to D, N with embeddings.",
        failures=(
            "E is hard to determine, because smaller exponents have nearly the same effect as a "
            "smaller E.",
            "Tokens repeated for more than about four epochs help less than new ones (arXiv "
            "2305.16264).",
            "Published exponents are valid for their data and tokenizer only. Fit your own.",
        ),
    ),
    notes="At C = 6ND: N* = K (C/6)^(beta/(alpha+beta)), K = (alpha A/(beta B))^(1/(alpha+beta)).",
)  # fmt: skip


def _skaling(x: Namespace, p: Namespace) -> Sequence[Any]:
    return x.N**-p.alpha, x.D**-p.beta


def _add_floor(total: Any, x: Namespace, p: Namespace) -> Any:
    return total**p.k + p.E


def _off_floor(loss: Any, x: Namespace, p: Namespace) -> Any:
    return (loss - p.E) ** (1 / p.k)


SKALING = Law(
    name="skaling",
    title="Outer exponent (Skaling)",
    formula=r"L = E + \left(A N^{-\alpha} + B D^{-\beta}\right)^{k}",
    formula_text="L = E + (A N^-alpha + B D^-beta)^k",
    source="arXiv 2608.07222",
    variables=(N, D),
    linear=(SIZE_FACTOR, DATA_FACTOR),
    nonlinear=(
        FEW_ALPHA,
        FEW_BETA,
        exponent("k", "k", "outer exponent", (0.5, 0.75, 1.0), (0.01, 3.0)),
        Parameter(
            "E", "E", "irreducible loss, nats per token", (0.0, math.inf),
            (0.0, 0.3, 0.6, 1.0, 1.4, 1.7, 2.0, 2.5),
        ),
    ),
    columns=_skaling,
    outer=Outer(_add_floor, _off_floor),
    domain=Domain(
        failures=(
            "A change of k can replace a change of E. For one data set, E moved from 0.45 to 0.03 "
            "(arXiv 2608.07222).",
        )
    ),
    notes="k does not change the optimal N and D. With k = 1 this is the law `hoffmann`.",
)  # fmt: skip


def _gadre(x: Namespace, p: Namespace) -> Sequence[Any]:
    compute, ratio = (6 * x.N * x.D) ** -p.eta, x.D / x.N
    return 1.0, ratio**p.eta * compute, ratio**-p.eta * compute


GADRE = Law(
    name="gadre",
    title="Gadre et al., over-training",
    formula=r"L = E + \left(a M^{\eta} + b M^{-\eta}\right) C^{-\eta},\quad M = D/N,\; C = 6ND",
    formula_text="L = E + (a M^eta + b M^-eta) C^-eta, M = D/N, C = 6 N D",
    source="arXiv 2403.08540, eq. 4",
    variables=(N, D),
    linear=(floor(), factor("a"), factor("b")),
    nonlinear=(exponent("eta", meaning="half the common exponent of size and data"),),
    columns=_gadre,
    domain=Domain(
        ranges={"N": (1.1e7, 6.9e9)},
        settings="C4, RedPajama and RefinedWeb, 20 to 640 tokens per parameter.",
        failures=("The law assumes that size and data have the same exponent.",),
    ),
    notes="This is the law `hoffmann` with alpha = beta = 2 eta, A = a 6^-eta, B = b 6^-eta.",
)


def _power(x: Namespace, p: Namespace) -> Sequence[Any]:
    return 1.0, x.X**-p.alpha


POWER = Law(
    name="power",
    title="Power law of one variable, with an irreducible loss",
    formula=r"L = E + A X^{-\alpha}",
    formula_text="L = E + A X^-alpha",
    source="arXiv 1712.00409",
    variables=(X,),
    linear=(floor(), factor("A", meaning="weight of the term")),
    nonlinear=(exponent("alpha", meaning="exponent of X", starts=(*EXPONENTS, 2.0, 3.0)),),
    columns=_power,
    notes="Fix E at 0 for a pure power law.",
)


def _kaplan_joint(x: Namespace, p: Namespace) -> Sequence[Any]:
    return x.N ** -(p.alpha_N / p.alpha_D), 1 / x.D


def _kaplan_additive(x: Namespace, p: Namespace) -> Sequence[Any]:
    return x.N**-p.alpha_N, x.D**-p.alpha_D


def _to_alpha_d(total: Any, x: Namespace, p: Namespace) -> Any:
    return total**p.alpha_D


def _from_alpha_d(loss: Any, x: Namespace, p: Namespace) -> Any:
    return loss ** (1 / p.alpha_D)


def _kaplan_exponent(name: str, p: Namespace) -> Any:
    return p.alpha_N / p.alpha_D if name == "ratio" else getattr(p, name)


def _kaplan_link(name: str) -> Any:
    return power_link(partial(_kaplan_exponent, name))


def _kaplan(**own: Any) -> Law:
    """Return a law of Kaplan et al. It has two power terms and no irreducible loss."""
    return Law(
        variables=(N, D),
        linear=(
            factor("N_c", meaning="scale of size, parameters"),
            factor("D_c", meaning="scale of data, tokens"),
        ),
        nonlinear=(
            exponent("alpha_N", r"\alpha_N", "exponent of size"),
            exponent("alpha_D", r"\alpha_D", "exponent of data"),
        ),
        domain=Domain(
            ranges={"N": (7.68e2, 1.5e9), "D": (2.2e7, 2.3e10)},
            settings="WebText2, decoder Transformers, N without embeddings, test loss.",
            failures=(
                "Its optimal sizes grow too fast with compute (exponent 0.73). The causes are "
                "embeddings left out of N, a fixed warm-up and an untuned schedule at small scale "
                "(arXiv 2406.19146).",
                "The law has no irreducible loss, so the loss goes to zero.",
            ),
        ),
        **own,
    )


KAPLAN_JOINT = _kaplan(
    name="kaplan_joint",
    title="Kaplan et al., both limits in one power",
    formula=r"L = \left[\left(\frac{N_c}{N}\right)^{\alpha_N/\alpha_D} + \frac{D_c}{D}"
    r"\right]^{\alpha_D}",
    formula_text="L = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D",
    source="arXiv 2001.08361, eq. 1.5",
    columns=_kaplan_joint,
    links={"N_c": _kaplan_link("ratio")},
    outer=Outer(_to_alpha_d, _from_alpha_d),
    published={
        "kaplan": Published.of(
            "arXiv 2001.08361, table 2", N_c=6.4e13, D_c=1.8e13, alpha_N=0.076, alpha_D=0.103
        )
    },
)
KAPLAN_ADDITIVE = _kaplan(
    name="kaplan_additive",
    title="Kaplan et al., as a sum of two powers",
    formula=r"L = \left(\frac{N_c}{N}\right)^{\alpha_N} + \left(\frac{D_c}{D}\right)^{\alpha_D}",
    formula_text="L = (N_c/N)^alpha_N + (D_c/D)^alpha_D",
    source="arXiv 2502.12051, eq. 2",
    columns=_kaplan_additive,
    links={"N_c": _kaplan_link("alpha_N"), "D_c": _kaplan_link("alpha_D")},
    notes="The source is a survey. The paper of Kaplan et al. has a different equation.",
)


def _saturating(total: Any, unique: Any, rate: Any) -> Any:
    repeats = np.maximum(total / unique - 1, 0.0)
    return unique * (1 + rate * (1 - np.exp(-repeats / rate)))


def _muennighoff(x: Namespace, p: Namespace) -> Sequence[Any]:
    unique = np.minimum(x.D, x.D_unique)
    # the optimal size for these tokens, at which alpha A N^-alpha = beta B D^-beta
    matched = (p.alpha * p.A / (p.beta * p.B)) ** (1 / p.alpha) * unique ** (p.beta / p.alpha)
    size = _saturating(x.N, np.minimum(x.N, matched), p.R_N)
    data = _saturating(x.D, unique, p.R_D)
    return 1.0, size**-p.alpha, data**-p.beta


MUENNIGHOFF = Law(
    name="muennighoff",
    title="Muennighoff et al., repeated data",
    formula=r"L = E + A N'^{-\alpha} + B D'^{-\beta},\quad D' = U_D + U_D R_D^* \left(1 - "
    r"e^{-(D/U_D - 1)/R_D^*}\right),\; N' \text{ likewise from } U_N",
    formula_text=(
        "L = E + A N'^-alpha + B D'^-beta, D' = U (1 + R_D (1 - exp(-(D/U - 1)/R_D))), "
        "U = min(D, D_unique); N' likewise with U_N = min(N, N*(U))"
    ),
    source="arXiv 2305.16264, eqs. 5, 6 and 18",
    variables=(N, D, D_UNIQUE),
    linear=(
        floor(),
        factor("A", meaning="weight of the size term", starts=(520.8,)),
        factor("B", meaning="weight of the data term", starts=(1487.7,)),
    ),
    nonlinear=(
        FEW_ALPHA,
        FEW_BETA,
        factor("R_N", "R_N^*", "decay constant of the value of extra size", (2.0, 5.0, 15.0)),
        factor("R_D", "R_D^*", "decay constant of the value of repetitions", (5.0, 15.0, 45.0)),
    ),
    columns=_muennighoff,
    published={
        "muennighoff": Published.of(
            "arXiv 2305.16264, appendix B",
            "C4, alpha and beta tied. R_N and R_D were fitted on 182 runs, the rest fixed.",
            E=math.exp(0.6254804), A=math.exp(6.255414), B=math.exp(7.3049974),
            alpha=0.3526596, beta=0.3526596, R_N=5.309743, R_D=15.387756,
        )
    },
    domain=Domain(
        ranges={"N": (7e6, 9e9), "D": (1e8, 9e11)},
        settings="C4, up to 1500 epochs.",
        failures=(
            "The law does not model overfitting. The published fit left out the runs that "
            "repetition made worse.",
        ),
    ),
    notes="With new data (D_unique >= D) and N below N*(D) this is the law `hoffmann`.",
)  # fmt: skip

REFERENCE = 1e9  # parameters: the size at which the coefficients of Farseer's law are defined


def _bend(size: Any, exponent: Any) -> Any:
    """Return `((N / REFERENCE)^exponent - 1) / exponent`, a log in the limit of exponent 0."""
    return np.expm1(exponent * np.log(size / REFERENCE)) / exponent


def _farseer(x: Namespace, p: Namespace) -> Sequence[Any]:
    exponent_of_data = np.exp(p.c_1 + p.s_1 * _bend(x.N, p.alpha))
    size, data = p.s_3 * _bend(x.N, p.gamma), p.s_2 * _bend(x.N, p.beta)
    return np.exp(size), np.exp(data - exponent_of_data * np.log(x.D))


def farseer_values(printed: Mapping[str, float]) -> dict[str, float]:
    """Convert the paper's `a_1, b_1, alpha, ..., gamma` (eq. 3) to the parameters of `farseer`."""
    values: dict[str, float] = {}
    for at, name in ((1, "alpha"), (2, "beta"), (3, "gamma")):
        height = printed[f"a_{at}"] * REFERENCE ** printed[name]
        values |= {f"c_{at}": printed[f"b_{at}"] + height, f"s_{at}": height * printed[name]}
        values[name] = printed[name]
    return values


def _bent(name: str, starts: tuple[float, ...]) -> Parameter:
    return exponent(name, meaning="change of that slope with N", starts=starts, bounds=(-2.0, 2.0))


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
        Parameter("c_3", "c_3", "log of the loss with unlimited data, at N = 1e9"),
        Parameter("c_2", "c_2", "log of the weight of the data term, at N = 1e9"),
    ),
    nonlinear=(
        Parameter(
            "s_3", "s_3", "slope of the first term's log in ln N", starts=(-0.3, -0.1, -0.03)
        ),
        _bent("gamma", (-0.2, 0.15, 0.4)),
        Parameter("s_2", "s_2", "slope of the weight's log in ln N", starts=(-1.5, -0.5, 0.0)),
        _bent("beta", (-0.3, -0.05, 0.2)),
        Parameter("c_1", "c_1", "log of the exponent of data, N = 1e9", starts=(-1.5, -1.0, -0.5)),
        Parameter("s_1", "s_1", "slope of the exponent's log in ln N", starts=(-0.2, -0.05, 0.05)),
        _bent("alpha", (-0.2, 0.15)),
    ),
    columns=_farseer,
    links={"c_3": EXP_LINK, "c_2": EXP_LINK},
    domain=Domain(
        settings="About 1000 runs. The loss has the paper's own unit.",
        failures=(
            "It has nine parameters. Runs over less than two decades of N barely determine its "
            "exponents.",
        ),
    ),
    notes=(
        "The paper writes exp(a_3 N^gamma + b_3). Its a and b go to infinity if an exponent goes "
        "to zero. So the same function is written here with its value c and its slope s at N = "
        "1e9: s = a gamma 1e9^gamma, c = b + a 1e9^gamma (`farseer_values`). The catalogue has no "
        "published values, because they could not be read in the paper."
    ),
)

CATALOGUE = (
    HOFFMANN, SKALING, GADRE, POWER, KAPLAN_JOINT, KAPLAN_ADDITIVE, MUENNIGHOFF, FARSEER
)  # fmt: skip

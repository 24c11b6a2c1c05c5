"""Laws of sparse models and of mixtures of experts (MoE)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ._parts import (
    ALPHA,
    BETA,
    EXPERT_GRANULARITY,
    EXPERTS,
    FEW_ALPHA,
    FEW_BETA,
    FEW_EXPONENTS,
    D,
    N,
    S,
    exp,
    exponent,
    factor,
    floor,
    log,
    power_link,
)
from .law import Domain, Law, Namespace, Outer, Parameter, Published


def _abnar(x: Namespace, p: Namespace) -> Sequence[Any]:
    dense = 1 - x.S
    both = dense**-p.delta * x.N**-p.gamma
    return 1.0, x.N**-p.alpha, x.D**-p.beta, dense**-p.lambda_, both


ABNAR = Law(
    name="abnar",
    title="Abnar et al., sparsity of experts",
    formula=r"L = e + a N^{-\alpha} + b D^{-\beta} + c (1-S)^{-\lambda} + "
    r"d (1-S)^{-\delta} N^{-\gamma}",
    formula_text=(
        "L = e + a N^-alpha + b D^-beta + c (1-S)^-lambda_ + d (1-S)^-delta N^-gamma"
    ),
    source="arXiv 2501.12370, eq. 6",
    variables=(N, D, S),
    linear=(floor("e"), factor("a"), factor("b"), factor("c"), factor("d")),
    nonlinear=(
        exponent("alpha", starts=(0.2, 0.35, 0.5, 0.65, 0.8)),
        exponent("beta", starts=(0.2, 0.3, 0.4, 0.5)),
        exponent("lambda_", r"\lambda", starts=(-0.5, -0.2, 0.2), bounds=(-5.0, 5.0)),
        exponent("delta", starts=(-0.1, 0.05, 0.15, 0.3), bounds=(-5.0, 5.0)),
        exponent("gamma", starts=(0.08, 0.15, 0.25, 0.4)),
    ),
    columns=_abnar,
    published={
        "abnar": Published.of(
            "arXiv 2501.12370, table 3",
            e=0.94, a=16612.50, b=5455.67, c=0.4598, d=17.26, alpha=0.5962, beta=0.3954,
            lambda_=-0.1666, delta=0.1603, gamma=0.1595,
        )
    },
    domain=Domain(
        ranges={"S": (0.0, 0.98)},
        architectures=("dense", "moe"),
        settings="IsoFLOP surfaces over N and S. S is the share of experts that are not used.",
        failures=(
            "It has ten parameters. R2 is 99% on the fitted runs and 68% on the held-out runs at "
            "S = 0.98.",
        ),
    ),
    family="sparse",
)  # fmt: skip


def _frantar(x: Namespace, p: Namespace) -> Sequence[Any]:
    size = x.N**-p.b_N
    return 1.0, (1 - x.S) ** p.b_S * size, size, x.D**-p.b_D


def _b_d(p: Namespace) -> Any:
    return p.b_D


FRANTAR = Law(
    name="frantar",
    title="Frantar et al., weight sparsity",
    formula=r"L = \left(a_S (1-S)^{b_S} + c_S\right) N^{-b_N} + "
    r"\left(\frac{a_D}{D}\right)^{b_D} + c",
    formula_text="L = (a_S (1-S)^b_S + c_S) N^-b_N + (a_D/D)^b_D + c",
    source="arXiv 2309.08520, eq. 1",
    variables=(N, D, S),
    linear=(floor("c"), factor("a_S"), factor("c_S"), factor("a_D", meaning="tokens")),
    nonlinear=(
        exponent("b_S", "b_S", starts=(0.3, 0.6, 1.0, 1.5)),
        exponent("b_N", "b_N", starts=FEW_EXPONENTS),
        exponent("b_D", "b_D", starts=FEW_EXPONENTS),
    ),
    columns=_frantar,
    links={"a_D": power_link(_b_d)},
    published={
        "t5_c4": Published.of(
            "arXiv 2309.08520, table 2, T5/C4",
            "Taken from the code of arXiv 2508.06617, whose defaults they are.",
            c=0.651, a_S=16.8, c_S=45.0, a_D=6.9e8, b_S=0.722, b_N=0.245, b_D=0.203,
        )
    },
    domain=Domain(
        ranges={"S": (0.0, 0.875)},
        architectures=("dense", "sparse"),
        settings="T5 on C4, gradual pruning in training. N counts weights that are not zero.",
        failures=(
            "The models were encoder-decoders of at most 85 million weights, unlike decoders of "
            "today.",
        ),
    ),
    family="sparse",
)  # fmt: skip


def _hossain(x: Namespace, p: Namespace) -> Sequence[Any]:
    dense, size = 1 - x.S, x.N**-p.alpha
    return dense**p.gamma, dense**p.alpha * size, x.S * size, x.D**-p.beta


HOSSAIN = Law(
    name="hossain",
    title="Hossain et al., dense and sparse in one law",
    formula=r"L = e (1-S)^{\gamma} + \left(a (1-S)^{\alpha} + c S\right) N^{-\alpha} + "
    r"b D^{-\beta}",
    formula_text="L = e (1-S)^gamma + (a (1-S)^alpha + c S) N^-alpha + b D^-beta",
    source="arXiv 2508.06617",
    variables=(N, D, S),
    linear=(floor("e"), factor("a"), factor("c"), factor("b")),
    nonlinear=(
        ALPHA,
        BETA,
        exponent(
            "gamma", meaning="exponent of the irreducible loss", starts=(0.0, 0.05, 0.2),
            bounds=(-2.0, 2.0),
        ),
    ),
    columns=_hossain,
    published={
        "hossain": Published.of(
            "The authors' tuning script",
            "The dense values are those of arXiv 2203.15556. The tables of v3 could not be read.",
            e=1.69, a=406.4, c=93.45, b=410.7, alpha=0.34, beta=0.28, gamma=0.001,
        )
    },
    domain=Domain(
        ranges={"S": (0.0, 0.98)},
        architectures=("dense", "moe", "sparse"),
        settings="The values come from earlier studies. Only c and gamma were tuned.",
        failures=("It was tuned close to published values, not fitted independently.",),
    ),
    notes="At S = 0 this is exactly the law `hoffmann`.",
    family="sparse",
)  # fmt: skip


LN10 = math.log(10)

EXPERT_RANGE = (
    factor("E_start", "E_{start}", "effective experts of a dense model", (1.5, 2.5)),
    factor("E_max", "E_{max}", "limit of the number of effective experts", (100.0, 400.0)),
)


def _log_effective_experts(x: Namespace, p: Namespace) -> Any:
    """Return the log of the effective number of experts (Clark et al., arXiv 2202.01169, eq. 6)."""
    most = 1 / p.E_max
    return -np.log(1 / (x.E - 1 + 1 / (1 / p.E_start - most)) + most)


def _clark(x: Namespace, p: Namespace) -> Sequence[Any]:
    size, experts = np.log(x.N), _log_effective_experts(x, p)
    return size, experts, size * experts, 1.0


def _clark_values(a: float, b: float, c: float, d: float, start: float, most: float) -> Published:
    return Published.of(
        "arXiv 2202.01169, table 3",
        "Published for logs to base 10. Here c and d are converted to natural logs.",
        a=a, b=b, c=c / LN10, d=d * LN10, E_start=start, E_max=most,
    )  # fmt: skip


CLARK = Law(
    name="clark",
    title="Clark et al., routed models at a fixed number of tokens",
    formula=r"\ln L = a \ln N + b \ln \hat E + c \ln N \ln \hat E + d,\quad "
    r"\frac{1}{\hat E} = \frac{1}{E - 1 + \left(1/E_{start} - 1/E_{max}\right)^{-1}} + "
    r"\frac{1}{E_{max}}",
    formula_text=(
        "ln L = a ln N + b ln e + c ln N ln e + d, "
        "1/e = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max"
    ),
    source="arXiv 2202.01169, eq. 1",
    variables=(N, EXPERTS),
    linear=(
        Parameter("a", "a", "log slope in size"),
        Parameter("b", "b", "log slope in experts"),
        Parameter("c", "c", "interaction: experts help less in larger models"),
        Parameter("d", "d", "log of the loss at N = 1 without experts"),
    ),
    nonlinear=tuple(
        factor(p.name, p.symbol, p.meaning, starts)
        for p, starts in zip(
            EXPERT_RANGE, ((1.2, 1.5, 2.0, 3.0, 4.5), (50.0, 100.0, 200.0, 350.0, 600.0)),
            strict=True,
        )
    ),
    columns=_clark,
    outer=Outer(exp, log),
    published={
        "s_base": _clark_values(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
        "rl_r": _clark_values(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
        "hash": _clark_values(-0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
    },
    domain=Domain(
        ranges={"N": (1.5e7, 1.3e9), "E": (1, 512)},
        architectures=("dense", "moe"),
        settings="MassiveText, 130 billion tokens in every run. N is the dense part.",
        failures=(
            "D is fixed at 130 billion tokens. There experts seem to stop helping at 937 billion "
            "parameters, but with more tokens that limit moves (arXiv 2402.07871).",
        ),
    ),
    family="sparse",
)  # fmt: skip


def _krajewski(x: Namespace, p: Namespace) -> Sequence[Any]:
    size = x.N**-p.alpha
    return 1.0, size, x.G_expert**-p.gamma * size, x.D**-p.beta


KRAJEWSKI = Law(
    name="krajewski",
    title="Krajewski et al., fine-grained experts",
    formula=r"L = c + \left(g\, G^{-\gamma} + a\right) N^{-\alpha} + b D^{-\beta}",
    formula_text="L = c + (g G_expert^-gamma + a) N^-alpha + b D^-beta",
    source="arXiv 2402.07871, eq. 9",
    variables=(N, D, EXPERT_GRANULARITY),
    linear=(floor("c"), factor("a"), factor("g"), factor("b")),
    nonlinear=(
        FEW_ALPHA,
        FEW_BETA,
        exponent("gamma", meaning="exponent of expert granularity", starts=(0.2, 0.5, 1.0, 1.5)),
    ),
    columns=_krajewski,
    published={
        "krajewski": Published.of(
            "arXiv 2402.07871, table 1",
            c=0.47, a=18.1, g=2.1, b=30.8, alpha=0.115, beta=0.147, gamma=0.58,
        )
    },
    domain=Domain(
        ranges={"N": (1.29e8, 3.7e9), "D": (1.6e10, 1.3e11), "G_expert": (1, 16)},
        architectures=("moe",),
        settings="C4, expansion factor 64.",
        failures=("The cost of routing grows with granularity and is not in the law.",),
    ),
    notes="The G of this law is the granularity of experts, not that of a familial model.",
    family="sparse",
)  # fmt: skip


def _ludziejewski(x: Namespace, p: Namespace) -> Sequence[Any]:
    experts = _log_effective_experts(x, p)
    size = np.exp(p.delta * experts) * x.N ** (p.alpha + p.gamma * experts)
    data = np.exp(p.omega * experts) * x.D ** (p.beta + p.zeta * experts)
    return 1.0, size, data


NEGATIVE = (-5.0, 5.0)

LUDZIEJEWSKI = Law(
    name="ludziejewski",
    title="Ludziejewski et al., joint law of mixtures of experts",
    formula=r"L = c + a \hat E^{\delta} N^{\alpha + \gamma \ln \hat E} + "
    r"b \hat E^{\omega} D^{\beta + \zeta \ln \hat E},\quad \hat E \text{ as in Clark et al.}",
    formula_text=(
        "L = c + a e^delta N^(alpha + gamma ln e) + b e^omega D^(beta + zeta ln e), "
        "1/e = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max"
    ),
    source="arXiv 2502.05172, eq. 6",
    variables=(N, D, EXPERTS),
    linear=(floor("c"), factor("a"), factor("b")),
    nonlinear=(
        exponent("alpha", starts=(-0.4, -0.3, -0.2, -0.12), bounds=NEGATIVE),
        exponent("beta", starts=(-0.4, -0.3, -0.2, -0.12), bounds=NEGATIVE),
        exponent("gamma", starts=(0.0, 0.01), bounds=NEGATIVE),
        exponent("delta", starts=(-0.3, 0.0), bounds=NEGATIVE),
        exponent("zeta", starts=(-0.03, 0.0), bounds=NEGATIVE),
        exponent("omega", starts=(0.0, 0.5), bounds=NEGATIVE),
        *EXPERT_RANGE,
    ),
    columns=_ludziejewski,
    published={
        "ludziejewski": Published.of(
            "arXiv 2502.05172, table of fitted coefficients",
            c=1.3637, a=35.91, b=35.98, alpha=-0.1889, beta=-0.1775, gamma=0.0098, delta=-0.2285,
            zeta=-0.0259, omega=0.5529, E_start=2.0732, E_max=290.4521,
        )
    },
    domain=Domain(
        ranges={"N": (1e7, 2.7e9), "E": (1, 32)},
        architectures=("dense", "moe"),
        settings="More than 280 runs. N counts active parameters.",
        failures=(
            "It has eleven parameters. Fix E_start and E_max if E has few different values.",
        ),
    ),
    family="sparse",
)  # fmt: skip

CATALOGUE = (CLARK, KRAJEWSKI, LUDZIEJEWSKI, ABNAR, FRANTAR, HOSSAIN)

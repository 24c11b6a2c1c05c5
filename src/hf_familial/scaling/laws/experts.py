"""Laws of mixtures of experts in which the number or the width of experts is a variable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .law import Law, Namespace, Outer
from .parts import EXPERT_GRANULARITY, EXPERTS, FEW_EXPONENTS, D, N, exponent, factor, floor
from .vocabulary import Domain, Parameter, Published


LN10 = math.log(10)

EXPERT_RANGE = (
    factor("E_start", "E_{start}", "effective experts of a dense model", (1.5, 2.5)),
    factor("E_max", "E_{max}", "effective experts without end", (100.0, 400.0)),
)


def _log_effective_experts(x: Namespace, p: Namespace) -> Any:
    """Log of the saturating number of experts (Clark et al., arXiv 2202.01169, eq. 6)."""
    most = 1 / p.E_max
    return -np.log(1 / (x.E - 1 + 1 / (1 / p.E_start - most)) + most)


# --- Clark ------------------------------------------------------------------------------------


def _clark(x: Namespace, p: Namespace) -> Sequence[Any]:
    size, experts = np.log(x.N), _log_effective_experts(x, p)
    return size, experts, size * experts, 1.0


def _exp(total: Any, x: Namespace, p: Namespace) -> Any:
    return np.exp(total)


def _log(loss: Any, x: Namespace, p: Namespace) -> Any:
    return np.log(loss)


def _clark_values(a: float, b: float, c: float, d: float, start: float, most: float) -> Published:
    values = {"a": a, "b": b, "c": c / LN10, "d": d * LN10, "E_start": start, "E_max": most}
    note = "Printed for logs to base 10: c and d are converted to natural logs."
    return Published(values, "arXiv 2202.01169, table 3", note)


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
        Parameter("c", "c", "how experts help less in larger models"),
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
    outer=Outer(_exp, _log),
    published={
        "s_base": _clark_values(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
        "rl_r": _clark_values(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
        "hash": _clark_values(-0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
    },
    domain=Domain(
        ranges={"N": (1.5e7, 1.3e9), "E": (1, 512)},
        architectures=("dense", "moe"),
        settings="MassiveText, every run 130 billion tokens; N is the dense part.",
        failures=(
            "D is fixed: at 130 billion tokens experts seem to stop helping at 937 billion "
            "parameters, which more tokens move (arXiv 2402.07871).",
        ),
    ),
    family="sparse",
)  # fmt: skip


# --- Krajewski --------------------------------------------------------------------------------


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
        exponent("alpha", meaning="exponent of size", starts=FEW_EXPONENTS),
        exponent("beta", meaning="exponent of data", starts=FEW_EXPONENTS),
        exponent("gamma", meaning="exponent of expert granularity", starts=(0.2, 0.5, 1.0, 1.5)),
    ),
    columns=_krajewski,
    published={
        "krajewski": Published(
            {
                "c": 0.47, "a": 18.1, "g": 2.1, "b": 30.8,
                "alpha": 0.115, "beta": 0.147, "gamma": 0.58,
            },
            "arXiv 2402.07871, table 1",
        )
    },
    domain=Domain(
        ranges={"N": (1.29e8, 3.7e9), "D": (1.6e10, 1.3e11), "G_expert": (1, 16)},
        architectures=("moe",),
        settings="C4, 64 times expansion.",
        failures=("Cost of routing grows with granularity and is not in the law.",),
    ),
    notes="Its G is the granularity of experts, not that of a familial model.",
    family="sparse",
)  # fmt: skip


# --- Ludziejewski -----------------------------------------------------------------------------


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
        "ludziejewski": Published(
            {
                "c": 1.3637, "a": 35.91, "b": 35.98,
                "alpha": -0.1889, "beta": -0.1775, "gamma": 0.0098, "delta": -0.2285,
                "zeta": -0.0259, "omega": 0.5529, "E_start": 2.0732, "E_max": 290.4521,
            },
            "arXiv 2502.05172, table of fitted coefficients",
        )
    },
    domain=Domain(
        ranges={"N": (1e7, 2.7e9), "E": (1, 32)},
        architectures=("dense", "moe"),
        settings="More than 280 runs; N counts active parameters.",
        failures=("Eleven parameters: fix E_start and E_max where E takes few values.",),
    ),
    family="sparse",
)  # fmt: skip

CATALOGUE = (CLARK, KRAJEWSKI, LUDZIEJEWSKI)

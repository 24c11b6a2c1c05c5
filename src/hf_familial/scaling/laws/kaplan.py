"""The laws of Kaplan et al.: no floor, one or two powers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .law import Law, Namespace, Outer
from .parts import D, N, exponent, factor, power_link
from .vocabulary import Domain, Published


KAPLAN_DOMAIN = Domain(
    ranges={"N": (7.68e2, 1.5e9), "D": (2.2e7, 2.3e10)},
    settings="WebText2, decoder Transformers, N without embeddings, test loss.",
    failures=(
        "Its optimal sizes grow too fast (exponent 0.73): embeddings left out of N, a fixed "
        "warm-up and an untuned schedule at small scale (arXiv 2406.19146).",
        "Without a floor the loss goes to zero.",
    ),
)


def _kaplan_joint(x: Namespace, p: Namespace) -> Sequence[Any]:
    return x.N ** -(p.alpha_N / p.alpha_D), 1 / x.D


def _kaplan_additive(x: Namespace, p: Namespace) -> Sequence[Any]:
    return x.N**-p.alpha_N, x.D**-p.alpha_D


def _to_alpha_d(total: Any, x: Namespace, p: Namespace) -> Any:
    return total**p.alpha_D


def _from_alpha_d(loss: Any, x: Namespace, p: Namespace) -> Any:
    return loss ** (1 / p.alpha_D)


def _ratio(p: Namespace) -> Any:
    return p.alpha_N / p.alpha_D


def _alpha_n(p: Namespace) -> Any:
    return p.alpha_N


def _alpha_d(p: Namespace) -> Any:
    return p.alpha_D


CRITICAL = (
    factor("N_c", meaning="scale of size, parameters"),
    factor("D_c", meaning="scale of data, tokens"),
)
KAPLAN_EXPONENTS = (
    exponent("alpha_N", r"\alpha_N", "exponent of size"),
    exponent("alpha_D", r"\alpha_D", "exponent of data"),
)

KAPLAN_JOINT = Law(
    name="kaplan_joint",
    title="Kaplan et al., both limits in one power",
    formula=r"L = \left[\left(\frac{N_c}{N}\right)^{\alpha_N/\alpha_D} + \frac{D_c}{D}"
    r"\right]^{\alpha_D}",
    formula_text="L = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D",
    source="arXiv 2001.08361, eq. 1.5",
    variables=(N, D),
    linear=CRITICAL,
    nonlinear=KAPLAN_EXPONENTS,
    columns=_kaplan_joint,
    links={"N_c": power_link(_ratio)},
    outer=Outer(_to_alpha_d, _from_alpha_d),
    published={
        "kaplan": Published(
            {"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103},
            "arXiv 2001.08361, table 2",
        )
    },
    domain=KAPLAN_DOMAIN,
)

KAPLAN_ADDITIVE = Law(
    name="kaplan_additive",
    title="Kaplan et al., as a sum of two powers",
    formula=r"L = \left(\frac{N_c}{N}\right)^{\alpha_N} + \left(\frac{D_c}{D}\right)^{\alpha_D}",
    formula_text="L = (N_c/N)^alpha_N + (D_c/D)^alpha_D",
    source="arXiv 2502.12051, eq. 2",
    variables=(N, D),
    linear=CRITICAL,
    nonlinear=KAPLAN_EXPONENTS,
    columns=_kaplan_additive,
    links={"N_c": power_link(_alpha_n), "D_c": power_link(_alpha_d)},
    domain=KAPLAN_DOMAIN,
    notes="The survey's rendering of Kaplan et al.; not the equation of that paper.",
)

CATALOGUE = (KAPLAN_JOINT, KAPLAN_ADDITIVE)

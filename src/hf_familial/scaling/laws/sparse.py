"""Laws of sparse models: sparsity of weights or of experts is a variable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .law import Law, Namespace
from .parts import FEW_EXPONENTS, D, N, S, exponent, factor, floor, power_link
from .vocabulary import Domain, Published


# --- Abnar ------------------------------------------------------------------------------------


def _abnar(x: Namespace, p: Namespace) -> Sequence[Any]:
    dense = 1 - x.S
    return (
        1.0,
        x.N**-p.alpha,
        x.D**-p.beta,
        dense**-p.lambda_,
        dense**-p.delta * x.N**-p.gamma,
    )


ABNAR = Law(
    name="abnar",
    title="Abnar et al., parameters against FLOPs",
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
        "abnar": Published(
            {
                "e": 0.94, "a": 16612.50, "b": 5455.67, "c": 0.4598, "d": 17.26,
                "alpha": 0.5962, "beta": 0.3954, "lambda_": -0.1666, "delta": 0.1603,
                "gamma": 0.1595,
            },
            "arXiv 2501.12370, table 3",
        )
    },
    domain=Domain(
        ranges={"S": (0.0, 0.98)},
        architectures=("dense", "moe"),
        settings="IsoFLOP surfaces over N and S; S is the share of idle experts.",
        failures=(
            "Ten parameters: R2 is 99% on the runs fitted and 68% on those held out at S = 0.98.",
        ),
    ),
    family="sparse",
)  # fmt: skip


# --- Frantar ----------------------------------------------------------------------------------


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
        "t5_c4": Published(
            {
                "c": 0.651, "a_S": 16.8, "c_S": 45.0, "a_D": 6.9e8,
                "b_S": 0.722, "b_N": 0.245, "b_D": 0.203,
            },
            "arXiv 2309.08520, table 2, T5/C4",
            "Read in the code of arXiv 2508.06617, which has them as defaults.",
        )
    },
    domain=Domain(
        ranges={"S": (0.0, 0.875)},
        architectures=("dense", "sparse"),
        settings="T5 on C4, gradual pruning in training; N counts weights that are not zero.",
        failures=("An encoder-decoder of at most 85 million weights: far from decoders of today.",),
    ),
    family="sparse",
)  # fmt: skip


# --- Hossain ----------------------------------------------------------------------------------


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
        exponent("alpha", meaning="exponent of size"),
        exponent("beta", meaning="exponent of data"),
        exponent("gamma", meaning="of the floor", starts=(0.0, 0.05, 0.2), bounds=(-2.0, 2.0)),
    ),
    columns=_hossain,
    published={
        "hossain": Published(
            {
                "e": 1.69, "a": 406.4, "c": 93.45, "b": 410.7,
                "alpha": 0.34, "beta": 0.28, "gamma": 0.001,
            },
            "The authors' tuning script",
            "Dense values are those of arXiv 2203.15556; the tables of v3 could not be read.",
        )
    },
    domain=Domain(
        ranges={"S": (0.0, 0.98)},
        architectures=("dense", "moe", "sparse"),
        settings="Values assembled from earlier studies, only c and gamma tuned.",
        failures=("Tuned in narrow boxes around published values: no independent fit.",),
    ),
    notes="At S = 0 it is Hoffmann's law, number for number.",
    family="sparse",
)  # fmt: skip

CATALOGUE = (ABNAR, FRANTAR, HOSSAIN)

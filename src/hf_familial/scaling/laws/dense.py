"""Laws of dense models in which size and data stand apart, and the power law of one variable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .law import Law, Namespace, Outer
from .parts import EXPONENTS, FEW_EXPONENTS, D, N, X, exponent, factor, floor
from .vocabulary import Domain, Parameter, Published


SIZE = factor("A", meaning="weight of the size term, nats per token times parameters to alpha")
DATA = factor("B", meaning="weight of the data term, nats per token times tokens to beta")
ALPHA = exponent("alpha", meaning="exponent of size")
BETA = exponent("beta", meaning="exponent of data")
FLOOR_IS_LOOSE = "The floor E is weakly identified: it trades off with small exponents."


def _hoffmann(x: Namespace, p: Namespace) -> Sequence[Any]:
    return 1.0, x.N**-p.alpha, x.D**-p.beta


HOFFMANN = Law(
    name="hoffmann",
    title="Hoffmann et al. (Chinchilla), approach 3",
    formula=r"L = E + A N^{-\alpha} + B D^{-\beta}",
    formula_text="L = E + A N^-alpha + B D^-beta",
    source="arXiv 2203.15556, eq. 2",
    variables=(N, D),
    linear=(floor(), SIZE, DATA),
    nonlinear=(ALPHA, BETA),
    columns=_hoffmann,
    published={
        "hoffmann": Published(
            {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
            "arXiv 2203.15556, eq. 10",
            "Does not fit the paper's own runs: see arXiv 2404.10102.",
        ),
        "hoffmann_unrounded": Published(
            {
                "E": math.exp(0.5267228),
                "A": math.exp(6.0073404),
                "B": math.exp(6.0179186),
                "alpha": 0.33917084,
                "beta": 0.2849083,
            },
            "LaTeX source of arXiv 2203.15556",
        ),
        "besiroglu": Published(
            {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
            "arXiv 2404.10102, table 1",
            "Refit of 240 runs read off a figure of arXiv 2203.15556.",
        ),
        "muennighoff": Published(
            {"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.353, "beta": 0.353},
            "arXiv 2305.16264, eq. 20",
            "C4, alpha and beta tied.",
        ),
        "krajewski": Published(
            {"E": 0.47, "A": 16.3, "B": 26.7, "alpha": 0.126, "beta": 0.127},
            "arXiv 2402.07871, table 1, dense row",
            "C4; the floor is that of its MoE law.",
        ),
    },
    domain=Domain(
        ranges={"N": (4.4e7, 1.6e10), "D": (5e9, 5e11)},
        settings="MassiveText below one epoch, cosine schedule matched to D, N with embeddings.",
        failures=(
            FLOOR_IS_LOOSE,
            "Repeated data: tokens beyond about four epochs are worth less (arXiv 2305.16264).",
            "Published exponents hold for their data and tokenizer alone: fit your own.",
        ),
    ),
    notes="At C = 6ND: N* = K (C/6)^(beta/(alpha+beta)), K = (alpha A/(beta B))^(1/(alpha+beta)).",
)


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
    linear=(SIZE, DATA),
    nonlinear=(
        exponent("alpha", meaning="exponent of size", starts=FEW_EXPONENTS),
        exponent("beta", meaning="exponent of data", starts=FEW_EXPONENTS),
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
            "E and k trade off: the floor of one data set moved from 0.45 to 0.03 (arXiv "
            "2608.07222).",
        )
    ),
    notes="k does not move the optimal N and D. At k = 1 it is Hoffmann's law.",
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
        failures=("Size and data share one exponent: wrong where they do not.",),
    ),
    notes="Hoffmann's law with alpha = beta = 2 eta, A = a 6^-eta, B = b 6^-eta.",
)


def _power(x: Namespace, p: Namespace) -> Sequence[Any]:
    return 1.0, x.X**-p.alpha


POWER = Law(
    name="power",
    title="Power law of one variable, with a floor",
    formula=r"L = E + A X^{-\alpha}",
    formula_text="L = E + A X^-alpha",
    source="arXiv 1712.00409",
    variables=(X,),
    linear=(floor(), factor("A", meaning="weight of the term")),
    nonlinear=(exponent("alpha", meaning="exponent of X", starts=(*EXPONENTS, 2.0, 3.0)),),
    columns=_power,
    notes="Fix E at 0 for a pure power law.",
)

CATALOGUE = (HOFFMANN, SKALING, GADRE, POWER)

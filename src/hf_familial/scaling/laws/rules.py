"""Rules for hyperparameters: no losses, but products of powers that fit alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._parts import D, N, exponent, factor
from .law import Domain, Law, Namespace, Published, Variable


LEARNING_RATE = Variable("lr", r"\eta", "1", "best peak learning rate")
BATCH = Variable("batch_tokens", "B", "tokens", "best batch")
SIZES, TOKENS = (6e7, 1e9), (2e9, 1e11)
SETTINGS = "AdamW, about 3700 runs over learning rates and batches, dense and MoE."
PLATEAU = ("The best values lie on a broad plateau: losses tell them apart only roughly.",)


def _learning_rate(x: Namespace, p: Namespace) -> Sequence[Any]:
    return (x.N**p.a * x.D**p.b,)


def _batch(x: Namespace, p: Namespace) -> Sequence[Any]:
    return (x.D**p.b,)


STARTS = (-1.0, -0.5, 0.0, 0.5, 1.0)

STEP_LR = Law(
    name="step_lr",
    title="StepLaw: best learning rate",
    formula=r"\eta = c\, N^{a} D^{b}",
    formula_text="lr = c N^a D^b",
    source="arXiv 2503.04715",
    variables=(N, D),
    linear=(factor("c", meaning="the learning rate at N = D = 1"),),
    nonlinear=(
        exponent("a", "a", "exponent of size", STARTS, (-5.0, 5.0)),
        exponent("b", "b", "exponent of data", STARTS, (-5.0, 5.0)),
    ),
    columns=_learning_rate,
    published={"step": Published({"c": 1.79, "a": -0.713, "b": 0.307}, "arXiv 2503.04715")},
    domain=Domain({"N": SIZES, "D": TOKENS}, ("dense", "moe"), SETTINGS, PLATEAU),
    family="rule",
    target=LEARNING_RATE,
)

STEP_BATCH = Law(
    name="step_batch",
    title="StepLaw: best batch",
    formula=r"B = c\, D^{b}",
    formula_text="batch_tokens = c D^b",
    source="arXiv 2503.04715",
    variables=(D,),
    linear=(factor("c", meaning="the batch at D = 1, tokens"),),
    nonlinear=(exponent("b", "b", "exponent of data", STARTS, (-5.0, 5.0)),),
    columns=_batch,
    published={"step": Published({"c": 0.58, "b": 0.571}, "arXiv 2503.04715")},
    domain=Domain({"D": TOKENS}, ("dense", "moe"), SETTINGS, PLATEAU),
    family="rule",
    target=BATCH,
)

CATALOGUE = (STEP_LR, STEP_BATCH)

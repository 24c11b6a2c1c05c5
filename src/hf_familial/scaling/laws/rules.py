"""Rules for the best learning rate and batch size. They are fitted like laws of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._parts import D, N, exponent, factor
from .law import Domain, Law, Namespace, Published, Variable


RANGES = {"N": (6e7, 1e9), "D": (2e9, 1e11)}
STARTS = (-1.0, -0.5, 0.0, 0.5, 1.0)


def _learning_rate(x: Namespace, p: Namespace) -> Sequence[Any]:
    return (x.N**p.a * x.D**p.b,)


def _batch(x: Namespace, p: Namespace) -> Sequence[Any]:
    return (x.D**p.b,)


def _rule(variables: tuple[Variable, ...], **own: Any) -> Law:
    return Law(
        source="arXiv 2503.04715",
        variables=variables,
        domain=Domain(
            {variable.name: RANGES[variable.name] for variable in variables},
            ("dense", "moe"),
            "AdamW, about 3700 runs over learning rates and batches, dense and MoE.",
            (
                "The loss is nearly the same in a wide range around the best value, so the best "
                "value is only roughly known.",
            ),
        ),
        family="rule",
        **own,
    )


A = exponent("a", "a", "exponent of size", STARTS, (-5.0, 5.0))
B = exponent("b", "b", "exponent of data", STARTS, (-5.0, 5.0))

STEP_LR = _rule(
    (N, D),
    name="step_lr",
    title="StepLaw: best learning rate",
    formula=r"\eta = c\, N^{a} D^{b}",
    formula_text="lr = c N^a D^b",
    linear=(factor("c", meaning="learning rate at N = D = 1"),),
    nonlinear=(A, B),
    columns=_learning_rate,
    published={"step": Published.of("arXiv 2503.04715", c=1.79, a=-0.713, b=0.307)},
    target=Variable("lr", r"\eta", "1", "best peak learning rate"),
)
STEP_BATCH = _rule(
    (D,),
    name="step_batch",
    title="StepLaw: best batch size",
    formula=r"B = c\, D^{b}",
    formula_text="batch_tokens = c D^b",
    linear=(factor("c", meaning="batch size at D = 1, in tokens"),),
    nonlinear=(B,),
    columns=_batch,
    published={"step": Published.of("arXiv 2503.04715", c=0.58, b=0.571)},
    target=Variable("batch_tokens", "B", "tokens", "best batch size"),
)

CATALOGUE = (STEP_LR, STEP_BATCH)

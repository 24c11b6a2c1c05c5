"""Rules for the learning rate and the batch of a run, and a law for the expected losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np

from .._wording import known_words
from ..errors import DesignError
from ._fields import FIELDS, check_positive


@dataclass(frozen=True)
class Fixed:
    """A rule with the same learning rate and batch for every run."""

    lr: float  # peak learning rate
    batch_tokens: int  # tokens in one optimiser step
    kind: str = "fixed"
    # true if the batch may change a little so that a whole number of steps meets the budget
    adjustable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        FIELDS.check(self)
        check_positive(self, "lr", "batch_tokens")

    def at(self, N: float, D: float) -> tuple[float, float]:
        """Return the learning rate and the tokens of a step for N parameters and D tokens."""
        return self.lr, float(self.batch_tokens)


@dataclass(frozen=True)
class StepLaw:
    """The Step Law: `lr = 1.79 N^-0.713 D^0.307` and `batch = 0.58 D^0.571` tokens.

    N is the number of parameters without embeddings. The law was fitted on models with at least 6e7
    parameters. Its learning rate is too high for much smaller models. Reduce it with `lr_scale`.

    Attributes:
        lr_scale (`float`): Factor of the learning rate.
        batch_scale (`float`): Factor of the batch.

    Reference: Li et al. 2025, "Predictable Scale: Part I", arXiv:2503.04715.
    """

    lr_scale: float = 1.0
    batch_scale: float = 1.0
    kind: str = "step_law"
    adjustable: ClassVar[bool] = True
    smallest: ClassVar[float] = 6e7  # fewest parameters of the models that the law was fitted on

    def __post_init__(self) -> None:
        FIELDS.check(self)
        check_positive(self, "lr_scale", "batch_scale")

    def at(self, N: float, D: float) -> tuple[float, float]:
        """Return the learning rate and the tokens of a step for N parameters and D tokens."""
        return self.lr_scale * 1.79 * N**-0.713 * D**0.307, self.batch_scale * 0.58 * D**0.571


@dataclass(frozen=True)
class MeasuredRow:
    """The best learning rate and batch that were measured for one N and D."""

    N: float  # parameters without embeddings
    D: float  # training tokens
    lr: float  # peak learning rate
    batch_tokens: float  # tokens in one optimiser step

    def __post_init__(self) -> None:
        FIELDS.check(self)
        check_positive(self, "N", "D", "lr", "batch_tokens")


@dataclass(frozen=True)
class Measured:
    """Power laws in N and D, fitted to a table of measured best settings.

    The fit is least squares on logarithms. If the table does not vary in N or D, the fitted setting
    does not depend on it. Values of N and D outside the table are moved to its nearest value.

    Attributes:
        table (`tuple[MeasuredRow, ...]`): Measured settings, at least one.
    """

    table: tuple[MeasuredRow, ...]
    kind: str = "measured"
    adjustable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        FIELDS.check(self)
        if not self.table:
            raise DesignError("`table` must have at least one row, got none.", "table")

    def at(self, N: float, D: float) -> tuple[float, float]:
        """Return the learning rate and the tokens of a step for N parameters and D tokens."""
        known = np.log([[row.N, row.D] for row in self.table])
        best = np.log([[row.lr, row.batch_tokens] for row in self.table])
        centre, level = known.mean(axis=0), best.mean(axis=0)
        # the solution with the least norm is constant in a direction where the table is constant
        slopes = np.linalg.lstsq(known - centre, best - level, rcond=1e-6)[0]
        point = np.clip(np.log([N, D]), known.min(axis=0), known.max(axis=0))
        lr, batch = np.exp(level + (point - centre) @ slopes)
        return float(lr), float(batch)


Rule: TypeAlias = Fixed | StepLaw | Measured
RULES: dict[str, type[Rule]] = {"fixed": Fixed, "step_law": StepLaw, "measured": Measured}


def read_rule(row: Any) -> Rule:
    """Return the rule that a mapping with `kind` describes."""
    rule: Any = row
    if not isinstance(row, tuple(RULES.values())):
        kind = row.get("kind") if isinstance(row, dict) else row
        if not isinstance(kind, str) or kind not in RULES:
            hint = known_words(kind, RULES)
            raise DesignError(f"`rule.kind` {kind!r} is unknown{hint}", "rule.kind")
        try:
            rule = FIELDS.read(RULES[kind], row if isinstance(row, dict) else {})
        except DesignError as error:
            raise FIELDS.within("rule", error) from None
    if RULES.get(rule.kind) is not type(rule):
        raise DesignError(f"`rule.kind` does not match its rule, got {rule.kind!r}.", "rule.kind")
    return rule


@dataclass(frozen=True)
class ExpectedLaw:
    """The law `E + A N^-alpha + B D^-beta` for the expected losses of a design.

    It predicts which sizes are optimal. The defaults come from one data set, so other data and
    tokenizers have other values.

    Reference: form of Hoffmann et al. 2022, arXiv:2203.15556. Defaults of the refit of its data by
    Besiroglu et al. 2024, arXiv:2404.10102, table 1.
    """

    A: float = 482.01
    alpha: float = 0.3478
    B: float = 2085.43
    beta: float = 0.3658

    def __post_init__(self) -> None:
        FIELDS.check(self)
        check_positive(self, "A", "alpha", "B", "beta")

    def reducible(self, N: float, D: float) -> float:
        """Return the expected loss above E in nats per token, without the constant factor of G."""
        return self.A * N**-self.alpha + self.B * D**-self.beta

    def optimum(self, budget: float) -> tuple[float, float]:
        """Return the optimal N and D for a budget if C = 6ND (arXiv:2203.15556, equation 4)."""
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        N = ratio * (budget / 6) ** (self.beta / (self.alpha + self.beta))
        return N, budget / (6 * N)

"""Plan of one run of a design, with its model, its length and its id."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import AutoConfig

from .._records import plain
from ..flops import ParameterCount
from ..models.familial import FamilialConfig
from ._fields import FIELDS
from .rules import Rule


TOLERANCE = 0.005  # largest difference between a run and its budget, as a share of the budget
MOVE = 0.2  # largest change of a batch that is not fixed, as a share of the batch


@dataclass(frozen=True)
class RunPlan:
    """The plan of one training run, with every number that decides its result."""

    id: str  # hash of the content that decides the result, 16 hexadecimal digits
    budget: float  # planned FLOPs
    flops: float  # FLOPs of the run, within 0.5 % of the budget
    flops_per_token: float  # FLOPs of training on one token, with all exits and heads
    exact: bool  # true if the FLOPs were counted, false if they are estimated
    N: int  # parameters by the convention of the design
    sizes: ParameterCount  # parameters of the whole family by all conventions
    width: int  # hidden size of the backbone
    depth: int  # layers of the backbone
    exits: tuple[int, ...]  # depth of each exit
    tokens: int  # training tokens D
    steps: int  # optimiser steps
    batch_sequences: int  # sequences in one optimiser step
    seq_length: int  # tokens in a sequence
    lr: float  # peak learning rate
    seed: int  # seed of the weights and of the order of the data, the same for every G
    data: str  # training data
    model_type: str  # architecture of the backbone
    backbone: Mapping[str, Any]  # fields of the backbone's config
    family: Mapping[str, Any]  # `num_exit_layers`, `exit_norm`, `exit_head`
    training: Mapping[str, Any]  # further training arguments

    def __post_init__(self) -> None:
        FIELDS.check(self)

    @property
    def G(self) -> int:
        """Number of exits."""
        return len(self.exits)

    @property
    def batch_tokens(self) -> int:
        """Tokens in one optimiser step."""
        return self.batch_sequences * self.seq_length

    @property
    def tokens_per_parameter(self) -> float:
        """D / N, with N by the convention of the design."""
        return self.tokens / self.N

    @property
    def six_nd_error(self) -> float:
        """Relative error of the approximation C = 6ND, `6ND / flops - 1`."""
        return 6 * self.N * self.tokens / self.flops - 1

    def config(self) -> FamilialConfig:
        """Return the config of the family."""
        text_config = AutoConfig.for_model(self.model_type, **self.backbone)
        return FamilialConfig(text_config=text_config, exits=list(self.exits), **self.family)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values for JSON or YAML."""
        return plain(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> RunPlan:
        """Build a plan from the result of `to_dict`. Raise `DesignError` if a field is wrong."""
        return FIELDS.read(cls, row)


@dataclass(frozen=True)
class InfeasibleRun:
    """A point of the grid for which no run is possible, and the reason."""

    budget: float  # FLOPs
    width: int
    depth: int
    G: int
    reason: str
    fits: tuple[float, ...] = ()  # nearest budgets for which a run is possible

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}, G = {self.G}, C = {self.budget:.3g}: {self.reason}"


class Schedule(NamedTuple):
    """A whole number of optimiser steps that meets a budget."""

    steps: int
    batch_sequences: int
    lr: float


def fit_budget(
    budget: float, flops_per_sequence: float, seq_length: int, N: int, rule: Rule
) -> Schedule | tuple[float, ...]:
    """Return steps whose FLOPs are within 0.5 % of a budget, or the nearest budgets that fit.

    If the rule does not fix the batch, the batch may change by up to 20 %. `N` is the number of
    parameters without embeddings, because the rules use that number.
    """
    sequences = budget / flops_per_sequence
    lr, batch_tokens = rule.at(N, sequences * seq_length)
    batch = max(1, round(batch_tokens / seq_length))
    reach = max(1, int(MOVE * batch)) if rule.adjustable else 0
    nearby = sorted(range(max(1, batch - reach), batch + reach + 1), key=lambda b: abs(b - batch))
    for size in nearby:
        steps = round(sequences / size)
        if steps and abs(steps * size / sequences - 1) <= TOLERANCE:
            # round, because the last digits may differ between machines and would change the id
            return Schedule(steps, size, float(f"{lr:.6g}"))
    step = batch * flops_per_sequence
    nearest = {math.floor(budget / step) * step, math.ceil(budget / step) * step}
    return tuple(sorted(nearest - {0.0}))


def content_id(content: Mapping[str, Any]) -> str:
    """Return a hash of `content`, 16 hexadecimal digits."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

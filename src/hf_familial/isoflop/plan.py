"""A run of a design: its model, its length, and the id that follows from its content."""

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


TOLERANCE = 0.005  # share of the budget by which a run may miss it
MOVE = 0.2  # share by which a batch that is not fixed may move so that whole steps meet the budget


@dataclass(frozen=True)
class RunPlan:
    """A run, with every number that decides its result."""

    id: str  # hash of the content that decides the result, 16 hexadecimal digits
    budget: float  # planned FLOPs
    flops: float  # FLOPs that it takes, within 0.5 % of the budget
    flops_per_token: float  # FLOPs of training on one token, every exit and head counted
    exact: bool  # whether the FLOPs were counted; otherwise they are estimated
    N: int  # parameters by the design's convention
    sizes: ParameterCount  # parameters of the whole family by every convention
    width: int  # hidden size of the backbone
    depth: int  # layers of the backbone
    exits: tuple[int, ...]  # depth of every exit
    tokens: int  # training tokens D
    steps: int  # optimiser steps
    batch_sequences: int  # sequences of one step
    seq_length: int  # tokens of a sequence
    lr: float  # peak learning rate
    seed: int  # seed of weights and order of data; the same for every G, so that runs pair up
    data: str  # the training data
    model_type: str  # architecture of the backbone
    backbone: Mapping[str, Any]  # fields of its config
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
        """Tokens of one optimiser step."""
        return self.batch_sequences * self.seq_length

    @property
    def tokens_per_parameter(self) -> float:
        """D / N, by the design's convention."""
        return self.tokens / self.N

    @property
    def six_nd_error(self) -> float:
        """Relative error of the usual approximation, `6ND / flops - 1`."""
        return 6 * self.N * self.tokens / self.flops - 1

    def config(self) -> FamilialConfig:
        """Return the family's config."""
        text_config = AutoConfig.for_model(self.model_type, **self.backbone)
        return FamilialConfig(text_config=text_config, exits=list(self.exits), **self.family)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON and YAML have them."""
        return plain(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> RunPlan:
        """Return the plan that `to_dict` wrote; a `DesignError` if a field is wrong."""
        return FIELDS.read(cls, row)


@dataclass(frozen=True)
class InfeasibleRun:
    """A point of the grid that has no run, and the reason."""

    budget: float  # FLOPs
    width: int
    depth: int
    G: int
    reason: str
    fits: tuple[float, ...] = ()  # budgets nearby that would do

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}, G = {self.G}, C = {self.budget:.3g}: {self.reason}"


class Schedule(NamedTuple):
    """Whole optimiser steps that meet a budget."""

    steps: int
    batch_sequences: int
    lr: float


def fit_budget(
    budget: float, flops_per_sequence: float, seq_length: int, N: int, rule: Rule
) -> Schedule | tuple[float, ...]:
    """Return steps whose FLOPs are within 0.5 % of a budget, or else the nearest budgets that fit.

    A batch that the rule does not fix moves by up to a fifth, to the nearest that fits. `N` counts
    parameters without embeddings, as the rule asks for.
    """
    sequences = budget / flops_per_sequence
    lr, batch_tokens = rule.at(N, sequences * seq_length)
    batch = max(1, round(batch_tokens / seq_length))
    reach = max(1, int(MOVE * batch)) if rule.adjustable else 0
    nearby = sorted(range(max(1, batch - reach), batch + reach + 1), key=lambda b: abs(b - batch))
    for size in nearby:
        steps = round(sequences / size)
        if steps and abs(steps * size / sequences - 1) <= TOLERANCE:
            # digits that machines may disagree on must not enter the id
            return Schedule(steps, size, float(f"{lr:.6g}"))
    step = batch * flops_per_sequence
    nearest = {math.floor(budget / step) * step, math.ceil(budget / step) * step}
    return tuple(sorted(nearest - {0.0}))


def content_id(content: Mapping[str, Any]) -> str:
    """Return a hash of what decides the result of a run."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""Plans of a training run: the best size and tokens for a budget, the loss, and the intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import NoMinimumError, ScalingError
from .confidence import Estimate
from .flop_models import Flops, HeadFlops, LifetimeFlops, six_nd
from .leverage import compute_leverage, even_members, loss_leverage
from .optima import best, powers
from .prediction import NEAR, Estimator, Source, outside, warn_of
from .quantities import compute_for, granularity_compute, loss_at, optimal


BOUNDLESS = 1e100  # number of parameters or tokens at which their term of the loss vanishes
ASKED: tuple[Literal["N", "D", "loss"], ...] = ("N", "D", "loss")


@dataclass(frozen=True)
class Limits:
    """The constraints of a plan. The defaults set no limit.

    Attributes:
        memory (`float`): Memory for the deployed member, in bytes.
        bytes_per_parameter (`float`): Bytes per stored weight: 2 for bfloat16.
        deployed (`float`): Parameters of the largest deployed member, as a share of N.
        reserve (`float`): Bytes of `memory` that the KV cache and the activations need.
        tokens (`float`): Largest number of training tokens.
        inference_tokens (`float`): Tokens to serve after training. If it is not 0, the budget
            pays for training and serving.

    Example:
        >>> Limits(memory=8e9, tokens=2e11).max_N  # parameters that fit in 8 GB
        4000000000.0
    """

    memory: float = math.inf
    bytes_per_parameter: float = 2.0
    deployed: float = 1.0
    reserve: float = 0.0
    tokens: float = math.inf
    inference_tokens: float = 0.0

    def __post_init__(self) -> None:
        for name in ("memory", "bytes_per_parameter", "deployed", "tokens"):
            if not getattr(self, name) > 0:
                raise ScalingError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in ("reserve", "inference_tokens"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ScalingError(f"`{name}` must be 0 or more, got {getattr(self, name)}.")
        if self.deployed > 1:
            raise ScalingError(f"`deployed` must be a share of N, 1 or less, got {self.deployed}.")
        if self.reserve >= self.memory:
            raise ScalingError(
                f"`reserve` must be less than `memory`, got {self.reserve} of {self.memory} bytes."
            )

    @property
    def max_N(self) -> float:
        """The largest N (parameters of the whole model) that the memory allows."""
        return (self.memory - self.reserve) / self.bytes_per_parameter / self.deployed


@dataclass(frozen=True)
class Plan:
    """The result of `plan`: the best run for a budget.

    Attributes:
        law (`str`): Name of the law.
        C (`float`): Budget in FLOPs. It includes serving if `Limits.inference_tokens` is set.
        G (`int`): Number of exits.
        N ([`Estimate`]): Parameters.
        D ([`Estimate`]): Training tokens.
        loss ([`Estimate`]): Predicted loss, in nats per token.
        exits (`tuple[Estimate, ...]`): Predicted loss of every exit, shallowest first. Empty
            without a branch law.
        members (`tuple[float, ...]`): Sizes of the members as shares of N.
        simple (`Mapping[str, float]`): N, D and loss of the best run at C = 6ND without limits.
        closed_form (`bool`): Whether a formula computes `simple`, without a search.
        shift (`float`): `N / simple["N"]`.
        training_flops (`float`): FLOPs of training alone, under the FLOP model.
        limits_hit (`tuple[str, ...]`): The limits that N or D reached: `"memory"`, `"tokens"`.
        granularity ([`Estimate`], *optional*): Factor by which compute (C = 6ND) must grow so that
            G exits reach the loss of one exit. Only for a familial law and G > 1.
        granularity_with_heads ([`Estimate`], *optional*): The same factor under the FLOP model of
            training, which also counts the exit heads.
        leverage (`Mapping[str, Estimate]`): Efficiency Leverage, see [`loss_leverage`] (key
            `"loss"`) and [`compute_leverage`] (key `"compute"`).
        level (`float`): Confidence level of the intervals, between 0 and 1.
        notes (`tuple[str, ...]`): Reasons to doubt the plan, one sentence each.
    """

    law: str
    C: float
    G: int
    N: Estimate
    D: Estimate
    loss: Estimate
    exits: tuple[Estimate, ...]
    members: tuple[float, ...]
    simple: Mapping[str, float]
    closed_form: bool
    shift: float
    training_flops: float
    limits_hit: tuple[str, ...]
    granularity: Estimate | None
    granularity_with_heads: Estimate | None
    leverage: Mapping[str, Estimate]
    level: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""

        def plain(value: Any) -> Any:
            if isinstance(value, Estimate):
                return value.to_dict()
            if isinstance(value, Mapping):
                return {key: plain(item) for key, item in value.items()}
            return [plain(item) for item in value] if isinstance(value, tuple) else value

        return plain(vars(self))


def plan(
    fit: Source,
    C: float | None = None,
    G: int = 1,
    *,
    loss: float | None = None,
    head_flops: bool = True,
    flops: Flops | None = None,
    limits: Limits | None = None,
    branch: Source | None = None,
    members: Sequence[float] | None = None,
    level: float = 0.95,
    **given: float,
) -> Plan:
    """Find the best parameters N and tokens D for a budget, or the least budget for a loss.

    Args:
        fit ([`Fit`] or [`PublishedFit`]): A law of N and D, and for a family also of G.
        C (`float`, *optional*): The budget in FLOPs. Pass either `C` or `loss`.
        G (`int`): Number of exits.
        loss (`float`, *optional*): The loss to reach with the least FLOPs, in nats per token.
        head_flops (`bool`): Whether to count the FLOPs of the exit heads, see [`HeadFlops`]. N then
            excludes embeddings and heads. `False` plans with C = 6ND.
        flops (`Callable`, *optional*): Another FLOP model: `flops(N, D, G)` returns FLOPs.
        limits ([`Limits`], *optional*): Limits of memory and tokens, and tokens to serve.
        branch ([`Fit`] or [`PublishedFit`], *optional*): A branch law. It predicts the loss of
            each exit.
        members (`Sequence[float]`, *optional*): Sizes of the members as shares of N. By default
            they are evenly spaced: 1/G, 2/G, ..., 1.
        level (`float`): Confidence level of the intervals, between 0 and 1.
        given: Values of the law's variables other than N, D and G.

    Returns:
        [`Plan`]: The best run, with intervals if `fit` has rows.

    Raises:
        ScalingError: If an argument is missing or out of range.
        NoMinimumError: If the law has no optimum at this budget.

    Example:
        >>> family = PublishedFit.published(get_law("familial"))
        >>> found = plan(family, C=1e21, G=4, limits=Limits(memory=8e9, tokens=2e11))
        >>> found.N.value, found.D.value, found.loss.value

    Reference: Hoffmann et al. 2022, arXiv:2203.15556; inference demand: Sardana et al. 2024,
    arXiv:2401.00448.
    """
    if (C is None) == (loss is None):
        got = "neither" if C is None else "both"
        raise ScalingError(f"`plan` needs either `C` or `loss`, not both, got {got}.")
    if G < 1:
        raise ScalingError(f"`G` must be 1 or more, got {G}.")
    sizes = even_members(G) if members is None else tuple(members)
    if len(sizes) != G:
        raise ScalingError(f"`members` must contain {G} sizes (one per exit), got {len(sizes)}.")
    training = flops or (HeadFlops() if head_flops else None)
    question = _Question(Estimator(fit, level), G, training, limits or Limits(), given)
    C = question.least_budget(float(loss)) if loss is not None else C
    if C is None or not 0 < C < math.inf:
        raise ScalingError(f"`C` must be positive and finite, got {C}.")
    estimate, law, at = question.estimator, fit.law, question.given
    N, D, reached = question.optimum(C)
    simple = question.simple(C)
    exits: tuple[Estimate, ...] = ()
    beyond = [*outside(fit, **at, N=N.value, D=D.value)]
    if branch is not None:
        exits, more = _exits(branch, G, sizes, N.value, D.value, level)
        beyond += more
    beyond = list(dict.fromkeys(beyond))
    warn_of(beyond)
    leverage, granularity, with_heads = {}, None, None
    if "G" in law.variable_names and G > 1:
        leverage = {
            "loss": estimate(loss_leverage(law, C, sizes, flops=training)),
            "compute": estimate(compute_leverage(law, C, sizes, flops=training)),
        }
        granularity = estimate(granularity_compute(law, G, C))
        with_heads = estimate(granularity_compute(law, G, C, training)) if training else None
    return Plan(
        law=law.name,
        C=float(C),
        G=G,
        N=N,
        D=D,
        loss=reached,
        exits=exits,
        members=sizes,
        simple=simple,
        closed_form=powers(law, fit.values, **at) is not None,
        shift=N.value / simple["N"],
        training_flops=float((training or six_nd)(N.value, D.value, G)),
        limits_hit=question.limits_hit(N.value, D.value),
        granularity=granularity,
        granularity_with_heads=with_heads,
        leverage=leverage,
        level=level,
        notes=tuple(dict.fromkeys([*beyond, *question.unspent(C, N, D), *estimate.notes])),
    )


class _Question:
    """A planning question: the law's variables, the cost of a run, and the constraints."""

    def __init__(
        self,
        estimator: Estimator,
        G: int,
        training: Flops | None,
        limits: Limits,
        given: Mapping[str, float],
    ) -> None:
        self.estimator, self.limits = estimator, limits
        self.law, self.values = estimator.fit.law, estimator.fit.values
        reads_G = "G" in self.law.variable_names
        self.given: dict[str, Any] = {**given, "G": float(G)} if reads_G else dict(given)
        self.edges: dict[str, Any] = {"max_N": limits.max_N, "max_D": limits.tokens}
        paid = training
        if limits.inference_tokens:
            paid = LifetimeFlops(training or six_nd, limits.inference_tokens, limits.deployed)
        self.paid = paid if paid is None or reads_G else _with_exits(paid, G)

    def optimum(self, C: float) -> tuple[Estimate, ...]:
        """Return the best N, D and loss at C FLOPs."""
        more = {**self.edges, **self.given}
        best(self.law, self.values, C, self.paid, **more)  # raises if there is no optimum
        return tuple(self.estimator(optimal(self.law, C, of, self.paid, **more)) for of in ASKED)

    def simple(self, C: float) -> dict[str, float]:
        """Return the best N, D and loss under C = 6ND, without limits."""
        N, D = best(self.law, self.values, C, **self.given)
        loss = self.law.predict(self.values, **self.given, N=N, D=D)
        return {"N": float(N), "D": float(D), "loss": float(loss)}

    def limits_hit(self, N: float, D: float) -> tuple[str, ...]:
        """Return the names of the limits that N or D reached."""
        pairs = {"memory": (N, self.limits.max_N), "tokens": (D, self.limits.tokens)}
        return tuple(name for name, (at, edge) in pairs.items() if at >= edge * (1 - NEAR))

    def unspent(self, C: float, N: Estimate, D: Estimate) -> Iterator[str]:
        """Yield a note if the limits leave a part of the budget unspent."""
        spent = float((self.paid or six_nd)(N.value, D.value, self.given.get("G", 1)))
        if spent < C * (1 - NEAR):
            yield (
                f"{1 - spent / C:.0%} of the budget is not spent, because memory and tokens limit "
                "the run."
            )

    def least_budget(self, loss: float) -> float:
        """Return the least FLOPs whose best run reaches a loss."""
        N, D = min(self.limits.max_N, BOUNDLESS), min(self.limits.tokens, BOUNDLESS)
        floor = float(self.law.predict(self.values, **self.given, N=N, D=D))
        more = {**self.edges, **self.given}
        try:
            C = float(compute_for(self.law, self.values, loss, (), self.paid, **more))
        except NoMinimumError:
            # the search tries ever larger budgets if no budget reaches the loss
            if loss > floor:
                raise
            C = math.inf
        if math.isinf(C):
            within = " within the limits" if any(map(math.isfinite, self.edges.values())) else ""
            known = f", E is {self.values['E']:.4g}" if "E" in self.values else ""
            raise ScalingError(
                f"No budget reaches a loss of {loss}{within}: the law predicts at least "
                f"{floor:.4g}{known}. Pass a larger loss."
            )
        return C


def _with_exits(flops: Flops, G: int) -> Flops:
    """Return `flops` with G fixed, for a law that does not use G."""
    return lambda N, D, _: flops(N, D, G)


def _exits(
    branch: Source, G: int, members: Sequence[float], N: float, D: float, level: float
) -> tuple[tuple[Estimate, ...], list[str]]:
    """Return the loss of every exit under a branch law, and notes on exits outside its domain."""
    if not {"U", "V"} <= set(branch.law.variable_names):
        raise ScalingError(
            f"`branch` must be a law of `U` and `V` such as `branch`, got `{branch.law.name}`."
        )
    estimator, found = Estimator(branch, level), []
    beyond: list[str] = []
    for exit_idx, share in enumerate(members):
        at = {"N": share * N, "D": D, "U": float(exit_idx), "V": float(G - 1 - exit_idx)}
        found.append(estimator(loss_at(branch.law, **at)))
        beyond += outside(branch, **at)
    return tuple(found), beyond

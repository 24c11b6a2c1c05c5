"""From what exits said of known tokens to the confidence at which each may let a token leave."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression


# prices of risk that are tried: enough that neighbours differ by little, few enough to be quick
PRICES = 200


@dataclass(frozen=True)
class Costs:
    """What a token costs.

    Attributes:
        depths (`tuple[int, ...]`): Layers below each exit, the deepest last.
        layer_flops (`float`): FLOPs of one layer, per token.
        read_flops (`tuple[float, ...]`): FLOPs to read each exit: private layers and head.
    """

    depths: tuple[int, ...]
    layer_flops: float
    read_flops: tuple[float, ...]


@dataclass(frozen=True)
class Readings:
    """What the exits said of every token of some texts, each after the right text before it.

    Attributes:
        sequence (`numpy.ndarray` of shape `(tokens,)`): Text of each token, in order.
        confidence (`numpy.ndarray` of shape `(tokens, exits - 1)`): Of every early exit.
        agrees (`numpy.ndarray` of shape `(tokens, exits)`): Whether its best is the deepest one's.
        loss (`numpy.ndarray` of shape `(tokens, exits)`): Cross entropy, in nats.
    """

    sequence: np.ndarray
    confidence: np.ndarray
    agrees: np.ndarray
    loss: np.ndarray

    def half(self, odd: bool) -> Readings:
        """Every other text."""
        order = np.unique(self.sequence, return_inverse=True)[1]
        kept = order % 2 == int(odd)
        return Readings(
            self.sequence[kept], self.confidence[kept], self.agrees[kept], self.loss[kept]
        )


@dataclass(frozen=True)
class TradeOff:
    """One setting of the thresholds, and what it does to texts that it was not made from.

    Attributes:
        thresholds (`dict[int, float]`): By index of the exit; exits that never let go are absent.
        agreement (`float`): Share of the tokens that are the deepest exit's.
        loss_increase (`float`): Mean cross entropy above the deepest exit's, in nats per token.
        layers_per_token (`float`): Layers that a token waits for, one after the other.
        flops_per_token (`float`): FLOPs with all heads read, and with the layers above completed
            for every position before one that goes deeper.
        shares (`tuple[float, ...]`): Share of the tokens that leave at each exit.
    """

    thresholds: dict[int, float]
    agreement: float
    loss_increase: float
    layers_per_token: float
    flops_per_token: float
    shares: tuple[float, ...]


def risk_curves(readings: Readings, goal: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """For every early exit, how much a token is likely to lose by leaving, against its confidence.

    Args:
        readings ([`Readings`]): To learn from.
        goal (`str`): `"agreement"`, the chance of another token, or `"loss"`, the increase in nats.

    Returns:
        `list[tuple[numpy.ndarray, numpy.ndarray]]`: Confidences, increasing, and the risk at each,
        which never increases (isotonic regression).
    """
    curves = []
    for k in range(readings.confidence.shape[1]):
        order = np.argsort(readings.confidence[:, k], kind="stable")
        if goal == "agreement":
            risk = 1.0 - readings.agrees[order, k]
        else:
            risk = readings.loss[order, k] - readings.loss[order, -1]
        fitted = isotonic_regression(risk, increasing=False).x
        curves.append((readings.confidence[order, k], np.maximum(fitted, 0.0)))
    return curves


def thresholds_at(
    curves: list[tuple[np.ndarray, np.ndarray]], price: float, costs: Costs
) -> dict[int, float]:
    """Let every exit take the same risk for a layer saved.

    Args:
        curves (`list`): See `risk_curves`.
        price (`float`): Risk accepted for all layers saved.
        costs ([`Costs`]): Of the family.

    Returns:
        `dict[int, float]`: Threshold by index of the exit.
    """
    found = {}
    for k, (confidences, risks) in enumerate(curves):
        saved = 1 - costs.depths[k] / costs.depths[-1]
        low_enough = np.flatnonzero(risks <= price * saved)
        if len(low_enough):
            found[k] = float(confidences[low_enough[0]])
    return found


def exits_taken(readings: Readings, thresholds: dict[int, float]) -> np.ndarray:
    """Exit at which each token leaves, shape `(tokens,)`: the first that is sure enough."""
    taken = np.full(len(readings.sequence), readings.agrees.shape[1] - 1)
    for k in sorted(thresholds, reverse=True):
        taken[readings.confidence[:, k] >= thresholds[k]] = k
    return taken


def measure(readings: Readings, thresholds: dict[int, float], costs: Costs) -> TradeOff:
    """What thresholds do.

    Args:
        readings ([`Readings`]): To measure on.
        thresholds (`dict[int, float]`): By index of the exit.
        costs ([`Costs`]): Of the family.

    Returns:
        [`TradeOff`]: Means over the tokens.
    """
    taken = exits_taken(readings, thresholds)
    rows, depths = np.arange(len(taken)), np.asarray(costs.depths)
    reads = np.asarray(
        [
            sum(costs.read_flops[j] for j in (*sorted(thresholds), len(depths) - 1) if j < k)
            + costs.read_flops[k]
            for k in range(len(depths))
        ]
    )
    completed = depths[_deepest_to_come(taken, readings.sequence)]
    return TradeOff(
        thresholds=dict(thresholds),
        agreement=float(readings.agrees[rows, taken].mean()),
        loss_increase=float((readings.loss[rows, taken] - readings.loss[:, -1]).mean()),
        layers_per_token=float(depths[taken].mean()),
        flops_per_token=float(costs.layer_flops * completed.mean() + reads[taken].mean()),
        shares=tuple(float((taken == k).mean()) for k in range(len(depths))),
    )


def _deepest_to_come(taken: np.ndarray, sequence: np.ndarray) -> np.ndarray:
    """For each token, the deepest exit of itself and those after it in its text."""
    deepest = taken.copy()
    for i in range(len(taken) - 2, -1, -1):
        if sequence[i] == sequence[i + 1]:
            deepest[i] = max(deepest[i], deepest[i + 1])
    return deepest


def trade_offs(
    learn: Readings, test: Readings, costs: Costs, goal: str, target: float
) -> tuple[list[TradeOff], int | None]:
    """Thresholds from cautious to bold, and which of them to use.

    Args:
        learn ([`Readings`]): What thresholds are made from.
        test ([`Readings`]): What they are measured on.
        costs ([`Costs`]): Of the family.
        goal (`str`): `"agreement"` or `"loss"`.
        target (`float`): Least agreement, or most increase of the loss in nats.

    Returns:
        `tuple[list[TradeOff], int | None]`: In order of the layers per token, most first; and the
        index of the boldest that reaches the target on the texts it was made from, `None` if the
        target asks for more than the deepest exit alone.
    """
    curves = risk_curves(learn, goal)
    ratios = [
        risks / max(1e-9, 1 - costs.depths[k] / costs.depths[-1])
        for k, (_, risks) in enumerate(curves)
    ]
    prices = np.unique(np.quantile(np.concatenate(ratios), np.linspace(0, 1, PRICES)))
    settings = [{}, *(thresholds_at(curves, price, costs) for price in prices)]
    distinct = [s for i, s in enumerate(settings) if s not in settings[:i]]
    found, chosen, least = [], None, np.inf
    for i, thresholds in enumerate(distinct):
        seen = measure(learn, thresholds, costs)
        reached = seen.agreement >= target if goal == "agreement" else seen.loss_increase <= target
        if reached and seen.layers_per_token < least:
            chosen, least = i, seen.layers_per_token
        found.append(measure(test, thresholds, costs))
    return found, chosen

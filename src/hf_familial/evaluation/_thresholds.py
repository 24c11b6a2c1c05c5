"""From the predictions of exits on known tokens to thresholds of confidence for leaving there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression


# prices of risk that are tried: enough that neighbours differ by little, few enough to be quick
PRICES = 200


@dataclass(frozen=True)
class Costs:
    """The cost of a token.

    Attributes:
        depths (`tuple[int, ...]`): Layers below each exit, the deepest last.
        layer_flops (`float`): FLOPs of one layer, per token.
        read_flops (`tuple[float, ...]`): FLOPs to read each exit: private layers and head.
    """

    depths: tuple[int, ...]
    layer_flops: float
    read_flops: tuple[float, ...]

    def saved(self, exit_idx: int) -> float:
        """Return the share of all layers that a token saves by leaving at an exit."""
        return 1 - self.depths[exit_idx] / self.depths[-1]


@dataclass(frozen=True)
class ExitPredictions:
    """The predictions of all exits for every token of some texts, each after the right text.

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

    def half(self, odd: bool) -> ExitPredictions:
        """Return every other text."""
        order = np.unique(self.sequence, return_inverse=True)[1]
        kept = order % 2 == int(odd)
        return ExitPredictions(
            self.sequence[kept], self.confidence[kept], self.agrees[kept], self.loss[kept]
        )


@dataclass(frozen=True)
class TradeOff:
    """A setting of the thresholds, and its effect on texts that it was not made from.

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


def risk_curves(predictions: ExitPredictions, goal: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for every early exit, increasing confidences and the risk of leaving at each.

    The risk is the chance of another token (`goal="agreement"`) or the increase of the loss in nats
    (`"loss"`). It never increases with the confidence (isotonic regression).
    """
    curves = []
    for k in range(predictions.confidence.shape[1]):
        order = np.argsort(predictions.confidence[:, k], kind="stable")
        if goal == "agreement":
            risk = 1.0 - predictions.agrees[order, k]
        else:
            risk = predictions.loss[order, k] - predictions.loss[order, -1]
        fitted = isotonic_regression(risk, increasing=False).x
        curves.append((predictions.confidence[order, k], np.maximum(fitted, 0.0)))
    return curves


def thresholds_at(
    curves: list[tuple[np.ndarray, np.ndarray]], price: float, costs: Costs
) -> dict[int, float]:
    """Return thresholds, by exit, at which every exit takes the same risk for a layer saved.

    `price` is the risk accepted for saving all layers.
    """
    found = {}
    for k, (confidences, risks) in enumerate(curves):
        low_enough = np.flatnonzero(risks <= price * costs.saved(k))
        if len(low_enough):
            found[k] = float(confidences[low_enough[0]])
    return found


def _exits_taken(predictions: ExitPredictions, thresholds: dict[int, float]) -> np.ndarray:
    """Return the exit at which each token leaves: the first that is sure enough."""
    taken = np.full(len(predictions.sequence), predictions.agrees.shape[1] - 1)
    for k in sorted(thresholds, reverse=True):
        taken[predictions.confidence[:, k] >= thresholds[k]] = k
    return taken


def measure(predictions: ExitPredictions, thresholds: dict[int, float], costs: Costs) -> TradeOff:
    """Return what thresholds do, as means over the tokens."""
    taken = _exits_taken(predictions, thresholds)
    rows, depths = np.arange(len(taken)), np.asarray(costs.depths)
    read = (*sorted(thresholds), len(depths) - 1)
    reads = np.asarray(
        [
            sum(costs.read_flops[j] for j in read if j < k) + costs.read_flops[k]
            for k in range(len(depths))
        ]
    )
    completed = depths[_deepest_to_come(taken, predictions.sequence)]
    return TradeOff(
        thresholds=dict(thresholds),
        agreement=float(predictions.agrees[rows, taken].mean()),
        loss_increase=float((predictions.loss[rows, taken] - predictions.loss[:, -1]).mean()),
        layers_per_token=float(depths[taken].mean()),
        flops_per_token=float(costs.layer_flops * completed.mean() + reads[taken].mean()),
        shares=tuple(float((taken == k).mean()) for k in range(len(depths))),
    )


def _deepest_to_come(taken: np.ndarray, sequence: np.ndarray) -> np.ndarray:
    """Return, for each token, the deepest exit of itself and those after it in its text."""
    deepest = taken.copy()
    for i in range(len(taken) - 2, -1, -1):
        if sequence[i] == sequence[i + 1]:
            deepest[i] = max(deepest[i], deepest[i + 1])
    return deepest


def trade_offs(
    learn: ExitPredictions, test: ExitPredictions, costs: Costs, goal: str, target: float
) -> tuple[list[TradeOff], int | None]:
    """Return settings from cautious to bold, made from `learn` and measured on `test`.

    The index is that of the boldest setting that reaches the target (least agreement, or most
    increase of the loss in nats) on the texts it was made from. It is `None` if the target asks for
    more than the deepest exit alone.
    """
    curves = risk_curves(learn, goal)
    ratios = [risks / max(1e-9, costs.saved(k)) for k, (_, risks) in enumerate(curves)]
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

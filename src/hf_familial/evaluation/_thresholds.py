"""The search for confidence thresholds of early exit, from predictions of all exits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression


# number of risk prices that are tried
PRICES = 200


@dataclass(frozen=True)
class Costs:
    """The cost of a token.

    Attributes:
        depths (`tuple[int, ...]`): The depth of each exit in layers, the deepest last.
        layer_flops (`float`): FLOPs of one layer per token.
        read_flops (`tuple[float, ...]`): FLOPs of the private layers and head of each exit.
    """

    depths: tuple[int, ...]
    layer_flops: float
    read_flops: tuple[float, ...]

    def saved(self, exit_idx: int) -> float:
        """Return the share of all layers that do not run if a token leaves at an exit."""
        return 1 - self.depths[exit_idx] / self.depths[-1]


@dataclass(frozen=True)
class ExitPredictions:
    """The predictions of all exits for each token of a dataset, with the true tokens as context.

    Attributes:
        sequence (`numpy.ndarray` of shape `(tokens,)`): The index of each token's text, ascending.
        confidence (`numpy.ndarray` of shape `(tokens, exits - 1)`): The confidence of each early
            exit.
        agrees (`numpy.ndarray` of shape `(tokens, exits)`): Whether the exit's most probable token
            is that of the deepest exit.
        loss (`numpy.ndarray` of shape `(tokens, exits)`): Cross entropy in nats.
    """

    sequence: np.ndarray
    confidence: np.ndarray
    agrees: np.ndarray
    loss: np.ndarray

    def half(self, odd: bool) -> ExitPredictions:
        """Return the texts of odd rank, or those of even rank."""
        order = np.unique(self.sequence, return_inverse=True)[1]
        kept = order % 2 == int(odd)
        return ExitPredictions(
            self.sequence[kept], self.confidence[kept], self.agrees[kept], self.loss[kept]
        )


@dataclass(frozen=True)
class TradeOff:
    """A setting of the thresholds, with its quality and cost on held-out texts.

    Attributes:
        thresholds (`dict[int, float]`): The confidence threshold by exit index. Exits without an
            entry never end a token.
        agreement (`float`): The share of tokens that equal the deepest exit's token.
        loss_increase (`float`): The mean cross entropy minus the deepest exit's, in nats per token.
        layers_per_token (`float`): The mean number of layers that run in sequence for a token.
        flops_per_token (`float`): The mean FLOPs of a token. They include all heads that are read,
            and the skipped layers of earlier positions that a deeper token needs later.
        shares (`tuple[float, ...]`): The share of tokens that leave at each exit.
    """

    thresholds: dict[int, float]
    agreement: float
    loss_increase: float
    layers_per_token: float
    flops_per_token: float
    shares: tuple[float, ...]


def risk_curves(predictions: ExitPredictions, goal: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for each early exit, increasing confidences and the risk of leaving at each of them.

    The risk is the probability of a token other than the deepest exit's (`goal="agreement"`), or
    the increase of the loss in nats (`goal="loss"`). Isotonic regression makes it non-increasing.
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
    """Return thresholds by exit at which each exit has the same risk per saved layer.

    `price` is the risk that is allowed if a token saves all layers.
    """
    found = {}
    for k, (confidences, risks) in enumerate(curves):
        low_enough = np.flatnonzero(risks <= price * costs.saved(k))
        if len(low_enough):
            found[k] = float(confidences[low_enough[0]])
    return found


def _exits_taken(predictions: ExitPredictions, thresholds: dict[int, float]) -> np.ndarray:
    """Return the exit of each token: the first one whose confidence reaches its threshold."""
    taken = np.full(len(predictions.sequence), predictions.agrees.shape[1] - 1)
    for k in sorted(thresholds, reverse=True):
        taken[predictions.confidence[:, k] >= thresholds[k]] = k
    return taken


def measure(predictions: ExitPredictions, thresholds: dict[int, float], costs: Costs) -> TradeOff:
    """Return the quality and cost of thresholds, as means over all tokens."""
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
    """Return, for each token, the deepest exit among this token and later ones of its text."""
    deepest = taken.copy()
    for i in range(len(taken) - 2, -1, -1):
        if sequence[i] == sequence[i + 1]:
            deepest[i] = max(deepest[i], deepest[i + 1])
    return deepest


def trade_offs(
    learn: ExitPredictions, test: ExitPredictions, costs: Costs, goal: str, target: float
) -> tuple[list[TradeOff], int | None]:
    """Return threshold settings from low to high risk, and the index of the chosen one.

    The settings are fitted on `learn` and measured on `test`. The chosen setting runs the fewest
    layers among those that reach the target on `learn`. The target is the smallest agreement or the
    largest increase of the loss in nats. The index is `None` if no setting reaches it.
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

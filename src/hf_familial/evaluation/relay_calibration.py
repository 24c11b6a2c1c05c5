"""The calibration of a confidence relay: thresholds for a target agreement or loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch

from ..flops import measure_flops_per_token
from ..models import is_family
from ..models.backbone_verification import evaluation_mode
from ..models.early_exit_policies import ConfidenceRelay, confidence
from ..models.familial import FamilialForCausalLM
from ..models.familial.configuration_familial import check_choice
from ._batches import Collator, Row, iter_batches
from ._predictions import predict_batches
from ._thresholds import Costs, ExitPredictions, TradeOff, trade_offs


GOALS = ("agreement", "loss")


@dataclass(frozen=True)
class Calibration:
    """A calibrated relay, and a table of threshold settings measured on held-out texts.

    Attributes:
        relay ([`ConfidenceRelay`]): The relay with the chosen thresholds, for `relay_generate`.
        chosen ([`TradeOff`]): The row of the chosen thresholds.
        rows (`tuple[TradeOff, ...]`): All settings, from most to fewest layers per token.
        goal (`str`): `"agreement"` or `"loss"`.
        target (`float`): The requested target.
        num_tokens (`int`): The number of tokens that the rows were measured on.
        depths (`tuple[int, ...]`): The depth of each exit in layers.
    """

    relay: ConfidenceRelay
    chosen: TradeOff
    rows: tuple[TradeOff, ...]
    goal: str
    target: float
    num_tokens: int
    depths: tuple[int, ...]

    def to_pandas(self) -> pd.DataFrame:
        """Return all settings as a table, one row per setting.

        Returns:
            `pandas.DataFrame`: The numbers of [`TradeOff`] as columns, then `threshold_k` and
            `share_k` of each exit k, and `chosen`.
        """
        names = ("agreement", "loss_increase", "layers_per_token", "flops_per_token")
        exits = range(len(self.depths))
        table = [
            {
                **{name: getattr(row, name) for name in names},
                **{f"threshold_{k}": row.thresholds.get(k, np.nan) for k in exits[:-1]},
                **{f"share_{k}": row.shares[k] for k in exits},
                "chosen": row is self.chosen,
            }
            for row in self.rows
        ]
        return pd.DataFrame(table)


def calibrate(
    model: FamilialForCausalLM,
    dataset: Iterable[Row],
    target: float = 0.99,
    goal: str = "agreement",
    measure: str = "max_prob",
    batch_size: int = 8,
    max_batches: int | None = None,
    data_collator: Collator | None = None,
) -> Calibration:
    """Find the thresholds of a [`ConfidenceRelay`] for a target quality.

    All exits predict each token of the dataset, with the true tokens as context. One half of the
    texts fits the thresholds. For each exit, isotonic regression estimates the risk of leaving at a
    given confidence. Each exit then gets the threshold with the same risk per saved layer. The
    other half of the texts measures quality and cost.

    Generated text can differ more from the deepest exit's than the table shows, because each
    different token changes the context of later tokens.

    Args:
        model ([`FamilialForCausalLM`]): The family. It needs two exits or more.
        dataset (`datasets.Dataset` or `Iterable`): Rows with `input_ids`, as in [`evaluate_exits`].
            It needs two texts or more.
        target (`float`, *optional*, defaults to 0.99): The smallest share of tokens that equal the
            deepest exit's. With `goal="loss"`, the largest increase of the loss in nats per token.
        goal (`str`, *optional*, defaults to `"agreement"`): `"agreement"` or `"loss"`.
        measure (`str`, *optional*, defaults to `"max_prob"`): The confidence measure, see
            [`ConfidenceRelay`].
        batch_size (`int`, *optional*, defaults to 8): The number of sequences in a batch.
        max_batches (`int`, *optional*): The largest number of batches to read. Defaults to all.
        data_collator (`Callable`, *optional*): A function that turns a list of rows into a batch,
            as in [`evaluate_exits`].

    Returns:
        [`Calibration`]: The relay and the table of settings. [`plot_trade_offs`] plots the table.

    Raises:
        TypeError: If `model` is not a family.
        ValueError: If the dataset has fewer than two texts, if the family has one exit, if an
            argument is out of range, or if no thresholds reach the target.

    Example:
        >>> calibration = calibrate(model, blocks, target=0.98)
        >>> model.relay_generate(**inputs, relay=calibration.relay)
    """
    _check(model, target, goal)
    with evaluation_mode(model), torch.no_grad():
        batches = iter_batches(dataset, batch_size, max_batches, data_collator)
        predictions = _gather(model, batches, measure)
        seq_length = int(np.bincount(predictions.sequence).max()) + 1
        costs = _costs(model, seq_length)
    learn, test = predictions.half(odd=False), predictions.half(odd=True)
    if not len(test.sequence):
        raise ValueError(
            "`dataset` must contain two texts or more with tokens to predict. One half fits the "
            "thresholds, and the other half measures them."
        )
    rows, chosen = trade_offs(learn, test, costs, goal, target)
    if chosen is None:
        raise ValueError(
            f"`target={target}` is not reached by any thresholds for `goal={goal!r}`. Choose a "
            "less strict target."
        )
    best = rows[chosen]
    rows = sorted(rows, key=lambda row: -row.layers_per_token)
    relay = ConfidenceRelay(dict(best.thresholds), measure)
    return Calibration(relay, best, tuple(rows), goal, target, len(test.sequence), costs.depths)


def _gather(
    model: FamilialForCausalLM, batches: Iterable[Mapping[str, Any]], measure: str
) -> ExitPredictions:
    """Return the predictions of all exits at all positions with a target."""
    parts: list[tuple[np.ndarray, ...]] = []
    seen = 0
    for batch in predict_batches(model, batches, partial(confidence, measure=measure)):
        if batch.exits:
            tokens = np.stack([found.tokens for found in batch.exits], 1)
            confidences = np.stack([found.confidences for found in batch.exits[:-1]], 1)
            losses = np.stack([found.losses for found in batch.exits], 1)
            parts.append((seen + batch.sequences, confidences, tokens == tokens[:, -1:], losses))
        seen += batch.num_sequences
    if not parts:
        raise ValueError(
            "`dataset` has no token to predict. It needs sequences of two tokens or more."
        )
    return ExitPredictions(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _costs(model: FamilialForCausalLM, seq_length: int) -> Costs:
    """Measure the FLOPs of one layer, and of each exit's private layers and head."""
    depths = tuple(model.config.exits)
    whole = [measure_flops_per_token(model, k, seq_length) for k in range(len(depths))]
    head = model.head(-1)
    last = 2.0 * sum(p.numel() for p in head.parameters() if p.dim() > 1)
    layer = (whole[-1] - last) / depths[-1]
    reads = [flops - layer * depth for flops, depth in zip(whole, depths, strict=True)]
    return Costs(depths, layer, tuple(reads))


def _check(model: Any, target: float, goal: str) -> None:
    if not is_family(model):
        raise TypeError(f"`model` must be a FamilialForCausalLM, got {type(model).__name__}.")
    if model.config.num_exits < 2:
        raise ValueError("`model` must have two exits or more, got a family with one exit.")
    check_choice("goal", goal, GOALS)
    if not (0 < target <= 1 if goal == "agreement" else target >= 0):
        wanted = "between 0 and 1" if goal == "agreement" else "0 or more nats"
        raise ValueError(f"`target` must be {wanted} for `goal={goal!r}`, got {target}.")

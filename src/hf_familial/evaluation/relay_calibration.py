"""Finding the thresholds of a confidence relay for a wanted agreement with the deepest exit."""

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
    """Thresholds of a relay, and their effect on texts that they were not made from.

    Attributes:
        relay ([`ConfidenceRelay`]): Ready for `relay_generate`.
        chosen ([`TradeOff`]): Its row of the table.
        rows (`tuple[TradeOff, ...]`): From cautious to bold.
        goal (`str`): `"agreement"` or `"loss"`.
        target (`float`): What was asked for.
        num_tokens (`int`): Tokens that the rows were measured on.
        depths (`tuple[int, ...]`): Layers below each exit.
    """

    relay: ConfidenceRelay
    chosen: TradeOff
    rows: tuple[TradeOff, ...]
    goal: str
    target: float
    num_tokens: int
    depths: tuple[int, ...]

    def to_pandas(self) -> pd.DataFrame:
        """Return the trade-off as a table, one row per setting.

        Returns:
            `pandas.DataFrame`: Columns as the fields of [`TradeOff`], `threshold_k` and `share_k`
            for exit k, and `chosen`.
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
    """Find the thresholds of a [`ConfidenceRelay`] for a wanted quality.

    Every exit reads every token of the dataset, after the right text before it. On half of the
    texts, isotonic regression tells how much a token of a given confidence loses by leaving, and
    every exit gets the threshold at which it takes the same risk for a layer saved; the other half
    measures what comes of it. A text that the relay writes itself may stray further than the rows
    say, since one other token changes those after it.

    Args:
        model ([`FamilialForCausalLM`]): The family.
        dataset (`datasets.Dataset` or `Iterable`): As for `evaluate_exits`: rows with `input_ids`.
        target (`float`, *optional*, defaults to 0.99): Least share of tokens that are the deepest
            exit's, or with `goal="loss"` the most nats per token that the loss may increase by.
        goal (`str`, *optional*, defaults to `"agreement"`): `"agreement"` or `"loss"`.
        measure (`str`, *optional*, defaults to `"max_prob"`): Measure of confidence, see
            [`ConfidenceRelay`].
        batch_size (`int`, *optional*, defaults to 8): Sequences run at once.
        max_batches (`int`, *optional*): Most batches to read; all by default.
        data_collator (`Callable`, *optional*): As for `evaluate_exits`.

    Returns:
        [`Calibration`]: The relay and the table of trade-offs; [`plot_trade_offs`] draws it.

    Raises:
        ValueError: If there are not two texts, the family has one exit, or a word or number is out
            of its range.

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
            "`dataset` must hold two texts or more: one half finds the thresholds and the other "
            "measures them."
        )
    rows, chosen = trade_offs(learn, test, costs, goal, target)
    if chosen is None:
        raise ValueError(f"no thresholds reach `target={target}` for `goal={goal!r}`.")
    best = rows[chosen]
    rows = sorted(rows, key=lambda row: -row.layers_per_token)
    relay = ConfidenceRelay(dict(best.thresholds), measure)
    return Calibration(relay, best, tuple(rows), goal, target, len(test.sequence), costs.depths)


def _gather(
    model: FamilialForCausalLM, batches: Iterable[Mapping[str, Any]], measure: str
) -> ExitPredictions:
    """Return the predictions of every exit for every token that has a target."""
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
        raise ValueError("`dataset` has no token to predict.")
    return ExitPredictions(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _costs(model: FamilialForCausalLM, seq_length: int) -> Costs:
    """Return the FLOPs of a layer and of reading each exit, from running the members."""
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
        raise ValueError("a family of one exit has no thresholds: `model` must have two or more.")
    check_choice("goal", goal, GOALS)
    if not (0 < target <= 1 if goal == "agreement" else target >= 0):
        wanted = "between 0 and 1" if goal == "agreement" else "0 or more nats"
        raise ValueError(f"`target` must be {wanted} for `goal={goal!r}`, got {target}.")

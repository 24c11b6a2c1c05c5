"""Thresholds keep what they promise, on texts that they were not made from."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import agreeing, logits, tiny_family, token_ids

from hf_familial import ConfidenceRelay, calibrate
from hf_familial.evaluation import plot_trade_offs
from hf_familial.evaluation._thresholds import (
    Costs,
    ExitPredictions,
    measure,
    risk_curves,
    thresholds_at,
    trade_offs,
)


EXITS = [1, 3, 4]
COSTS = Costs(depths=(2, 4, 8), layer_flops=10.0, read_flops=(3.0, 3.0, 4.0))


def simulated(tokens=4_000, texts=40, seed=0):
    """Exits that are right as often as they are sure, deeper ones surer."""
    rng = np.random.default_rng(seed)
    hard = rng.uniform(size=(tokens, 1))
    confidence = np.clip(1 - hard * [[0.9, 0.6]] + 0.1 * rng.normal(size=(tokens, 2)), 0.01, 1)
    agrees = np.column_stack([rng.uniform(size=(tokens, 2)) < confidence, np.ones(tokens, bool)])
    loss = np.where(agrees, 1.0, 3.0)
    return ExitPredictions(np.sort(rng.integers(0, texts, tokens)), confidence, agrees, loss)


def slow_measure(predictions, thresholds, costs):
    """The oracle, token by token."""
    tokens, last = len(predictions.sequence), len(costs.depths) - 1
    taken, flops, layers, agreed, lost = [], 0.0, 0, 0, 0.0
    for t in range(tokens):
        exit_idx = next(
            (k for k in sorted(thresholds) if predictions.confidence[t, k] >= thresholds[k]), last
        )
        taken.append(exit_idx)
        flops += sum(costs.read_flops[k] for k in sorted(thresholds) if k < exit_idx)
        flops += costs.read_flops[exit_idx]
        layers += costs.depths[exit_idx]
        agreed += predictions.agrees[t, exit_idx]
        lost += predictions.loss[t, exit_idx] - predictions.loss[t, last]
    for t in range(tokens):
        later = [
            taken[u] for u in range(t, tokens) if predictions.sequence[u] == predictions.sequence[t]
        ]
        flops += costs.layer_flops * costs.depths[max(later)]
    return np.array([agreed, lost, layers, flops]) / tokens


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), low=st.floats(0.1, 1.1), high=st.floats(0.1, 1.1))
def test_what_thresholds_do(seed, low, high):
    predictions = simulated(tokens=60, texts=4, seed=seed)
    for thresholds in ({0: low, 1: high}, {1: high}, {}):
        found = measure(predictions, thresholds, COSTS)
        figures = [
            found.agreement, found.loss_increase, found.layers_per_token, found.flops_per_token,
        ]  # fmt: skip
        assert np.allclose(figures, slow_measure(predictions, thresholds, COSTS))
        assert sum(found.shares) == pytest.approx(1.0)


def test_nobody_leaves_without_thresholds():
    found = measure(simulated(), {}, COSTS)
    assert (found.agreement, found.layers_per_token, found.flops_per_token) == (1.0, 8.0, 84.0)


@pytest.mark.parametrize("goal", ["agreement", "loss"])
def test_risk_never_rises_with_confidence(goal):
    for confidences, risks in risk_curves(simulated(), goal):
        assert (np.diff(confidences) >= 0).all()
        assert (np.diff(risks) <= 1e-12).all()
        assert risks.min() >= 0


def test_the_same_risk_for_a_layer_saved():
    predictions = simulated(40_000)
    found = thresholds_at(risk_curves(predictions, "agreement"), 0.2, COSTS)
    # exits are right as often as they are sure: risk is 1 - confidence
    assert found[0] == pytest.approx(1 - 0.2 * 6 / 8, abs=0.05)
    assert found[1] == pytest.approx(1 - 0.2 * 4 / 8, abs=0.05)


@pytest.mark.parametrize("target", [0.9, 0.95, 0.99])
def test_the_target_is_reached_and_layers_are_saved(target):
    learn, test = simulated(20_000, seed=1), simulated(20_000, seed=2)
    rows, chosen = trade_offs(learn, test, COSTS, "agreement", target)
    assert rows[chosen].agreement >= target - 0.006  # rounding of another sample
    assert rows[chosen].layers_per_token < 8
    bolder = [row for row in rows if row.layers_per_token < rows[chosen].layers_per_token - 1e-9]
    assert all(row.agreement < target + 0.006 for row in bolder)


def test_a_wanted_loss():
    learn, test = simulated(20_000, seed=1), simulated(20_000, seed=2)
    rows, chosen = trade_offs(learn, test, COSTS, "loss", 0.05)
    assert 0.03 < rows[chosen].loss_increase < 0.065


def blocks(count=12, length=24):
    return [{"input_ids": row} for row in token_ids(count, length)]


def test_a_family_is_calibrated(tmp_path):
    family = agreeing(tiny_family("llama", EXITS), share=0.15)
    found = calibrate(family, blocks(), target=0.8, batch_size=5)
    assert isinstance(found.relay, ConfidenceRelay)
    assert found.num_tokens == 6 * 23
    assert found.relay.threshold == found.chosen.thresholds
    table = found.to_pandas()
    assert table["chosen"].sum() == 1
    assert table["layers_per_token"].is_monotonic_decreasing
    assert table["layers_per_token"].iloc[0] == 4
    plot_trade_offs(found, tmp_path / "trade_off.png")
    assert (tmp_path / "trade_off.png").stat().st_size > 10_000


@torch.no_grad()
def test_the_readings_are_what_the_exits_say():
    """Agreement of the chosen thresholds, recomputed from whole logits."""
    family, rows = agreeing(tiny_family("gemma2", EXITS), share=0.15), blocks()
    found = calibrate(family, rows, target=0.7, measure="margin", batch_size=4)
    ids = torch.stack([row["input_ids"] for row in rows[1::2]])
    read = [logits(family, ids, exit_idx=k)[:, :-1].softmax(-1) for k in range(3)]
    taken = read[2].argmax(-1)
    for k in sorted(found.relay.threshold, reverse=True):
        best = read[k].topk(2).values
        sure = best[..., 0] - best[..., 1] >= found.relay.threshold[k]
        taken = torch.where(sure, read[k].argmax(-1), taken)
    agreement = (taken == read[2].argmax(-1)).float().mean().item()
    assert found.chosen.agreement == pytest.approx(agreement, abs=1e-2)
    assert found.chosen.layers_per_token < 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 1.2}, "between 0 and 1"),
        ({"target": 0}, "between 0 and 1"),
        ({"goal": "loss", "target": -0.1}, "0 or more nats"),
        ({"goal": "speed"}, "`goal` must be one of"),
        ({"measure": "luck"}, "`measure` must be one of"),
        ({"max_batches": 1, "batch_size": 1}, "two texts or more"),
    ],
)
def test_bad_arguments(arguments, message):
    family = tiny_family("llama", EXITS)
    with pytest.raises(ValueError, match=message):
        calibrate(family, blocks(), **arguments)


def test_a_family_of_one_has_nothing_to_calibrate():
    with pytest.raises(ValueError, match="one exit"):
        calibrate(tiny_family("llama", [4]), blocks())
    with pytest.raises(TypeError, match="FamilialForCausalLM"):
        calibrate(torch.nn.Linear(2, 2), blocks())
    with pytest.raises(ValueError, match="no token to predict"):
        calibrate(tiny_family("llama", EXITS), [])

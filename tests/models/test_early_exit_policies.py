"""Tokens leave at early exits as a policy says, each row for itself."""

from dataclasses import dataclass

import pytest
import torch
from reference import logits, token_ids
from relays import ASKED, EXITS, NEW, family_of

from hf_familial import ConfidenceRelay, EarlyExitRelay, HandoffRelay
from hf_familial.models.early_exit_policies import confidence


@pytest.mark.parametrize(
    "relay",
    [
        ConfidenceRelay(0.05),
        ConfidenceRelay({0: 0.03, 1: 0.06}),
        ConfidenceRelay({1: 0.05}, measure="margin"),
        ConfidenceRelay(0.2, measure="entropy"),
        HandoffRelay(below=0.06, window=3),
        HandoffRelay(from_exit=1, after=5),
    ],
    ids=repr,
)
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "falcon_h1"])
def test_one_row_never_decides_for_another(model_type, relay):
    """Rows of a batch write what each writes alone: no exit is forced on any."""
    family, ids = family_of(model_type), token_ids(4, 12)
    together = family.relay_generate(ids, relay=relay, **ASKED)
    for row in range(4):
        alone = family.relay_generate(ids[row : row + 1], relay=relay, **ASKED)
        assert torch.equal(together.sequences[row], alone.sequences[0])
        mixed, own = together.relay_stats.token_exits[row], alone.relay_stats.token_exits[0]
        assert torch.equal(mixed, own)


def slow_confidence_relay(family, ids, thresholds, steps):
    """The oracle: every token from uncached passes, row by row, exit by exit."""
    texts, exits = [], []
    for row in ids:
        text, taken = row[None], []
        for _ in range(steps):
            for k in range(len(EXITS)):
                scores = logits(family, text, exit_idx=k)[0, -1]
                if k == len(EXITS) - 1 or scores.softmax(-1).max() >= thresholds[k]:
                    break
            text = torch.cat([text, scores.argmax()[None, None]], 1)
            taken.append(k)
        texts.append(text[0])
        exits.append(taken)
    return torch.stack(texts), torch.tensor(exits)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("private", [0, 1])
def test_confidence_is_the_oracles(model_type, private):
    family, ids = family_of(model_type, num_exit_layers=private), token_ids(3, 12)
    thresholds = {
        k: logits(family, ids, exit_idx=k).softmax(-1).amax(-1).quantile(0.61).item()
        for k in (0, 1)
    }
    found = family.relay_generate(ids, relay=ConfidenceRelay(thresholds), **ASKED)
    texts, exits = slow_confidence_relay(family, ids, thresholds, NEW)
    assert torch.equal(found.sequences, texts)
    assert torch.equal(found.relay_stats.token_exits, exits)
    assert exits.unique().tolist() == [0, 1, 2]  # or nothing was tried


def test_a_confident_relay_saves_layers():
    family, ids = family_of(), token_ids(1, 12)
    stats = family.relay_generate(ids, relay=ConfidenceRelay(0.0), **ASKED).relay_stats
    assert stats.positions == (25, 0, 0)
    assert (stats.layer_passes, stats.plain_layer_passes) == (25, 100)
    assert 0.5 < stats.flops_saved < 1
    assert stats.token_exits.unique().tolist() == [0]


def test_what_is_handed_over_does_not_come_back():
    family, ids = family_of(), token_ids(3, 12)
    exits = family.relay_generate(ids, relay=HandoffRelay(after=4), **ASKED).relay_stats.token_exits
    assert exits[:, :4].unique().tolist() == [0]
    assert exits[:, 4:].unique().tolist() == [2]


@dataclass(frozen=True)
class EveryOther(EarlyExitRelay):
    """A policy of a user's own: shallow and deep in turn."""

    def exits(self, num_exits):
        return 0, -1

    def new_state(self, batch_size):
        return {"count": 0}

    def leaves(self, exit_idx, logits, state):
        state["count"] += 1
        return torch.full((len(logits),), state["count"] % 2 == 1)


def test_a_policy_of_ones_own():
    family, ids = family_of(), token_ids(2, 12)
    exits = family.relay_generate(ids, relay=EveryOther(), **ASKED).relay_stats.token_exits
    assert exits.tolist() == [[0, 2] * 7] * 2


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
def test_confidence_lies_between_0_and_1(measure):
    even, certain = torch.zeros(10), torch.full((10,), -1e4).index_fill(0, torch.tensor(3), 0.0)
    assert confidence(certain, measure) == pytest.approx(1.0)
    assert confidence(even, measure) == pytest.approx(0.1 if measure == "max_prob" else 0, abs=1e-6)
    masked = torch.tensor([0.0, 0.0, float("-inf")])
    assert 0 <= confidence(masked, measure) <= 1

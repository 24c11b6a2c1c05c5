"""Draft lengths follow what an exit gets right, and what its drafts cost."""

import pytest

from hf_familial.decoding._draft_length import DRAFTED, WATCHED, Acceptance, DraftLength


def drafted_in(rounds, confidence, is_right):
    """Drafts of each round, told how sure the exit was and whether it was right."""
    length, counts = DraftLength(1 / 3, timed=False), []
    for _ in range(rounds):
        drafts, right, kind = 0, 0, length.mode()
        if kind == WATCHED:
            length.watched(confidence, float(is_right))
        if kind != DRAFTED:
            counts.append(0)
            continue
        while drafts < 15 and length.goes_on(confidence):
            drafts += 1
            right += is_right and right == drafts - 1
        length.finish(drafts, right, right + 1)
        if drafts == right and length._confidences and drafts < 15:
            length.learn_next(float(is_right))
        counts.append(drafts)
    return counts


@pytest.mark.parametrize("confidence", [0.2, 0.6, 0.99])
def test_an_exit_that_is_always_wrong_never_drafts(confidence):
    assert not any(drafted_in(200, confidence, False))


def test_an_exit_that_is_always_right_drafts_long_soon():
    counts = drafted_in(20, 0.95, True)
    assert counts[:7] == [0] * 7  # plain, then watched
    assert counts[7] == 4  # nothing was drafted yet
    assert min(counts[11:]) == 15


def test_an_exit_that_begins_to_be_right_drafts_again():
    length, drafts = DraftLength(1 / 3, timed=False), 0
    for step in range(120):
        kind = length.mode()
        if kind == WATCHED:
            length.watched(0.9, float(step > 20))
        drafts += kind == DRAFTED
        if kind == DRAFTED:
            length.goes_on(0.9)
            length.finish(1, 1, 2)
    assert drafts > 40


def test_what_is_learned_of_one_class_of_confidence_holds_for_others():
    seen = Acceptance()
    before = seen.rate(0.95)
    for _ in range(10):
        seen.observe(0.35, 0.0)
    assert seen.rate(0.95) < before / 3
    for _ in range(50):
        seen.observe(0.95, 1.0)
    assert seen.rate(0.95) > 0.9

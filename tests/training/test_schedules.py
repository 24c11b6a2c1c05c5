"""Weights of the exits and how they change over the steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_familial import FamilialTrainingArguments
from hf_familial.training.schedules import SCHEDULES, SCHEMES, ExitSchedule, exit_weights


DEPTHS = [2, 4, 8]


@pytest.mark.parametrize(
    ("scheme", "ratios"),
    [
        ("uniform", (1, 1, 1)),
        ("linear", (2, 4, 8)),
        ("sqrt", (2**0.5, 2, 8**0.5)),
        ("inverse", (1 / 2, 1 / 4, 1 / 8)),
        ("sum", (3, 10, 36)),
        ([0, 1, 3], (0, 1, 3)),
    ],
)
def test_schemes(scheme, ratios) -> None:
    total = sum(ratios)
    assert exit_weights(scheme, DEPTHS) == pytest.approx([ratio / total for ratio in ratios])


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("depth", "one of uniform"),
        ([1, 2], "3 exits, got 2"),
        ([1, -1, 1], "0 or more"),
        ([0, 0, 0], "not all 0"),
        ([1, float("nan"), 1], "0 or more"),
    ],
)
def test_wrong_weights(scheme, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exit_weights(scheme, DEPTHS)


@given(
    scheme=st.sampled_from(sorted(SCHEMES)),
    kind=st.sampled_from(SCHEDULES),
    depths=st.lists(st.integers(1, 64), min_size=1, max_size=8, unique=True).map(sorted),
    total=st.integers(0, 1000),
    fraction=st.floats(0.01, 1.0),
    step=st.integers(0, 1000),
)
def test_weights_always_sum_to_one(scheme, kind, depths, total, fraction, step) -> None:
    weights = ExitSchedule(exit_weights(scheme, depths), kind, total, fraction).at(step)
    assert sum(weights) == pytest.approx(1)
    assert all(weight >= 0 for weight in weights)
    assert weights[-1] > 0


def active(kind: str, steps: range, fraction: float = 0.5) -> list[tuple[bool, ...]]:
    """Which exits have a weight at each step of a run of 12, of 4 exits."""
    schedule = ExitSchedule((0.25,) * 4, kind, 12, fraction)
    return [tuple(weight > 0 for weight in schedule.at(step)) for step in steps]


def test_rotating_trains_one_early_exit_at_a_time() -> None:
    first = [(True, False, False, True), (False, True, False, True), (False, False, True, True)]
    assert active("rotating", range(6)) == first * 2


def test_gradual_adds_the_deeper_exits_first() -> None:
    counts = [sum(row) for row in active("gradual", range(12))]
    assert counts == [2, 2, 3, 3, *[4] * 8]
    assert active("gradual", range(1)) == [(False, False, True, True)]


def test_warmup_and_decay_are_linear() -> None:
    warmup = ExitSchedule((0.5, 0.5), "warmup", 10, 0.5)
    assert warmup.at(0) == (0, 1)
    assert warmup.at(1) == pytest.approx((0.1 / 0.6, 0.5 / 0.6))
    assert warmup.at(5) == warmup.at(9) == (0.5, 0.5)
    decay = ExitSchedule((0.5, 0.5), "decay", 10, 0.5)
    assert decay.at(0) == decay.at(5) == (0.5, 0.5)
    assert decay.at(10) == (0, 1)


def test_one_exit_under_every_schedule() -> None:
    assert all(ExitSchedule((1.0,), kind, 10).at(3) == (1.0,) for kind in SCHEDULES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exit_schedule": "cosine"}, "one of constant"),
        ({"exit_schedule_fraction": 0.0}, r"\(0, 1\]"),
        ({"distillation_weight": -1.0}, "0 or more"),
        ({"distillation_temperature": 0.0}, "positive"),
    ],
)
def test_wrong_arguments(fields, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        FamilialTrainingArguments(output_dir=str(tmp_path), **fields)


def test_arguments_give_a_schedule(tmp_path) -> None:
    args = FamilialTrainingArguments(
        output_dir=str(tmp_path), exit_weights="1,1,2", exit_schedule="decay"
    )
    assert args.schedule(DEPTHS, 10).at(0) == (0.25, 0.25, 0.5)
    assert args.distillation() is None


WRONG_ARGUMENTS = [
    ({"exit_weights": "1;2"}, "separated by commas"),
    ({"exit_weights": "unifrom"}, "Did you mean 'uniform'?"),
    ({"exit_weights": "0,0"}, "not all 0"),
    ({"exit_weights": "1,-1"}, "0 or more"),
    ({"exit_weights": "1,0", "exit_schedule": "decay"}, "deepest exit must have a weight"),
    ({"exit_schedule": "warmpu"}, "Did you mean 'warmup'?"),
    ({"lr_scheduler_type": "cosin"}, "Did you mean 'cosine'"),
    ({"optim": "adamw_troch"}, "Did you mean 'adamw_torch'"),
    ({"eval_strategy": "epochs"}, "Did you mean 'epoch'?"),
    ({"report_to": "tensorbord"}, "Did you mean 'tensorboard'?"),
    ({"adam_beta1": 2}, "`adam_beta1` must be a number, from 0 to less than 1, got 2"),
    ({"adam_epsilon": -1e-8}, "`adam_epsilon` must be a number, 0 or more"),
    ({"weight_decay": "1e-1"}, "`weight_decay` must be a number"),
    ({"learning_rate": float("nan")}, "`learning_rate`"),
    ({"seed": 2**32}, "`seed` must be a number, from 0 to less than 4294967296"),
    ({"per_device_eval_batch_size": 0}, "1 or more, got 0"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_ARGUMENTS)
def test_an_argument_that_no_run_can_use_is_refused_when_it_is_given(
    fields, message: str, tmp_path
) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 the message is compared below
        FamilialTrainingArguments(output_dir=str(tmp_path), **fields)
    assert message in str(raised.value)


def test_weights_may_be_a_list(tmp_path) -> None:
    args = FamilialTrainingArguments(output_dir=str(tmp_path), exit_weights=[1, 1, 2])
    assert args.schedule(DEPTHS, 10).at(0) == (0.25, 0.25, 0.5)

"""The door: invariances, settings that hold, refusals that name what is wrong, refits."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_fit import objective_by_hand, study

from hf_familial.errors import (
    BadRowsError,
    MissingColumnError,
    NoOptimumError,
    NotIdentifiedError,
    ScalingError,
    TooFewError,
    UnknownLawError,
)
from hf_familial.scaling import (
    Domain,
    FarResiduals,
    Fit,
    FitStatus,
    LargestLosses,
    Parameter,
    RunTable,
    Settings,
    fit,
    get_law,
    refit,
)
from hf_familial.scaling._problem import Problem
from hf_familial.scaling._search import minimise
from hf_familial.scaling.diagnostics import diagnose


NOISY = study("hoffmann", get_law("hoffmann").published["besiroglu"].values, noise=0.005, seed=1)
FAMILY = study("familial", noise=0.003, seed=2)
ROWS = len(NOISY["loss"])


@pytest.fixture(scope="module")
def plain():
    return fit("hoffmann", NOISY)


@pytest.fixture(scope="module")
def family():
    return fit("familial", FAMILY)


def close(answer, expected, rel=1e-6):
    assert answer.objective == pytest.approx(expected.objective, rel=1e-9)
    assert answer.values == pytest.approx(dict(expected.values), rel=rel)


# --- what must not matter ---------------------------------------------------------------------


@settings(max_examples=15)
@given(size=st.floats(1e-9, 1e9), data=st.floats(1e-9, 1e9))
def test_units_of_size_and_data_do_not_matter(plain, size, data):
    moved = {**NOISY, "N": NOISY["N"] * size, "D": NOISY["D"] * data}
    answer = fit("hoffmann", moved)
    v = plain.values
    expected = {**v, "A": v["A"] * size ** v["alpha"], "B": v["B"] * data ** v["beta"]}
    close(answer, dataclasses.replace(plain, values=expected))


@settings(max_examples=15)
@given(order=st.permutations(range(ROWS)))
def test_the_order_of_rows_does_not_matter(plain, order):
    answer = fit("hoffmann", {name: values[list(order)] for name, values in NOISY.items()})
    close(answer, plain)


@settings(max_examples=10)
@given(twice=st.sets(st.integers(0, ROWS - 1), min_size=1))
def test_a_row_given_twice_is_a_row_of_weight_two(twice):
    index = [*range(ROWS), *sorted(twice)]
    doubled = {name: values[index] for name, values in NOISY.items()}
    weights = np.array([2.0 if row in twice else 1.0 for row in range(ROWS)])
    expected = fit("hoffmann", NOISY, weights=weights)
    close(fit("hoffmann", RunTable.read(doubled, duplicates="keep")), expected)
    merged = RunTable.read(doubled, duplicates="merge")
    assert merged.weight == pytest.approx(weights)
    close(fit("hoffmann", merged), expected)


@settings(max_examples=10)
@given(factor=st.floats(1e-3, 1e3))
def test_a_common_weight_scales_the_objective_alone(plain, factor):
    answer = fit("hoffmann", NOISY, weights=np.full(ROWS, factor))
    close(answer, dataclasses.replace(plain, objective=plain.objective * factor))


@settings(max_examples=10)
@given(factor=st.floats(0.01, 100))
def test_the_unit_of_a_raw_loss_scales_what_is_linear(factor):
    first, second = (
        fit("hoffmann", {**NOISY, "loss": NOISY["loss"] * f}, "huber", delta=0.01 * f)
        for f in (1.0, factor)
    )
    scaled = {n: v * (factor if n in "EAB" else 1) for n, v in first.values.items()}
    objective = first.objective * factor**2
    close(second, dataclasses.replace(first, values=scaled, objective=objective))


def test_the_same_twice(plain):
    again = fit("hoffmann", NOISY)
    assert again.values == plain.values
    assert again.objective == plain.objective


# --- what the answer says ---------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["log_huber", "huber", "mse"])
@pytest.mark.parametrize("law", ["hoffmann", "skaling"])
def test_an_optimum_has_no_way_down(objective, law):
    answer = fit(law, NOISY, objective=objective, delta=0.002)
    assert answer.status is FitStatus.CONVERGED
    here = objective_by_hand(answer)
    assert answer.objective == pytest.approx(here, rel=1e-12)
    for name in answer.free:
        for step in (1e-3, -1e-3, 1e-4, -1e-4):
            moved = {**answer.values, name: answer.values[name] * (1 + step)}
            assert objective_by_hand(dataclasses.replace(answer, values=moved)) > here


def test_an_answer_is_complete(plain):
    assert plain.free == ("E", "A", "B", "alpha", "beta")
    assert plain.bounds_hit == ()
    assert plain.dropped == ()
    assert plain.starts == 8
    assert plain.grid == 256
    assert plain.agreement == plain.exact_agreement == 1.0
    assert 10 < plain.condition < 1e4
    assert plain.residuals() == pytest.approx(np.log(NOISY["loss"] / plain.fitted()))
    raw = fit("hoffmann", NOISY, objective="mse")
    assert raw.residuals() == pytest.approx(NOISY["loss"] - raw.fitted())
    assert plain.predict(N=NOISY["N"], D=NOISY["D"]) == pytest.approx(plain.fitted())
    with pytest.raises(dataclasses.FrozenInstanceError):
        plain.objective = 0.0


def test_a_fit_comes_back_from_json():
    answer = fit(
        "familial",
        RunTable.read(FAMILY),
        delta=2e-3,
        tied={"beta": "alpha"},
        bounds={"E": (0.0, np.inf)},
        starts={"gamma": [0.0, 0.1]},
        outliers=FarResiduals(4.0, 2),
    )
    text = json.dumps(answer.to_dict(), allow_nan=False)
    back = Fit.from_dict(json.loads(text))
    for field in dataclasses.fields(Fit):
        if field.name not in ("data", "law"):
            assert getattr(back, field.name) == getattr(answer, field.name), field.name
    assert back.law is answer.law
    assert (back.data.loss == answer.data.loss).all()
    assert back.data.dropped == answer.data.dropped
    assert back.to_dict() == answer.to_dict()
    assert not back.data.loss.flags.writeable
    ones = np.ones((1, len(back.data)))
    assert refit(back, ones).values["gamma"][0] == pytest.approx(answer.values["gamma"])


def test_json_of_another_kind_is_refused(plain):
    record = plain.to_dict()
    with pytest.raises(ScalingError, match="schema"):
        Fit.from_dict({**record, "schema": 99})
    with pytest.raises(ScalingError, match="without its rows"):
        Fit.from_dict(plain.to_dict(data=False))
    with pytest.raises(UnknownLawError):
        Fit.from_dict({**record, "law": "gone"})


# --- settings ---------------------------------------------------------------------------------


def test_fixed_parameters_stay(family):
    gamma = family.values["gamma"]
    answer = fit("familial", FAMILY, fixed={"gamma": gamma})
    assert answer.values["gamma"] == gamma
    assert "gamma" not in answer.free
    close(answer, family, rel=1e-5)
    away = fit("familial", FAMILY, fixed={"gamma": gamma + 0.02})
    assert away.objective > family.objective
    only = fit("hoffmann", NOISY, fixed={"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35})
    assert only.free == ("beta",)
    floorless = fit("hoffmann", NOISY, fixed={"E": 0.0})
    assert floorless.values["E"] == 0.0
    assert floorless.values["alpha"] < 0.2


def test_tied_parameters_follow():
    answer = fit("hoffmann", NOISY, tied={"beta": "alpha"})
    assert answer.values["beta"] == answer.values["alpha"]
    assert len(answer.free) == 4
    here = answer.objective
    for step in (1e-3, -1e-3):
        moved = {n: answer.values[n] * (1 + step) for n in ("alpha", "beta")}
        moved = dataclasses.replace(answer, values={**answer.values, **moved})
        assert objective_by_hand(moved) > here
    linear = fit("gadre", NOISY, tied={"b": "a"})
    assert linear.values["b"] == linear.values["a"]


def test_bounds_hold_and_say_so(plain):
    answer = fit("hoffmann", NOISY, bounds={"alpha": (0.4, 0.6), "E": (0.0, 1.7)})
    assert answer.status is FitStatus.AT_BOUND
    assert set(answer.bounds_hit) <= {"alpha", "E"}
    assert answer.bounds_hit
    assert 0.4 <= answer.values["alpha"] <= 0.6
    assert answer.values["E"] <= 1.7
    assert answer.objective > plain.objective
    wide = fit("hoffmann", NOISY, bounds={"alpha": (0.0, 2.0), "A": (1.0, 1e9)})
    close(wide, plain)
    runs = {**NOISY, "loss": 300 * NOISY["N"] ** -0.3 + 2000 * NOISY["D"] ** -0.36}
    floorless = fit("hoffmann", runs)
    assert floorless.bounds_hit == ("E",)
    assert floorless.values["E"] == 0.0
    assert floorless.values["alpha"] == pytest.approx(0.3, rel=1e-6)


def test_starts_of_ones_own(plain):
    given = fit("hoffmann", NOISY, starts={"alpha": [0.3, 0.4], "beta": 0.3})
    assert given.grid == 2
    close(given, plain)
    one = fit("hoffmann", NOISY, starts={"E": 1, "A": 10, "B": 10, "alpha": 0.5, "beta": 0.5})
    assert (one.grid, one.starts) == (1, 1)
    close(one, plain)
    several = fit("hoffmann", NOISY, polished=20)
    assert several.starts == 20
    close(several, plain)


def test_too_few_steps_are_said():
    assert fit("hoffmann", NOISY, max_steps=1).status is FitStatus.NOT_CONVERGED


def test_outliers_are_left_out_and_recorded(plain):
    spoilt = NOISY["loss"].copy()
    spoilt[[3, 17]] = [30.0, 0.2]
    runs = {**NOISY, "loss": spoilt}
    far = fit("hoffmann", runs, outliers=FarResiduals(8.0))
    assert {row.row for row in far.dropped} >= {3, 17}
    assert "robust standard deviations" in far.dropped[0].reason
    assert far.values["alpha"] == pytest.approx(plain.values["alpha"], abs=0.02)
    assert len(far.data) + len(far.dropped) == ROWS
    largest = fit("hoffmann", runs, outliers=LargestLosses(1))
    assert [row.row for row in largest.dropped] == [3]
    assert largest.dropped[0].reason == "among the 1 largest losses"
    none = fit("hoffmann", NOISY, outliers=FarResiduals(50.0))
    assert none.dropped == ()
    close(none, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "huge"}, "`objective` must be one of"),
        ({"delta": 0.0}, "`delta` must be positive"),
        ({"polished": 0}, "`polished` must be positive"),
        ({"fixed": {"gamma": 1.0}}, "not 'gamma'"),
        ({"starts": {"gamma": 1.0}}, "not 'gamma'"),
        ({"fixed": {"alpha": 7.0}}, r"`alpha` must be in \[0, 5\], got 7"),
        ({"bounds": {"alpha": (0.5, 0.4)}}, r"must be \(low, high\)"),
        ({"bounds": {"A": (-1.0, 5.0)}}, "`bounds` of `A` must be 0 or more"),
        ({"tied": {"beta": "alpha", "alpha": "beta"}}, "tied to a parameter that is not"),
        ({"tied": {"beta": "A"}}, "one is the weight of a column"),
        ({"tied": {"beta": "alpha"}, "fixed": {"beta": 0.3}}, "both fixed and tied"),
        ({"fixed": dict.fromkeys(["E", "A", "B", "alpha", "beta"], 1.0)}, "nothing to fit"),
        ({"weights": [1.0]}, "`weights` must be"),
        ({"weights": np.zeros(ROWS)}, "`weights` must be"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ScalingError, match=message):
        fit("hoffmann", NOISY, **change)


# --- rows that cannot bear the law ------------------------------------------------------------


def test_granularity_must_vary():
    runs = {**FAMILY, "G": np.full_like(FAMILY["G"], 4.0)}
    with pytest.raises(TooFewError, match="`G` never varies") as error:
        fit("familial", runs)
    assert (error.value.what, error.value.got, error.value.needed) == ("G", 1, 2)
    fixed = fit("familial", runs, fixed={"gamma": 0.033})
    assert fixed.values["gamma"] == 0.033


def test_too_few_rows_and_sizes():
    five = {name: values[[0, 8, 16, 24, 32]] for name, values in NOISY.items()}
    with pytest.raises(TooFewError, match="5 rows cannot determine 5 parameters"):
        fit("hoffmann", five)
    two = NOISY["N"] < np.unique(NOISY["N"])[2]
    with pytest.raises(TooFewError, match="`N` has 2 different values only"):
        fit("hoffmann", {name: values[two] for name, values in NOISY.items()})


def test_what_rows_leave_open_is_refused():
    law = get_law("hoffmann")
    values = law.published["besiroglu"].values
    size = np.geomspace(1e8, 1e10, 12)
    runs = {"N": size, "D": 20 * size, "loss": law.predict(values, N=size, D=20 * size)}
    with pytest.raises(NotIdentifiedError, match="condition number") as error:
        fit(law, runs)
    assert error.value.condition > 1e6
    with pytest.raises(NotIdentifiedError, match="`A`, `B`") as error:
        fit(law, runs, tied={"beta": "alpha"})
    assert set(error.value.parameters) == {"A", "B"}
    flat = {**NOISY, "loss": 1.8 + 2000 * NOISY["D"] ** -0.36}
    with pytest.raises(NotIdentifiedError):
        fit(law, flat)
    with pytest.raises(NotIdentifiedError):
        fit(law, {**NOISY, "loss": np.full(ROWS, 2.0)})


def test_bad_numbers_are_refused():
    for column, value in [("N", -1.0), ("D", 0.0), ("loss", np.nan), ("N", np.inf), ("loss", 0.0)]:
        runs = {name: values.copy() for name, values in NOISY.items()}
        runs[column][[4, 7]] = value
        with pytest.raises(BadRowsError, match="row 4") as error:
            fit("hoffmann", runs)
        assert error.value.rows == (4, 7)
        kept = RunTable.read(runs, needed=("N", "D"), bad_rows="drop")
        kept = kept.for_law(get_law("hoffmann"), "drop")
        assert [row.row for row in fit("hoffmann", kept).dropped] == [4, 7]
    with pytest.raises(BadRowsError, match="`G` must be >= 1"):
        fit("familial", {**FAMILY, "G": FAMILY["G"] / 2})


def test_missing_columns_are_named():
    with pytest.raises(MissingColumnError) as error:
        fit("familial", NOISY)
    assert error.value.missing == ("G",)
    with pytest.raises(MissingColumnError):
        fit("familial", RunTable.read(NOISY))


def test_a_table_may_name_its_runs_and_its_target():
    records = [
        {"N": n, "D": d, "loss": loss, "run_id": f"run {row // 6}"}
        for row, (n, d, loss) in enumerate(zip(*NOISY.values(), strict=True))
    ]
    answer = fit("hoffmann", records)
    assert answer.data.runs == ROWS / 6
    assert answer.data.run_names[:2] == ("run 0", "run 1")
    runs = study("step_lr")
    rates = {"N": runs["N"], "D": runs["D"], "lr": runs["loss"]}
    assert fit("step_lr", rates).values["a"] == pytest.approx(-0.713)


def test_rows_given_twice_are_refused():
    runs = {name: np.append(values, values[5]) for name, values in NOISY.items()}
    with pytest.raises(BadRowsError, match=f"row {ROWS}: copy of row 5"):
        fit("hoffmann", runs)


def test_a_law_without_a_value_is_refused():
    with pytest.raises(NoOptimumError):
        fit("skaling", NOISY, fixed={"E": 100.0, "k": 0.75})


def _cusp(x, p):
    # a square root of a parameter: no slope at its bound
    return 1.0, np.sqrt(p.root) * x.N**-0.3


def test_a_start_without_a_slope_has_not_arrived():
    law = dataclasses.replace(
        get_law("power"),
        name="cusp",
        variables=get_law("hoffmann").variables[:1],
        linear=get_law("hoffmann").linear[:2],
        nonlinear=(Parameter("root", "r", "under a root", (0.0, 1.0), (0.5,)),),
        columns=_cusp,
        published={},
        domain=Domain(),
    )
    data = RunTable.read({"N": np.geomspace(1e8, 1e10, 9), "loss": np.linspace(3, 2, 9)})
    problem = Problem.of(law, data, Settings(objective="mse"))
    starts = problem.space.point({"E": [2.0, 2.0], "A": [100.0, 100.0], "root": [0.0, 0.5]})
    found = minimise(problem, starts)
    assert found.converged.tolist() == [False, True]
    assert np.isfinite(found.points).all()
    assert found.value[1] < found.value[0]


# --- refits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["log_huber", "mse"])
def test_a_refit_is_a_fit_of_the_replicate(objective):
    answer = fit("familial", FAMILY, objective=objective)
    rng = np.random.default_rng(3)
    rows = len(answer.data)
    counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=6)
    again = refit(answer, counts)
    assert again.converged.all()
    for at, weights in enumerate(counts):
        kept = weights > 0
        index = np.flatnonzero(kept)
        alone = fit("familial", answer.data.take(index), objective, weights=weights[kept])
        assert again.objective[at] == pytest.approx(alone.objective, rel=1e-9)
        values = {name: value[at] for name, value in again.values.items()}
        assert values == pytest.approx(dict(alone.values), rel=1e-4)


def test_a_refit_takes_other_losses(family):
    rng = np.random.default_rng(4)
    losses = family.fitted() * np.exp(0.003 * rng.standard_normal((5, len(family.data))))
    again = refit(family, np.ones_like(losses), losses)
    for at, loss in enumerate(losses):
        alone = fit("familial", {**FAMILY, "loss": loss})
        assert again.objective[at] == pytest.approx(alone.objective, rel=1e-9)
    same = refit(family, np.ones((1, len(family.data))))
    assert {name: value[0] for name, value in same.values.items()} == pytest.approx(
        dict(family.values), rel=1e-8
    )


def test_refits_do_not_depend_on_their_company(family):
    rng = np.random.default_rng(5)
    rows = len(family.data)
    counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=700)
    whole, alone = refit(family, counts), refit(family, counts[650:651])
    assert whole.objective[650] == pytest.approx(alone.objective[0], rel=1e-9)


def test_a_refit_keeps_what_is_held():
    answer = fit("hoffmann", NOISY, fixed={"E": 1.8}, tied={"beta": "alpha"})
    again = refit(answer, np.random.default_rng(0).integers(1, 4, (3, ROWS)))
    assert (again.values["E"] == 1.8).all()
    assert (again.values["beta"] == again.values["alpha"]).all()


def test_wrong_replicates_are_refused(plain):
    for weights in (np.ones(ROWS), np.ones((2, 3)), np.full((1, ROWS), -1.0)):
        with pytest.raises(ScalingError, match="`weights`"):
            refit(plain, weights)
    with pytest.raises(ScalingError, match="`losses`"):
        refit(plain, np.ones((2, ROWS)), np.ones((1, ROWS)))
    with pytest.raises(ScalingError, match="`losses`"):
        refit(plain, np.ones((1, ROWS)), np.zeros((1, ROWS)))


@pytest.mark.slow
def test_a_hundred_thousand_rows():
    rng = np.random.default_rng(0)
    law = get_law("hoffmann")
    truth = law.published["besiroglu"].values
    size, data = np.exp(rng.uniform(np.log([[5e7], [5e8]]), np.log([[2e10], [5e11]]), (2, 100_000)))
    loss = law.predict(truth, N=size, D=data) * np.exp(0.01 * rng.standard_normal(100_000))
    answer = fit(law, {"N": size, "D": data, "loss": loss})
    assert answer.status is FitStatus.CONVERGED
    assert answer.values["alpha"] == pytest.approx(truth["alpha"], abs=2e-3)
    assert answer.values["beta"] == pytest.approx(truth["beta"], abs=2e-3)


# what the rows cannot tell, and what a law does not know


@pytest.mark.parametrize(("power", "words"), [(1.0, "proportional to `N`"), (0.5, "`N`^0.5")])
def test_tokens_that_follow_the_size_are_the_reason_of_a_refusal(power, words):
    size = np.geomspace(1e7, 1e10, 20)
    tokens = 2e9 * (size / 1e8) ** power
    law = get_law("hoffmann")
    values = next(iter(law.published.values())).values
    loss = law.predict(values, N=size, D=tokens) * np.exp(
        np.random.default_rng(0).normal(0, 0.002, 20)
    )
    assert words in said_of(law, {"N": size, "D": tokens, "loss": loss})


def said_of(law, rows):
    """The refusal of a fit, or what speaks against it."""
    try:
        return " ".join(diagnose(fit(law, rows)))
    except NotIdentifiedError as refusal:
        return str(refusal)


def test_repeated_data_are_a_warning_for_a_law_that_takes_them_for_new():
    law, plain = get_law("muennighoff"), get_law("hoffmann")
    values = next(iter(law.published.values())).values
    size, unique = np.geomspace(1e8, 1e9, 30), np.full(30, 1e9)
    tokens = 1e9 * np.geomspace(1, 50, 30)[np.random.default_rng(0).permutation(30)]
    loss = law.predict(values, N=size, D=tokens, D_unique=unique)
    rows = {"N": size, "D": tokens, "D_unique": unique, "loss": loss}
    found = [doubt for doubt in diagnose(fit(plain, rows)) if "repeat their data" in doubt]
    assert len(found) == 1
    assert "up to 50 times" in found[0]
    assert "Fit `muennighoff`" in found[0]
    fresh = {**rows, "D_unique": tokens}
    assert not any("repeat" in doubt for doubt in diagnose(fit(plain, fresh)))


def test_a_rule_is_fitted_to_the_best_of_the_settings_tried():
    law = get_law("step_lr")
    values = next(iter(law.published.values())).values
    rows = {"N": [], "D": [], "lr": [], "loss": []}
    for size in (1e8, 2e8, 5e8, 1e9):
        for tokens in (2e9, 1e10, 5e10):
            best = float(law.predict(values, N=size, D=tokens))
            for factor in (0.25, 0.5, 1.0, 2.0, 8.0):  # lopsided: their mean is not the best
                rows["N"].append(size)
                rows["D"].append(tokens)
                rows["lr"].append(best * factor)
                rows["loss"].append(2.5 + 0.1 * np.log(factor) ** 2)
    answer = fit(law, rows)
    assert len(answer.data) == 12
    assert answer.values == pytest.approx(dict(values), rel=1e-6)
    assert "has a lower loss" in answer.dropped[0].reason
    del rows["loss"]
    assert any("the rule predicts the best lr" in doubt for doubt in diagnose(fit(law, rows)))

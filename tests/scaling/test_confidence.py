"""Intervals against closed forms, jackknives, brute-force profiles and published spreads."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_familial.errors import ScalingError, TooFewError
from hf_familial.scaling import LargestLosses, RunTable, fit, get_law, refit
from hf_familial.scaling._covariance import CoefficientCovariance
from hf_familial.scaling.confidence import Estimate, intervals, seed_noise
from hf_familial.scaling.quantities import (
    DerivedQuantity,
    Interval,
    coefficient,
    loss_at,
    optimal,
    size_exponent,
)
from hf_familial.scaling.resampling import Bootstrap, bootstrap
from hf_familial.scaling.simulation import isoflop_design, simulate


FAMILIAL, HOFFMANN = get_law("familial"), get_law("hoffmann")
TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28, "gamma": 0.033}
DENSE = {name: TRUTH[name] for name in HOFFMANN.names}
DESIGN = isoflop_design(FAMILIAL, TRUTH, [1e19, 1e20, 1e21], G=[1, 2, 4, 8])


@pytest.fixture(scope="module")
def family():
    """84 runs with noise of 0.005 nats."""
    return fit(FAMILIAL, simulate(FAMILIAL, TRUTH, DESIGN, noise=0.005, seed=1))


@pytest.fixture(scope="module")
def linear():
    """A fit that is linear in its coefficients: E, A and B with the exponents held."""
    design = isoflop_design(HOFFMANN, DENSE, [1e19, 1e20, 1e21])
    data = simulate(HOFFMANN, DENSE, design, noise=0.01, seed=3)
    return fit(HOFFMANN, data, objective="mse", fixed={"alpha": 0.34, "beta": 0.28})


def columns_of(answer):
    """Design matrix of `linear` by its coefficients themselves."""
    N, D = (answer.data.columns[name] for name in ("N", "D"))
    return np.column_stack([np.ones_like(N), N**-0.34, D**-0.28])


def itself(name):
    """A coefficient on a linear scale, whatever the search moves."""
    return DerivedQuantity(name, lambda values: values[name], "linear")


def test_an_interval_survives_json():
    for interval in (Interval(0.9, 0.1, 0.3, "delta"), Interval(0.9, -math.inf, 2.0, "profile")):
        assert Interval.from_dict(json.loads(json.dumps(interval.to_dict()))) == interval
    assert 0.2 in interval
    assert 2.5 not in interval
    with pytest.raises(dataclasses.FrozenInstanceError):
        interval.low = 0
    estimate = Estimate(0.2, Interval(0.9, 0.1, 0.3, "delta"), "tokens")
    assert Estimate.from_dict(json.loads(json.dumps(estimate.to_dict()))) == estimate


@pytest.mark.parametrize("level", [0, 1, -0.5, 95])
def test_a_level_is_a_share(level):
    with pytest.raises(ScalingError, match="`level` must be between 0 and 1"):
        Interval(level, 0, 1, "delta")


@pytest.mark.parametrize("position", range(3))
def test_the_delta_method_is_hc3_where_all_is_linear(linear, position):
    X, y = columns_of(linear), linear.data.loss
    inverse = np.linalg.inv(X.T @ X)
    beta = inverse @ X.T @ y
    leverage = np.einsum("ni,ij,nj->n", X, inverse, X)
    scores = X * ((y - X @ beta) / (1 - leverage))[:, None]
    covariance = inverse @ scores.T @ scores @ inverse
    reach = stats.t.ppf(0.95, len(y) - 3) * math.sqrt(covariance[position, position])
    found = CoefficientCovariance.of(linear).interval(itself("EAB"[position]), level=0.9)
    # by differences of the logs of coefficients, hence not to the last digit
    assert found.low == pytest.approx(beta[position] - reach, rel=1e-4)
    assert found.high == pytest.approx(beta[position] + reach, rel=1e-4)


def test_checkpoints_of_a_run_are_not_independent(linear):
    """Cluster-robust scores are those of a jackknife over runs."""
    data = linear.data
    rows = {name: np.repeat(column, 4) for name, column in data.columns.items()}
    rows["D"] = rows["D"] * np.tile([1, 1.1, 1.2, 1.3], len(data))
    rows["run_id"] = np.repeat(np.arange(len(data)), 4)
    many = simulate(HOFFMANN, DENSE, rows, noise=0.001, run_noise=0.01, seed=0)
    held = {"alpha": 0.34, "beta": 0.28}
    answer = fit(HOFFMANN, many, objective="mse", fixed=held)
    weights = (many.run_id[None, :] != np.arange(many.runs)[:, None]).astype(float)
    left_out = refit(answer, weights).values
    for name in "EAB":
        jackknife = math.sqrt(np.square(left_out[name] - answer.values[name]).sum())
        error = CoefficientCovariance.of(answer).standard_error(itself(name))
        assert error == pytest.approx(jackknife, rel=2e-3)
    naive = dataclasses.replace(many, run_id=np.arange(len(many)), run_names=("",) * len(many))
    taken_apart = CoefficientCovariance.of(dataclasses.replace(answer, data=naive))
    assert taken_apart.standard_error(itself("E")) < 0.7 * error_of(answer, "E")


def error_of(answer, name):
    return CoefficientCovariance.of(answer).standard_error(itself(name))


def test_a_row_of_weight_2_is_the_row_twice(family):
    """Twice the same run, not two runs: its two rows are one cluster."""
    times = 1 + np.arange(84) % 2
    once = fit(FAMILIAL, family.data, weights=times.astype(float))
    rows = np.repeat(np.arange(84), times)
    twice = dataclasses.replace(
        family.data.take(rows), run_id=rows, run_names=tuple(map(str, range(84)))
    )
    repeated = fit(FAMILIAL, twice)
    for name in FAMILIAL.names:
        assert error_of(repeated, name) == pytest.approx(error_of(once, name), rel=1e-5)


def test_tied_and_fixed_coefficients(family):
    tied = fit(FAMILIAL, family.data, tied={"beta": "alpha"}, fixed={"gamma": 0.033})
    found = intervals(tied, ["alpha", "beta"])
    assert (found["alpha"].low, found["alpha"].high) == (found["beta"].low, found["beta"].high)
    assert set(intervals(tied)) == {"E", "A", "B", "alpha"}
    held = intervals(tied, ["gamma"])["gamma"]
    assert held.low == held.high == pytest.approx(0.033)


def test_runs_without_noise_leave_nothing_open():
    exact = fit(FAMILIAL, simulate(FAMILIAL, TRUTH, DESIGN))
    for method in ("delta", "profile"):
        for name, interval in intervals(exact, method=method).items():
            assert interval.low == pytest.approx(TRUTH[name], rel=1e-6)
            assert interval.high == pytest.approx(TRUTH[name], rel=1e-6)


def test_least_absolute_residuals(family):
    """With a knee of nearly nothing no row is on the curved part of Huber's function."""
    sharp = fit(FAMILIAL, family.data, delta=1e-6)
    assert np.sum(np.abs(sharp.residuals()) < 1e-6) < 12
    draws = bootstrap(sharp, 300, seed=0)
    for name in ("gamma", "alpha"):
        ratio = error_of(sharp, name) / draws.values[name].std()
        assert 0.6 < ratio < 1.6


def test_a_coefficient_on_its_bound_is_held_there():
    """Runs that would have a negative floor: the others get intervals, the floor none."""
    design = isoflop_design(HOFFMANN, DENSE, [1e19, 1e20, 1e21])
    data = simulate(HOFFMANN, {**DENSE, "E": 0.05}, design, noise=0.02, seed=1)
    answer = fit(HOFFMANN, data, bounds={"E": (0.3, 10.0)})
    assert answer.bounds_hit == ("E",)
    found = intervals(answer)
    assert found["E"].low == pytest.approx(found["E"].high)
    assert found["alpha"].high > found["alpha"].low


def test_the_slope_of_a_quantity(family):
    spread = CoefficientCovariance.of(family)
    quantity = loss_at(FAMILIAL, N=7e9, D=1e11, G=4.0)
    gradient = FAMILIAL.gradient(family.values, N=7e9, D=1e11, G=4.0)
    logs = [FAMILIAL.parameter(name).scale == "log" for name in FAMILIAL.names]
    values = np.array([family.values[name] for name in FAMILIAL.names])
    expected = gradient * np.where(logs, values, 1) / family.predict(N=7e9, D=1e11, G=4.0)
    np.testing.assert_allclose(spread.slope(quantity), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["gamma", "alpha", "E"])
def test_a_profile_is_the_least_objective_at_each_value(family, name):
    profile = CoefficientCovariance.of(family).profile(coefficient(FAMILIAL, name))
    for index in (2, 8, 17, 22):
        held = fit(FAMILIAL, family.data, fixed={name: profile.values[index]})
        rise = held.objective - family.objective
        assert profile.rise[index] == pytest.approx(rise, rel=1e-4, abs=1e-9 * family.objective)
    end = fit(FAMILIAL, family.data, fixed={name: profile.interval.high})
    assert end.objective - family.objective == pytest.approx(profile.threshold, rel=0.01)


def test_a_profile_follows_what_the_delta_method_cannot():
    """A floor near nothing: its likelihood is flat below."""
    truth = {**DENSE, "E": 0.3}
    design = isoflop_design(HOFFMANN, truth, [1e19, 1e20, 1e21])
    answer = fit(HOFFMANN, simulate(HOFFMANN, truth, design, noise=0.02, seed=1), objective="mse")
    spread = CoefficientCovariance.of(answer)
    straight = spread.interval(itself("E"))
    profile = spread.profile(itself("E")).interval
    assert 0 <= profile.low < answer.values["E"] < profile.high
    assert 0.3 in profile
    assert not math.isclose(profile.high, straight.high, rel_tol=0.02)


def test_a_profile_of_what_follows_from_coefficients(family):
    quantity = optimal(FAMILIAL, 1e24, G=4.0)
    spread = CoefficientCovariance.of(family)
    straight, bent = spread.interval(quantity), spread.profile(quantity).interval
    assert bent.low == pytest.approx(straight.low, rel=0.02)
    assert bent.high == pytest.approx(straight.high, rel=0.02)


def test_draws_have_the_covariance(family):
    spread = CoefficientCovariance.of(family)
    draws = spread.draws(20_000, seed=1)
    for name in FAMILIAL.names:
        quantity = coefficient(FAMILIAL, name)
        expected = spread.standard_error(quantity)
        assert quantity.scaled(draws).std() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("kind", ["runs", "wild"])
def test_the_bootstrap_does_not_know_its_workers(family, kind):
    one, three = (bootstrap(family, 300, kind, seed=5, workers=n) for n in (1, 3))
    other = bootstrap(family, 300, kind, seed=6)
    for name in FAMILIAL.names:
        np.testing.assert_array_equal(one.values[name], three.values[name])
        assert not np.array_equal(one.values[name], other.values[name])
    assert one.failed == 0


@pytest.mark.parametrize("kind", ["runs", "wild"])
def test_the_bootstrap_agrees_with_the_delta_method(family, kind):
    squares = fit(FAMILIAL, family.data, objective="mse")
    found, spread = bootstrap(squares, 500, kind, seed=1), CoefficientCovariance.of(squares)
    for name in ("gamma", "alpha", "beta"):
        quantity = coefficient(FAMILIAL, name)
        sd = quantity.scaled(found.values).std()
        assert sd == pytest.approx(spread.standard_error(quantity), rel=0.2)


def test_bootstrap_intervals(family):
    found = bootstrap(family, 400, seed=2)
    gamma = coefficient(FAMILIAL, "gamma")
    low, high = np.quantile(found.values["gamma"], [0.05, 0.95])
    percentile = found.interval(gamma, 0.9)
    assert (percentile.low, percentile.high) == pytest.approx((low, high), rel=1e-12)
    again = Bootstrap.from_dict(json.loads(json.dumps(found.to_dict())), family)
    assert again.interval(gamma, 0.9, "bca") == found.interval(gamma, 0.9, "bca")
    everything = intervals(family, ["gamma"], 0.9, "bca", found)
    assert everything == {"gamma": found.interval(gamma, 0.9, "bca")}


def test_bca_of_a_mean():
    """With only E free and least squares, E is the mean of skewed residuals: Efron's formula."""
    generator = np.random.default_rng(4)
    rows = {"N": generator.uniform(1e8, 1e9, 40), "D": generator.uniform(1e9, 1e10, 40)}
    clean = HOFFMANN.predict(DENSE, **rows)
    rows["loss"] = clean + 0.2 * generator.exponential(size=40)
    held = {name: DENSE[name] for name in ("A", "B", "alpha", "beta")}
    answer = fit(HOFFMANN, rows, objective="mse", fixed=held)
    draws = bootstrap(answer, 4000, seed=0)
    sample = rows["loss"] - clean + DENSE["E"]
    assert answer.values["E"] == pytest.approx(sample.mean(), rel=1e-9)
    off = sample - sample.mean()
    skew = (off**3).sum() / (6 * (off**2).sum() ** 1.5)
    bias = stats.norm.ppf(np.mean(draws.values["E"] < sample.mean()))
    z = bias + stats.norm.ppf([0.05, 0.95])
    expected = np.quantile(draws.values["E"], stats.norm.cdf(bias + z / (1 - skew * z)))
    found = draws.interval(itself("E"), 0.9, "bca")
    assert skew > 0.02
    assert [found.low, found.high] == pytest.approx(expected.tolist(), rel=1e-6)


def test_what_does_not_exist_in_a_replicate_opens_the_interval(family):
    found = bootstrap(family, 200, seed=0)
    edge = np.quantile(found.values["gamma"], 0.9)
    partial = DerivedQuantity("root", lambda values: np.sqrt(edge - np.asarray(values["gamma"])))
    interval = found.interval(partial, 0.9)
    assert (interval.low, interval.high) == (-math.inf, math.inf)


def test_runs_are_drawn_whole():
    rows = {name: np.repeat(column, 3) for name, column in DESIGN.items()}
    rows["D"] = rows["D"] * np.tile([1.0, 1.5, 2.0], 84)
    rows["run_id"] = np.repeat(np.arange(84), 3)
    data = simulate(FAMILIAL, TRUTH, rows, noise=1e-4, run_noise=0.005, seed=2)
    answer = fit(FAMILIAL, data)
    found = bootstrap(answer, 200, seed=0)
    gamma = coefficient(FAMILIAL, "gamma")
    assert found.values["gamma"].std() == pytest.approx(
        CoefficientCovariance.of(answer).standard_error(gamma), rel=0.3
    )


def test_the_spread_of_hoffmanns_runs(epoch_runs):
    """Standard deviations of 4000 bootstraps by Besiroglu et al., arXiv 2404.10102."""
    answer = fit("hoffmann", epoch_runs, outliers=LargestLosses(5))
    found = bootstrap(answer, 400, seed=0)
    expected = {"E": 0.0249, "A": 117, "B": 1277, "alpha": 0.0146, "beta": 0.0204}
    for name, sd in expected.items():
        assert found.values[name].std() == pytest.approx(sd, rel=0.15), name
    share = found.cloud(size_exponent(HOFFMANN))
    assert np.median(share) == pytest.approx(0.5158, abs=0.003)
    interval = found.interval(size_exponent(HOFFMANN), 0.8)
    assert (interval.low, interval.high) == pytest.approx((0.492, 0.541), abs=0.006)


def test_refusals(family):
    found = bootstrap(family, 20)
    with pytest.raises(ScalingError, match="needs 40 replicates or more, got 20"):
        found.interval(coefficient(FAMILIAL, "gamma"))
    for wrong in ({"kind": "rows"}, {"draws": 0}, {"workers": 0}):
        with pytest.raises(ScalingError):
            bootstrap(family, **wrong)
    with pytest.raises(ScalingError, match="must be delta, profile or one of"):
        intervals(family, method="gut")
    few = dataclasses.replace(family.data, run_id=np.arange(84) % 4, run_names=tuple("abcd"))
    few = dataclasses.replace(family, data=few)
    with pytest.raises(TooFewError, match="more than 6 runs, got 4"):
        CoefficientCovariance.of(few)


def test_seed_noise():
    data = simulate(FAMILIAL, TRUTH, DESIGN, noise=0.004, kind="relative", repeats=3, seed=0)
    found = seed_noise(data, FAMILIAL)
    assert found.relative == pytest.approx(0.004, rel=0.1)
    assert 0.004 in found.interval
    assert (found.settings, found.dof) == (84, 168)
    by_hand = np.log(data.loss).reshape(3, 84).std(0, ddof=1)
    assert found.relative == pytest.approx(math.sqrt(np.mean(by_hand**2)), rel=1e-12)
    with pytest.raises(TooFewError, match="run twice"):
        seed_noise(RunTable.read({**DESIGN, "loss": np.ones(84)}), FAMILIAL)


@settings(max_examples=8)
@given(st.floats(0.5, 2.0), st.floats(0.01, 100.0))
def test_intervals_do_not_depend_on_units(size_unit, token_unit):
    data = simulate(HOFFMANN, DENSE, isoflop_design(HOFFMANN, DENSE, [1e19, 1e20, 1e21]), 0.003)
    plain = fit(HOFFMANN, data)
    moved = data.with_columns(N=data.columns["N"] * size_unit, D=data.columns["D"] * token_unit)
    scaled = fit(HOFFMANN, moved)
    for name in ("alpha", "beta", "E"):
        first, second = (intervals(answer, [name])[name] for answer in (plain, scaled))
        assert second.low == pytest.approx(first.low, rel=1e-4)
        assert second.high == pytest.approx(first.high, rel=1e-4)


def test_squares_have_intervals_with_fewer_rows_than_twice_the_coefficients():
    """Every row is on the curved part of a parabola, however few they are."""
    law = get_law("hoffmann")
    values = next(iter(law.published.values())).values
    size, tokens = np.geomspace(1e7, 1e10, 8), 2e9 * np.array([1, 9, 2, 30, 3, 80, 5, 1.5])
    loss = law.predict(values, N=size, D=tokens)
    loss = loss * np.exp(np.random.default_rng(1).normal(0, 1e-3, 8))
    found = {
        name: intervals(fit(law, {"N": size, "D": tokens, "loss": loss}, *settings))
        for name, settings in {"mse": ("mse",), "wide": ("huber", 1e3)}.items()
    }
    for name, interval in found["mse"].items():
        assert np.isfinite([interval.low, interval.high]).all()
        assert interval.low < interval.high
        assert found["wide"][name].low == pytest.approx(interval.low, rel=1e-4)

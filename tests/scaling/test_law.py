"""A law as data: evaluation, exact gradients, checks, laws of one's own; derivatives by `Dual`."""

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_fit import study, truths

from hf_familial.errors import MissingColumnError, ScalingError
from hf_familial.scaling import (
    LAWS,
    Domain,
    Law,
    Outer,
    Parameter,
    Published,
    Variable,
    fit,
    get_law,
)
from hf_familial.scaling.laws._duals import BINARY, UNARY, Dual


POINT = {
    "N": 1e9, "D": 2e10, "G": 3.0, "U": 1.0, "V": 2.0, "S": 0.5, "E": 8.0, "G_expert": 4.0,
    "D_unique": 3e9, "X": 1e5,
}  # fmt: skip


def slope_by_differences(function, at, step):
    return (function(at + step) - function(at - step)) / (2 * step)


@pytest.mark.parametrize("ufunc", list(UNARY), ids=lambda ufunc: ufunc.__name__)
@given(x=st.floats(0.1, 30))
def test_dual_of_one(ufunc, x):
    dual = ufunc(Dual(x, {"x": 2.0}))
    assert dual.value == pytest.approx(ufunc(x), rel=1e-12)
    assert dual.grad["x"] / 2 == pytest.approx(slope_by_differences(ufunc, x, 1e-6), rel=1e-5)


@pytest.mark.parametrize("ufunc", list(BINARY), ids=lambda ufunc: ufunc.__name__)
@given(x=st.floats(0.1, 5), y=st.floats(-3, 3))
def test_dual_of_two(ufunc, x, y):
    if ufunc in (np.divide,) and abs(y) < 0.05 or abs(x - y) < 1e-4:
        return
    both = ufunc(Dual(x, {"x": 1.0}), Dual(y, {"y": 1.0}))
    assert both.value == pytest.approx(ufunc(x, y), rel=1e-12)
    left = slope_by_differences(lambda v: ufunc(v, y), x, 1e-6)
    right = slope_by_differences(lambda v: ufunc(x, v), y, 1e-6)
    assert both.grad["x"] == pytest.approx(left, rel=1e-4, abs=1e-6)
    assert both.grad["y"] == pytest.approx(right, rel=1e-4, abs=1e-6)
    same = ufunc(Dual(x, {"x": 1.0}), y), ufunc(x, Dual(y, {"y": 1.0}))
    assert set(same[0].grad) == {"x"}
    assert set(same[1].grad) == {"y"}


def test_dual_adds_what_both_sides_share_and_broadcasts():
    x = Dual(np.array([[1.0], [2.0]]), {"x": 1.0})
    result = np.exp(x * np.array([1.0, 3.0])) / x
    assert result.value.shape == (2, 2)
    # d/dx exp(kx)/x = exp(kx) (k/x - 1/x^2)
    expected = np.exp([[1, 3], [2, 6]]) * (np.array([[1, 3], [0.5, 1.5]]) - [[1], [0.25]])
    assert result.grad["x"] == pytest.approx(expected)


def test_dual_refuses_what_it_has_no_slope_for():
    with pytest.raises(TypeError):
        np.sin(Dual(1.0, {"x": 1.0}))
    with pytest.raises(TypeError):
        np.add.reduce(Dual(np.ones(3), {"x": 1.0}))


@pytest.mark.parametrize("name", LAWS)
def test_gradients_are_exact(name):
    law = get_law(name)
    for values in truths(law).values():
        variables = {name: POINT[name] for name in law.variable_names}
        gradient = law.gradient(values, **variables)
        assert gradient.shape == (len(law.names),)
        loss = law.predict(values, **variables)
        for at, parameter in enumerate(law.names):
            value = values[parameter]

            def moved(x, parameter=parameter, values=values, variables=variables):
                return law.predict({**values, parameter: x}, **variables)

            slope = slope_by_differences(moved, value, 1e-5 * abs(value))
            # the differences themselves are exact to rounding of the loss
            rounding = 1e-9 * abs(loss / value)
            assert gradient[at] == pytest.approx(slope, rel=1e-6, abs=rounding), parameter


@pytest.mark.parametrize("name", LAWS)
def test_terms_and_outer_function_agree(name):
    """What projection inverts is what prediction applies, and a law can leave the process."""
    law = pickle.loads(pickle.dumps(LAWS[name]))
    values = next(iter(truths(law).values()))
    variables = {name: POINT[name] for name in law.variable_names}
    x, p, _ = law._namespaces(values, variables)
    terms = law.terms(x, p)
    assert len(terms) == len(law.linear)
    loss = law.predict(values, **variables)
    total = loss if law.outer is None else law.outer.invert(loss, x, p)
    assert sum(terms) == pytest.approx(total, rel=1e-12)
    for parameter in law.linear:
        link = law.links.get(parameter.name)
        if link is not None:
            weight = law.weight(parameter.name, p)
            assert link.value(weight, p) == pytest.approx(values[parameter.name], rel=1e-12)


def test_predict_broadcasts():
    law = get_law("familial")
    values = law.published["assumed"].values
    sizes, tokens = np.geomspace(1e8, 1e10, 4)[:, None], np.geomspace(1e9, 1e11, 3)
    grid = law.predict(values, N=sizes, D=tokens, G=[1, 2, 4])
    assert grid.shape == (4, 3)
    assert law.gradient(values, N=sizes, D=tokens, G=2).shape == (4, 3, 6)
    one = law.predict(values, N=sizes[2, 0], D=tokens[1], G=2)
    assert one.shape == ()
    assert grid[2, 1] == one
    cloud = {name: np.full((5, 1), value) for name, value in values.items()}
    assert law.predict(cloud, N=1e9, D=tokens, G=2).shape == (5, 3)
    # E alone would not give the shape of the variables
    flat = {**values, "A": 0.0, "B": 0.0}
    assert law.predict(flat, N=sizes, D=tokens, G=1) == pytest.approx(np.full((4, 3), flat["E"]))


def test_what_is_missing_is_named():
    law = get_law("hoffmann")
    values = dict(law.published["hoffmann"].values)
    with pytest.raises(MissingColumnError, match=r"missing: \['D'\]") as error:
        law.predict(values, N=1e9)
    assert error.value.missing == ("D",)
    del values["beta"]
    with pytest.raises(ScalingError, match=r"missing: \['beta'\]"):
        law.predict(values, N=1e9, D=1e10)
    with pytest.raises(ScalingError, match="not 'gamma'"):
        law.parameter("gamma")


def test_a_law_checks_itself():
    law = get_law("power")
    with pytest.raises(ScalingError, match="must name"):
        dataclasses.replace(law, published={"bad": Published({"E": 1.0}, "nowhere")})
    with pytest.raises(ScalingError, match="differ in name"):
        dataclasses.replace(law, nonlinear=(*law.nonlinear, law.linear[0]))
    with pytest.raises(ScalingError, match="low, high"):
        Parameter("a", "a", "upside down", (1.0, 0.0))
    with pytest.raises(ScalingError, match="negative"):
        Parameter("a", "a", "negative", (-1.0, 1.0), scale="log")


def _own_columns(x, p):
    return 1.0, np.exp(-x.T / p.tau), np.log(x.T)


OWN = Law(
    name="own",
    title="A law of one's own",
    formula=r"L = a + b e^{-T/\tau} + c \ln T",
    formula_text="L = a + b exp(-T/tau) + c ln T",
    source="this test",
    variables=(Variable("T", "T", "steps", "steps of training"),),
    linear=tuple(Parameter(name, name, "weight") for name in "abc"),
    nonlinear=(Parameter("tau", r"\tau", "steps", (0.0, 1e6), (10.0, 100.0, 1e3), "log"),),
    columns=_own_columns,
)


def test_a_law_of_ones_own_is_fitted_alike():
    steps = np.geomspace(1, 1e4, 40)
    truth = {"a": 3.0, "b": 2.5, "c": -0.05, "tau": 250.0}
    answer = fit(OWN, {"T": steps, "loss": OWN.predict(truth, T=steps)})
    assert answer.values == pytest.approx(truth, rel=1e-9)
    assert type(answer).from_dict(answer.to_dict(), {"own": OWN}.get).values == answer.values


def test_an_outer_function_of_ones_own():
    law = dataclasses.replace(
        OWN,
        name="own_log",
        outer=Outer(lambda total, x, p: np.exp(total), lambda loss, x, p: np.log(loss)),
    )
    steps = np.geomspace(1, 1e4, 40)
    truth = {"a": 0.5, "b": 1.0, "c": -0.02, "tau": 250.0}
    answer = fit(law, {"T": steps, "loss": law.predict(truth, T=steps)})
    assert answer.values == pytest.approx(truth, rel=1e-9)


def test_a_domain_says_what_leaves_it():
    domain = Domain({"N": (1e8, 1e10)})
    assert domain.outside(N=1e9, D=1.0) == ()
    assert domain.outside(N=[1e8, 1e10]) == ()
    (below,) = domain.outside(N=[1e7, 1e9])
    assert "`N` = 1e+07 is below 1e+08" in below
    assert len(domain.outside(N=[1e7, 1e11])) == 2


def test_variables_know_their_range():
    size, exits, idle = (
        next(v for v in get_law(law).variables if v.name == name)
        for law, name in (("familial", "N"), ("familial", "G"), ("hossain", "S"))
    )
    bad = np.array([-1.0, np.nan, np.inf])
    assert not size.lawful(bad).any()
    assert not size.lawful(np.array([0.0])).any()
    assert exits.lawful(np.array([1.0, 8.0])).all()
    assert not exits.lawful(np.array([0.5])).any()
    assert idle.lawful(np.array([0.0, 0.98])).all()
    assert not idle.lawful(np.array([1.0])).any()
    assert idle.range_text == ">= 0 and < 1"
    assert size.range_text == "> 0 and finite"


def test_studies_of_the_tests_are_noise_free():
    runs = study("hoffmann")
    law = get_law("hoffmann")
    values = next(iter(truths(law).values()))
    assert runs["loss"] == pytest.approx(law.predict(values, N=runs["N"], D=runs["D"]), rel=1e-15)

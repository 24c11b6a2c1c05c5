"""The catalogue: every law is complete, comes back from its own data, and knows its relatives."""

import numpy as np
import pytest
from reference_fit import study, truths

from hf_familial.errors import UnknownLawError
from hf_familial.scaling import LAWS, FitStatus, fit, get_law
from hf_familial.scaling.laws.dense import farseer_values


FAMILIES = {"familial", "dense", "sparse", "rule"}


@pytest.mark.parametrize("name", LAWS)
def test_every_law_is_complete(name):
    law = LAWS[name]
    assert law.name == name
    assert law.family in FAMILIES
    for text in (law.title, law.formula, law.formula_text, law.source):
        assert text.strip() == text
        assert text
    assert law.formula_text.isascii()
    assert law.domain.architectures
    for parameter in law.parameters:
        assert parameter.meaning
        low, high = parameter.bounds
        assert all(low <= start <= high for start in parameter.starts)
    assert all(parameter.starts for parameter in law.nonlinear)
    assert all(variable.unit and variable.meaning for variable in law.variables)
    for published in law.published.values():
        assert published.source
        for parameter in law.parameters:
            low, high = parameter.bounds
            assert low <= published.values[parameter.name] <= high
    for variable, (low, high) in law.domain.ranges.items():
        assert variable in law.variable_names
        assert low < high


def test_the_catalogue_holds_what_the_literature_has():
    assert set(LAWS) >= {
        "familial", "familial_e_inside", "familial_n_only", "branch", "kaplan_joint",
        "kaplan_additive", "hoffmann", "skaling", "muennighoff", "gadre", "farseer", "clark",
        "krajewski", "ludziejewski", "abnar", "frantar", "hossain", "power", "step_lr",
        "step_batch",
    }  # fmt: skip


def test_names_and_aliases():
    assert get_law("chinchilla") is get_law("hoffmann")
    assert get_law(LAWS["clark"]) is LAWS["clark"]
    with pytest.raises(UnknownLawError, match="got 'bloom'"):
        get_law("bloom")
    with pytest.raises(TypeError):
        LAWS["mine"] = LAWS["power"]


CASES = [(name, label) for name, law in LAWS.items() for label in truths(law)]


@pytest.mark.parametrize("objective", ["log_huber", "mse"])
@pytest.mark.parametrize(("name", "label"), CASES, ids=["-".join(case) for case in CASES])
def test_every_law_comes_back_from_its_own_data(name, label, objective):
    law = LAWS[name]
    truth = truths(law)[label]
    answer = fit(law, study(law, truth), objective=objective)
    assert answer.status is FitStatus.CONVERGED
    assert answer.values == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("name", ["familial", "branch", "krajewski", "skaling"])
def test_noise_moves_the_answer_little(name):
    law = LAWS[name]
    truth = next(iter(truths(law).values()))
    runs = study(law, truth, noise=1e-4)
    answer = fit(law, runs)
    assert answer.status is FitStatus.CONVERGED
    assert 0 < answer.objective < len(runs["loss"]) * 1e-8
    for parameter in law.nonlinear:
        assert answer.values[parameter.name] == pytest.approx(truth[parameter.name], abs=0.02)


def test_gadre_is_hoffmann_with_one_exponent():
    eta, values = 0.15, {"E": 1.8, "a": 300.0, "b": 600.0, "eta": 0.15}
    same = {"E": 1.8, "A": 300.0 * 6**-eta, "B": 600.0 * 6**-eta, "alpha": 0.3, "beta": 0.3}
    where = {"N": np.geomspace(1e7, 1e11, 9), "D": np.geomspace(1e9, 1e13, 9)[::-1]}
    gadre, hoffmann = LAWS["gadre"], LAWS["hoffmann"]
    assert gadre.predict(values, **where) == pytest.approx(hoffmann.predict(same, **where))
    # a M^eta C^-eta = a 6^-eta N^-2eta: the size term
    tied = fit("hoffmann", study("gadre", values), tied={"beta": "alpha"})
    assert tied.values == pytest.approx(same, rel=1e-8)
    assert "beta" not in tied.free


def test_skaling_at_one_is_hoffmann():
    values = dict(LAWS["hoffmann"].published["besiroglu"].values)
    where = {"N": 3e8, "D": 7e9}
    expected = LAWS["hoffmann"].predict(values, **where)
    assert LAWS["skaling"].predict({**values, "k": 1.0}, **where) == pytest.approx(expected)


def test_familial_variants_meet_at_one_exit():
    values = LAWS["familial"].published["assumed"].values
    where = {"N": 3e8, "D": 7e9}
    dense = {name: value for name, value in values.items() if name != "gamma"}
    expected = LAWS["hoffmann"].predict(dense, **where)
    for name in ("familial", "familial_e_inside", "familial_n_only"):
        assert LAWS[name].predict(values, **where, G=1) == expected
    branch = LAWS["branch"].published["assumed"].values
    assert LAWS["branch"].predict(branch, **where, U=0, V=0) == expected
    # the penalty of eight exits on what is reducible (gamma = 0.033): 7.1%
    loss = LAWS["familial"].predict(values, **where, G=8)
    assert (loss - dense["E"]) / (expected - dense["E"]) == pytest.approx(1.071, abs=5e-4)


def test_muennighoff_counts_repetitions():
    law = LAWS["muennighoff"]
    values = law.published["muennighoff"].values
    tokens = 1e11
    dense = {name: values[name] for name in ("E", "A", "B", "alpha", "beta")}
    fresh = law.predict(values, N=1e9, D=tokens, D_unique=tokens)
    assert fresh == LAWS["hoffmann"].predict(dense, N=1e9, D=tokens)
    assert fresh == law.predict(values, N=1e9, D=tokens, D_unique=2 * tokens)
    four, forty = (law.predict(values, N=1e9, D=k * tokens, D_unique=tokens) for k in (4, 40))
    new_four, new_forty = (LAWS["hoffmann"].predict(dense, N=1e9, D=k * tokens) for k in (4, 40))
    assert fresh > four > new_four
    # "up to four epochs are almost as good as new data"
    assert (four - new_four) / (fresh - new_four) < 0.1
    assert (forty - new_forty) / (fresh - new_forty) > 0.1
    # the matched size is 0.051 of the unique tokens (appendix B): beyond it, size counts less
    matched = 0.051 * tokens
    rate = (values["A"] / values["B"]) ** (1 / values["alpha"])
    assert rate == pytest.approx(0.051, abs=1e-3)
    small, large = (
        law.predict(values, N=k * matched, D=tokens, D_unique=tokens)
        - LAWS["hoffmann"].predict(dense, N=k * matched, D=tokens)
        for k in (0.9, 20)
    )
    assert small == 0
    assert large > 1e-3


def test_clark_without_experts_is_a_power_law():
    """arXiv 2202.01169: a dense model of 1.3e9 parameters, against its own dense power law."""
    law = LAWS["clark"]
    loss = law.predict(law.published["s_base"].values, N=1.3e9, E=1)
    assert loss == pytest.approx((3.568e13 / 1.3e9) ** 0.078, rel=0.02)
    more = law.predict(law.published["s_base"].values, N=1.3e9, E=np.array([1, 8, 64, 512]))
    assert (np.diff(more) < 0).all()


def test_farseer_is_written_around_a_size():
    printed = {
        "a_1": -0.12, "alpha": 0.12, "b_1": 0.4, "a_2": 80.0, "beta": -0.1, "b_2": -6.0,
        "a_3": -0.02, "gamma": 0.17, "b_3": 0.1,
    }  # fmt: skip
    size, data = np.geomspace(1e7, 1e11, 9), np.geomspace(1e9, 1e13, 9)
    p = printed
    expected = np.exp(p["a_3"] * size ** p["gamma"] + p["b_3"]) + np.exp(
        p["a_2"] * size ** p["beta"] + p["b_2"]
    ) * data ** -np.exp(p["a_1"] * size ** p["alpha"] + p["b_1"])
    law = LAWS["farseer"]
    values = farseer_values(printed)
    assert law.predict(values, N=size, D=data) == pytest.approx(expected, rel=1e-12)
    near, at = ({**values, "beta": exponent} for exponent in (1e-9, -1e-9))
    both = [law.predict(v, N=size, D=data) for v in (near, at)]
    assert both[0] == pytest.approx(both[1], rel=1e-6)


def test_step_rules():
    rate = LAWS["step_lr"].predict(LAWS["step_lr"].published["step"].values, N=1e9, D=1e11)
    assert rate == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307)
    assert 1e-3 < rate < 3e-3
    batch = LAWS["step_batch"].predict(LAWS["step_batch"].published["step"].values, D=1e11)
    assert batch == pytest.approx(0.58 * 1e11**0.571)
    assert LAWS["step_lr"].target.name == "lr"

"""Synthetic studies: the grid they stand on, the noise they carry."""

import numpy as np
import pytest

from hf_familial.errors import ScalingError
from hf_familial.scaling import get_law
from hf_familial.scaling.optima import best
from hf_familial.scaling.simulation import isoflop_design, simulate


LAW = get_law("familial")
TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28, "gamma": 0.033}
BUDGETS = [1e19, 1e20, 1e21]


def test_the_grid_has_equal_compute_and_is_centred():
    design = isoflop_design(LAW, TRUTH, BUDGETS, sizes=7, reach=4, G=[1, 2, 4, 8])
    assert {len(column) for column in design.values()} == {84}
    np.testing.assert_allclose(6 * design["N"] * design["D"], design["C"])
    for C in BUDGETS:
        sizes = np.unique(design["N"][design["C"] == C].round(3))
        assert len(sizes) == 7
        assert np.exp(np.log(sizes).mean()) == pytest.approx(float(best(LAW, TRUTH, C, G=1.0)[0]))
        assert sizes[-1] / sizes[0] == pytest.approx(16)
        assert np.diff(np.log(sizes)) == pytest.approx(np.log(16) / 6)


def test_the_grid_drifts():
    design = isoflop_design(LAW, TRUTH, BUDGETS, centre=0.5, drift=0.25, G=[2])
    middles = [np.exp(np.log(design["N"][design["C"] == C]).mean()) for C in BUDGETS]
    best_sizes = [float(best(LAW, TRUTH, C, G=2.0)[0]) for C in BUDGETS]
    assert np.divide(middles, best_sizes) == pytest.approx([0.5, 0.25, 0.125])


def test_other_variables_need_levels():
    with pytest.raises(ScalingError, match=r"needs levels of \['G'\], got \['S'\]"):
        isoflop_design(LAW, TRUTH, BUDGETS, S=[0.0])


@pytest.mark.parametrize("kind", ["absolute", "relative"])
@pytest.mark.parametrize("tails", [None, 5.0])
def test_noise_has_its_size(kind, tails):
    design = isoflop_design(LAW, TRUTH, BUDGETS, G=[1, 2, 4, 8])
    data = simulate(LAW, TRUTH, design, 0.01, seed=1, kind=kind, tails=tails, repeats=100)
    truth = np.tile(LAW.predict(TRUTH, **{name: design[name] for name in "NDG"}), 100)
    error = data.loss - truth if kind == "absolute" else np.log(data.loss / truth)
    assert error.std() == pytest.approx(0.01, rel=0.05)
    fourth = np.mean(error**4) / error.var() ** 2
    assert fourth > 4 if tails else abs(fourth - 3) < 0.2
    again = simulate(LAW, TRUTH, design, 0.01, seed=1, kind=kind, tails=tails, repeats=100)
    np.testing.assert_array_equal(data.loss, again.loss)


def test_checkpoints_share_the_noise_of_their_run():
    design = isoflop_design(LAW, TRUTH, BUDGETS, G=[1, 2])
    rows = {name: np.repeat(column, 5) for name, column in design.items()}
    rows["run_id"] = np.repeat(np.arange(42), 5)
    data = simulate(LAW, TRUTH, rows, 0.001, run_noise=0.02, repeats=4, seed=0)
    assert data.runs == 168
    truth = LAW.predict(TRUTH, **{name: data.columns[name] for name in "NDG"})
    error = (data.loss - truth).reshape(168, 5)
    assert error.mean(1).std() == pytest.approx(0.02, rel=0.15)
    assert error.std(1).mean() == pytest.approx(0.001 * 0.84, rel=0.1)


def test_tails_without_a_variance_are_refused():
    with pytest.raises(ScalingError, match="more than 2 degrees of freedom"):
        simulate(LAW, TRUTH, {}, tails=2.0)

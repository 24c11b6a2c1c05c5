"""Laws on the same runs: criteria, held-out error, and what the wrong variant does to gamma."""

import json
import math

import numpy as np
import pytest
from scipy import integrate, stats

from hf_familial.errors import ScalingError
from hf_familial.scaling import FarResiduals, RunTable, fit, get_law
from hf_familial.scaling.comparison import Entry, _doubt, aicc, compare, log_likelihood
from hf_familial.scaling.results import FitStatus
from hf_familial.scaling.simulation import isoflop_design, simulate


TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28, "gamma": 0.033}
VARIANTS = ["familial", "familial_e_inside", "familial_n_only"]
BUDGETS = [1e19, 1e20, 1e21]


def runs_of(name, noise=0.0, seed=0, **design):
    law = get_law(name)
    columns = isoflop_design(law, TRUTH, BUDGETS, G=[1, 2, 4, 8], **design)
    return simulate(law, TRUTH, columns, noise=noise, seed=seed)


def test_the_wrong_variant_reads_0033_as_0079():
    """E inside the factor, fitted with E outside."""
    runs = runs_of("familial_e_inside")
    wrong = fit("familial", runs, objective="mse")
    assert wrong.values["gamma"] == pytest.approx(0.079, abs=5e-4)
    found = compare(runs, VARIANTS, objective="mse")
    assert found.best == "familial_e_inside"
    assert found["familial_e_inside"].values["gamma"] == pytest.approx(0.033, abs=1e-6)
    warning = next(note for note in found.notes if note.startswith("gamma depends"))
    assert "0.079 by `familial`" in warning
    assert "0.033 by `familial_e_inside`" in warning
    assert "These runs support `familial_e_inside`" in warning


@pytest.mark.parametrize(
    ("first", "second", "doubt"),
    [
        ({}, {}, ""),
        ({"status": "at_bound"}, {}, "the fit of `a`, the best in AICc, is at bound"),
        ({}, {"status": "at_bound"}, ""),
        ({"held_out": None}, {"held_out": None}, "there were no larger runs to test the laws on"),
        ({"held_out": 0.3}, {}, "AICc prefers `a`, but `b` predicts larger runs better"),
        ({}, {"aicc": 1.9}, "the AICc of `a` and `b` differ by less than 2"),
    ],
)
def test_a_variant_is_named_only_where_all_speaks_for_it(first, second, doubt):
    common = {"values": {}, "free": 6, "objective": 0.0, "weight": 0.5, "error": 0.1}
    fair = {"held_out": 0.1, "status": str(FitStatus.CONVERGED)}
    a = Entry("a", **common, **({"aicc": 0.0} | fair | first))
    b = Entry("b", **common, **({"aicc": 2.0} | fair | {"held_out": 0.2} | second))
    assert _doubt([a, b]) == doubt


def test_too_few_runs_speak_for_no_variant():
    """One budget: nothing can be held out."""
    law = get_law("familial")
    columns = isoflop_design(law, TRUTH, BUDGETS[:2], G=[1, 2, 4], sizes=4)
    runs = simulate(law, TRUTH, columns, noise=0.02, seed=3)
    found = compare(runs, VARIANTS)
    (note,) = [note for note in found.notes if note.startswith("gamma depends")]
    assert "These runs cannot decide between the variants: " in note
    assert not any("[" in note for note in found.notes)


@pytest.mark.parametrize("truth", VARIANTS)
def test_the_true_variant_is_found_under_noise(truth):
    found = compare(runs_of(truth, noise=0.003, seed=2), VARIANTS)
    assert found.best == found.entries[0].law == truth
    assert found.entries[0].weight > 0.99
    held = {entry.law: entry.held_out for entry in found.entries}
    assert held[truth] < 0.9 * min(error for law, error in held.items() if law != truth)
    json.dumps(found.to_dict(), allow_nan=False)


def test_variants_that_do_not_differ_are_not_told_apart():
    columns = isoflop_design(get_law("familial"), TRUTH, BUDGETS, G=[1, 2])
    flat = {**TRUTH, "gamma": 0.0}
    runs = simulate(get_law("familial"), flat, columns, noise=0.01, seed=1)
    found = compare(runs, VARIANTS)
    assert any("AICc cannot decide between" in note for note in found.notes)


def test_aicc_of_least_squares_is_the_textbooks():
    runs = runs_of("familial", noise=0.005)
    answer = fit("familial", runs, objective="mse")
    residuals = answer.residuals()
    width = math.sqrt(np.mean(residuals**2))
    likelihood = stats.norm.logpdf(residuals, scale=width).sum()
    assert log_likelihood(answer) == pytest.approx(likelihood, rel=1e-9)
    expected = 2 * 7 - 2 * likelihood + 2 * 7 * 8 / (84 - 7 - 1)
    assert aicc(answer) == pytest.approx(expected, rel=1e-9)


def test_hubers_density_is_one():
    """The likelihood at the best width, from a density integrated by hand."""
    answer = fit("familial", runs_of("familial", noise=0.01))
    delta, residuals = answer.settings.delta, answer.residuals()

    def rho(r):
        size = np.abs(r)
        return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))

    def likelihood(width):
        total = (
            2
            * integrate.quad(
                lambda r: math.exp(-rho(r) / width**2),
                0,
                60 * width**2 / delta + 10 * delta,
                limit=400,
            )[0]
        )
        return -rho(residuals).sum() / width**2 - len(residuals) * math.log(total)

    widths = np.geomspace(delta / 5, delta * 20, 400)
    best = max(likelihood(width) for width in widths)
    in_losses = best - np.log(answer.data.loss).sum()
    assert log_likelihood(answer) == pytest.approx(in_losses, abs=0.02)


def test_huber_with_a_far_knee_is_least_squares():
    runs = runs_of("familial", noise=0.005)
    robust = fit("familial", runs, objective="huber", delta=10.0)
    squares = fit("familial", runs, objective="mse")
    assert log_likelihood(robust) == pytest.approx(log_likelihood(squares), abs=1e-6)


def test_a_superfluous_coefficient_costs():
    law = get_law("hoffmann")
    dense = {name: TRUTH[name] for name in law.names}
    columns = isoflop_design(law, dense, BUDGETS, sizes=9)
    runs = simulate(law, dense, columns, noise=0.004, seed=1)
    small, large = (fit(name, runs) for name in ("hoffmann", "skaling"))
    assert large.objective <= small.objective
    assert aicc(small) < aicc(large)


def test_dense_and_sparse_runs_in_one_table():
    law = get_law("hossain")
    truth = next(iter(law.published.values())).values
    columns = isoflop_design(law, truth, [1e19, 1e20, 1e21, 1e22], S=[0.0, 0.5, 0.9])
    runs = simulate(law, truth, columns, noise=0.002, seed=0)
    found = compare(runs, ["hoffmann", "hossain", "frantar", "familial"])
    assert found.entries[0].law != "hoffmann"
    assert found["hossain"].held_out < found["hoffmann"].held_out
    refused = found["familial"]
    assert (refused.status, refused.held_out, refused.weight) == ("refused", None, 0.0)
    assert "missing: ['G']" in refused.refusal
    assert found.entries[-1] == refused
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_rollout_is_what_it_says():
    runs = runs_of("familial", noise=0.004, seed=5)
    found = compare(runs, ["familial", "hoffmann"])
    assert [(split.C, split.fitted, split.held_out) for split in found.splits] == [
        (pytest.approx(1e20), 56, 28)
    ]
    C = runs.columns["C"]
    small = fit("familial", runs.take(np.flatnonzero(C < 5e20)))
    large = runs.take(np.flatnonzero(C > 5e20))
    off = np.log(small.predict(**{n: large.columns[n] for n in "NDG"})) - np.log(large.loss)
    assert found.splits[0].errors["familial"] == pytest.approx(math.sqrt(np.mean(off**2)))
    assert found.splits[0].drift["familial"] == pytest.approx(np.mean(off))
    assert found["familial"].held_out == pytest.approx(found.splits[0].errors["familial"])
    four = isoflop_design(get_law("familial"), TRUTH, [*BUDGETS, 1e22], G=[1, 2, 4, 8])
    more = compare(simulate(get_law("familial"), TRUTH, four, noise=0.004), ["familial"])
    assert [(split.fitted, split.held_out) for split in more.splits] == [(56, 56), (84, 28)]
    squares = [split.held_out * split.errors["familial"] ** 2 for split in more.splits]
    assert more["familial"].held_out == pytest.approx(math.sqrt(sum(squares) / 84))


def test_computes_without_budgets_are_parted_by_shares():
    generator = np.random.default_rng(0)
    rows = {
        "N": np.exp(generator.uniform(18, 23, 90)),
        "D": np.exp(generator.uniform(21, 26, 90)),
    }
    law = get_law("hoffmann")
    runs = simulate(law, {k: TRUTH[k] for k in law.names}, rows, noise=0.003)
    found = compare(runs, ["hoffmann"])
    assert [split.fitted for split in found.splits] == pytest.approx([45, 58, 72, 81], abs=1)


def test_a_law_that_small_budgets_cannot_bear_spoils_no_other():
    """Six runs do not identify six coefficients; the split does not count, and is named."""
    law = get_law("hoffmann")
    values = {k: TRUTH[k] for k in law.names}
    columns = isoflop_design(law, values, BUDGETS, sizes=3)
    found = compare(simulate(law, values, columns, noise=0.002), ["hoffmann", "skaling"])
    assert found.splits[0].errors["skaling"] is None
    assert any("do not count" in note for note in found.notes)


def test_checkpoints_are_named_as_dependent():
    runs = runs_of("familial", noise=0.004)
    table = {**runs.columns, "loss": runs.loss, "run_id": np.arange(84) // 4}
    found = compare(RunTable.read(table, run_id="run_id"), ["familial"])
    assert any("share a run" in note for note in found.notes)


def test_refusals():
    runs = runs_of("familial", noise=0.004)
    for laws in ([], ["familial", "familial"]):
        with pytest.raises(ScalingError, match="one or more different laws"):
            compare(runs, laws)
    with pytest.raises(ScalingError, match="`outliers` must not depend on the law"):
        compare(runs, ["familial"], outliers=FarResiduals())
    with pytest.raises(ScalingError, match="None of the laws could be fitted"):
        _ = compare(runs, ["hossain"]).best
    with pytest.raises(KeyError):
        compare(runs, ["familial"])["hoffmann"]

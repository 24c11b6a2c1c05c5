"""Numbers that others published or that were confirmed by other programs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_fit import hoffmann_by_lbfgs, hoffmann_objective, objective_by_hand

from hf_familial.scaling import (
    FarResiduals,
    FitStatus,
    LargestLosses,
    RunTable,
    fit,
    get_law,
    refit,
)


FIVE_LARGEST = LargestLosses(5)  # the rule of arXiv 2404.10102
NAMES = ("E", "A", "B", "alpha", "beta")


@pytest.fixture(scope="module")
def epoch(epoch_runs):
    return RunTable.read(epoch_runs)


def expect(answer, numbers, tolerances):
    for name, number, tolerance in zip(NAMES, numbers, tolerances, strict=True):
        assert answer.values[name] == pytest.approx(number, **tolerance), name


CLOSE = ({"abs": 1e-3}, {"rel": 0.01}, {"rel": 0.02}, {"abs": 5e-4}, {"abs": 5e-4})


def test_the_optimum_of_240_runs(epoch):
    answer = fit("hoffmann", epoch, outliers=FIVE_LARGEST)
    assert answer.status is FitStatus.CONVERGED
    assert len(answer.data) == 240
    assert [row.row for row in answer.dropped] == [0, 1, 2, 3, 4]
    assert 1.0182740e-3 <= answer.objective <= 1.018275e-3
    expect(answer, (1.817218, 477.826, 2143.42, 0.347310, 0.367172), CLOSE)
    # Besiroglu et al., arXiv 2404.10102, table 1
    paper = ({"abs": 1e-3}, {"rel": 0.03}, {"rel": 0.05}, {"abs": 2e-3}, {"abs": 2e-3})
    expect(answer, (1.8172, 482.01, 2085.43, 0.3478, 0.3658), paper)
    share = answer.values["beta"] / (answer.values["alpha"] + answer.values["beta"])
    assert share == pytest.approx(0.5139, abs=2e-3)
    assert answer.exact_agreement == 1.0
    assert answer.objective == pytest.approx(objective_by_hand(answer), rel=1e-12)


def test_five_runs_move_the_exponent_of_data(epoch):
    answer = fit("hoffmann", epoch)
    assert answer.objective == pytest.approx(1.82601e-3, rel=1e-5)
    expect(answer, (1.89134, 495.73, 12845.6, 0.34931, 0.45305), CLOSE)


@pytest.mark.parametrize(
    ("delta", "numbers"),
    [
        (1e-4, (1.81582, 478.69, 2065.4, 0.34741, 0.36538)),
        (1e-2, (1.83808, 538.75, 2905.6, 0.35442, 0.38154)),
        (1e-1, (1.86455, 593.32, 4875.6, 0.36025, 0.40588)),
    ],
)
def test_every_delta(epoch, delta, numbers):
    answer = fit("hoffmann", epoch, delta=delta, outliers=FIVE_LARGEST)
    assert answer.status is FitStatus.CONVERGED
    expect(answer, numbers, ({"abs": 2e-5}, {"rel": 2e-5}, {"rel": 1e-4}, *[{"abs": 1e-5}] * 2))


@pytest.mark.parametrize(
    ("outliers", "numbers", "squares"),
    [
        (
            FIVE_LARGEST,
            (1.8828136, 567.80542, 7581.852, 0.35761509, 0.42762062),
            0.0832038077,
        ),
        (None, (2.0105676, 711.83, 1.01362e6, 0.368436, 0.661397), 0.8437738),
    ],
    ids=["240", "245"],
)
def test_least_squares_of_raw_losses(epoch, outliers, numbers, squares):
    answer = fit("hoffmann", epoch, objective="mse", outliers=outliers)
    assert 2 * answer.objective == pytest.approx(squares, rel=1e-6)
    expect(answer, numbers, [{"rel": 1e-5}] * 5)


def test_a_start_at_the_published_values_does_not_stop_there(epoch):
    """Solvers that stop on an absolute decrease of a mean of 1e-6 never leave it."""
    start = dict(get_law("hoffmann").published["hoffmann_unrounded"].values)
    answer = fit("hoffmann", epoch, outliers=FIVE_LARGEST, starts=start)
    assert answer.starts == 1
    there = [np.log(start["A"]), np.log(start["B"]), np.log(start["E"])]
    point = [*there, start["alpha"], start["beta"]]
    rows = {**answer.data.columns, "loss": answer.data.loss}
    # 1.23116e-3 with the five digits of N and D that others used
    assert hoffmann_objective(point, rows, 1e-3)[0] == pytest.approx(1.23116e-3, rel=1e-4)
    assert answer.objective <= 1.01828e-3


def test_the_outer_exponent_fits_better(epoch):
    answer = fit("skaling", epoch, outliers=FIVE_LARGEST)
    assert answer.objective == pytest.approx(9.542e-4, rel=1e-4)
    assert answer.values["k"] == pytest.approx(0.774, abs=1e-3)


def test_far_residuals_find_the_largest_losses(epoch):
    answer = fit("hoffmann", epoch, outliers=FarResiduals(threshold=10.0))
    assert {0, 1, 2, 3, 4} <= {row.row for row in answer.dropped}
    assert answer.values["beta"] == pytest.approx(0.367, abs=0.02)


def test_bootstrap_spread(epoch):
    answer = fit("hoffmann", epoch, outliers=FIVE_LARGEST)
    counts = np.random.default_rng(0).multinomial(240, np.full(240, 1 / 240), size=1000)
    again = refit(answer, counts)
    assert again.converged.all()
    spread = [again.values[name].std(ddof=1) for name in NAMES]
    assert spread == pytest.approx([0.0249, 117, 1277, 0.0146, 0.0204], rel=0.15)
    share = again.values["beta"] / (again.values["alpha"] + again.values["beta"])
    assert np.median(share) == pytest.approx(0.5158, abs=3e-3)
    assert np.quantile(share, [0.1, 0.9]) == pytest.approx([0.492, 0.541], abs=6e-3)


def test_llama_3(llama_runs):
    answer = fit("hoffmann", llama_runs, objective="mse")
    assert len(answer.data) == 133
    expect(answer, (0.60467, 59.1411, 155.114, 0.310006, 0.313643), [{"rel": 2e-5}] * 5)
    assert 2 * answer.objective == pytest.approx(0.00201972, rel=1e-5)


@pytest.mark.parametrize(
    ("law", "label", "variables", "loss"),
    [
        ("hoffmann", "hoffmann", {"N": 18.8e9, "D": 110.2e9}, 2.1529793706605496),
        ("hossain", "hossain", {"N": 18.8e9, "D": 110.2e9, "S": 0.0}, 2.1529793706605496),
        ("hossain", "hossain", {"N": 18.8e9, "D": 110.2e9, "S": 0.98}, 2.0797801359),
        ("abnar", "abnar", {"N": 18.8e9, "D": 110.2e9, "S": 0.98}, 2.1693352661),
        ("frantar", "t5_c4", {"N": 18.8e9, "D": 110.2e9, "S": 0.98}, 1.1478624295),
        ("krajewski", "krajewski", {"N": 1e9, "D": 20e9, "G_expert": 8.0}, 3.1403931160),
        ("hoffmann", "krajewski", {"N": 1e9, "D": 20e9}, 2.9803051497),
        ("kaplan_joint", "kaplan", {"N": 1e9, "D": 22e9}, 2.3693163430),
    ],
)
def test_values_of_published_laws(law, label, variables, loss):
    law = get_law(law)
    assert law.predict(law.published[label].values, **variables) == pytest.approx(loss, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e6, 1e13), st.floats(1e6, 1e14))
def test_without_sparsity_hossain_is_hoffmann(size, tokens):
    sparse, dense = get_law("hossain"), get_law("hoffmann")
    values = sparse.published["hossain"].values
    same = {"E": values["e"], "A": values["a"], "B": values["b"]}
    same |= {name: values[name] for name in ("alpha", "beta")}
    left = sparse.predict(values, N=size, D=tokens, S=0.0)
    assert left == dense.predict(same, N=size, D=tokens)


def test_the_wrong_familial_variant_biases_gamma():
    """Data with E inside the penalty and gamma 0.033, read with E outside."""
    sizes, tokens, exits = np.meshgrid(
        np.geomspace(5e7, 5e9, 7), np.geomspace(2e9, 2e11, 3), [1.0, 2, 4, 8], indexing="ij"
    )
    runs = {"N": sizes.ravel(), "D": tokens.ravel(), "G": exits.ravel()}
    dense = get_law("hoffmann").published["hoffmann"].values
    inside = get_law("familial_e_inside")
    runs["loss"] = inside.predict({**dense, "gamma": 0.033}, **runs)
    right, wrong = (fit(law, runs, objective="mse") for law in (inside, "familial"))
    assert right.values["gamma"] == pytest.approx(0.033, rel=1e-9)
    assert 0.07 < wrong.values["gamma"] < 0.09
    assert right.objective < 1e-20 < wrong.objective


@pytest.mark.slow
@pytest.mark.parametrize("delta", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("outliers", [FIVE_LARGEST, None], ids=["240", "245"])
def test_no_start_of_scipy_ends_lower(epoch, outliers, delta):
    answer = fit("hoffmann", epoch, outliers=outliers, delta=delta)
    rows = {**answer.data.columns, "loss": answer.data.loss}
    # the grid of arXiv 2203.15556: 4500 starts, of which every 25th
    grid = np.meshgrid(
        np.arange(0, 30, 5), np.arange(0, 30, 5), np.arange(-1, 1.5, 0.5),
        np.arange(0, 2.5, 0.5), np.arange(0, 2.5, 0.5), indexing="ij",
    )  # fmt: skip
    starts = np.stack([axis.ravel() for axis in grid], -1)[::25]
    lowest, _ = hoffmann_by_lbfgs(rows, starts, delta)
    assert answer.objective <= lowest * (1 + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("study", ["epoch", "llama"])
def test_the_package_chinchilla_ends_no_lower(request, tmp_path, study):
    chinchilla = pytest.importorskip("chinchilla")
    rows = request.getfixturevalue(f"{study}_runs")
    answer = fit("hoffmann", rows, outliers=FIVE_LARGEST if study == "epoch" else None)
    data = answer.data

    def log_huber(truth, predicted):
        return chinchilla._metrics.log_huber(truth, predicted, delta=1e-3)

    peer = chinchilla.Chinchilla(
        str(tmp_path),
        param_grid={
            "e": [-1.0, 0.0, 1.0], "a": [0.0, 5.0, 10.0], "b": [0.0, 5.0, 10.0],
            "alpha": [0.2, 0.5, 0.8], "beta": [0.2, 0.5, 0.8],
        },
        loss_fn=log_huber,
        log_level=40,
    )  # fmt: skip
    for n, d, loss in zip(data.columns["N"], data.columns["D"], data.loss, strict=True):
        peer.database.append(C=6 * n * d, N=n, D=d, loss=loss)
    peer.fit(parallel=False)
    p = peer.params
    point = [np.log(p["A"]), np.log(p["B"]), np.log(p["E"]), p["alpha"], p["beta"]]
    theirs, _ = hoffmann_objective(point, {**data.columns, "loss": data.loss}, 1e-3)
    assert answer.objective <= theirs

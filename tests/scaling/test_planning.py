"""Plans against closed forms, published tables, a brute-force search and their own limits."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from hf_familial.errors import DomainWarning, MissingColumnError, NoMinimumError, ScalingError
from hf_familial.scaling import fit, get_law
from hf_familial.scaling.flop_models import HeadFlops, LifetimeFlops, aspect_width, six_nd
from hf_familial.scaling.leverage import compute_leverage, even_members, loss_leverage
from hf_familial.scaling.optima import best, powers, tokens_for
from hf_familial.scaling.planning import Limits, plan
from hf_familial.scaling.prediction import PublishedFit, predict
from hf_familial.scaling.quantities import compute_for, granularity_compute, least_loss
from hf_familial.scaling.simulation import isoflop_design, simulate


FAMILIAL, HOFFMANN = get_law("familial"), get_law("hoffmann")
TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28, "gamma": 0.033}
DENSE = {name: TRUTH[name] for name in HOFFMANN.names}
KNOWN = PublishedFit(FAMILIAL, TRUTH)

pytestmark = pytest.mark.filterwarnings("ignore::hf_familial.scaling.DomainWarning")

exponents = st.floats(0.1, 0.9)
weights = st.floats(10, 1e4)
computes = st.floats(1e16, 1e25)


@pytest.fixture(scope="module")
def family():
    design = isoflop_design(FAMILIAL, TRUTH, [1e19, 1e20, 1e21], G=[1, 2, 4, 8])
    return fit(FAMILIAL, simulate(FAMILIAL, TRUTH, design, noise=0.002, seed=1))


def brute_force(law, values, C, flops, G):
    """Scalar search for the best log N, tokens by root finding."""

    def tokens(N):
        return optimize.brentq(lambda D: flops(N, D, G) / C - 1, 1.0, C)

    def loss(x):
        N = math.exp(x)
        return float(law.predict(values, N=N, D=tokens(N))) if flops(N, 2.0, G) < C else math.inf

    grid = np.linspace(math.log(1e6), math.log(1e12), 60)
    start = grid[int(np.argmin([loss(x) for x in grid]))]
    found = optimize.minimize_scalar(
        loss, bounds=(start - 0.3, start + 0.3), method="bounded", options={"xatol": 1e-10}
    )
    N = math.exp(found.x)
    return N, tokens(N)


@given(exponents, exponents, weights, weights, computes)
def test_the_closed_form(alpha, beta, A, B, C):
    """Equation 4 of arXiv 2203.15556, and what defines it: equal marginal gains."""
    values = {"E": 1.0, "A": A, "B": B, "alpha": alpha, "beta": beta}
    N, D = best(HOFFMANN, values, C)
    assert 6 * N * D == pytest.approx(C, rel=1e-9)
    assert alpha * A * N**-alpha == pytest.approx(beta * B * D**-beta, rel=1e-9)


@given(exponents, exponents, computes, st.sampled_from([1, 2, 8]))
def test_the_search_finds_the_closed_form(alpha, beta, C, G):
    values = {**TRUTH, "alpha": alpha, "beta": beta}
    closed = best(FAMILIAL, values, C, G=G)
    try:
        searched = best(FAMILIAL, values, C, six_nd, G=G)
    except NoMinimumError:
        assert not 1e2 < closed[0] < 1e18
        return
    np.testing.assert_allclose(searched, closed, rtol=1e-7)


@pytest.mark.parametrize(
    ("law", "given", "closed"),
    [
        ("hoffmann", {}, True),
        ("familial", {"G": 4.0}, True),
        ("familial_e_inside", {"G": 4.0}, True),
        ("familial_n_only", {"G": 4.0}, True),
        ("skaling", {}, True),
        ("kaplan_joint", {}, True),
        ("hossain", {"S": 0.9}, True),
        ("frantar", {"S": 0.5}, True),
        ("krajewski", {"G_expert": 8.0}, True),
        ("ludziejewski", {"E": 8.0}, True),
        ("abnar", {"S": 0.5}, False),
    ],
)
def test_which_laws_have_a_closed_form(law, given, closed):
    law = get_law(law)
    known = PublishedFit.published(law) if law.published else PublishedFit(law, {**DENSE, "k": 0.8})
    found = powers(law, known.values, **given)
    assert (found is not None) == closed
    if closed:
        searched = best(law, known.values, 1e21, six_nd, **given)
        np.testing.assert_allclose(found.optimum(1e21), searched, rtol=1e-6)


@pytest.mark.parametrize(
    ("experts", "C", "N", "D"),
    [(1, 1e20, 1.73e9, 9.65e9), (8, 1e21, 3.79e9, 4.40e10), (32, 1e22, 1.23e10, 1.36e11)],
)
def test_table_1_of_ludziejewski(experts, C, N, D):
    """Table 1 of the joint law of mixtures, by search."""
    known = PublishedFit.published(get_law("ludziejewski"))
    found = best(known.law, known.values, C, six_nd, E=float(experts))
    np.testing.assert_allclose(found, (N, D), rtol=0.015)


@pytest.mark.parametrize(
    "flops",
    [HeadFlops(), HeadFlops(heads_in_N=1, vocab=128_000), LifetimeFlops(six_nd, 1e12)],
    ids=["heads", "one head counted", "lifetime"],
)
def test_the_search_against_brute_force(flops):
    found = best(FAMILIAL, TRUTH, 1e21, flops, G=4.0)
    # the factor of G does not move the optimum at equal cost: a dense law has the same
    expected = brute_force(HOFFMANN, DENSE, 1e21, flops, G=4.0)
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    assert flops(*found, 4.0) == pytest.approx(1e21, rel=1e-9)


def test_a_cloud_is_searched_at_once():
    cloud = {name: value * np.linspace(0.95, 1.05, 7) for name, value in TRUTH.items()}
    together = best(FAMILIAL, cloud, 1e21, HeadFlops(), G=4.0)
    for i in range(7):
        one = {name: column[i] for name, column in cloud.items()}
        alone = best(FAMILIAL, one, 1e21, HeadFlops(), G=4.0)
        np.testing.assert_allclose([part[i] for part in together], alone, rtol=1e-10)


@given(st.floats(1e6, 1e12), st.floats(1e17, 1e24), st.integers(1, 16))
def test_tokens_spend_the_budget(N, C, G):
    flops = HeadFlops()
    D = tokens_for(C, N, flops, G)
    if flops(N, 1.0, G) > C:
        assert D == 0
    else:
        assert flops(N, D, G) == pytest.approx(C, rel=1e-12)
    # a cost that bends in D
    bent = tokens_for(C, N, lambda N, D, G: 6 * N * D * (1 + np.log1p(D) / 100), 1)
    if bent > 0:
        assert 6 * N * bent * (1 + math.log1p(bent) / 100) == pytest.approx(C, rel=1e-9)


def test_heads_move_the_best_size_with_granularity():
    sizes = [float(best(FAMILIAL, TRUTH, 1e20, HeadFlops(), G=float(G))[0]) for G in (1, 2, 4, 8)]
    plain = [float(best(FAMILIAL, TRUTH, 1e20, G=float(G))[0]) for G in (1, 2, 4, 8)]
    assert plain == pytest.approx([plain[0]] * 4, rel=1e-9)
    # a head of V x d grows more slowly than N: the dearer the heads, the larger the backbone
    assert sizes == sorted(sizes)
    assert sizes[-1] / sizes[0] > 1.2
    narrow = HeadFlops(width=lambda N: np.full_like(N, 512.0))
    assert float(best(FAMILIAL, TRUTH, 1e20, narrow, G=8.0)[0]) != pytest.approx(plain[0], rel=0.01)


def test_the_default_width():
    assert aspect_width(12 * 32 * 2048**2, aspect=64) == pytest.approx(2048)


@settings(max_examples=10)
@given(st.integers(2, 16), computes)
def test_what_granularity_costs(G, C):
    """`G^(gamma (alpha + beta) / (alpha beta))` of extra compute at any budget."""
    power = 0.033 * (0.34 + 0.28) / (0.34 * 0.28)
    assert granularity_compute(FAMILIAL, G, C).of(TRUTH) == pytest.approx(G**power, rel=1e-9)


@pytest.mark.parametrize(("G", "factor"), [(2, 1.16), (4, 1.35), (5, 1.41), (8, 1.56)])
def test_what_granularity_costs_in_numbers(G, factor):
    assert plan(KNOWN, C=1e21, G=G).granularity.value == pytest.approx(factor, abs=0.005)


def test_heads_make_granularity_dearer(family):
    found = plan(family, C=1e20, G=4)
    assert found.granularity_with_heads.value > 1.1 * found.granularity.value
    C = 1e20 * found.granularity_with_heads.value
    bought_back = least_loss(FAMILIAL, family.values, C, HeadFlops(), G=4.0)
    dense = least_loss(FAMILIAL, family.values, 1e20, HeadFlops(), G=1.0)
    assert bought_back == pytest.approx(float(dense), rel=1e-9)
    assert plan(family, C=1e20, G=4, head_flops=False).granularity_with_heads is None


def test_a_cost_that_no_compute_buys_back():
    """With E inside the factor the loss of G = 1 may be below the floor of G."""
    law = get_law("familial_e_inside")
    high = {**TRUTH, "gamma": 0.2}
    assert granularity_compute(law, 8, 1e24).of(high) == math.inf
    assert 1 < granularity_compute(law, 2, 1e18).of(TRUTH) < math.inf


def test_compute_for_a_loss_is_the_inverse():
    target = least_loss(FAMILIAL, TRUTH, 3e20, HeadFlops(), G=4.0)
    found = compute_for(FAMILIAL, TRUTH, target, flops=HeadFlops(), G=4.0)
    assert found == pytest.approx(3e20, rel=1e-9)


def test_a_plan(family):
    found = plan(family, C=1e21, G=4)
    truth = best(FAMILIAL, TRUTH, 1e21, HeadFlops(), G=4.0)
    for part, expected in zip((found.N, found.D), truth, strict=True):
        assert part.interval.low < part.value < part.interval.high
        assert part.value == pytest.approx(expected, rel=0.05)
        assert expected in part.interval
    assert found.training_flops == pytest.approx(1e21)
    assert found.shift == pytest.approx(found.N.value / found.simple["N"])
    assert found.shift > 1.05
    assert found.closed_form
    assert found.limits_hit == ()
    assert found.notes == ()
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_plan_without_heads_has_the_closed_form(family):
    found = plan(family, C=1e21, G=4, head_flops=False)
    assert found.shift == pytest.approx(1)
    values = family.values
    N, D = powers(FAMILIAL, values, G=4.0).optimum(1e21)
    assert (found.N.value, found.D.value) == pytest.approx((N, D))
    assert found.loss.value == pytest.approx(float(family.predict(N=N, D=D, G=4.0)))


def test_a_plan_for_a_loss(family):
    forward = plan(family, C=2e20, G=2)
    back = plan(family, loss=forward.loss.value, G=2)
    assert back.C == pytest.approx(2e20, rel=1e-6)
    assert back.N.value == pytest.approx(forward.N.value, rel=1e-5)
    with pytest.raises(ScalingError, match="No budget reaches a loss of 1.0:"):
        plan(family, loss=1.0)


def test_limits_hold():
    free = plan(KNOWN, C=1e21, head_flops=False)
    small = plan(KNOWN, C=1e21, head_flops=False, limits=Limits(memory=1e9, reserve=2e8))
    assert small.N.value == pytest.approx(4e8)
    assert small.D.value == pytest.approx(1e21 / 6 / 4e8)
    assert small.limits_hit == ("memory",)
    assert small.loss.value > free.loss.value
    few = plan(KNOWN, C=1e21, head_flops=False, limits=Limits(tokens=1e10))
    assert few.D.value == pytest.approx(1e10)
    assert few.N.value == pytest.approx(1e21 / 6 / 1e10)
    assert few.limits_hit == ("tokens",)
    both = plan(KNOWN, C=1e21, head_flops=False, limits=Limits(tokens=1e10, memory=1e9))
    assert (both.N.value, both.D.value) == pytest.approx((5e8, 1e10))
    assert both.limits_hit == ("memory", "tokens")
    assert any("is not spent" in note for note in both.notes)
    shallow = plan(KNOWN, C=1e21, G=4, head_flops=False, limits=Limits(memory=1e9, deployed=0.25))
    assert shallow.N.value == pytest.approx(free.N.value)


def test_what_limits_leave_is_the_best_within_them():
    """Against a search over sizes that keep them."""
    limits = {"max_N": 1.2e9, "max_D": 6e10}
    N, D = best(FAMILIAL, TRUTH, 1e21, HeadFlops(), G=4.0, **limits)
    sizes = np.geomspace(1e7, 1.2e9, 4000)
    tokens = np.minimum(tokens_for(1e21, sizes, HeadFlops(), 4), 6e10)
    losses = FAMILIAL.predict(TRUTH, N=sizes, D=tokens, G=4.0)
    assert FAMILIAL.predict(TRUTH, N=N, D=D, G=4.0) <= losses.min() + 1e-12


def test_serving_makes_models_smaller():
    """Sardana et al.: the more is served, the smaller and the longer trained."""
    plans = [
        plan(KNOWN, C=1e22, head_flops=False, limits=Limits(inference_tokens=tokens))
        for tokens in (0, 1e11, 1e12, 1e13)
    ]
    sizes = [found.N.value for found in plans]
    assert sizes == sorted(sizes, reverse=True)
    for found, tokens in zip(plans, (0, 1e11, 1e12, 1e13), strict=True):
        spent = 6 * found.N.value * found.D.value + 2 * found.N.value * tokens
        assert spent == pytest.approx(1e22, rel=1e-9)
        assert found.training_flops == pytest.approx(6 * found.N.value * found.D.value, rel=1e-9)


def test_the_least_lifetime_for_a_loss_is_sardanas():
    """Their problem, solved in one dimension: least 6ND + 2N D_inf with L(N, D) held."""
    loss, served = 2.2, 1e12
    found = plan(
        PublishedFit(HOFFMANN, DENSE),
        loss=loss,
        head_flops=False,
        limits=Limits(inference_tokens=served),
    )

    def cost(x):
        N = math.exp(x)
        rest = loss - DENSE["E"] - DENSE["A"] * N ** -DENSE["alpha"]
        if rest <= 0:
            return math.inf
        return N * (6 * (DENSE["B"] / rest) ** (1 / DENSE["beta"]) + 2 * served)

    x = optimize.minimize_scalar(cost, bounds=(20, 27), method="bounded", options={"xatol": 1e-10})
    assert pytest.approx(x.fun, rel=1e-6) == found.C
    assert found.N.value == pytest.approx(math.exp(x.x), rel=1e-3)


def test_the_loss_of_every_exit(family):
    branch = PublishedFit.published(get_law("branch"))
    found = plan(family, C=1e21, G=3, branch=branch, members=(0.2, 0.6, 1.0))
    assert len(found.exits) == 3
    for exit_idx, (estimate, share) in enumerate(zip(found.exits, (0.2, 0.6, 1.0), strict=True)):
        expected = branch.predict(
            N=share * found.N.value, D=found.D.value, U=exit_idx, V=2 - exit_idx
        )
        assert estimate.value == pytest.approx(float(expected))
        assert estimate.interval is None
    with pytest.raises(ScalingError, match="law of `U` and `V`"):
        plan(family, C=1e21, G=3, branch=family)


def test_efficiency_leverage():
    """By hand, for two members and C = 6ND."""
    C, shares = 1e20, np.array([0.5, 1.0])
    N, D = best(FAMILIAL, TRUTH, C, G=2.0)
    whole = FAMILIAL.predict(TRUTH, N=N, D=D, G=2.0)

    def dense(tokens):
        return HOFFMANN.predict(DENSE, N=shares * N, D=tokens).mean()

    same_tokens = C / 6 / (1.5 * N)
    assert loss_leverage(FAMILIAL, C, shares).of(TRUTH) == pytest.approx(dense(same_tokens) / whole)
    same_flops = C / 2 / 6 / (shares * N)
    by_flops = loss_leverage(FAMILIAL, C, shares, "flops").of(TRUTH)
    assert by_flops == pytest.approx(dense(same_flops) / whole)
    needed = optimize.brentq(lambda x: dense(same_tokens * x) - whole, 0.1, 100)
    found = compute_leverage(FAMILIAL, C, shares).of(TRUTH)
    assert found == pytest.approx(needed, rel=1e-8)
    separate = loss_leverage(FAMILIAL, C, shares, dense=(HOFFMANN, DENSE)).of(TRUTH)
    assert separate == pytest.approx(loss_leverage(FAMILIAL, C, shares).of(TRUTH))


def test_leverage_is_largest_at_low_compute():
    """As the abstract of arXiv 2512.23407 has it."""
    found = [loss_leverage(FAMILIAL, C, even_members(4)).of(TRUTH) for C in (1e19, 1e20, 1e21)]
    assert found == sorted(found, reverse=True)
    assert found[-1] > 1


def test_one_member_has_no_leverage():
    for leverage in (loss_leverage, compute_leverage):
        assert leverage(FAMILIAL, 1e20, (1.0,)).of(TRUTH) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("members", [(), (0.5,), (1.0, 0.5), (0.0, 1.0), (0.5, 0.5, 1.0)])
def test_members_rise_to_the_whole(members):
    with pytest.raises(ScalingError, match="members"):
        loss_leverage(FAMILIAL, 1e20, members)


def test_leverage_by_plan_counts_heads_on_both_sides(family):
    found = plan(family, C=1e21, G=4)
    sides = {
        name: float(maker(FAMILIAL, 1e21, even_members(4), flops=HeadFlops()).of(family.values))
        for name, maker in (("loss", loss_leverage), ("compute", compute_leverage))
    }
    assert {name: part.value for name, part in found.leverage.items()} == pytest.approx(sides)


def test_a_prediction_outside_the_runs_warns(family, recwarn):
    inside = predict(family, N=1e9, D=1e10, G=2.0)
    assert inside.interval.low < inside.value < inside.interval.high
    assert not recwarn.list
    with pytest.warns(DomainWarning, match=r"`N` = 1e\+13 is .* times the largest of the runs"):
        predict(family, N=1e13, D=1e10, G=2.0)
    corner = {name: family.data.columns[name].max() for name in "NDG"}
    with pytest.warns(DomainWarning, match=r"`6ND` = .* times the largest") as caught:
        predict(family, **corner)
    assert len(caught) == 1
    with pytest.warns(DomainWarning, match="`G` = 16 is 2 times"):
        plan(family, C=1e20, G=16)
    with pytest.warns(DomainWarning, match="the edge of the runs"):
        plan(PublishedFit.published(HOFFMANN), C=1e26)


def test_given_coefficients_have_no_intervals():
    found = plan(KNOWN, C=1e20)
    assert found.N.interval is None
    assert (
        "The coefficients of `familial` are published values, so there are no intervals."
        in found.notes
    )
    with pytest.raises(ScalingError, match="not 'other'"):
        PublishedFit.published(HOFFMANN, "other")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "either `C` or `loss`, not both"),
        ({"C": 1e20, "loss": 2.0}, "either `C` or `loss`, not both"),
        ({"C": -1.0}, "`C` must be positive"),
        ({"C": 1e20, "G": 0}, "`G` must be 1 or more"),
        ({"C": 1e20, "G": 2, "members": (1.0,)}, "must contain 2 sizes"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(ScalingError, match=words):
        plan(KNOWN, **arguments)


@pytest.mark.parametrize(
    "limits", [{"memory": 0}, {"tokens": -1}, {"deployed": 2}, {"memory": 1e9, "reserve": 1e9}]
)
def test_wrong_limits(limits):
    with pytest.raises(ScalingError):
        Limits(**limits)


def test_missing_variables_are_named():
    law = get_law("hossain")
    with pytest.raises(MissingColumnError, match=r"also needs values of \['S'\]"):
        plan(PublishedFit.published(law), C=1e20)


def test_a_loss_below_the_floor_is_no_question_of_budget():
    """Also where the best size of an endless budget is beyond those looked at."""
    steep = PublishedFit(FAMILIAL, {**TRUTH, "alpha": 0.2, "beta": 0.6, "E": 1.8})
    with pytest.raises(ScalingError, match="loss of 1.7: the law predicts at least 1.8, E is 1.8."):
        plan(steep, loss=1.7)
    with pytest.raises(NoMinimumError, match="still falls at the edge"):
        plan(steep, C=1e38)
    floor = 1.8 + 406.4 * 4e9**-0.2
    tight = Limits(memory=8e9)
    with pytest.raises(
        ScalingError, match=f"within the limits: the law predicts at least {floor:.4g}"
    ):
        plan(steep, loss=floor - 0.1, limits=tight)
    assert plan(steep, loss=floor + 0.1, limits=tight).loss.value == pytest.approx(floor + 0.1)


@pytest.mark.parametrize(("asked", "got"), [({}, "neither"), ({"C": 1e20, "loss": 2.0}, "both")])
def test_a_plan_is_for_a_budget_or_for_a_loss(asked, got):
    with pytest.raises(ScalingError, match=f"either `C` or `loss`, not both, got {got}"):
        plan(KNOWN, **asked)


def test_a_law_without_a_valley_is_refused():
    rising = {**DENSE, "alpha": 1e-4, "A": 1e-3}
    with pytest.raises(NoMinimumError, match="still falls at the edge"):
        best(HOFFMANN, rising, 1e21, six_nd)

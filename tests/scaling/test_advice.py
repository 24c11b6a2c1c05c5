"""Advice: that it is what the laws say, no surer than they are, and moves as it should."""

import json

import numpy as np
import pytest
from scipy.stats import norm

from hf_familial.errors import ScalingError
from hf_familial.scaling import fit, get_law
from hf_familial.scaling.advice import UNKNOWN, advise
from hf_familial.scaling.candidates import Candidate, Situation
from hf_familial.scaling.flop_models import six_nd
from hf_familial.scaling.optima import best
from hf_familial.scaling.prediction import PublishedFit
from hf_familial.scaling.simulation import isoflop_design, simulate
from hf_familial.scaling.tables.facts import Facts


FAMILIAL, HOFFMANN = get_law("familial"), get_law("hoffmann")
TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28, "gamma": 0.033}
DENSE = {name: TRUTH[name] for name in HOFFMANN.names}
MIXTURE = get_law("ludziejewski")

pytestmark = pytest.mark.filterwarnings("ignore::hf_familial.scaling.DomainWarning")


@pytest.fixture(scope="module")
def fits():
    """A dense and a familial law fitted to one table of runs."""
    columns = isoflop_design(FAMILIAL, TRUTH, [1e19, 1e20, 1e21], G=[1, 2, 4, 8])
    runs = simulate(FAMILIAL, TRUTH, columns, noise=0.003, seed=0)
    return fit(HOFFMANN, runs.take(runs.columns["G"] == 1)), fit(FAMILIAL, runs)


def ask(candidates, **changes):
    arguments = {
        "unique_tokens": 1e12,
        "training_flops": 1e21,
        "memory": [2e9, 4e9],
        "flops": six_nd,
        **changes,
    }
    return advise(candidates=candidates, **arguments)


def known(**changes):
    return [
        Candidate("dense", PublishedFit(HOFFMANN, DENSE)),
        Candidate("family", PublishedFit(FAMILIAL, {**TRUTH, **changes})),
    ]


def option(advice, name):
    return next(found for found in advice.options if found.name == name)


def test_every_option_is_the_best_of_its_kind():
    found = ask(known(), training_flops=1e22)
    one = option(found, "dense, one for all")
    assert one.runs[0].N == pytest.approx(1e9)
    assert one.runs[0].D == pytest.approx(1e22 / 6e9)
    several = option(found, "dense, several models")
    assert [run.N for run in several.runs] == pytest.approx([1e9, 2e9])
    assert [run.flops for run in several.runs] == pytest.approx([5e21, 5e21])
    expected = HOFFMANN.predict(DENSE, N=[1e9, 2e9], D=5e21 / 6 / np.array([1e9, 2e9]))
    assert several.losses == pytest.approx(tuple(expected))
    family = option(found, "family, one family")
    assert family.runs[0].N == pytest.approx(2e9)
    assert family.runs[0].members == pytest.approx((0.5, 1.0))
    assert family.losses[0] == pytest.approx(
        float(FAMILIAL.predict(TRUTH, N=2e9, D=1e22 / 12e9, G=2.0))
    )
    assert found.winner == min(found.options, key=lambda o: o.loss).name
    assert sum(found.chances.values()) == pytest.approx(1)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_dear_granularity_speaks_for_dense_models():
    cheap, dear = (ask(known(gamma=gamma), training_flops=1e23) for gamma in (0.0, 0.3))
    assert cheap.winner == "family, one family"
    assert dear.winner.startswith("dense")


def test_room_for_the_whole_makes_a_family_pointless():
    found = ask(known(), training_flops=1e19)
    family = option(found, "family, one family")
    assert family.runs[0].G == 1
    assert family.loss == pytest.approx(option(found, "dense, one for all").loss, rel=1e-9)
    assert any("a family is not needed" in note for note in family.notes)


def test_tokens_bind():
    found = ask(known(), unique_tokens=1e9, epochs=2)
    assert all(run.D <= 2e9 * (1 + 1e-9) for o in found.options for run in o.runs)
    row = next(r for r in found.sensitivity if (r.assumption, r.factor) == ("unique_tokens", 4.0))
    assert min(row.losses.values()) < found.options[0].loss


def test_a_law_of_repetition_counts_it_itself():
    law = get_law("muennighoff")
    repeated = PublishedFit.published(law)
    found = ask(
        [Candidate("repeated", repeated), Candidate("dense", PublishedFit(HOFFMANN, DENSE))],
        unique_tokens=1e10,
        memory=[1e12],
    )
    run = option(found, "repeated, one for all").runs[0]
    N, D = best(law, repeated.values, 1e21, six_nd, D_unique=1e10)
    assert (run.N, run.D) == pytest.approx((float(N), float(D)))
    assert option(found, "dense, one for all").runs[0].D <= 4e10 * (1 + 1e-9)


def test_serving_is_paid_for():
    found = ask(known(), inference_tokens=1e12, memory=[1e12])
    run = option(found, "dense, one for all").runs[0]
    assert run.flops == pytest.approx(6 * run.N * run.D + 2 * run.N * 1e12)
    assert run.flops == pytest.approx(1e21)
    assert run.N < option(ask(known(), memory=[1e12]), "dense, one for all").runs[0].N


def test_a_mixture_holds_more_than_it_uses():
    mixture = Candidate(
        "mixture", PublishedFit.published(MIXTURE), given={"E": 8.0}, stored=5.0, active=1.0
    )
    found = ask([mixture, Candidate("dense", PublishedFit(HOFFMANN, DENSE))], memory=[4e9])
    run = option(found, "mixture, one for all").runs[0]
    assert run.N <= 4e9 / 2 / 5 * (1 + 1e-9)
    careless = Candidate("mixture", PublishedFit.published(MIXTURE), given={"E": 8.0})
    notes = ask([careless, *known()], memory=[4e9]).notes
    assert any("stores more parameters" in note for note in notes)


def test_a_law_of_other_models_is_named():
    dense_law_of_a_mixture = Candidate(
        "mixture", PublishedFit(HOFFMANN, DENSE), "sparse", stored=4.0
    )
    found = ask([dense_law_of_a_mixture, *known()], memory=[4e9])
    assert "mixture, one for all: `hoffmann` is a law of dense models, not of sparse ones." in (
        found.notes
    )
    winner = found.options[0].candidate.source.law
    assert all(
        f"Known limit of `{winner.name}`: {text}" in found.notes for text in winner.domain.failures
    )


def test_the_branch_law_tells_members_apart(fits):
    dense, family = fits
    branch = PublishedFit.published(get_law("branch"))
    candidate = Candidate("family", family, branch=branch)
    found = ask([Candidate("dense", dense), candidate], training_flops=1e22)
    told = option(found, "family, one family")
    run = told.runs[0]
    for device, share in enumerate(run.members):
        expected = branch.predict(N=share * run.N, D=run.D, U=device, V=1 - device)
        assert told.losses[device] == pytest.approx(float(expected))
    assert not any("there is no branch law" in note for note in found.notes)


def test_it_is_no_surer_than_its_inputs(fits):
    dense, family = fits
    sure = ask([Candidate("dense", dense), Candidate("family", family)], training_flops=1e22)
    vague = ask(
        [Candidate("dense", dense, error=0.05), Candidate("family", family, error=0.05)],
        training_flops=1e22,
    )
    assert sure.winner == vague.winner
    assert sure.confidence > vague.confidence
    assert vague.confidence < 0.8
    published = ask(known(), training_flops=1e22)
    gap = np.log(option(published, "dense, one for all").loss / published.options[0].loss)
    # two laws whose errors are 2% each
    assert published.confidence <= norm.cdf(gap / UNKNOWN / np.sqrt(2)) + 0.05
    assert any("not all fitted to one table" in note for note in published.notes)


def test_confidence_falls_with_extrapolation(fits):
    """The same coefficients and errors, once with runs that are seven decades away."""
    arguments = {"training_flops": 1e28, "memory": [2e13, 4e13], "unique_tokens": 1e16}
    sources = {
        "fitted": fits,
        "given": [PublishedFit(answer.law, answer.values) for answer in fits],
    }
    found = {
        kind: ask(
            [Candidate(name, s, error=0.002) for name, s in zip("df", pair, strict=True)],
            **arguments,
        )
        for kind, pair in sources.items()
    }
    assert found["fitted"].winner == found["given"].winner
    assert found["fitted"].confidence < found["given"].confidence - 0.03


def test_what_would_change_the_answer():
    found = ask(known(gamma=0.02), training_flops=3e21)
    changed = [row for row in found.sensitivity if row.changes]
    assert changed
    for row in changed:
        assert row.winner != found.winner
        low, high = sorted((1.0, row.factor))
        assert low <= row.turns_at <= high
    row = next(r for r in changed if r.assumption in ("training_flops", "memory"))
    change = {
        "training_flops": {"training_flops": 3e21 * row.turns_at},
        "memory": {"training_flops": 3e21, "memory": [2e9 * row.turns_at, 4e9 * row.turns_at]},
    }[row.assumption]
    assert ask(known(gamma=0.02), **change).winner != found.winner
    unchanged = [row for row in found.sensitivity if not row.changes]
    assert all(row.turns_at is None and row.winner == found.winner for row in unchanged)


def test_the_sentence(fits):
    found = ask([Candidate("dense", fits[0]), Candidate("family", fits[1])], training_flops=1e22)
    assert found.winner in found.sentence
    assert f"{found.confidence:.0%}" in found.sentence
    assert "nats per token" in found.sentence


def test_advice_repeats_itself(fits):
    first, again = (ask(list(fits), training_flops=1e22, seed=3) for _ in range(2))
    assert first.chances == again.chances


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unique_tokens": 0}, "`unique_tokens` must be positive"),
        ({"training_flops": -1}, "`training_flops` must be positive"),
        ({"memory": []}, "`memory` must be one or more"),
        ({"memory": [0.0]}, "`memory` must be positive"),
        ({"inference_tokens": -1}, "`inference_tokens` must be 0 or more"),
    ],
)
def test_wrong_situations(changes, words):
    with pytest.raises(ScalingError, match=words):
        ask(known(), **changes)


def test_wrong_candidates(fits):
    with pytest.raises(ScalingError, match="must differ in name"):
        ask([fits[0], fits[0]])
    with pytest.raises(ScalingError, match="two or more options to choose from"):
        ask([fits[0]], memory=[1e9])
    with pytest.raises(ScalingError, match=r"give a value for E"):
        Candidate("mixture", PublishedFit.published(MIXTURE))
    with pytest.raises(ScalingError, match="a law of N and D"):
        Candidate("line", PublishedFit(get_law("power"), {}))
    with pytest.raises(ScalingError, match="does not use G"):
        Candidate("family", fits[0], kind="familial")
    with pytest.raises(ScalingError, match="rising"):
        Situation(1e9, 1e20, 0, (2.0, 1.0))


# laws whose losses do not compare


def fitted(data, seed=0, **facts):
    """A candidate of a law fitted to runs of its own."""
    columns = isoflop_design(HOFFMANN, DENSE, [1e19, 1e20, 1e21])
    runs = simulate(HOFFMANN, DENSE, columns, noise=0.003, seed=seed)
    told = None if data is None else Facts(**{**FACTS, "data": data, **facts})
    return Candidate(f"{data}-{seed}", fit(HOFFMANN, runs), facts=told)


FACTS = {"loss": "eval_loss_mean", "vocab_size": 50_000, "size": "total"}


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (("web",), ("books", 1), "their runs have different data, web and books"),
        (("web",), ("web", 1, {"vocab_size": 300}), "different vocabularies, 50000 and 300"),
        (("web",), ("web", 1, {"loss": "loss_mean"}), "one uses the loss 'eval_loss_mean'"),
        (("",), ("", 1), "do not name the data and the tokenizer"),
        ((None,), (None, 1), "the data and the tokenizer of their runs are unknown"),
    ],
)
def test_laws_of_other_runs_are_not_ranked(first, second, reason):
    one, other = (fitted(*c[:2], **(c[2] if len(c) > 2 else {})) for c in (first, second))
    found = ask([one, other])
    assert found.winner == ""
    assert found.confidence is None
    assert found.sensitivity == ()
    assert found.sentence.startswith("No ranking: ")
    assert reason in found.sentence
    assert len(found.options) == 4
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (record["winner"], record["confidence"]) == (None, None)
    ranked = ask([one, other], losses_compare=True)
    assert ranked.winner
    assert sum(ranked.chances.values()) == pytest.approx(1)


def test_laws_of_the_same_data_tokenizer_and_loss_are_ranked():
    assert ask([fitted("web"), fitted("web", 1)]).winner
    # of one exit the mean loss is the final loss
    dense = fitted("web", 1, loss="eval_loss_final", dense=True)
    assert ask([fitted("web"), dense]).winner


def test_of_several_groups_each_is_ranked_by_itself():
    found = ask([fitted("web"), fitted("books", 1), fitted("web", 2)])
    assert found.winner == ""
    shares = {name: share for name, share in found.chances.items() if name.startswith("web")}
    assert sum(shares.values()) == pytest.approx(1)
    assert len(found.incomparable) == 1


def test_published_laws_of_different_papers_are_not_ranked():
    frantar = Candidate("frantar", PublishedFit.published(get_law("frantar")), given={"S": 0.5})
    dense = Candidate("dense", PublishedFit.published(HOFFMANN))
    found = ask([frantar, dense])
    assert found.winner == ""
    assert "their coefficients come from arXiv 2309.08520" in found.sentence


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"G": 4.0}, "leave G out, because there is one exit"),
        ({"N": 1e9}, "leave N out, because the planner"),
        ({"Q": 1.0}, "`Q` is not in its law"),
    ],
)
def test_what_a_candidate_need_not_give_is_named(given, words):
    with pytest.raises(ScalingError, match=words):
        Candidate("family", PublishedFit(FAMILIAL, TRUTH), given=given)

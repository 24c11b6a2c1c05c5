"""Drafts cost what they should, and what is kept of them has the deepest exit's distribution."""

from types import SimpleNamespace

import pytest
import torch
from reference import agreeing, endless, logits, tiny_family, token_ids
from relays import ASKED, DRAFTS, EXITS, family_of, untrained

from hf_familial import ConfidenceRelay, FamilialConfig, FamilialForCausalLM, SpeculativeRelay
from hf_familial.models.familial.configuration_familial import Accelerator
from hf_familial.models.familial.relay_policies import DraftedTokens, SpeculativeDecoder


def test_shallow_layers_see_the_prompt_once():
    """The bound of the field's slow way: 218 positions for 100 + 8 tokens; here 107 and drafts."""
    family, ids = family_of(), token_ids(1, 100)
    for relay in (SpeculativeRelay(0, draft_length=3), SpeculativeRelay(0)):
        stats = family.relay_generate(ids, relay=relay, **ASKED | {"max_new_tokens": 8}).relay_stats
        rejected = stats.drafted - stats.accepted
        assert stats.positions[0] <= 107 + rejected
        assert stats.positions[1] <= 107 + rejected


def test_drafts_that_agree_are_all_accepted():
    family, ids = endless(tiny_family("llama", EXITS)), token_ids(1, 12)
    agreeing(family, share=0.0)  # the layers above the first exit say nothing
    relay = SpeculativeRelay(0, draft_length=4)
    stats = family.relay_generate(ids, relay=relay, **ASKED | {"max_new_tokens": 15}).relay_stats
    assert (stats.rounds, stats.drafted, stats.accepted) == (3, 12, 12)
    assert (stats.acceptance, stats.tokens_per_round) == (1.0, 5.0)
    assert stats.token_exits[0].tolist() == [0, 0, 0, 0, 2] * 3
    assert stats.positions == (26, 26)


def test_the_draft_exit_that_pays_is_found():
    """Exit 0 is never right, exit 1 always: after a trial of both, the second drafts."""
    family, ids = endless(tiny_family("llama", [1, 2, 8], depth=8)), token_ids(1, 12)
    agreeing(family, share=1.0)
    with torch.no_grad():
        for layer in family.model.decoder.layers[2:]:
            for parameter in layer.parameters():
                parameter.mul_(float(parameter.dim() < 2))
    # sampled at next to no temperature: costs are counted in layers then, not by a clock
    asked = ASKED | {"max_new_tokens": 100, "do_sample": True, "temperature": 1e-3}
    stats = family.relay_generate(ids, relay=SpeculativeRelay("auto"), **asked).relay_stats
    late = stats.token_exits[0, 50:]
    assert (late == 1).sum() > 0.5 * len(late)
    assert (late == 0).sum() < 0.1 * len(late)


def test_auto_stops_drafting_what_is_never_accepted():
    family, ids = endless(tiny_family("llama", EXITS)), token_ids(1, 12)
    asked = ASKED | {"max_new_tokens": 80}
    auto = family.relay_generate(ids, relay=SpeculativeRelay(0), **asked).relay_stats
    fixed = family.relay_generate(ids, relay=SpeculativeRelay(0, draft_length=4), **asked)
    assert auto.acceptance < 0.5
    assert auto.drafted <= 0.2 * fixed.relay_stats.drafted


@pytest.mark.parametrize("new", [8, 32, 128])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_first_text_runs_no_layer_for_drafts_that_would_be_wrong(model_type, new):
    """The draft exit of a family is read a few times, in the pass of the head that runs anyway."""
    family, ids = untrained(model_type), token_ids(1, 12)
    asked = ASKED | {"max_new_tokens": new}
    for _ in range(2):
        stats = family.relay_generate(ids, **asked).relay_stats
        assert stats.drafted == 0
        assert stats.layer_passes == stats.plain_layer_passes


DRAWS, TOKENS = 20_000, 16


def small_vocabulary():
    config = {
        "model_type": "llama", "vocab_size": TOKENS, "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 3, "num_attention_heads": 2, "initializer_range": 0.6,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    family = FamilialForCausalLM(FamilialConfig(text_config=config, exits=[1, 2, 3])).eval()
    return endless(family)


def chi_square(found, chances, draws):
    """Statistic over its mean under the hypothesis, for expected counts of five or more."""
    expected = chances * draws
    kept = expected >= 5
    found = torch.cat([found[kept], found[~kept].sum()[None]])
    expected = torch.cat([expected[kept], expected[~kept].sum()[None]])
    kept = expected > 0
    return ((found - expected)[kept] ** 2 / expected[kept]).sum().item(), int(kept.sum()) - 1


TWO, CHAIN = SpeculativeRelay(0, draft_length=2), SpeculativeRelay((0, 1), draft_length=1)
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "warp", [{"top_k": 0}, {"temperature": 0.7, "top_k": 6}], ids=["plain", "top-k"]
)
@pytest.mark.parametrize(
    ("relay", "draws", "batch"),
    [
        pytest.param(TWO, 20_000, 500, id="two"),
        # few rows, so that several drafts in a row are accepted
        pytest.param(TWO, 6_000, 2, id="two-rows", marks=slow),
        pytest.param(TWO, 5_000, 1, id="one-row", marks=slow),
        pytest.param(CHAIN, 6_000, 2, id="chain", marks=slow),
        pytest.param(SpeculativeRelay(0), 5_000, 1, id="auto", marks=slow),
    ],
)
@torch.no_grad()
def test_sampled_text_has_the_deepest_exits_distribution(relay, draws, batch, warp):
    """The second and third token after a prompt: counts against exact chances."""
    family, ids = small_vocabulary(), torch.tensor([[3, 1, 4]])

    def chances(texts):
        scores = logits(family, texts)[:, -1] / warp.get("temperature", 1.0)
        if warp["top_k"]:
            floor = scores.topk(warp["top_k"]).values[:, -1:]
            scores = scores.masked_fill(scores < floor, float("-inf"))
        return scores.softmax(-1)

    def longer(texts):
        count = len(texts)
        ends = torch.arange(TOKENS).repeat(count)[:, None]
        return torch.cat([texts.repeat_interleave(TOKENS, 0), ends], 1)

    ones, twos = longer(ids), longer(longer(ids))
    pairs = chances(ids).flatten()[:, None] * chances(ones)
    triples = (pairs.flatten()[:, None] * chances(twos)).view(TOKENS, TOKENS, TOKENS)
    torch.manual_seed(1)
    counts = torch.zeros(TOKENS * TOKENS)
    prompt = ids.expand(batch, -1)
    for _ in range(draws // batch):
        text = family.relay_generate(prompt, relay=relay, max_new_tokens=4, do_sample=True, **warp)
        counts += torch.bincount(text[:, 4] * TOKENS + text[:, 5], minlength=TOKENS * TOKENS)
    statistic, freedom = chi_square(counts, triples.sum(0).flatten(), draws)
    assert statistic <= freedom + 4.5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("ran", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_a_check_keeps_the_distribution_at_every_place(batch, ran):
    """Drafts of one distribution, checked against another that does not depend on the text."""
    torch.manual_seed(3)
    wanted = torch.randn(3 if ran else 2, TOKENS).mul(1.5)
    given = wanted[:2] + torch.randn(2, TOKENS)  # close enough to be accepted now and then
    rows = torch.ones(batch, dtype=torch.bool)
    text = SimpleNamespace(do_sample=True, unfinished=rows, kept_rows=rows)
    text.draw = lambda chances, column: torch.multinomial(chances, 1)
    text.uniform = lambda drafts, column: torch.rand(drafts.shape)
    check = SpeculativeDecoder.accept
    me = SimpleNamespace(text=text)
    me._fewest = lambda right: SpeculativeDecoder._fewest(me, right)
    counts, rounds = torch.zeros(len(wanted), TOKENS), 6_000 // batch
    drafts = torch.stack([torch.multinomial(q.softmax(-1), rounds * batch, True) for q in given], 1)
    scores = list(given[:, None].expand(-1, batch, -1))
    for tokens in drafts.split(batch):
        drafted = DraftedTokens(tokens, 0, scores, torch.zeros_like(tokens), ran)
        found, _, _ = check(me, drafted, wanted.expand(batch, -1, -1))
        for place in range(found.shape[1]):
            counts[place] += torch.bincount(found[:, place], minlength=TOKENS)
    assert counts[0].sum() == rounds * batch
    assert counts.sum(1).min() > 300
    for place, row in enumerate(counts):
        statistic, freedom = chi_square(row, wanted[place].softmax(-1), row.sum())
        assert statistic <= freedom + 4.5 * (2 * freedom) ** 0.5, place


@pytest.mark.parametrize(
    "relay", [SpeculativeRelay(0), ConfidenceRelay(0.05)], ids=["draft", "sure"]
)
def test_a_seed_repeats_a_sampled_text(relay):
    family, ids = family_of(), token_ids(2, 12)
    texts = []
    for _ in range(2):
        torch.manual_seed(5)
        texts.append(family.relay_generate(ids, relay=relay, max_new_tokens=20, do_sample=True))
    assert torch.equal(*texts)


# --- without the package


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", DRAFTS)
def test_a_family_relays_without_the_package(name, sampled):
    """Its text is `generate`'s, and a seed repeats it."""
    family, ids, relay = family_of(), token_ids(2, 12), DRAFTS[name]
    family._accelerator = Accelerator()
    asked = ASKED | {"do_sample": sampled}
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(family.relay_generate(ids, relay=relay, **asked).sequences)
    assert torch.equal(*texts)
    if not sampled:
        plain = family.generate(ids, exit_idx=relay.exit_idx, **asked)
        assert torch.equal(texts[0], plain.sequences)


def test_lengths_follow_the_plain_rule():
    me = SimpleNamespace(fixed=None, draft_length=4, rounds=0, drafted=0, accepted=0)
    for count, right, length in ((4, 4, 6), (6, 6, 8), (8, 3, 7), (0, 0, 7), (1, 0, 6)):
        SpeculativeDecoder.learn(me, SimpleNamespace(tokens=torch.zeros(1, count)), 2, None, right)
        assert me.draft_length == length
    assert (me.rounds, me.drafted, me.accepted) == (5, 19, 13)
    for _ in range(9):
        SpeculativeDecoder.learn(me, SimpleNamespace(tokens=torch.zeros(1, 2)), 2, None, 0)
    assert me.draft_length == 1

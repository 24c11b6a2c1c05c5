"""A relay writes what `generate` writes, and says truly how."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from reference import agreeing, endless, logits, tiny_family, token_ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

from hf_familial import (
    ConfidenceRelay,
    FamilialConfig,
    FamilialForCausalLM,
    FixedExit,
    HandoffRelay,
    RelayOutput,
    RelayPolicy,
    RelayStats,
    SpeculativeRelay,
    relay_decode,
)
from hf_familial.decoding import _fused
from hf_familial.models.familial.speculation import DraftedTokens, SpeculativeDecoder
from hf_familial.models.policies import confidence


EXITS = [1, 3, 4]
NEW = 14
ASKED = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
FAMILIES = ("llama", "gemma2", "qwen3_moe", "gpt2")

DRAFTS = {
    "one": SpeculativeRelay(0, draft_length=1),
    "three": SpeculativeRelay(0, draft_length=3),
    "auto": SpeculativeRelay(0),
    "any-exit": SpeculativeRelay("auto"),
    "middle": SpeculativeRelay(1, draft_length=4),
    "chain": SpeculativeRelay((0, 1), draft_length=2),
    "shallow": SpeculativeRelay(0, draft_length=2, exit_idx=1),
}
DEEPEST = {
    **{name: relay for name, relay in DRAFTS.items() if name != "shallow"},
    "never-sure": ConfidenceRelay(1.1),
    "fixed": FixedExit(),
    "at-once": HandoffRelay(after=0),
}


def family_of(model_type="llama", **fields):
    return endless(agreeing(tiny_family(model_type, EXITS, **fields)))


def padding(ids):
    mask = torch.ones_like(ids)
    for row in range(ids.shape[0]):
        mask[row, : (3 * row) % 5] = 0
    return mask


@pytest.mark.parametrize("relay", DEEPEST.values(), ids=DEEPEST)
@pytest.mark.parametrize("private", [0, 1])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_text_is_the_deepest_exits(model_type, private, relay):
    family, ids = family_of(model_type, num_exit_layers=private), token_ids(3, 12)
    for mask in (torch.ones_like(ids), padding(ids)):
        plain = family.generate(ids, attention_mask=mask, **ASKED)
        found = family.relay_generate(ids, attention_mask=mask, relay=relay, **ASKED)
        assert torch.equal(found.sequences, plain.sequences)
        lengths = [layer.get_seq_length() for layer in plain.past_key_values.layers]
        ours = [layer.get_seq_length() for layer in found.past_key_values.layers]
        assert ours == lengths


def test_a_relay_to_another_exit_writes_that_ones_text():
    family, ids = family_of(), token_ids(2, 12)
    plain = family.generate(ids, exit_idx=1, **ASKED)
    for relay in (DRAFTS["shallow"], FixedExit(1), ConfidenceRelay(1.1, exit_idx=1)):
        found = family.relay_generate(ids, relay=relay, **ASKED)
        assert torch.equal(found.sequences, plain.sequences)
        assert found.past_key_values is None


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_two_hundred_prompts(model_type, batch):
    """Drafts are accepted and rejected, and the text never differs."""
    family = family_of(model_type)
    drafted = accepted = 0
    for seed in range(0, 200, batch):
        ids = token_ids(batch, 6 + seed % 11, seed=seed)
        plain = family.generate(ids, max_new_tokens=24, do_sample=False)
        relay = list(DRAFTS.values())[seed // batch % 6]
        found = family.relay_generate(ids, relay=relay, **ASKED | {"max_new_tokens": 24})
        assert torch.equal(found.sequences, plain), seed
        drafted += found.relay_stats.drafted
        accepted += found.relay_stats.accepted
    assert 0 < accepted < drafted


def test_half_precision_draws_no_other_text_but_at_ties():
    """Each token is within rounding of the best that the full pass would give it."""
    family, ids = family_of().to(torch.bfloat16), token_ids(2, 12)
    found = family.relay_generate(ids, relay=DRAFTS["three"], **ASKED).sequences
    scores = logits(family, found)[:, 11:-1].float()
    chosen = scores.gather(2, found[:, 12:, None]).squeeze(-1)
    assert (scores.amax(-1) - chosen).max() <= 0.02 * scores.abs().max()


# --- per-row decisions


@pytest.mark.parametrize(
    "relay",
    [
        ConfidenceRelay(0.05),
        ConfidenceRelay({0: 0.03, 1: 0.06}),
        ConfidenceRelay({1: 0.05}, measure="margin"),
        ConfidenceRelay(0.2, measure="entropy"),
        HandoffRelay(below=0.06, window=3),
        HandoffRelay(from_exit=1, after=5),
    ],
    ids=repr,
)
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "falcon_h1"])
def test_one_row_never_decides_for_another(model_type, relay):
    """Rows of a batch write what each writes alone: no exit is forced on any."""
    family, ids = family_of(model_type), token_ids(4, 12)
    together = family.relay_generate(ids, relay=relay, **ASKED)
    for row in range(4):
        alone = family.relay_generate(ids[row : row + 1], relay=relay, **ASKED)
        assert torch.equal(together.sequences[row], alone.sequences[0])
        mixed, own = together.relay_stats.token_exits[row], alone.relay_stats.token_exits[0]
        assert torch.equal(mixed, own)


def slow_confidence_relay(family, ids, thresholds, steps):
    """The oracle: every token from uncached passes, row by row, exit by exit."""
    texts, exits = [], []
    for row in ids:
        text, taken = row[None], []
        for _ in range(steps):
            for k in range(len(EXITS)):
                scores = logits(family, text, exit_idx=k)[0, -1]
                if k == len(EXITS) - 1 or scores.softmax(-1).max() >= thresholds[k]:
                    break
            text = torch.cat([text, scores.argmax()[None, None]], 1)
            taken.append(k)
        texts.append(text[0])
        exits.append(taken)
    return torch.stack(texts), torch.tensor(exits)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("private", [0, 1])
def test_confidence_is_the_oracles(model_type, private):
    family, ids = family_of(model_type, num_exit_layers=private), token_ids(3, 12)
    thresholds = {
        k: logits(family, ids, exit_idx=k).softmax(-1).amax(-1).quantile(0.61).item()
        for k in (0, 1)
    }
    found = family.relay_generate(ids, relay=ConfidenceRelay(thresholds), **ASKED)
    texts, exits = slow_confidence_relay(family, ids, thresholds, NEW)
    assert torch.equal(found.sequences, texts)
    assert torch.equal(found.relay_stats.token_exits, exits)
    assert exits.unique().tolist() == [0, 1, 2]  # or nothing was tried


def test_a_confident_relay_saves_layers():
    family, ids = family_of(), token_ids(1, 12)
    stats = family.relay_generate(ids, relay=ConfidenceRelay(0.0), **ASKED).relay_stats
    assert stats.positions == (25, 0, 0)
    assert (stats.layer_passes, stats.plain_layer_passes) == (25, 100)
    assert 0.5 < stats.flops_saved < 1
    assert stats.token_exits.unique().tolist() == [0]


def test_what_is_handed_over_does_not_come_back():
    family, ids = family_of(), token_ids(3, 12)
    exits = family.relay_generate(ids, relay=HandoffRelay(after=4), **ASKED).relay_stats.token_exits
    assert exits[:, :4].unique().tolist() == [0]
    assert exits[:, 4:].unique().tolist() == [2]


@dataclass(frozen=True)
class EveryOther(RelayPolicy):
    """A policy of a user's own: shallow and deep in turn."""

    def exits(self, num_exits):
        return 0, -1

    def new_state(self, batch_size):
        return {"count": 0}

    def leaves(self, exit_idx, logits, state):
        state["count"] += 1
        return torch.full((len(logits),), state["count"] % 2 == 1)


def test_a_policy_of_ones_own():
    family, ids = family_of(), token_ids(2, 12)
    exits = family.relay_generate(ids, relay=EveryOther(), **ASKED).relay_stats.token_exits
    assert exits.tolist() == [[0, 2] * 7] * 2


# --- the numbers of speculation


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


def untrained(model_type):
    """A family whose first exit never agrees with the deepest."""
    family = endless(tiny_family(model_type, EXITS))
    with torch.no_grad():
        family.model.members.norm(0).weight.neg_()
    return family


def test_drafts_are_prepared_ahead(monkeypatch):
    family, ids = family_of(), token_ids(1, 12)
    with pytest.raises(ValueError, match="call `eval\\(\\)`"):
        family.train().prepare_drafts()
    family.eval().prepare_drafts()
    monkeypatch.setattr(_fused, "_agrees", None)  # to compare again would fail
    plain = family.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(family.relay_generate(ids, max_new_tokens=NEW, do_sample=False), plain)


# --- sampling

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
    check = SpeculativeDecoder._accept
    me = SimpleNamespace(text=text)
    me._fewest = lambda right: SpeculativeDecoder._fewest(me, right)
    me._drawn = lambda *args: SpeculativeDecoder._drawn(me, *args)
    counts, rounds = torch.zeros(len(wanted), TOKENS), 6_000 // batch
    drafts = torch.stack([torch.multinomial(q.softmax(-1), rounds * batch, True) for q in given], 1)
    scores = list(given[:, None].expand(-1, batch, -1))
    for tokens in drafts.split(batch):
        drafted = DraftedTokens(tokens, scores, torch.zeros_like(tokens), ran)
        found, _, _ = check(me, 0, drafted, wanted.expand(batch, -1, -1))
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


# --- as `generate` does it


@pytest.mark.parametrize(
    "relay", [DRAFTS["three"], DRAFTS["chain"], ConfidenceRelay(1.1)], ids=repr
)
def test_scores_and_logits_are_generates(relay):
    family, ids = family_of(), token_ids(2, 12)
    asked = ASKED | {"output_scores": True, "output_logits": True, "repetition_penalty": 1.4}
    plain = family.generate(ids, **asked)
    found = family.relay_generate(ids, relay=relay, **asked)
    assert isinstance(found, RelayOutput)
    assert torch.equal(found.sequences, plain.sequences)
    assert len(found.scores) == len(found.logits) == NEW
    for name in ("scores", "logits"):
        for ours, right in zip(found[name], plain[name], strict=True):
            assert (ours - right).abs().max() <= 1e-4


def test_processors_see_the_text_before_each_token():
    family, ids = family_of(), token_ids(2, 12)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7)])
    asked = {"max_new_tokens": NEW, "do_sample": False, "no_repeat_ngram_size": 2}
    plain = family.generate(ids, logits_processor=processors, **asked)
    for relay in DEEPEST.values():
        found = family.relay_generate(ids, logits_processor=processors, relay=relay, **asked)
        assert torch.equal(found, plain)


@pytest.mark.parametrize("relay", DEEPEST.values(), ids=DEEPEST)
def test_rows_end_one_by_one(relay):
    family, ids = family_of(), token_ids(3, 12)
    plain = family.generate(ids, max_new_tokens=24, do_sample=False)[:, 12:]
    ends = sorted({int(plain[0, 4]), int(plain[1, 9])})
    asked = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
    right = family.generate(ids, **asked)
    found = family.relay_generate(ids, relay=relay, return_dict_in_generate=True, **asked)
    assert torch.equal(found.sequences, right)
    exits = found.relay_stats.token_exits
    ended = (right[:, 12:] == 0) & torch.isin(right[:, 12:], torch.tensor(ends)).cumsum(1).bool()
    assert torch.equal(exits == -1, ended)
    assert ended.any()


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("relay", DEEPEST.values(), ids=DEEPEST)
def test_the_streamer_gets_everything_once(relay):
    family, ids = family_of(), token_ids(1, 12)
    recorder = Recorder()
    text = family.relay_generate(
        ids, relay=relay, streamer=recorder, max_new_tokens=NEW, do_sample=False
    )
    assert (recorder.tokens, recorder.ended) == (text[0].tolist(), 1)


def test_stopping_criteria_see_every_token():
    family, ids = family_of(), token_ids(1, 12)
    lengths = []

    def at_seventeen(input_ids, scores, **kwargs):
        lengths.append(input_ids.shape[1])
        return torch.tensor([input_ids.shape[1] >= 17])

    text = family.relay_generate(
        ids,
        relay=DRAFTS["three"],
        stopping_criteria=StoppingCriteriaList([at_seventeen]),
        **ASKED,
    )
    assert text.sequences.shape == (1, 17)
    assert lengths == list(range(13, 18))
    assert text.past_key_values.get_seq_length() == 16


def test_stop_strings():
    letters = Tokenizer(models.WordLevel({chr(33 + i): i for i in range(128)}, unk_token="!"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
    family, ids = family_of(), token_ids(1, 12)
    plain = family.generate(ids, max_new_tokens=NEW, do_sample=False)
    stop = tokenizer.convert_ids_to_tokens(int(plain[0, 15]))
    asked = {"max_new_tokens": NEW, "do_sample": False, "stop_strings": [stop]}
    right = family.generate(ids, tokenizer=tokenizer, **asked)
    found = family.relay_generate(ids, relay=DRAFTS["three"], tokenizer=tokenizer, **asked)
    assert torch.equal(found, right)
    assert right.shape[1] <= 16
    with pytest.raises(ValueError, match="the model's tokenizer"):
        family.relay_generate(ids, **asked)


def test_a_talk_goes_on_from_its_cache():
    family, ids = family_of(), token_ids(1, 12)
    first = family.relay_generate(ids, relay=DRAFTS["three"], **ASKED)
    longer = torch.cat([first.sequences, token_ids(1, 5, seed=9)], 1)
    whole = family.generate(longer, **ASKED)
    for relay in (DRAFTS["three"], ConfidenceRelay(1.1)):
        past = family.relay_generate(ids, relay=relay, **ASKED).past_key_values
        found = family.relay_generate(longer, relay=relay, past_key_values=past, **ASKED)
        assert torch.equal(found.sequences, whole.sequences)
        assert sum(found.relay_stats.positions[-1:]) <= 5 + 1 + 2 * NEW


def test_it_is_a_decoding_method_of_generate():
    family, ids = family_of(), token_ids(2, 12)
    asked = {"max_new_tokens": NEW, "do_sample": False}
    plain = family.generate(ids, **asked)
    config = GenerationConfig(**asked, pad_token_id=0)
    relay = SpeculativeRelay(draft_exit=1)
    ways = [
        family.generate(ids, custom_generate=relay_decode, relay=relay, **asked),
        family.generate(ids, custom_generate=relay_decode, **asked),
        family.relay_generate(input_ids=ids, generation_config=config),
        family.relay_generate(
            inputs_embeds=family.get_input_embeddings()(ids), relay=relay, **asked
        ),
    ]
    for found in ways[:3]:
        assert torch.equal(found, plain)
    assert torch.equal(ways[3], plain[:, 12:])


def test_threads_do_not_disturb_each_other():
    family = family_of()
    prompts = [token_ids(1, 12, seed=seed) for seed in range(8)]
    plain = [family.generate(ids, max_new_tokens=NEW, do_sample=False) for ids in prompts]

    def write(ids):
        return family.relay_generate(ids, max_new_tokens=NEW, do_sample=False)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(write, prompts))
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert family.accelerator.draft_lengths  # learned, and no thread's alone


def test_several_texts_of_one_prompt():
    family, ids = family_of(), token_ids(1, 12)
    asked = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": NEW}
    assert family.relay_generate(ids, relay=DRAFTS["three"], **asked).shape == (3, 26)


# --- what is refused, before anything runs


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_beams": 2}, "generation mode `beam_search`"),
        ({"use_cache": False}, "lives in the cache"),
        ({"exit_idx": 1}, "`SpeculativeRelay\\(exit_idx=1\\)`, not beside it"),
        ({"cache_implementation": "static"}, "needs a `DynamicCache`"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"relay": "fast"}, "`relay` must be a `SpeculativeRelay`.* got str"),
        ({"relay": SpeculativeRelay(2)}, "must be shallower"),
        ({"relay": ConfidenceRelay({2: 0.5})}, "go deeper one after the other"),
        ({"prompt_lookup_num_tokens": 3}, "leave out `prompt_lookup_num_tokens`, and say how"),
    ],
    ids=str,
)
def test_what_a_relay_does_not_do(asked, message):
    family, ids = family_of(), token_ids(1, 12)
    with pytest.raises(ValueError, match=message):
        family.relay_generate(ids, max_new_tokens=3, **asked)


def test_an_exit_that_is_not_there():
    family, ids = family_of(), token_ids(1, 12)
    for relay in (FixedExit(3), HandoffRelay(to_exit=5, after=1), ConfidenceRelay({4: 0.1})):
        with pytest.raises(IndexError, match="exits 0 to 2"):
            family.relay_generate(ids, relay=relay, max_new_tokens=3)


def test_the_hosts_early_exit_points_to_ours():
    family, ids = family_of(), token_ids(1, 12)
    with pytest.raises(ValueError, match="relay_generate"):
        family.generate(ids, assistant_early_exit=2, max_new_tokens=3)
    assert family.config.num_hidden_layers == 4


@pytest.mark.parametrize(
    "make",
    [
        lambda: SpeculativeRelay(draft_length=0),
        lambda: SpeculativeRelay("deep"),
        lambda: SpeculativeRelay(None),
        lambda: SpeculativeRelay(0.0),
        lambda: SpeculativeRelay(draft_length="some"),
        lambda: ConfidenceRelay("high"),
        lambda: ConfidenceRelay({-2: 0.5}),
        lambda: ConfidenceRelay(float("nan")),
        lambda: ConfidenceRelay(measure="guess"),
        lambda: HandoffRelay(),
        lambda: HandoffRelay(after=-1),
        lambda: HandoffRelay(below=0.5, window=0),
    ],
)
def test_a_policy_that_makes_no_sense(make):
    with pytest.raises(ValueError, match="must|needs a rule"):
        make()


def test_a_prompt_that_the_cache_holds_already():
    family, ids = family_of(), token_ids(1, 12)
    past = DynamicCache(config=family.config.text_config)
    family(ids, past_key_values=past)
    with pytest.raises(ValueError, match="must go beyond `past_key_values`, which holds 12"):
        family.relay_generate(ids, past_key_values=past, max_new_tokens=3)


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
def test_confidence_lies_between_0_and_1(measure):
    even, certain = torch.zeros(10), torch.full((10,), -1e4).index_fill(0, torch.tensor(3), 0.0)
    assert confidence(certain, measure) == pytest.approx(1.0)
    assert confidence(even, measure) == pytest.approx(0.1 if measure == "max_prob" else 0, abs=1e-6)
    masked = torch.tensor([0.0, 0.0, float("-inf")])
    assert 0 <= confidence(masked, measure) <= 1


@pytest.mark.parametrize(("flops", "noted"), [(150.0, True), (100.0, False), (40.0, False)])
def test_stats_say_when_a_relay_costs_more_than_plain_text(flops, noted):
    stats = RelayStats(
        token_exits=torch.zeros(1, 8, dtype=torch.long),
        exits=(0, 2),
        positions=(8, 8),
        layer_passes=30,
        plain_layer_passes=32,
        flops=flops,
        plain_flops=100.0,
        rounds=6,
        drafted=10,
        accepted=2,
        seconds=1.0,
    )
    assert bool(stats.note) == noted
    assert ("more FLOPs than plain text, 1.50 times (20% of the drafts" in str(stats)) == noted
    assert str(stats).startswith("8 tokens of 1 rows in 6 rounds; 2 of 10 drafts accepted")

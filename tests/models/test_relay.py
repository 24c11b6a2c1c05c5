"""A relay writes what `generate` writes, and says truly how."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reference import logits, token_ids
from relays import ASKED, DEEPEST, DRAFTS, NEW, family_of, padding
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
    FixedExit,
    HandoffRelay,
    RelayOutput,
    RelayStats,
    SpeculativeRelay,
    relay_decode,
)
from hf_familial.decoding import _fused


FAMILIES = ("llama", "gemma2", "qwen3_moe", "gpt2")


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


def test_drafts_are_prepared_ahead(monkeypatch):
    family, ids = family_of(), token_ids(1, 12)
    with pytest.raises(ValueError, match="Call `model.eval\\(\\)`"):
        family.train().prepare_drafts()
    family.eval().prepare_drafts()
    monkeypatch.setattr(_fused, "_agrees", None)  # to compare again would fail
    plain = family.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(family.relay_generate(ids, max_new_tokens=NEW, do_sample=False), plain)


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
        ({"use_cache": False}, "a relay needs the cache"),
        ({"exit_idx": 1}, "to the policy instead, as in `SpeculativeRelay\\(exit_idx=1\\)`"),
        ({"cache_implementation": "static"}, "needs a `DynamicCache`"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"relay": "fast"}, "`relay` must be an instance of `SpeculativeRelay`.* got str"),
        ({"relay": SpeculativeRelay(2)}, "be shallower than `exit_idx`"),
        ({"relay": ConfidenceRelay({2: 0.5})}, "in increasing order"),
        ({"prompt_lookup_num_tokens": 3}, "`prompt_lookup_num_tokens` has no effect"),
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
    with pytest.raises(ValueError, match="must|needs `after` or"):
        make()


def test_a_prompt_that_the_cache_holds_already():
    family, ids = family_of(), token_ids(1, 12)
    past = DynamicCache(config=family.config.text_config)
    family(ids, past_key_values=past)
    with pytest.raises(ValueError, match="must be longer than `past_key_values` .12 tokens"):
        family.relay_generate(ids, past_key_values=past, max_new_tokens=3)


@pytest.mark.parametrize(
    ("flops", "noted"), [(150.0, True), (100.0, False), (40.0, False), (None, False)]
)
def test_stats_say_when_a_relay_costs_more_than_plain_text(flops, noted):
    stats = RelayStats(
        token_exits=torch.zeros(1, 8, dtype=torch.long),
        exits=(0, 2),
        positions=(8, 8),
        layer_passes=30,
        plain_layer_passes=32,
        flops=flops,
        plain_flops=None if flops is None else 100.0,
        rounds=6,
        drafted=10,
        accepted=2,
        seconds=1.0,
    )
    assert bool(stats.note) == noted
    assert ("1.50 times the FLOPs of plain decoding (20% of the drafts" in str(stats)) == noted
    assert (stats.flops_saved is None, "FLOPs" in str(stats)) == (flops is None, flops is not None)
    assert str(stats).startswith("8 tokens of 1 rows in 6 rounds; 2 of 10 drafts accepted")

"""Logits processors and stopping criteria see in a relay what they see in `generate`."""

import inspect
import re
import warnings

import pytest
import torch
from reference import token_ids, truncated_host
from relays import DEEPEST, DRAFTS, family_of
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TopKLogitsWarper,
    WatermarkingConfig,
)
from transformers.generation import logits_process

from hf_familial import ConfidenceRelay, FixedExit, HandoffRelay, SpeculativeRelay
from hf_familial.models.familial.relay import STATELESS, processors_with_memory


NEW = 12
ASKED = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
# classes of transformers that change with every call, or call a function of the user
MEMORY = {
    "DiaEOSDelayPatternLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "WhisperNoSpeechDetection",
}
SYNTHID = SynthIDTextWatermarkingConfig(keys=[654, 400, 836, 123, 340, 443], ngram_len=3)


def even_after_odd(batch_id, input_ids):
    return list(range(8, 128, 2)) if int(input_ids[-1]) % 2 else list(range(9, 128, 2))


# arguments of `generate` that make a processor, with the class that they make
GREEDY = {
    "SequenceBiasLogitsProcessor": {"sequence_bias": {(9,): 4.0, (11, 12): -3.0}},
    "EncoderRepetitionPenaltyLogitsProcessor": {"encoder_repetition_penalty": 1.5},
    "RepetitionPenaltyLogitsProcessor": {"repetition_penalty": 1.7},
    "NoRepeatNGramLogitsProcessor": {"no_repeat_ngram_size": 2},
    "EncoderNoRepeatNGramLogitsProcessor": {"encoder_no_repeat_ngram_size": 2},
    "NoBadWordsLogitsProcessor": {"bad_words_ids": [[9], [10, 11], [30], [31, 32]]},
    "MinLengthLogitsProcessor": {"min_length": 18},
    "MinNewTokensLengthLogitsProcessor": {"min_new_tokens": 7},
    "PrefixConstrainedLogitsProcessor": {"prefix_allowed_tokens_fn": even_after_odd},
    "ForcedBOSTokenLogitsProcessor": {"forced_bos_token_id": 5},
    "ForcedEOSTokenLogitsProcessor": {"forced_eos_token_id": 7},
    "InfNanRemoveLogitsProcessor": {"remove_invalid_values": True},
    "ExponentialDecayLengthPenalty": {"exponential_decay_length_penalty": (2, 1.9)},
    "SuppressTokensLogitsProcessor": {"suppress_tokens": list(range(40, 90))},
    "SuppressTokensAtBeginLogitsProcessor": {"begin_suppress_tokens": list(range(60))},
    "LogitNormalization": {"renormalize_logits": True},
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": {"guidance_scale": 1.7},
    "WatermarkLogitsProcessor": {"watermarking_config": WatermarkingConfig(bias=3.0)},
}
SAMPLED = {
    "TemperatureLogitsWarper": {"temperature": 0.8},
    "TopHLogitsWarper": {"top_h": 0.7},
    "TopKLogitsWarper": {"top_k": 9},
    "TopPLogitsWarper": {"top_p": 0.8},
    "MinPLogitsWarper": {"min_p": 0.4},
    "TypicalLogitsWarper": {"typical_p": 0.7},
    "EpsilonLogitsWarper": {"epsilon_cutoff": 0.01},
    "EtaLogitsWarper": {"eta_cutoff": 0.02},
}


def stops(family, ids):
    """Tokens that end rows of a text in its middle."""
    plain = family.generate(ids, max_new_tokens=NEW, do_sample=False)[:, ids.shape[1] :]
    return {"eos_token_id": sorted({int(plain[0, 3]), int(plain[-1, 7])}), "pad_token_id": 0}


# --- which processors have a memory


def test_every_processor_of_the_host_is_known():
    kinds = inspect.getmembers(logits_process, inspect.isclass)
    found = {
        name
        for name, kind in kinds
        if issubclass(kind, LogitsProcessor) and kind.__module__ == logits_process.__name__
    }
    assert found - {"LogitsProcessor"} == STATELESS | MEMORY
    assert not STATELESS & MEMORY


def test_every_processor_that_arguments_make_is_tried():
    source = inspect.getsource(GenerationMixin._get_logits_processor)
    made = set(re.findall(r"processors\.append\(\s*(\w+)\(", source))
    assert made == (GREEDY.keys() | SAMPLED.keys()) - {"WatermarkLogitsProcessor"}


def direct(ids):
    """One of each class that has no memory, made anew by every call."""
    made = {
        "AlternatingCodebooksLogitsProcessor": (3, 20, 30),
        "BarkEosPrioritizerLogitsProcessor": (2, 0.001),
        "ClassifierFreeGuidanceLogitsProcessor": (1.5,),
        "DiaClassifierFreeGuidanceLogitsProcessor": (1.5, 5),
        "DiaEOSChannelFilterLogitsProcessor": (2, 50),
        "EncoderNoRepeatNGramLogitsProcessor": (2, ids),
        "EncoderRepetitionPenaltyLogitsProcessor": (1.5, ids),
        "EpsilonLogitsWarper": (0.01,),
        "EtaLogitsWarper": (0.01,),
        "ExponentialDecayLengthPenalty": ((1, 1.5), 2, 3),
        "ForcedBOSTokenLogitsProcessor": (1,),
        "ForcedEOSTokenLogitsProcessor": (9, 2),
        "InfNanRemoveLogitsProcessor": (),
        "LogitNormalization": (),
        "MinLengthLogitsProcessor": (9, 2),
        "MinNewTokensLengthLogitsProcessor": (6, 3, 2),
        "MinPLogitsWarper": (0.3,),
        "NoBadWordsLogitsProcessor": ([[9], [10, 11]], 2),
        "NoRepeatNGramLogitsProcessor": (2,),
        "RepetitionPenaltyLogitsProcessor": (1.5, torch.tensor([1, 0])),
        "SequenceBiasLogitsProcessor": ({(9,): 2.0, (10, 11): 1.0},),
        "SuppressTokensAtBeginLogitsProcessor": ([9], 7),
        "SuppressTokensLogitsProcessor": ([9],),
        "TemperatureLogitsWarper": (0.7,),
        "TopHLogitsWarper": (0.5,),
        "TopKLogitsWarper": (5,),
        "TopPLogitsWarper": (0.5,),
        "TypicalLogitsWarper": (0.5,),
        "WatermarkLogitsProcessor": (128, "cpu", 0.25, 2.0, 15485863, "selfhash", 2),
    }
    config = GenerationConfig(no_timestamps_token_id=99, eos_token_id=2)
    whisper = logits_process.WhisperTimeStampLogitsProcessor(config, 3)
    return {name: getattr(logits_process, name)(*given) for name, given in made.items()} | {
        "WhisperTimeStampLogitsProcessor": whisper
    }


@pytest.mark.parametrize("name", sorted(STATELESS))
def test_a_processor_without_memory_answers_alike_whatever_it_saw(name):
    ids = token_ids(2, 7)
    rows = 4 if "ClassifierFree" in name else 2
    scores = torch.randn(rows, 128, generator=torch.Generator().manual_seed(3))
    used, fresh = direct(ids)[name], direct(ids)[name]
    for seed in range(4):  # drafts of several lengths
        used(token_ids(2, 5 + seed, seed=seed + 9), torch.rand_like(scores))
    assert torch.equal(used(ids, scores.clone()), fresh(ids, scores.clone()))
    assert processors_with_memory([used]) == []


class Own(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class Told(Own):
    stateless = True


class Descendant(TopKLogitsWarper):
    pass


def test_a_foreign_processor_has_a_memory_unless_it_says_otherwise():
    told = Own()
    told.stateless = True
    unclear = Own()
    unclear.stateless = "no"
    found = processors_with_memory([Own(), Told(), told, unclear, Descendant(3), even_after_odd])
    names = ["Own", "Own", "Descendant", "even_after_odd"]
    assert found == [f"{__name__}.{name}" for name in names]


# --- greedy text is `generate`'s


@pytest.mark.filterwarnings("ignore:.*without drafts:UserWarning")
@pytest.mark.parametrize("relay", [DRAFTS["three"], DRAFTS["chain"], FixedExit()], ids=repr)
@pytest.mark.parametrize("name", GREEDY)
def test_every_argument_leaves_the_text_of_generate(name, relay):
    family, ids = family_of(), token_ids(2, 1 if "BOS" in name else 12)
    asked = ASKED | GREEDY[name] | stops(family, ids)
    if name == "ForcedBOSTokenLogitsProcessor":
        del asked["eos_token_id"]
    plain = family.generate(ids, **asked)
    found = family.relay_generate(ids, relay=relay, **asked)
    assert torch.equal(found.sequences, plain.sequences)
    drafts = isinstance(relay, SpeculativeRelay) and name not in MEMORY
    assert (found.relay_stats.drafted > 0) == drafts


@pytest.mark.filterwarnings("ignore:.*without drafts:UserWarning")
@pytest.mark.parametrize("relay", [*DRAFTS.values(), FixedExit(1)], ids=repr)
def test_guidance_is_of_the_exit_that_writes(relay):
    """A guide reads the exit whose text it guides: member and stock model write the same."""
    family, ids = family_of(), token_ids(2, 12)
    exit_idx = relay.exit_idx
    asked = {"max_new_tokens": NEW, "do_sample": False, "guidance_scale": 1.9}
    negative = {
        "negative_prompt_ids": token_ids(2, 5, seed=4),
        "negative_prompt_attention_mask": torch.ones(2, 5, dtype=torch.long),
    }
    host = truncated_host(family, exit_idx % 3)
    host.generation_config = family.generation_config
    for given in (asked, asked | negative):
        right = host.generate(ids, **given)
        assert torch.equal(family.generate(ids, exit_idx=exit_idx, **given), right)
        assert torch.equal(family.relay_generate(ids, relay=relay, **given), right)
    unguided = host.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert not torch.equal(unguided, right)


@pytest.mark.filterwarnings("ignore:.*without drafts:UserWarning")
@pytest.mark.parametrize("relay", DRAFTS.values(), ids=DRAFTS)
def test_a_synthid_watermark_stays_in_the_text(relay):
    """The mean g of a sampled text, whose processor counts its calls, is `generate`'s."""
    family, ids = family_of(), token_ids(4, 12)
    asked = {"max_new_tokens": 40, "do_sample": True, "watermarking_config": SYNTHID}
    torch.manual_seed(0)
    plain = family.generate(ids, exit_idx=relay.exit_idx, **asked)
    torch.manual_seed(0)
    found = family.relay_generate(ids, relay=relay, **asked)
    assert torch.equal(found, plain)
    g = SYNTHID.construct_processor(128, "cpu").compute_g_values(found[:, 12:]).float().mean()
    assert g > 0.6


# --- processors and criteria with a memory are called as `generate` calls them


class Grammar(LogitsProcessor):
    """A grammar that moves on with every call, as xgrammar's does, and dies if one is missing."""

    def __init__(self):
        self.seen, self.calls = None, 0

    def __call__(self, input_ids, scores):
        if self.seen is not None:
            assert torch.equal(input_ids[:, :-1], self.seen), "a call for each kept token, in order"
        self.seen, self.calls = input_ids, self.calls + 1
        banned = torch.arange(scores.shape[1]) % 3 == self.calls % 3
        return scores.masked_fill(banned, float("-inf"))


POLICIES = {
    **DEEPEST,
    "confident": ConfidenceRelay(0.05),
    "handed-over": HandoffRelay(after=3),
    "shallow": FixedExit(0),
}


@pytest.mark.filterwarnings("ignore:.*without drafts:UserWarning")
@pytest.mark.parametrize("relay", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("sampled", [False, True])
def test_a_grammar_is_called_once_for_each_kept_token(relay, sampled):
    family, ids = family_of(), token_ids(3, 12)
    ends = stops(family, ids)
    grammar = Grammar()
    asked = ASKED | ends | {"do_sample": sampled}
    torch.manual_seed(1)
    processors = LogitsProcessorList([grammar])
    found = family.relay_generate(ids, relay=relay, logits_processor=processors, **asked).sequences
    assert grammar.calls == found.shape[1] - 12
    assert torch.equal(grammar.seen, found[:, :-1])
    torch.manual_seed(1)
    exit_idx = relay.exit_idx if isinstance(relay, FixedExit) else -1
    processors = LogitsProcessorList([Grammar()])
    plain = family.generate(ids, exit_idx=exit_idx, logits_processor=processors, **asked).sequences
    if relay not in (POLICIES["confident"], POLICIES["handed-over"]):
        assert torch.equal(found, plain)


def test_writing_without_drafts_is_said_once():
    family, ids = family_of(), token_ids(1, 12)
    asked = {"max_new_tokens": 4, "do_sample": False}
    with pytest.warns(
        UserWarning,
        match=r"`test_processors\.Grammar` may depend on earlier calls.*`stateless = True`",
    ) as seen:
        family.relay_generate(ids, logits_processor=LogitsProcessorList([Grammar()]), **asked)
    assert len([one for one in seen if "drafts" in str(one.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        family.relay_generate(ids, logits_processor=LogitsProcessorList([Told()]), **asked)
        family.relay_generate(
            ids, FixedExit(), logits_processor=LogitsProcessorList([Grammar()]), **asked
        )


class Countdown:
    """A criterion that counts its calls: row r ends at call number `ends[r]`, then forgets it."""

    def __init__(self, ends, eos_token_id=None):
        self.ends, self.seen, self.calls, self.scores = ends, None, 0, []
        if eos_token_id is not None:
            self.eos_token_id = eos_token_id

    def __call__(self, input_ids, scores, **kwargs):
        if self.seen is not None:
            assert torch.equal(input_ids[:, :-1], self.seen)
        self.seen, self.calls = input_ids, self.calls + 1
        self.scores.append(None if scores is None else len(scores))
        return torch.tensor([self.calls == end for end in self.ends])


@pytest.mark.parametrize("relay", DEEPEST.values(), ids=DEEPEST)
@pytest.mark.parametrize("padded", [False, True])
def test_rows_that_a_criterion_ends_are_written_on_as_by_generate(relay, padded):
    """Without an end token the host writes real tokens after a row's end, and so does a relay."""
    family, ids = family_of(), token_ids(3, 12)
    asked = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    ends, more = [3, 18, 7], {"return_dict_in_generate": True, "output_scores": True}
    eos = torch.tensor([127]) if padded else None
    theirs, ours = Countdown(ends, eos), Countdown(ends, eos)
    right = family.generate(ids, stopping_criteria=StoppingCriteriaList([theirs]), **asked, **more)
    found = family.relay_generate(
        ids, relay=relay, stopping_criteria=StoppingCriteriaList([ours]), **asked, **more
    )
    assert found.sequences.shape == (3, 12 + 18)
    assert torch.equal(found.sequences, right.sequences)
    assert (found.sequences[0, 15:] == 0).all() == padded
    assert torch.equal(ours.seen, theirs.seen)
    assert (ours.calls, ours.scores) == (theirs.calls, theirs.scores)


def test_padding_without_a_padding_token_is_refused():
    family, ids = family_of(), token_ids(2, 12)
    family.generation_config.pad_token_id = None
    criteria = StoppingCriteriaList([Countdown([3, 4], torch.tensor([127]))])
    with pytest.raises(ValueError, match="`pad_token_id` must be set"):
        family.relay_generate(ids, stopping_criteria=criteria, max_new_tokens=5)

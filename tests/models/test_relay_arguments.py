"""Every argument of `generate` is honoured by a relay, or refused by name."""

import copy
import inspect
from functools import partial

import numpy as np
import pytest
import torch
from reference import tiny_family, token_ids
from test_relay import DEEPEST, DRAFTS, Recorder, family_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedTokenizerFast,
)
from transformers.generation import utils

from hf_familial import SpeculativeRelay, relay_decode
from hf_familial.models.familial.relay import ASSISTED, UNUSED


ASKED = {"max_new_tokens": 9, "do_sample": False}


def letters():
    """A tokenizer in which every token of the zoo is one character."""
    vocabulary = {chr(33 + i): i for i in range(128)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="!", bos_token='"')


# --- refused


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"assistant_model": "itself"}, "`assistant_model` has no effect"),
        ({"assistant_tokenizer": "t"}, "`assistant_tokenizer` has no effect"),
        ({"num_assistant_tokens": 3}, "`num_assistant_tokens` has no effect"),
        ({"assistant_early_exit": 1}, "`assistant_early_exit` has no effect"),
        ({"use_mtp": True}, "`use_mtp` has no effect"),
        ({"synced_gpus": True}, "`synced_gpus`.*does not work with a relay"),
        ({"cache_implementation": "offloaded"}, "`cache_implementation='offloaded'`"),
        ({"cache_implementation": "quantized"}, "`cache_implementation='quantized'`"),
        ({"cache_implementation": "paged"}, "`cache_implementation='paged'`"),
        ({"prefill_chunk_size": 4}, "`prefill_chunk_size` has no effect"),
        ({"output_hidden_states": True}, "`output_hidden_states` has no effect"),
        ({"labels": torch.ones(1, 12, dtype=torch.long)}, "`labels` has no effect"),
        ({"output_exits": True}, "`output_exits` has no effect"),
        ({"output_router_logits": True}, "`output_router_logits` has no effect"),
        ({"dola_layers": "high"}, "generation mode `dola_generation`"),
        ({"relay_streamer": "s"}, "not used by the model: \\['relay_streamer'\\]"),
        ({"return_legacy_cache": True}, "not used by the model: \\['return_legacy_cache'\\]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("entry", ["relay_generate", "custom_generate", "partial"])
def test_what_a_relay_would_ignore_is_refused(asked, message, entry):
    family, ids = family_of(), token_ids(1, 12)
    if "assistant_model" in asked:
        asked = {"assistant_model": family}
    if entry == "relay_generate":
        write = family.relay_generate
    else:
        loop = (
            relay_decode
            if entry == "custom_generate"
            else partial(relay_decode, fused_weights=False)
        )
        write = partial(family.generate, custom_generate=loop)
        if asked.get("cache_implementation") == "paged":
            pytest.skip("`generate` hands this to its continuous batching before any loop")
    with pytest.raises(ValueError, match=message):
        write(ids, **ASKED, **asked)


@pytest.mark.parametrize("entry", ["relay_generate", "custom_generate"])
def test_a_replaced_hook_of_generate_is_not_passed_over(entry):
    """As peft replaces it for prompts that it has learned: a relay would write without them."""
    family = family_of()
    asked, generate = dict(ASKED), family.relay_generate
    if entry == "custom_generate":
        asked["custom_generate"], generate = relay_decode, family.generate
    own = family.prepare_inputs_for_generation
    family.prepare_inputs_for_generation = lambda *args, **kwargs: own(*args, **kwargs)
    try:
        family.generate(token_ids(1, 6), **ASKED)
        with pytest.raises(ValueError, match="is replaced on this model"):
            generate(token_ids(1, 6), **asked)
        family.prepare_inputs_for_generation = own  # as peft puts it back
        generate(token_ids(1, 6), **asked)
    finally:
        del family.prepare_inputs_for_generation


def test_a_learned_prompt_is_not_passed_over():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped = peft.get_peft_model(tiny_family("llama", [2, 4]), config).eval()
    with pytest.raises(ValueError, match="Call `generate"):
        wrapped.generate(input_ids=token_ids(1, 6), custom_generate=relay_decode, **ASKED)


def test_a_family_of_one_exit_says_how_to_write():
    family = tiny_family("llama", [4])
    with pytest.raises(
        ValueError, match=r"deeper than the shallowest of 1 exits.*`relay=FixedExit\(-1\)`"
    ):
        family.relay_generate(token_ids(1, 6), **ASKED)


def test_numbers_of_numpy_choose_drafts():
    relay = SpeculativeRelay(np.int64(0), np.int64(3), np.int64(2))
    assert relay == SpeculativeRelay(0, 3, 2)
    assert type(relay.draft_length) is int


def test_processes_that_must_keep_step_do_not_relay(monkeypatch):
    """Under ZeRO-3 and FSDP the host sets `synced_gpus` by itself."""
    family, ids = family_of(), token_ids(1, 12)
    right = family.generate(ids, **ASKED)
    monkeypatch.setattr(utils, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(utils, "_get_torch_distributed_world_size", lambda: 2)
    with pytest.raises(ValueError, match="the default under FSDP and ZeRO-3"):
        family.relay_generate(ids, **ASKED)
    assert torch.equal(family.relay_generate(ids, synced_gpus=False, **ASKED), right)


def test_a_cache_of_ones_own_that_offloads_is_named():
    family, ids = family_of(), token_ids(1, 12)
    past = DynamicCache(config=family.config.text_config, offloading=True)
    with pytest.raises(ValueError, match="got DynamicCache that offloads its layers"):
        family.relay_generate(ids, past_key_values=past, **ASKED)


def test_a_field_of_the_configuration_is_refused_as_an_argument_is():
    family, ids = family_of(), token_ids(1, 12)
    for name, value in {"prefill_chunk_size": 4, "cache_implementation": "offloaded"}.items():
        config = GenerationConfig(**ASKED, **{name: value})
        with pytest.raises(ValueError, match=name):
            family.relay_generate(ids, generation_config=config)


# --- every argument there is

# honoured: they make processors, criteria, the length, the mode or the output
HONOURED = {
    *("bad_words_ids", "begin_suppress_tokens", "bos_token_id", "do_sample", "eos_token_id"),
    *("encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff"),
    *("eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id"),
    *("forced_eos_token_id", "guidance_scale", "max_length", "max_new_tokens", "max_time"),
    *("min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size", "num_return_sequences"),
    *("output_logits", "output_scores", "pad_token_id", "remove_invalid_values"),
    *("renormalize_logits", "repetition_penalty", "return_dict_in_generate", "sequence_bias"),
    *("stop_strings", "suppress_tokens", "temperature", "token_healing", "top_h", "top_k"),
    *("top_p", "typical_p", "use_cache", "watermarking_config"),
}
# refused, for they ask for another mode or another cache
REFUSED = {
    *("cache_implementation", "constraints", "dola_layers", "force_words_ids", "num_beams"),
    *("penalty_alpha", *ASSISTED, *UNUSED),
}
# of no effect in `generate` either, where decoding is greedy or by sampling, with a dynamic cache
WITHOUT_EFFECT = {
    *("cache_config", "compile_config", "continuous_batching_config", "decoder_start_token_id"),
    *("disable_compile", "diversity_penalty", "early_stopping", "length_penalty", "low_memory"),
    *("max_cache_len", "num_beam_groups", "transformers_version"),
}
NAMED = {
    *("custom_generate", "generation_config", "inputs", "kwargs", "logits_processor", "self"),
    *("negative_prompt_attention_mask", "negative_prompt_ids", "prefix_allowed_tokens_fn"),
    *("assistant_model", "stopping_criteria", "streamer", "synced_gpus"),
}


def test_every_argument_of_generate_is_known():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    known = HONOURED | REFUSED | WITHOUT_EFFECT
    assert fields - known == set()
    assert set(inspect.signature(GenerationMixin.generate).parameters) == NAMED
    family, ids = family_of(), token_ids(1, 12)
    right = family.generate(ids, **ASKED)
    quiet = {"disable_compile": True, "compile_config": CompileConfig(), "low_memory": False}
    assert torch.equal(family.relay_generate(ids, **ASKED, **quiet), right)


# --- honoured


@pytest.mark.parametrize("loop", [relay_decode, partial(relay_decode, fused_weights=False)])
def test_a_loop_gets_streamer_and_stop_strings_from_generate(loop):
    family, ids, tokenizer = family_of(), token_ids(1, 12), letters()
    plain = family.generate(ids, **ASKED)
    stop = tokenizer.convert_ids_to_tokens(int(plain[0, 16]))
    asked = ASKED | {"stop_strings": [stop]}
    right = family.generate(ids, tokenizer=tokenizer, **asked)
    for given in (asked, {"generation_config": GenerationConfig(**asked, pad_token_id=0)}):
        recorder = Recorder()
        found = family.generate(
            ids,
            custom_generate=loop,
            relay=SpeculativeRelay(0, draft_length=3),
            streamer=recorder,
            tokenizer=tokenizer,
            **given,
        )
        assert torch.equal(found, right)
        assert (recorder.tokens, recorder.ended) == (right[0].tolist(), 1)
    assert right.shape[1] <= 17


def test_a_prompt_is_healed_as_by_generate():
    family, ids, tokenizer = family_of(), token_ids(1, 12), letters()
    asked = ASKED | {"token_healing": True, "tokenizer": tokenizer}
    right = family.generate(ids, **asked)
    assert torch.equal(family.relay_generate(ids, relay=DRAFTS["three"], **asked), right)
    with pytest.raises(ValueError, match="`token_healing` would run exit -1.*from exit 1"):
        family.relay_generate(ids, relay=DRAFTS["shallow"], **asked)


@pytest.mark.parametrize("relay", DEEPEST.values(), ids=DEEPEST)
def test_the_new_tokens_alone_go_on_from_a_cache(relay):
    """The host takes ids that are fewer than the mask's columns for the new ones, and so do we."""
    family, ids, new = family_of(), token_ids(2, 6), token_ids(2, 9, seed=5)
    past = family.generate(ids, **ASKED, return_dict_in_generate=True).past_key_values
    seen = past.get_seq_length()
    for length in (9, seen + 3):  # fewer and more than the cache holds
        new = token_ids(2, length, seed=5)
        mask = torch.ones(2, seen + length, dtype=torch.long)
        right = family.generate(
            new, attention_mask=mask, past_key_values=copy.deepcopy(past), **ASKED
        )
        found = family.relay_generate(
            new, relay=relay, attention_mask=mask, past_key_values=copy.deepcopy(past), **ASKED
        )
        assert torch.equal(found, right)


@pytest.mark.parametrize("relay", [DRAFTS["three"], DEEPEST["fixed"]], ids=repr)
def test_embeddings_go_on_from_a_cache(relay):
    """They are the whole text always: what the cache holds is left out."""
    family, ids = family_of(), token_ids(2, 6)
    first = family.generate(ids, **ASKED, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, token_ids(2, 7, seed=5)), 1)
    states = family.get_input_embeddings()(longer)
    right = family.generate(inputs_embeds=states, **ASKED)
    past = first.past_key_values
    found = family.relay_generate(inputs_embeds=states, relay=relay, past_key_values=past, **ASKED)
    assert torch.equal(found, right)

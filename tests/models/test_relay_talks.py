"""Talks go on from the cache that a relay filled, wherever its text ended."""

import pytest
import torch
from reference import agreeing, endless, tiny_family, token_ids
from transformers import DynamicCache

import hf_familial as hff


RELAYS = {
    "drafts": lambda last: hff.SpeculativeRelay(0, draft_length=5, exit_idx=last),
    "chain": lambda last: hff.SpeculativeRelay((0, 1)[: last + 3], 2, exit_idx=last),
    "auto": lambda last: hff.SpeculativeRelay("auto", exit_idx=last),
    "fixed": lambda last: hff.FixedExit(last),
}


@pytest.mark.parametrize("name", RELAYS)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text"])
def test_a_talk_goes_on_after_a_text_that_ended_among_drafts(model_type, name):
    """A cache of the caller's, and one that is returned, hold the text but its last token."""
    family, accepted = endless(agreeing(tiny_family(model_type, [1, 2, 4]), 0.2)), 0
    for seed in range(4):
        ids = token_ids(1, 12, seed=seed)
        for last, ending in ((-1, 3), (-1, 6), (-2, 5)):
            plain = family.generate(ids, exit_idx=last, max_new_tokens=10, do_sample=False)
            asked = {"eos_token_id": int(plain[0, 12 + ending]), "max_new_tokens": 10}
            given = DynamicCache(config=family.config.text_config)
            output = family.relay_generate(
                ids, RELAYS[name](last), past_key_values=given, do_sample=False, **asked
            )
            longer = torch.cat((output, token_ids(1, 3, seed=99)), 1)
            go_on = {"exit_idx": last, "max_new_tokens": 6, "do_sample": False}
            right = family.generate(longer, **go_on)
            assert given.get_seq_length() == output.shape[1] - 1
            assert not any(getattr(layer, "record_past", False) for layer in given.layers)
            assert torch.equal(family.generate(longer, past_key_values=given, **go_on), right)
            returned = family.relay_generate(
                ids, RELAYS[name](last), return_dict_in_generate=True, do_sample=False, **asked
            )
            accepted += returned.relay_stats.accepted
            if last == -1:
                cache = returned.past_key_values
                assert torch.equal(family.generate(longer, past_key_values=cache, **go_on), right)
    assert accepted or name in ("auto", "fixed")

"""Settings and arguments of a hand-off: usable values run, others raise an error with a name."""

from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from parted import DEPTH, family_and_device, sent
from reference import token_ids
from test_state import tiny_state
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    WatermarkingConfig,
)

from hf_familial.errors import HandoffError
from hf_familial.handoff import DeviceSide, HandoffState, server_side
from hf_familial.handoff.loops import decode_tokens, encode_tokens


TOO_FAR = {
    "temperature": [1e-300, 1e-9, 0.0, -1.0, 1e9, 1e300, 2],
    "repetition_penalty": [1e-300, 0.0, -1.0, 1e300],
    "max_new_tokens": [2**31 - 1, 0, 1 << 21],
    "min_new_tokens": [2**31 - 1],
    "top_p": [-0.1, 1.1, 1e300],
    "min_p": [-0.1, 1.1],
    "top_h": [0.0, 1.5],
    "typical_p": [0.0, 2.0],
    "epsilon_cutoff": [-0.1, 3.0],
    "eta_cutoff": [-0.1, 3.0],
    "no_repeat_ngram_size": [1 << 20],
    "bad_words_ids": [[], [[]], [list(range(6000)), list(range(6000))]],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in TOO_FAR.items() for value in values]
)
def test_a_setting_that_no_run_can_use_is_refused(name, value):
    with pytest.raises(HandoffError, match=f"`{name}` cannot be"):
        tiny_state(settings={name: value})


SHARES = st.floats(0.0, 1.0, exclude_min=True)
FACTORS = st.floats(1e-8, 1e8) | st.just(1)
USABLE = st.fixed_dictionaries(
    {"do_sample": st.just(True), "max_new_tokens": st.just(2)},
    optional={
        "temperature": FACTORS,
        "repetition_penalty": FACTORS,
        "top_k": st.integers(0, 2**31 - 1),
        "top_p": SHARES,
        "min_p": SHARES,
        "top_h": SHARES,
        "typical_p": SHARES,
        "epsilon_cutoff": SHARES,
        "eta_cutoff": SHARES,
        "no_repeat_ngram_size": st.integers(0, 1024),
        "min_new_tokens": st.integers(0, 2),
    },
)


@hypothesis.given(settings=USABLE)
@hypothesis.settings(max_examples=60, deadline=None)
def test_every_setting_within_the_bounds_runs(settings, parted_llama):
    deep, state = parted_llama
    text = deep.resume(sent(replace(state, settings=settings))).generate()
    assert text.shape == (2, 10)


@pytest.fixture(scope="module")
def parted_llama():
    family, device = family_and_device("llama")
    state = DeviceSide(device).start(token_ids(2, 8), max_new_tokens=2).state("migrate")
    return server_side(family, 0), state


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_text_does_not_outgrow_the_positions_of_the_model(model_type):
    family, device = family_and_device(model_type)
    limit = family.config.text_config.max_position_embeddings
    side, deep = DeviceSide(device), server_side(family, 0)
    with pytest.raises(HandoffError, match=f"more than the {limit} positions of this model"):
        side.start(token_ids(1, 8), max_new_tokens=limit)
    state = side.start(token_ids(1, 8), max_new_tokens=3).state("migrate")
    for settings in ({"max_new_tokens": limit - 7 + 1}, {"max_new_tokens": 1 << 20}):
        with pytest.raises(HandoffError, match="Set a smaller `max_new_tokens`"):
            deep.resume(replace(state, settings=settings))
    assert (
        deep.resume(replace(state, settings=settings), max_new_tokens=2).generate().shape[1] == 10
    )
    far = tiny_state(1, limit + 1, layers={}, finished=None, generator=None, settings={})
    taps = {DEPTH: torch.zeros(1, limit + 1, family.config.hidden_size)}
    far = replace(far, taps=taps, weights_digest=state.weights_digest)
    with pytest.raises(HandoffError, match=f"{limit + 1} positions"):
        deep.resume(far, max_new_tokens=1)


@pytest.mark.parametrize("do_sample", [False, True])
def test_taps_that_overflow_the_layers_are_refused(do_sample):
    family, device = family_and_device("gpt2")
    state = DeviceSide(device).start(token_ids(2, 8), max_new_tokens=2).state("migrate")
    taps = {DEPTH: torch.full_like(state.taps[DEPTH], 3e38)}
    settings = {"do_sample": do_sample, "max_new_tokens": 2}
    odd = HandoffState.from_bytes(replace(state, taps=taps, settings=settings).to_bytes())
    with pytest.raises(HandoffError, match="the logits row contains numbers that are"):
        server_side(family, 0).resume(odd).step()


def test_tokens_from_the_other_side_are_of_the_vocabulary():
    _, device = family_and_device("llama")
    text = DeviceSide(device).start(token_ids(2, 8), max_new_tokens=4)
    tokens, _ = decode_tokens(encode_tokens(torch.tensor([[3], [2**31 - 1]]), False), 2)
    with pytest.raises(HandoffError, match="token ids must be from 0 to 127"):
        text.take(tokens)
    assert text.take(torch.tensor([[3], [127]])) is None


# --- what `resume` is given


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"assistant_model": "m"}, "does not support `assistant_model`"),
        ({"prompt_lookup_num_tokens": 3}, "does not support `prompt_lookup_num_tokens`"),
        ({"streamer": "s"}, "does not support `streamer`"),
        ({"synced_gpus": True}, "does not support `synced_gpus`"),
        ({"exit_idx": 0}, "does not support `exit_idx`"),
        ({"past_key_values": "c"}, "does not support `past_key_values`"),
        ({"output_scores": True}, "does not support `output_scores`"),
        ({"use_cache": False}, "does not support `use_cache=False`"),
        ({"cache_implementation": "offloaded"}, "does not support `cache_implementation`"),
        ({"stop_strings": ["x"]}, "has no tokenizer. Instead of `stop_strings`"),
        ({"num_beams": 2}, "got generation mode `beam_search`"),
        ({"num_return_sequences": 2, "do_sample": True}, "`num_return_sequences=2`"),
        ({"typo": 3}, "does not support `typo`"),
    ],
    ids=str,
)
def test_what_a_hand_off_would_ignore_is_refused(parted_llama, asked, message):
    deep, state = parted_llama
    with pytest.raises(ValueError, match=message):
        deep.resume(state, **asked)


class Counted(LogitsProcessor):
    """Keeps the length of the text at each call."""

    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        return scores


class Stop(Counted):
    def __call__(self, input_ids, scores, **kwargs):
        super().__call__(input_ids, scores)
        return torch.tensor([len(self.lengths) == 2, len(self.lengths) == 6])


def test_a_processor_with_a_memory_is_called_once_for_each_token(parted_llama):
    deep, state = parted_llama
    settings = {"max_new_tokens": 9}
    processor, stop = Counted(), Stop()
    text = deep.resume(
        replace(state, settings=settings),
        logits_processor=LogitsProcessorList([processor]),
        stopping_criteria=StoppingCriteriaList([stop]),
    ).generate()
    assert processor.lengths == list(range(8, 14))
    assert stop.lengths == list(range(9, 15))
    right = deep.model.generate(
        state.tokens, max_new_tokens=9, stopping_criteria=StoppingCriteriaList([Stop()])
    )
    assert torch.equal(text, right)


@pytest.mark.parametrize("asked", [{"guidance_scale": 1.9}, {"watermarking_config": {}}], ids=str)
def test_the_deep_side_goes_on_as_generate_on_the_text_so_far(asked):
    family, device = family_and_device("llama")
    family.config.default_exit = 0
    if "watermarking_config" in asked:
        asked = {"watermarking_config": WatermarkingConfig(bias=4.0)}
    deep, text = server_side(family, 0), DeviceSide(device).start(token_ids(2, 8), max_new_tokens=9)
    begun = text.answer(3)
    found = deep.resume(sent(text.state("migrate")), **asked).generate()
    right = family.generate(begun, exit_idx=-1, max_new_tokens=6, **asked)
    assert torch.equal(found, right)
    assert not torch.equal(right, family.generate(begun, exit_idx=-1, max_new_tokens=6))


def test_a_memory_that_would_have_to_travel_is_refused():
    _, device = family_and_device("llama")
    device.generation_config.guidance_scale = 1.5
    text = DeviceSide(device).start(token_ids(2, 8), max_new_tokens=4)
    with pytest.raises(HandoffError, match="that memory cannot be sent"):
        text.answer(1)
    assert text.state("split").shape == (2, 8)

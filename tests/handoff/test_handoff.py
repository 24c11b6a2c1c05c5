"""The three modes of a hand-off, each compared with one process that runs the whole family."""

import gc
import weakref

import pytest
import torch
from parted import (
    DEPTH,
    NEW,
    Passes,
    cut,
    family_and_device,
    hand_off,
    other_side,
    padded_text,
    sent,
    whole,
)
from reference import tiny_family, token_ids

from hf_familial import FamilialForCausalLM
from hf_familial.errors import HandoffError
from hf_familial.handoff import (
    MODES,
    DeviceSide,
    server_side,
)
from hf_familial.hub.export import export_exit


LAST = 12 + NEW - 1  # positions of a text of 12 and 8 tokens, of which the last is never run


@pytest.mark.parametrize("num_exit_layers", [0, 1])
@pytest.mark.parametrize(
    "model_type", ["llama", "qwen3", "gemma3_text", "gpt2", "mistral", "mixtral", "lfm2", "mamba"]
)
def test_the_tokens_are_those_of_one_process(model_type, num_exit_layers):
    family, device = family_and_device(model_type, num_exit_layers=num_exit_layers)
    ids, mask = padded_text()
    expected, side = whole(family, ids, mask), DeviceSide(device, DEPTH)
    for mode in MODES:
        text = hand_off(side, other_side(family, mode), mode, ids, mask)
        assert torch.equal(text.tokens, expected), mode


@pytest.mark.parametrize("mode", MODES)
def test_bf16_taps_of_a_bf16_model_are_exact(mode):
    family, device = family_and_device("llama", torch.bfloat16)
    ids, mask = padded_text()
    deep = other_side(family, mode)
    text = hand_off(DeviceSide(device), deep, mode, ids, mask, dtype="bf16")
    assert torch.equal(text.tokens, whole(family, ids, mask))


@pytest.mark.parametrize("num_exit_layers", [0, 1])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "falcon_h1"])
def test_the_device_answers_first_and_a_deeper_exit_goes_on(model_type, num_exit_layers):
    family, device = family_and_device(model_type, num_exit_layers=num_exit_layers)
    ids, mask = padded_text(3)
    begun = whole(family, ids, mask, exit_idx=0, max_new_tokens=5)
    longer = torch.cat((mask, mask.new_ones(3, 5)), 1)
    expected = whole(family, begun, longer, max_new_tokens=3)
    for mode in ("migrate", "migrate-light"):
        shallow = DeviceSide(device, DEPTH).start(ids, mask, max_new_tokens=NEW)
        assert torch.equal(shallow.answer(5), begun)
        text = server_side(family, 0).resume(sent(shallow.state(mode)))
        assert torch.equal(text.generate(), expected), mode


def test_split_runs_every_layer_on_one_side_once():
    family, device = family_and_device("llama")
    side, deep, ids = DeviceSide(device), server_side(family, 0, keep_lower=False), token_ids(2, 12)
    with Passes(device) as below, Passes(family) as above:
        hand_off(side, deep, "split", ids)
    assert below == dict.fromkeys((0, 1), list(range(LAST)))
    assert above == dict.fromkeys((2, 3), list(range(LAST)))


def test_migrate_recomputes_nothing():
    family, device = family_and_device("llama")
    side, deep, ids = DeviceSide(device), server_side(family, 0), token_ids(2, 12)
    with Passes(device) as below, Passes(family) as above:
        text = hand_off(side, deep, "migrate", ids)
    assert below == dict.fromkeys((0, 1), list(range(12)))
    new, every = list(range(12, LAST)), list(range(LAST))
    assert above == {0: new, 1: new, 2: every, 3: every}
    assert text.recomputed is None


def test_migrate_light_says_what_it_recomputed():
    family, device = family_and_device("llama")
    side, deep, ids = DeviceSide(device), server_side(family, 0), token_ids(2, 12)
    with Passes(device) as below, Passes(family) as above:
        text = hand_off(side, deep, "migrate-light", ids)
    assert below == dict.fromkeys((0, 1), list(range(12)))
    assert above == dict.fromkeys(range(4), list(range(LAST)))
    cost = text.recomputed
    assert (cost.positions, cost.layers, cost.layer_passes) == (24, 2, 48)
    # hidden 32, 4 heads of 8 and 2 for keys and values, intermediate 48; every pair of positions
    matrices = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    assert cost.flops == 2 * (24 * 2 * matrices + 2 * 2 * 12 * 12 * 2 * 32)
    assert cost.seconds > 0
    assert cost.tap_error <= 1e-6


def test_private_layers_stay_on_the_device():
    family, device = family_and_device("llama", num_exit_layers=1)
    side, deep = DeviceSide(device, DEPTH), server_side(family, 0)
    shallow = side.start(token_ids(1, 6))
    shallow.answer(3)
    state = shallow.state("migrate")
    assert sorted(state.layers) == [0, 1]
    ran = []
    family.model.exits[0].layers[0].register_forward_hook(lambda *args: ran.append(1))
    deep.resume(state, max_new_tokens=3).generate()
    assert not ran


def test_a_server_without_lower_layers_neither_holds_nor_runs_what_is_below():
    family = tiny_family("gpt2", [2, 3, 4], num_exit_layers=1, exit_head="own")
    lower = [
        *family.model.backbone.h[:2],
        family.model.backbone.wpe,
        family.model.backbone.wte,
        family.model.exits[0].layers[0],
        family.model.exits[0].norm,
        family.exit_heads[0],
    ]
    upper = [
        family.model.backbone.h[2:],
        family.model.backbone.ln_f,
        family.model.exits[1],
        family.exit_heads[1],
        family.lm_head,
    ]
    kept = sum(p.numel() for module in upper for p in module.parameters())
    gone = [weakref.ref(module) for module in lower]
    deep = server_side(family, 0, keep_lower=False)
    ids = token_ids(1, 4)
    family(ids)
    del family, lower, upper
    gc.collect()
    assert all(reference() is None for reference in gone)
    assert sum(p.numel() for p in deep.model.parameters()) == kept
    for run in (deep.model, deep.model.get_input_embeddings(), deep.model.model.backbone.h[1]):
        with pytest.raises(ValueError, match="which has only the layers above"):
            run(ids)
    with pytest.raises(ValueError, match="is not in this process"):
        deep.model(ids, exit_idx=0)


def test_a_server_without_lower_layers_cannot_go_on_alone():
    family, device = family_and_device("llama")
    shallow = DeviceSide(device).start(token_ids(1, 6))
    deep = server_side(family, 0, keep_lower=False)
    text = deep.resume(shallow.state("split"))
    with pytest.raises(ValueError, match="layers below depth 2 are not in this process"):
        text.generate()
    # what travelled for nothing is refused too
    with pytest.raises(HandoffError, match=r"of the layers \[\] are needed, got \[0, 1\]"):
        deep.resume(shallow.state("migrate"))


def test_texts_on_one_side_do_not_disturb_each_other():
    family, device = family_and_device("falcon_h1")
    side, deep = DeviceSide(device), server_side(family, 0, keep_lower=False)
    prompts = [padded_text(2, 9), padded_text(3, 12)]
    below = [side.start(ids, mask, max_new_tokens=NEW) for ids, mask in prompts]
    above = [deep.resume(sent(text.state("split"))) for text in below]
    for step in range(NEW):
        for shallow, text in zip(below, above, strict=True):
            tokens = text.step()
            if step < NEW - 1:
                shallow.take(tokens)
                text.take(sent(shallow.state("split")))
    for (ids, mask), text in zip(prompts, above, strict=True):
        assert torch.equal(text.tokens, whole(family, ids, mask))


def test_the_other_side_goes_on_when_the_device_is_lost():
    family, device = family_and_device("mistral")
    ids, mask = padded_text()
    shallow = DeviceSide(device).start(ids, mask, max_new_tokens=NEW)
    text = server_side(family, 0).resume(sent(shallow.state("split")))
    for _ in range(3):
        shallow.take(text.step())
        text.take(sent(shallow.state("split")))
    assert torch.equal(text.generate(), whole(family, ids, mask))
    assert text.recomputed.positions == 2 * 15


def test_the_cache_is_an_ordinary_one_afterwards():
    family, device = family_and_device("llama")
    ids = token_ids(2, 12)
    text = hand_off(DeviceSide(device), server_side(family, 0), "migrate", ids)
    cache = text.relay.to_plain()
    longer = family.generate(text.tokens, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(longer, whole(family, ids, max_new_tokens=NEW + 4))


@pytest.mark.parametrize("mode", MODES)
def test_the_random_stream_goes_on(mode):
    family, device = family_and_device("llama")
    ids, mask = padded_text()
    settings = {"do_sample": True, "temperature": 0.9, "top_k": 20, "repetition_penalty": 1.1}
    torch.manual_seed(7)
    expected = whole(family, ids, mask, **settings)
    generator = torch.Generator().manual_seed(7)
    side, deep = DeviceSide(device), other_side(family, mode)
    text = hand_off(side, deep, mode, ids, mask, generator=generator, **settings)
    assert torch.equal(text.tokens, expected)


def test_the_random_stream_goes_on_from_device_to_split_to_migrate():
    family, device = family_and_device("llama")
    ids, settings = token_ids(2, 9), {"do_sample": True, "top_p": 0.9}
    torch.manual_seed(3)
    begun = whole(family, ids, exit_idx=0, max_new_tokens=4, **settings)
    expected = whole(family, begun, max_new_tokens=8, **settings)
    generator = torch.Generator().manual_seed(3)
    shallow = DeviceSide(device).start(ids, None, generator, max_new_tokens=12, **settings)
    assert torch.equal(shallow.answer(4), begun)
    upper = server_side(family, 0, keep_lower=False).resume(sent(shallow.state("split")))
    for _ in range(3):
        shallow.take(upper.step())
        upper.take(sent(shallow.state("split")))
    text = server_side(family, 0).resume(sent(shallow.state("migrate")))
    assert torch.equal(text.generate(), expected)


def test_rows_that_have_ended_stay_ended():
    family, device = family_and_device("llama")
    ids = token_ids(2, 9)
    ends = int(whole(family, ids, exit_idx=0)[0, 9])  # the first row's first token
    begun = whole(family, ids, exit_idx=0, max_new_tokens=3, eos_token_id=ends)
    assert (begun[0] == 0).sum() == 2  # padding
    shallow = DeviceSide(device).start(ids, max_new_tokens=NEW, eos_token_id=ends)
    assert torch.equal(shallow.answer(3), begun)
    state = sent(shallow.state("migrate"))
    assert state.finished.tolist() == [1, 0]
    text = server_side(family, 0).resume(state).generate()
    alone = whole(family, begun[1:], max_new_tokens=5, eos_token_id=ends)
    assert torch.equal(text[1:, : alone.shape[1]], alone)
    assert not text[0, 10:].any()


def test_an_exported_member_hands_over(tmp_path):
    family = tiny_family("qwen3", [DEPTH, 4], num_exit_layers=1)
    family.generation_config.eos_token_id = None
    export_exit(family, 0, tmp_path / "device", format="familial")
    device = FamilialForCausalLM.from_pretrained(tmp_path / "device")
    ids, mask = padded_text()
    side, deep = DeviceSide(device, DEPTH), server_side(family, 0)
    text = hand_off(side, deep, "migrate", ids, mask)
    assert torch.equal(text.tokens, whole(family, ids, mask))


@pytest.mark.parametrize(
    ("dtype", "taps", "keys_and_values", "error"),
    # hidden 32; two layers of keys and values, each 2 heads of 8
    [
        ("fp32", 32 * 4, 2 * 2 * 2 * 8 * 4, 0.0),
        ("bf16", 32 * 2, 2 * 2 * 2 * 8 * 2, 2**-8),
        ("int8", 32 + 4, 2 * 2 * 2 * (8 + 4), 0.5 / 127),
    ],
)
def test_fewer_bytes_per_token_and_what_they_lose(dtype, taps, keys_and_values, error):
    family, device = family_and_device("llama")
    shallow = DeviceSide(device).start(token_ids(2, 12), max_new_tokens=2)
    state = sent(shallow.state("migrate", dtype))
    sizes = {"columns": 9, "taps": taps, "keys_and_values": keys_and_values}
    assert state.bytes_by_part == sizes
    assert state.bytes_per_token == sum(sizes.values())
    text = server_side(family, 0).resume(sent(shallow.state("migrate-light", dtype)))
    text.generate()
    assert error / 4 <= text.recomputed.tap_error <= error + 1e-6


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gemma4_text", "every layer has its own embedding"),
        ("openai-gpt", "it does not use a cache"),
        ("recurrent_gemma", "its layers store a part of the text outside the cache"),
    ],
)
def test_hosts_that_cannot_be_handed_over_are_refused(model_type, reason):
    family = tiny_family(model_type, [2, 4])
    for make in (
        lambda: server_side(family, 0),
        lambda: server_side(family, 0, keep_lower=False),
        lambda: DeviceSide(family, DEPTH),
    ):
        with pytest.raises(ValueError, match=reason):
            make()


def test_the_sides_refuse_what_cannot_be():
    family, device = family_and_device("llama")
    with pytest.raises(ValueError, match="exit 1 is the deepest"):
        server_side(family, -1)
    with pytest.raises(IndexError, match="must be between"):
        server_side(family, 2, keep_lower=False)
    with pytest.raises(ValueError, match="`depth` must be from 1 to 2, got 3"):
        DeviceSide(device, 3)
    side = DeviceSide(device)
    with pytest.raises(HandoffError, match="`settings` cannot contain 'num_beams'"):
        side.start(token_ids(1, 4), num_beams=2)
    shallow = side.start(token_ids(1, 4), max_new_tokens=2)
    with pytest.raises(HandoffError, match="`mode` must be one of split, migrate"):
        shallow.state("copy")
    with pytest.raises(ValueError, match="got generation mode `beam_search`"):
        server_side(family, 0).resume(shallow.state("migrate"), num_beams=2)
    shallow.state("split")
    with pytest.raises(HandoffError, match="all 4 columns are sent"):
        shallow.state("split")
    shallow.answer(5)
    assert shallow.tokens.shape == (1, 6)
    with pytest.raises(HandoffError, match="the text has ended on this side"):
        shallow.state("migrate")


class Listener:
    """A streamer that remembers."""

    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(value.tolist())

    def end(self):
        self.heard.append("end")


def test_tokens_are_streamed_as_generate_does():
    family, device = family_and_device("llama")
    ids = token_ids(1, 6)
    there, here = Listener(), Listener()
    whole(family, ids, max_new_tokens=3, streamer=there)
    shallow = DeviceSide(device).start(ids, max_new_tokens=3)
    server_side(family, 0).resume(shallow.state("migrate")).generate(here)
    assert here.heard == there.heard
    assert len(here.heard) == 5


def test_a_model_in_training_is_refused():
    family, device = family_and_device("gpt2")
    for make in (lambda: DeviceSide(device.train()), lambda: server_side(family.train(), 0)):
        with pytest.raises(ValueError, match="in training mode"):
            make()


def test_messages_out_of_turn_are_refused():
    family, device = family_and_device("llama")
    shallow = DeviceSide(device).start(token_ids(2, 6), max_new_tokens=NEW)
    deep = server_side(family, 0, keep_lower=False)
    first = shallow.state("split")
    text = deep.resume(first)
    with pytest.raises(HandoffError, match="only the taps of columns 6 to 6, got columns 0 to 6"):
        text.take(first)
    tokens = text.step()
    with pytest.raises(HandoffError, match="taps of 6 columns have arrived, but the text has 7"):
        text.step()
    shallow.take(tokens)
    second = shallow.state("split")
    with pytest.raises(HandoffError, match="the state must begin at column 0, got `start=6`"):
        deep.resume(second)
    other = DeviceSide(device).start(token_ids(2, 6), max_new_tokens=NEW)
    other.state("split")
    other.take((tokens + 1) % 100)
    with pytest.raises(HandoffError, match=r"expected the taps of the tokens .*, got those of"):
        text.take(other.state("split"))
    text.take(second)  # nothing was lost by the refusals
    assert text.step().shape == (2, 1)
    with pytest.raises(HandoffError, match="got columns 6 to 7"):
        text.take(second)


def test_a_device_may_answer_from_a_shallower_exit():
    family = tiny_family("llama", [1, 2, 4])
    family.generation_config.eos_token_id = None
    ids = token_ids(1, 7)
    side = DeviceSide(family, 1, answer_idx=0)
    shallow = side.start(ids, max_new_tokens=NEW)
    begun = shallow.answer(3)
    assert torch.equal(begun, whole(family, ids, exit_idx=0, max_new_tokens=3))
    text = server_side(family, 0).resume(sent(shallow.state("migrate")))
    assert torch.equal(text.generate(), whole(family, begun, max_new_tokens=5))


def test_the_cut_of_this_test_is_the_member():
    family = tiny_family("llama", [2, 4], num_exit_layers=1, exit_head="own")
    ids = token_ids(1, 5)
    assert torch.equal(cut(family)(ids).logits, family(ids, exit_idx=0).logits)

"""Whatever the order in which positions go deeper, every exit reads what one full pass would."""

import random

import pytest
import torch
from backbones import MUST_WORK
from reference import logits, tiny_family, token_ids
from transformers import DynamicCache, StaticCache

from hf_familial import RelayCache
from hf_familial.handoff.server import UpperCache


EXITS = [1, 3, 4]
# states that cannot be taken back
RECURRENT = ("falcon_h1", "lfm2", "qwen3_next", "mamba2")
ATTENDING = tuple(name for name in MUST_WORK if name not in RECURRENT)
LENGTH = 26  # windows of the zoo hold 8


def padding(ids):
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, :2] = 0
    return mask


def positions_of(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def references(family, ids, mask):
    """Logits of every exit from one uncached pass over the whole text."""
    inputs = {"attention_mask": mask, "position_ids": positions_of(mask)}
    return [logits(family, ids, exit_idx=k, **inputs) for k in range(len(EXITS))]


class Schedule:
    """Feeds a text in random pieces, goes deeper and back at random, compares what is read."""

    def __init__(self, family, ids, mask, seed, rollback, exits=(0, 1, 2)):
        self.family, self.ids, self.mask, self.exits = family, ids, mask, exits
        self.random, self.rollback = random.Random(seed), rollback
        self.right = references(family, ids, mask)
        self.cache = RelayCache(family, exits, rollback=rollback)
        self.worst, self.reads = 0.0, set()

    def run(self):
        prompt = 9
        self.feed(prompt)
        while self.cache.length < self.ids.shape[1]:
            move = self.random.random()
            if self.rollback and move < 0.3 and self.cache.length > prompt + 3:
                self.cache.crop(self.random.randint(0, 3))
            elif 0.3 <= move < 0.4 and self.cache.length < self.ids.shape[1] - 2:
                self.feed(self.random.randint(1, 2), whole=True)
                self.feed(1)
            elif move < 0.5:
                self.read(self.random.choice(self.exits))
            elif self.rollback and move < 0.6:
                self.cache.commit()
                prompt = max(prompt, self.cache.length - 3)
            else:
                self.feed(min(self.random.randint(1, 4), self.ids.shape[1] - self.cache.length))
        for k in self.exits:
            self.read(k)
        return self

    def feed(self, count, whole=False):
        start = self.cache.length
        span = slice(start, start + count)
        padded = {"attention_mask": self.mask[:, span]} if (self.mask == 0).any() else {}
        positions = positions_of(self.mask)[:, span]
        self.cache.feed(self.ids[:, span], position_ids=positions, whole=whole, **padded)
        if whole:  # the exits before cannot be read at these positions
            self.read(self.exits[-1])

    def read(self, k):
        pending = self.cache.pending(k)
        last = self.random.randint(1, pending) if pending else 1
        self.cache.catch_up(k)
        found = self.cache.logits(k, last=last)
        stop = self.cache.length
        kept = self.mask[:, stop - last : stop].bool()
        right = self.right[k][:, stop - last : stop]
        scale = right.abs().max().item()
        self.worst = max(self.worst, (found - right)[kept].abs().max().item() / scale)
        self.reads.add(k)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("model_type", ATTENDING)
def test_any_schedule_reads_what_one_pass_would(model_type, padded):
    """Three rows, texts longer than the windows, positions taken back."""
    family, ids = tiny_family(model_type, EXITS), token_ids(3, LENGTH)
    mask = padding(ids) if padded else torch.ones_like(ids)
    for seed in range(2):
        schedule = Schedule(family, ids, mask, seed, rollback=True).run()
        assert schedule.reads == {0, 1, 2}
        assert schedule.worst <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("model_type", RECURRENT)
def test_recurrent_hosts_go_deeper_at_any_time(model_type, padded):
    family, ids = tiny_family(model_type, EXITS), token_ids(3, LENGTH)
    mask = padding(ids) if padded else torch.ones_like(ids)
    for seed in range(3):
        assert Schedule(family, ids, mask, seed, rollback=False).run().worst <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral", "gpt2"])
@pytest.mark.parametrize("exits", [(0, 2), (1, 2), (0, 1, 2), (0, 1)], ids=str)
def test_private_layers_have_slots_of_their_own(model_type, exits):
    family, ids = tiny_family(model_type, EXITS, num_exit_layers=2), token_ids(3, LENGTH)
    for seed in range(3):
        schedule = Schedule(family, ids, padding(ids), seed, rollback=True, exits=exits).run()
        assert schedule.worst <= 1e-5


def layer_positions(family):
    """Counts the positions that each backbone layer sees."""
    counts = [0] * family.config.num_hidden_layers

    def count(index):
        def hook(module, args, kwargs):
            states = args[0] if args else kwargs["hidden_states"]
            counts[index] += states.shape[1]

        return hook

    for index, layer in enumerate(family.model.decoder.layers):
        layer.register_forward_pre_hook(count(index), with_kwargs=True)
    return counts


@torch.no_grad()
def test_nothing_runs_twice():
    family, ids = tiny_family("llama", EXITS), token_ids(2, 20)
    seen = layer_positions(family)
    cache = RelayCache(family, [2, 0, 1])
    cache.feed(ids[:, :12])
    assert seen == [12, 0, 0, 0]
    cache.catch_up(0)
    cache.logits(0)
    assert seen == [12, 0, 0, 0]
    for i in range(12, 20):
        cache.feed(ids[:, i : i + 1])
    cache.catch_up(1)
    assert seen == [20, 20, 20, 0]
    assert cache.lengths == {0: 20, 1: 20, 2: 0}
    assert (cache.pending(0), cache.pending(1), cache.pending(-1)) == (0, 0, 20)
    cache.catch_up(2)
    assert seen == [20, 20, 20, 20] == [cache.ran[i] for i in (0, 1, 1, 2)]


@torch.no_grad()
def test_the_pending_buffer_is_bounded():
    family, ids = tiny_family("llama", EXITS), token_ids(1, 60)
    cache = RelayCache(family, [0, 2], max_pending=8)
    cache.feed(ids[:, :10])
    most = 0
    for i in range(10, 60):
        cache.feed(ids[:, i : i + 1])
        most = max(most, cache.pending(2))
    assert most == 18  # the prompt's and `max_pending` more
    cache.catch_up(2)
    whole = logits(family, ids)
    assert (cache.logits(2) - whole[:, -1:]).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("rollback", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("private", [0, 1])
def test_a_plain_cache_comes_back(model_type, private, rollback):
    family, ids = tiny_family(model_type, EXITS, num_exit_layers=private), token_ids(2, 24)
    cache = RelayCache(family, [0, 1, 2], rollback=rollback)
    cache.feed(ids[:, :15])
    cache.catch_up(1)
    cache.logits(0)
    cache.feed(ids[:, 15:20])
    if rollback:
        cache.crop(2)
        cache.feed(ids[:, 18:20])
    plain = cache.to_plain()
    assert {layer.get_seq_length() for layer in plain.layers} == {20}
    found = family(ids[:, 20:], past_key_values=plain).logits
    assert (found - logits(family, ids)[:, 20:]).abs().max() <= 1e-5


@torch.no_grad()
def test_a_relay_goes_on_from_a_plain_cache():
    family, ids = tiny_family("gemma2", EXITS), token_ids(2, 24)
    past = DynamicCache(config=family.config.text_config)
    family(ids[:, :13], past_key_values=past)
    cache = RelayCache(family, [0, 2], past)
    assert (cache.length, cache.first) == (13, 13)
    cache.feed(ids[:, 13:20])
    cache.feed(ids[:, 20:])
    for k in (0, 2):
        cache.catch_up(k)
        assert (cache.logits(k) - logits(family, ids, exit_idx=k)[:, -1:]).abs().max() <= 1e-5


@torch.no_grad()
def test_taps_from_elsewhere():
    """A process that has the upper layers goes on from taps alone."""
    family, ids = tiny_family("llama", EXITS), token_ids(2, 20)
    below = RelayCache(family, [0])
    above = UpperCache(family, 0)
    seen = layer_positions(family)
    for span in (slice(0, 9), slice(9, 10), slice(10, 16), slice(16, 20)):
        below.feed(ids[:, span])
        above.push(below.taps(0, span.stop - span.start), None, None)
        above.catch_up(2)
    assert seen == [20, 20, 20, 20]
    assert (above.logits(2) - logits(family, ids)[:, -1:]).abs().max() <= 1e-5


@torch.no_grad()
def test_a_ragged_cache_does_not_pass_for_a_plain_one():
    family, ids = tiny_family("llama", EXITS), token_ids(2, 20)
    cache = RelayCache(family, [0, 2])
    cache.feed(ids[:, :12])
    with pytest.raises(ValueError, match="same number of tokens in every layer"):
        family(ids[:, 12:13], past_key_values=cache.cache)
    with pytest.raises(ValueError, match="same number of tokens in every layer, got \\[0, 12\\]"):
        RelayCache(family, [0, 2], cache.cache)


def test_what_cannot_be_relayed_is_refused_with_the_reason():
    family = tiny_family("llama", EXITS)
    with pytest.raises(IndexError, match="exit"):
        RelayCache(family, [0, 7])
    with pytest.raises(ValueError, match="needs a `DynamicCache`.*got StaticCache"):
        RelayCache(family, [0], StaticCache(config=family.config.text_config, max_cache_len=8))
    with pytest.raises(ValueError, match="got DynamicCache"):
        RelayCache(family, [0], DynamicCache(config=family.config.text_config, offloading=True))
    recurrent = tiny_family("falcon_h1", EXITS)
    with pytest.raises(ValueError, match="`falcon_h1` has recurrent layers"):
        RelayCache(recurrent, [0, 2], rollback=True)
    shallow = RelayCache(family, [0, 1])
    shallow.feed(token_ids(1, 4))
    with pytest.raises(ValueError, match="`to_plain` needs the family's deepest exit"):
        shallow.to_plain()


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("zamba2", "use the token embedding again"), ("xlstm", "it does not use a cache")],
)
def test_hosts_whose_taps_are_not_enough(model_type, reason):
    family = tiny_family(model_type, EXITS)
    with pytest.raises(ValueError, match=f"`{model_type}` does not work with a relay: .*{reason}"):
        RelayCache(family, [0, 1])


@torch.no_grad()
def test_private_layers_need_the_whole_text():
    family, ids = tiny_family("llama", EXITS, num_exit_layers=1), token_ids(2, 12)
    past = family(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="private layers"):
        RelayCache(family, [0, 2], past)
    assert RelayCache(family, [2], past).length == 12

"""Ten thousand broken payloads: each is refused by type, or says what the whole one said."""

import json
import random

import pytest
import torch
from parted import family_and_device
from reference import token_ids
from test_state import assert_same, tiny_state

from hf_familial.errors import HandoffError
from hf_familial.handoff import DeviceSide, HandoffState, server_side
from hf_familial.handoff._message import DTYPES, decode, encode


COUNT = 10_000
ODD = [0, 1, -1, 3, 1 << 31, 1 << 63, 10**30, 0.5, 1e308, True, None, "", "x", [], {}, [[]], "F32"]


def flip(rng, data):
    """Some bits."""
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def overwrite(rng, data):
    """Some bytes in a row."""
    start, length = rng.randrange(len(data)), rng.choice([1, 4, 8, 64])
    data[start : start + length] = rng.randbytes(min(length, len(data) - start))


def truncate(rng, data):
    del data[rng.randrange(len(data)) :]


def extend(rng, data):
    data.extend(rng.randbytes(rng.randrange(1, 64)))


def remove(rng, data):
    start = rng.randrange(len(data))
    del data[start : start + rng.randrange(1, 32)]


def insert(rng, data):
    start = rng.randrange(len(data))
    data[start:start] = rng.randbytes(rng.randrange(1, 32))


def repeat(rng, data):
    """A piece stands somewhere else too."""
    start, to, length = rng.randrange(len(data)), rng.randrange(len(data)), rng.randrange(1, 64)
    data[to : to + length] = data[start : start + length]


def header_length(rng, data):
    """The header claims another size."""
    size = rng.choice([0, 1, 7, len(data) - 8, len(data), 1 << 20, 1 << 62, rng.getrandbits(64)])
    data[:8] = size.to_bytes(8, "little")


def header_value(rng, data):
    """A number or word in the header is another; its length fits again."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + size]))
    change(rng, header)
    head = json.dumps(header).encode()
    data[: 8 + size] = len(head).to_bytes(8, "little") + head


MUTATIONS = [
    flip, overwrite, truncate, extend, remove, insert, repeat, header_length, header_value
]  # fmt: skip


def change(rng, value):
    """Change one thing somewhere in a tree of JSON."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.8:
            value = value[key]
            continue
        kind = rng.randrange(3)
        if kind == 0 or isinstance(value, list):
            value[key] = rng.choice(ODD)
        elif kind == 1:
            value[rng.choice(["taps.3", "layers.7.keys", "0", "shape", ""])] = value.pop(key)
        else:
            del value[key]
        return


@pytest.fixture(scope="module")
def states():
    """One as it is, one in int8, one of a split."""
    return [
        tiny_state(1, 3),
        tiny_state(2, 2, dtype="int8"),
        tiny_state(1, 1, layers={}, start=4, generator=None, finished=None, settings={}),
    ]


def read(payload):
    """The state in a payload, or `None` if it is refused; any other error gets through."""
    try:
        return HandoffState.from_bytes(payload)
    except HandoffError:
        return None


def test_broken_payloads_are_refused_or_say_the_same(states):
    rng, accepted = random.Random(0), 0
    wholes = [state.to_bytes() for state in states]
    truths = [HandoffState.from_bytes(whole) for whole in wholes]
    for _ in range(COUNT):
        index = rng.randrange(len(states))
        data = bytearray(wholes[index])
        for _ in range(rng.choice([1, 1, 1, 2])):
            if data:
                mutate(rng, data)
        found = read(bytes(data))
        if found is not None:
            accepted += 1
            same(found, truths[index])
    # an overwritten byte may be the one that stood there, a space in the header may be a tab
    assert accepted < COUNT // 20


def mutate(rng, data):
    """One mutation; those of the header need one that can be read."""
    try:
        rng.choice(MUTATIONS)(rng, data)
    except ValueError:
        flip(rng, data)


def same(found, expected):
    """As `assert_same`, for states without optional parts too."""
    assert found.to_bytes() == expected.to_bytes()
    if expected.finished is not None:
        assert_same(found, expected)


def test_forged_payloads_with_the_right_checksum_never_crash(states):
    rng, accepted, count = random.Random(1), 0, COUNT // 4
    parts = [decode(state.to_bytes()) for state in states]
    for _ in range(count):
        tensors, words = rng.choice(parts)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        words = json.loads(json.dumps(words))
        if rng.random() < 0.6:
            change(rng, words)
        else:
            forge(rng, tensors)
        try:
            payload = encode(tensors, words)
        except (TypeError, ValueError):
            continue  # no JSON
        accepted += read(payload) is not None
    assert 0 < accepted < count // 2


def test_forged_states_never_crash_the_other_side():
    family, device = family_and_device("mistral")
    settings = {"eos_token_id": [2], "do_sample": True, "top_k": 9, "repetition_penalty": 1.2}
    generator = torch.Generator().manual_seed(0)
    text = DeviceSide(device).start(token_ids(2, 9), None, generator, max_new_tokens=3, **settings)
    wholes = [text.state(mode).to_bytes() for mode in ("migrate", "migrate-light")]
    parts, deep = [decode(whole) for whole in wholes], server_side(family, 0)
    rng, went_on = random.Random(2), 0
    for _ in range(1500):
        tensors, words = rng.choice(parts)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        words = json.loads(json.dumps(words))
        if rng.random() < 0.4:
            change(rng, words)
        else:
            forge(rng, tensors)
        try:
            state = HandoffState.from_bytes(encode(tensors, words))
            deep.resume(state, max_new_tokens=2).generate()
            went_on += 1
        except ValueError:
            pass  # of ours, or what `generate` says of settings
    assert 20 < went_on < 500


def forge(rng, tensors):
    """Another shape, dtype, name or value of one tensor."""
    name = rng.choice(list(tensors))
    tensor = tensors.pop(name)
    forged = [
        lambda: tensor[..., :-1],
        lambda: tensor.reshape(-1),
        lambda: tensor[None],
        lambda: tensor.float() * float("nan"),
        lambda: tensor.to(rng.choice([*DTYPES.values()])),
        lambda: tensor.float() * 1e38 * 1e38,
        lambda: tensor * 0 - 1 if tensor.dtype.is_signed else tensor * 0 + 255,
        lambda: tensor.repeat_interleave(2, 0),
    ]
    other = rng.choice(
        [name, name, name, "tokens", "taps.2", "layers.0.keys", "generator", "\ud800"]
    )
    if rng.random() < 0.9:
        tensors[other] = rng.choice(forged)()

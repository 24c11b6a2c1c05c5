"""The bytes of a text on its way: what comes out is what went in, or an error that says why not."""

import json
import tracemalloc
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from parted import family_and_device

from hf_familial.errors import HandoffError
from hf_familial.handoff import DeviceSide, HandoffState, server_side
from hf_familial.handoff._cache_layers import LayerState
from hf_familial.handoff._message import decode, encode
from hf_familial.handoff._quantization import dequantize, quantize, quantized_bytes


FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def tiny_state(batch=2, columns=5, floats=torch.float32, seed=0, **fields):
    """A state with one of everything."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator).to(floats)

    layer = {"keys": noise(batch, 2, columns, 4), "values": noise(batch, 2, columns, 4)}
    recurrent = {"conv_states.0": noise(batch, 3, 2)}
    parts = {
        "tokens": torch.randint(0, 99, (batch, columns), generator=generator),
        "attention_mask": torch.ones(batch, columns, dtype=torch.long),
        "position_ids": torch.arange(columns).repeat(batch, 1),
        "taps": {2: noise(batch, columns, 8)},
        "weights_digest": "f" * 64,
        "layers": {0: LayerState("DynamicLayer", columns, layer), 1: LayerState("X", 0, recurrent)},
        "finished": torch.zeros(batch, dtype=torch.uint8),
        "settings": {"do_sample": True, "temperature": 0.7, "eos_token_id": [2, 3]},
        "generator": torch.arange(16, dtype=torch.uint8),
    }
    return HandoffState(**(parts | fields))


def assert_same(found, expected):
    """Every field, tensors bit for bit."""
    for name in ("tokens", "attention_mask", "position_ids", "finished", "generator"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("weights_digest", "start", "settings", "dtype"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.taps.keys() == expected.taps.keys()
    for depth, tap in expected.taps.items():
        assert found.taps[depth].dtype == tap.dtype
        assert torch.equal(found.taps[depth], tap)
    assert found.layers.keys() == expected.layers.keys()
    for slot, layer in expected.layers.items():
        mine = found.layers[slot]
        assert (mine.kind, mine.seen, mine.tensors.keys()) == (
            layer.kind,
            layer.seen,
            layer.tensors.keys(),
        )
        for name, tensor in layer.tensors.items():
            assert torch.equal(mine.tensors[name], tensor), name


@hypothesis.given(
    batch=st.integers(1, 3),
    columns=st.integers(1, 7),
    floats=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_a_state_comes_back_bit_for_bit(batch, columns, floats, seed):
    state = tiny_state(batch, columns, floats, seed)
    assert_same(HandoffState.from_bytes(state.to_bytes()), state)


def test_the_bytes_are_a_safetensors_file():
    state = tiny_state()
    payload = state.to_bytes()
    found = safetensors.torch.load(payload)
    assert torch.equal(found["taps.2"], state.taps[2])
    assert torch.equal(found["layers.0.values"], state.layers[0].tensors["values"])
    assert found["tokens"].dtype == torch.int32
    header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    assert header["__metadata__"].keys() == {"relay", "checksum"}
    # every tensor starts where its dtype may
    for name, tensor in found.items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0


def test_a_state_is_saved_whole_or_not_at_all(tmp_path):
    path = tmp_path / "state.safetensors"
    state = tiny_state()
    state.save(path)
    assert_same(HandoffState.load(path), state)
    large = tiny_state(taps={2: torch.full((2, 5, 8), 3.4e38)}, dtype="bf16")
    with pytest.raises(HandoffError, match="not finite"):
        large.save(path)
    assert_same(HandoffState.load(path), state)
    with pytest.raises(OSError, match="there is no folder"):
        state.save(tmp_path / "missing" / "state.safetensors")
    with pytest.raises(OSError, match="No such file"):
        HandoffState.load(tmp_path / "missing")
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


@hypothesis.given(
    rows=st.lists(
        st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    )
)
def test_int8_is_off_by_half_a_scale_at_most(rows):
    tensor = torch.tensor(rows)
    packed = quantize("x", tensor, "int8")
    found = dequantize("x", packed, "int8", torch.float32)
    scale = tensor.abs().amax(-1, keepdim=True).double() / 127
    assert ((found.double() - tensor.double()).abs() <= scale * 0.5001 + 1e-37).all()
    assert quantized_bytes(tensor, "int8") == sum(t.nbytes for t in packed.values())


@pytest.mark.parametrize("floats", FLOATS)
@pytest.mark.parametrize("dtype", [None, "fp32", "bf16", "int8"])
def test_bytes_per_token_are_those_of_the_payload(dtype, floats):
    state = tiny_state(3, 6, floats, dtype=dtype)
    tensors, _ = decode(state.to_bytes())
    once = {"finished", "generator"}
    sent = sum(t.nbytes for name, t in tensors.items() if name not in once)
    assert state.bytes_per_token == sent / 18
    found = HandoffState.from_bytes(state.to_bytes())
    assert found.bytes_by_part == state.bytes_by_part
    assert found.taps[2].dtype == floats
    # recurrent states are never rounded
    recurrent = state.layers[1].tensors["conv_states.0"]
    assert torch.equal(found.layers[1].tensors["conv_states.0"], recurrent)


def with_header(change, tensors=None, words=None):
    """A payload whose checksum is right and whose header was changed."""
    payload = encode(tensors or {"tokens": torch.zeros(2, 3)}, words or {})
    size = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + size])
    head = change(header)
    head = (json.dumps(header) if head is None else head).encode()
    return len(head).to_bytes(8, "little") + head + payload[8 + size :]


def entry(**fields):
    return lambda header: header["tokens"].update(fields)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "at least 8 bytes, got 0"),
        (b"\xff" * 8, "claims 18446744073709551615 bytes, but 0 follow"),
        ((1 << 40).to_bytes(8, "little") + b"{}" * 9, "claims 1099511627776 bytes, but 18 follow"),
        ((2 << 20).to_bytes(8, "little") + b" " * (3 << 20), "1048576 is the limit"),
        (with_header(lambda h: "[" * 100_000), "not valid JSON"),
        (with_header(lambda h: "[]"), "must be a JSON object, got list"),
        (with_header(lambda h: '{"a":1,"a":1}'), "has the same name twice"),
        (with_header(lambda h: '{"a":NaN}'), "NaN, which is not a JSON number"),
        (with_header(lambda h: "9" * 10_000), "not valid JSON"),
        (
            with_header(lambda h: '{"a": "\udcff'.encode("utf-8", "replace").decode()),
            "not valid JSON",
        ),
        (
            with_header(lambda h: h.pop("__metadata__") and None),
            "`__metadata__` must contain `relay` and `checksum`",
        ),
        (with_header(lambda h: h["__metadata__"].update(relay=1)), "must be strings"),
        (with_header(lambda h: h.update(tokens=[])), "must have a dtype, a shape and offsets"),
        (with_header(entry(dtype="F8")), "must be one of F64"),
        (with_header(entry(dtype=["F32"])), "must be one of F64"),
        (with_header(entry(shape=[1 << 40, 1 << 40])), "fit in memory"),
        (with_header(entry(shape=[1 << 47, 0, 1 << 47])), "fit in memory"),
        (with_header(entry(shape=[1 << 40])), "needs 4398046511104 bytes at offset 0"),
        (with_header(entry(shape=[-2, -3])), "must be lists of sizes"),
        (with_header(entry(shape=[2.0, 3])), "must be lists of sizes"),
        (with_header(entry(shape=[True, 6])), "must be lists of sizes"),
        (with_header(entry(shape=[1] * 99 + [6])), "must be lists of sizes"),
        (with_header(entry(data_offsets=[0])), "must have two offsets"),
        (with_header(entry(data_offsets=[8, 32])), "but its offsets are 8 and 32"),
        (with_header(entry(data_offsets=[24, 0])), "but its offsets are 24 and 0"),
        (with_header(lambda h: h.update(b=h["tokens"])), "needs 24 bytes at offset 24"),
        (with_header(entry(shape=[3, 2])), "checksum"),
        (with_header(lambda h: h["__metadata__"].update(relay="[]")), "checksum"),
        (encode({}, [1]), "`relay` must be a JSON object"),
        ("text", "a payload must be `bytes`, got str"),
    ],
)
def test_forged_bytes_are_refused_before_anything_is_made_of_them(payload, message):
    tracemalloc.start()
    try:
        with pytest.raises(HandoffError, match=message):
            HandoffState.from_bytes(payload)
        assert tracemalloc.get_traced_memory()[1] < (8 << 20)
    finally:
        tracemalloc.stop()


def resealed(change):
    """The bytes of a state, changed and given the right checksum again."""
    tensors, words = decode(tiny_state().to_bytes())
    change(tensors, words)
    return encode(tensors, words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, w: w.update(version=2), "the state must have version 1, got 2"),
        (lambda t, w: w.pop("start"), "the state must have version 1"),
        (lambda t, w: w.update(extra=1), "the state must have version 1"),
        (lambda t, w: t.pop("tokens"), "has no `tokens`"),
        (lambda t, w: t.update(tokens=t["tokens"].float()), "`tokens` must be in torch.int32"),
        (lambda t, w: t.update(tokens=t["tokens"][:, :3]), "`attention_mask` must be integers"),
        (lambda t, w: t.update(tokens=t["tokens"][:, :0]), "not be empty"),
        (lambda t, w: t["tokens"].fill_(-1), "`tokens` must be from 0"),
        (lambda t, w: t["attention_mask"].fill_(2), "`attention_mask` must be from 0 to 1"),
        (lambda t, w: t["position_ids"].fill_(5), "`position_ids` must be from 0 to 4"),
        (lambda t, w: t["finished"].fill_(2), "`finished` must be 0 or 1"),
        (lambda t, w: t.update(finished=torch.full((2,), torch.nan)), "`finished` must be 0 or 1"),
        (lambda t, w: t.update(generator=torch.zeros(4)), "`generator` must be the uint8 tensor"),
        (
            lambda t, w: t.update({"taps.2": t["taps.2"][:1]}),
            r"have the shape \(2, pending, hidden\)",
        ),
        (lambda t, w: t["taps.2"].fill_(torch.nan), "depth 2 contains numbers that are not finite"),
        (lambda t, w: t["layers.0.keys"].fill_(torch.inf), "layer 0 contains numbers that are not"),
        (lambda t, w: t.update({"layers.0.keys": torch.ones(1, 2)}), "layer 0 must have 2 rows"),
        (lambda t, w: t.update({"layers.0.keys": torch.tensor(1.0)}), "layer 0 must have 2 rows"),
        (lambda t, w: t.update({"taps.2.scale": torch.ones(1)}), "unknown tensor 'taps.2.scale'"),
        (lambda t, w: t.update(odd=torch.ones(1)), "unknown tensor 'odd'"),
        (lambda t, w: t.pop("taps.2"), "must be a floating tensor"),
        (lambda t, w: w["floats"].pop("taps.2"), "unknown tensor 'taps.2'"),
        (lambda t, w: w["floats"].update(tokens="F32"), "must be a floating tensor"),
        (lambda t, w: w["floats"].update({"taps.2": "I8"}), "must be a floating tensor"),
        (lambda t, w: w["floats"].update({"taps.2": ["F32"]}), "must be a floating tensor"),
        (lambda t, w: w.update(floats=1), "must be JSON objects"),
        (lambda t, w: w.update(dtype="int4"), "must be one of fp32, bf16, int8 or None"),
        (lambda t, w: w.update(dtype=8), "`dtype` must be a name"),
        (lambda t, w: w.update(dtype="bf16"), "must be in torch.bfloat16, got torch.float32"),
        (lambda t, w: w.update(dtype="int8"), "must be in torch.int8"),
        (lambda t, w: w.update(start=-1), "`start` must be a number of columns"),
        (lambda t, w: w.update(start=True), "`start` must be a number of columns"),
        (lambda t, w: w.update(start=3), "in a state with keys and values"),
        (lambda t, w: w.update(fingerprint=""), "`weights_digest` must be a non-empty string"),
        (lambda t, w: w.update(fingerprint=None), "`weights_digest` must be a non-empty string"),
        (lambda t, w: w.update(settings=[]), "`settings` must be a mapping"),
        (
            lambda t, w: w["settings"].update(use_cache=True),
            "`settings` cannot contain 'use_cache'",
        ),
        (lambda t, w: w["settings"].update(top_k="9"), "`top_k` cannot be '9'"),
        (lambda t, w: w["settings"].update(eos_token_id=[]), r"`eos_token_id` cannot be \[\]"),
        (lambda t, w: w["settings"].update(top_k=True), "`top_k` cannot be True"),
        (lambda t, w: w["settings"].update(bad_words_ids=[1]), r"`bad_words_ids` cannot be \[1\]"),
        (
            lambda t, w: w["layers"].update({"0": "DynamicLayer"}),
            "a list of kind and length",
        ),
        (
            lambda t, w: w["layers"].update({"0": ["DynamicLayer", 6]}),
            "processed at most 5 positions, got 6",
        ),
        (lambda t, w: w["layers"].update({"00": ["X", 0]}), "'00' is not the index"),
        (lambda t, w: w["layers"].pop("0"), "unknown tensor 'layers.0.keys'"),
    ],
)
def test_a_state_that_does_not_fit_together_is_refused(change, message):
    with pytest.raises(HandoffError, match=message):
        HandoffState.from_bytes(resealed(change))


def test_more_positions_pending_than_columns_are_refused():
    taps = {1: torch.zeros(2, 3, 8), 2: torch.zeros(2, 3, 8)}
    with pytest.raises(HandoffError, match="at most 5 positions can be pending, got 6"):
        tiny_state(taps=taps)
    kept = tiny_state(taps={1: taps[1], 2: taps[2][:, :2]})
    assert_same(HandoffState.from_bytes(kept.to_bytes()), kept)


def test_a_state_says_what_it_is():
    assert repr(tiny_state()) == (
        "HandoffState(rows=2, columns=5, start=0, pending={2: 5}, layers=[0, 1], dtype=None, "
        "bytes_per_token=109.8)"
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.complex64])
def test_a_dtype_that_cannot_travel_is_refused(dtype):
    layers = {0: LayerState("DynamicLayer", 5, {"keys": torch.zeros(2, 1, 5, 4).to(dtype)})}
    with pytest.raises(HandoffError, match=f"`keys` of layer 0 must be floating, got {dtype}"):
        tiny_state(layers=layers)
    with pytest.raises(HandoffError, match="a floating dtype"):
        tiny_state(taps={2: torch.zeros(2, 5, 8).to(dtype)})


def test_every_truncation_is_refused():
    payload = tiny_state(1, 2).to_bytes()
    for length in range(len(payload)):
        with pytest.raises(HandoffError):
            HandoffState.from_bytes(payload[:length])
    with pytest.raises(HandoffError):
        HandoffState.from_bytes(payload + b"\0")


@pytest.fixture(scope="module")
def handed():
    """A state that fits the model it came for, and the other side."""
    family, device = family_and_device("mistral")
    shallow = DeviceSide(device).start(torch.arange(20).reshape(2, 10) + 9, max_new_tokens=3)
    return shallow.state("migrate"), server_side(family, 0)


def layer(**fields):
    def change(state):
        return {"layers": state.layers | {1: replace(state.layers[1], **fields)}}

    return change


def tensors(change):
    def changed(state):
        found = {name: change(t) for name, t in state.layers[1].tensors.items()}
        return layer(tensors=found)(state)

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"weights_digest": "0" * 64}, "the taps come from other layers"),
        (lambda s: {"taps": {1: s.taps[2]}}, "expected taps at depth 2"),
        (lambda s: {"taps": {2: s.taps[2][:, 1:]}}, "expected taps at depth 2"),
        (lambda s: {"taps": {2: s.taps[2][..., :16]}}, "expected taps at depth 2"),
        (lambda s: {"taps": {2: s.taps[2].half()}}, "expected taps at depth 2"),
        (lambda s: {"taps": {}}, "expected taps at depth 2"),
        (lambda s: {"tokens": s.tokens + 128}, "token ids must be below 128, got 1"),
        (lambda s: {"settings": {"eos_token_id": 128}}, "token ids must be below 128, got 128"),
        (lambda s: {"settings": {"bad_words_ids": [[5], [7, 130]]}}, "must be below 128, got 130"),
        (lambda s: {"generator": torch.zeros(8, dtype=torch.uint8)}, "must be the state of a CPU"),
        (lambda s: {"layers": {0: s.layers[0]}}, r"layers \[0, 1\] are needed, got \[0\]"),
        (layer(kind="DynamicLayer"), "layer 1 must be a DynamicSlidingWindowLayer"),
        (layer(seen=9), "layer 1 must have processed 10 positions, got 9"),
        (layer(tensors={}), "layer 1 must be a DynamicSlidingWindowLayer with"),
        (tensors(lambda t: t[:, :, 1:]), r"of shape \[2, 2, 7, 8\], got .* \[2, 2, 6, 8\]"),
        (tensors(lambda t: t[:, :1]), r"got torch.float32 of shape \[2, 1, 7, 8\]"),
        (tensors(lambda t: t[..., :4]), r"got torch.float32 of shape \[2, 2, 7, 4\]"),
        (tensors(lambda t: t.bfloat16()), "must be torch.float32 of shape .* got torch.bfloat16"),
    ],
)
def test_a_state_that_does_not_fit_the_model_is_refused(handed, change, message):
    state, deep = handed
    wrong = HandoffState.from_bytes(replace(state, **change(state)).to_bytes())
    with pytest.raises(HandoffError, match=message):
        deep.resume(wrong)
    # nothing is left behind: the right one still goes on
    assert deep.resume(state).generate().shape == (2, 13)

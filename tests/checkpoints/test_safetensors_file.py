"""Files of weights: believed only when sound, copied byte for byte, in little memory."""

import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from reference import tiny_family
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from support import assert_same_tensors
from transformers import LlamaConfig

from hf_familial import FamilialConfig, FamilialForCausalLM
from hf_familial.checkpoints import safetensors_file
from hf_familial.checkpoints.safetensors_file import TensorCopy, read_header, write_file
from hf_familial.errors import CheckpointError
from hf_familial.flops import member_parameters
from hf_familial.hub import export_exit


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
DTYPES += (torch.bool, torch.float8_e4m3fn)


def tensors_of(seed=0):
    """One tensor of every dtype, odd sizes among them, one empty and one without dimensions."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2, (7, 5, 8), generator=generator, dtype=torch.uint8)
    tensors = {f"t{i}": (bits[: i + 1] * 3).to(dtype) for i, dtype in enumerate(DTYPES[:6])}
    tensors |= {"flag": bits.bool(), "small": bits.float().to(DTYPES[-1])}
    return tensors | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(3.5)}


def pieces_of(path, dtype=None):
    return [TensorCopy(n, s, dtype or s.dtype) for n, s in read_header(path).items()]


# headers


def test_a_header_says_what_the_formats_own_reader_says(tmp_path):
    save_file(tensors_of(), tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert found.keys() == set(file.keys())
        for name, stored in found.items():
            row = file.get_slice(name)
            assert (stored.dtype, list(stored.shape)) == (row.get_dtype(), row.get_shape())
            raw = file.get_tensor(name)
            if raw.numel():
                raw = raw.reshape(-1).view(torch.uint8).numpy().tobytes()
                assert data[stored.start : stored.start + stored.nbytes] == raw


def forged(path, header, data=b"\0" * 16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def row(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


FORGED = {
    "empty": (b"", b"", None),
    "length": ({"a": row()}, b"\0" * 16, 2**63),
    "length-past-the-end": ({"a": row()}, b"\0" * 16, 200),
    "not-json": (b"{nonsense", b"\0" * 16, None),
    "not-text": (b"\xff\xfe{}", b"\0" * 16, None),
    "a-list": (b"[]", b"", None),
    "deep": (b"[" * 100_000, b"", None),
    "twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"\0",
        None,
    ),
    "no-row": ({"a": 3}, b"\0" * 16, None),
    "dtype": ({"a": row(dtype="F99")}, b"\0" * 16, None),
    "dtype-list": ({"a": row(dtype="F32") | {"dtype": None}}, b"\0" * 16, None),
    "shape": ({"a": row() | {"shape": 4}}, b"\0" * 16, None),
    "shape-negative": ({"a": row(shape=(-4,))}, b"\0" * 16, None),
    "shape-true": ({"a": row(shape=(True, 4))}, b"\0" * 16, None),
    "shape-huge": ({"a": row(shape=(2**40, 2**40))}, b"\0" * 16, None),
    "shape-beyond": ({"a": row(shape=(2**70,))}, b"\0" * 16, None),
    "offsets-three": ({"a": row(offsets=(0, 8, 16))}, b"\0" * 16, None),
    "offsets-backwards": ({"a": row(offsets=(16, 0))}, b"\0" * 16, None),
    "offsets-wide": ({"a": row(offsets=(0, 12))}, b"\0" * 12, None),
    "past-the-end": ({"a": row(shape=(2**30,), offsets=(0, 2**32))}, b"\0" * 16, None),
    "overlap": ({"a": row(), "b": row(offsets=(0, 16))}, b"\0" * 16, None),
    "gap": ({"a": row(offsets=(4, 20))}, b"\0" * 20, None),
    "left-over": ({"a": row()}, b"\0" * 17, None),
}


@pytest.mark.parametrize(("header", "data", "length"), FORGED.values(), ids=FORGED)
def test_forged_headers_are_refused(header, data, length, tmp_path):
    path = forged(tmp_path / "a.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        read_header(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "a.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3).bfloat16()}, path)
    return path.read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_what_is_accepted_the_formats_own_reader_accepts(sound, tmp_path, data):
    damaged = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 3))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(bytes(damaged[: len(damaged) - cut]))
    try:
        found = read_header(path)
    except CheckpointError:
        return
    with safe_open(path, "pt") as file:
        assert found.keys() == set(file.keys())


@pytest.mark.parametrize("kind", ["cut", "longer", "lying-index", "traversal", "broken-index"])
def test_a_damaged_checkpoint_leaves_nothing(kind, tmp_path):
    folder = tmp_path / "family"
    tiny_family("llama", [1, 2], depth=2).save_pretrained(folder, by_segment=True)
    index = folder / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    names = fields["weight_map"]
    shard = folder / "model-00001-of-00002.safetensors"
    if kind == "cut":
        os.truncate(shard, shard.stat().st_size - 1)
    elif kind == "longer":
        with shard.open("ab") as file:
            file.write(b"x")
    elif kind == "lying-index":
        names["model.exits.0.norm.weight"] = "model-00002-of-00002.safetensors"
    elif kind == "traversal":
        names["model.exits.0.norm.weight"] = "../family/model-00001-of-00002.safetensors"
    else:
        fields["weight_map"] = ["model.safetensors"]
    index.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError):
        export_exit(folder, 0, tmp_path / "out")
    assert os.listdir(tmp_path) == ["family"]


# copies


def broken_call(number, after=0):
    """A system call that a file system does not have, at once or after some bytes."""
    calls = []

    def call(*args):
        calls.append(args)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
        return original(*args[:2], min(5, args[2]), *args[3:])

    original = os.copy_file_range
    return call


HOWS = {
    "kernel": {},
    "short-counts": {
        "copy_file_range": lambda s, t, n, o: _real(s, t, min(n, 7), o),
    },
    "sendfile": {"copy_file_range": broken_call(errno.EXDEV)},
    "sendfile-half-way": {"copy_file_range": broken_call(errno.EINVAL, after=3)},
    "chunks": {
        "copy_file_range": broken_call(errno.ENOSYS),
        "sendfile": broken_call(errno.EINVAL),
    },
    "nothing-copied": {"copy_file_range": lambda *_: 0, "sendfile": lambda *_: 0},
    "absent": {"copy_file_range": None, "sendfile": None},
}
_real = os.copy_file_range


@pytest.mark.parametrize("patches", HOWS.values(), ids=HOWS)
def test_copies_are_equal_byte_for_byte_however_they_are_made(patches, tmp_path, monkeypatch):
    save_file(tensors_of(), tmp_path / "a.safetensors")
    for name, call in patches.items():
        if call is None:
            monkeypatch.delattr(safetensors_file.os, name)
        else:
            monkeypatch.setattr(safetensors_file.os, name, call)
    monkeypatch.setattr(safetensors_file, "CHUNK", 16)
    size = write_file(tmp_path / "b.safetensors", pieces_of(tmp_path / "a.safetensors"))
    assert size == (tmp_path / "b.safetensors").stat().st_size
    assert_same_tensors(
        load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    )
    assert read_header(tmp_path / "b.safetensors").keys() == tensors_of().keys()


def test_tensors_of_several_files_under_other_names_start_aligned(tmp_path):
    for i in range(3):
        save_file({f"{i}-{n}": t for n, t in tensors_of(i).items()}, tmp_path / f"{i}.safetensors")
    pieces = [
        TensorCopy(f"new.{piece.name[::-1]}", piece.source, piece.dtype)
        for i in (2, 0, 1)
        for piece in pieces_of(tmp_path / f"{i}.safetensors")[i:]
    ]
    write_file(tmp_path / "out.safetensors", pieces)
    found = load_file(tmp_path / "out.safetensors")
    right = {
        f"new.{n[::-1]}": t
        for i in range(3)
        for n, t in load_file(tmp_path / f"{i}.safetensors").items()
    }
    assert_same_tensors(found, {n: right[n] for n in found})
    assert len(found) == len(pieces)
    for stored in read_header(tmp_path / "out.safetensors").values():
        assert stored.start % (safetensors_file.BITS[stored.dtype] // 8) == 0


def test_a_source_that_shrinks_meanwhile_is_an_error(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / "a.safetensors")
    pieces = pieces_of(tmp_path / "a.safetensors")
    os.truncate(tmp_path / "a.safetensors", 200)
    for dtype in ("F32", "BF16"):
        changed = [TensorCopy(p.name, p.source, dtype) for p in pieces]
        with pytest.raises(CheckpointError, match="ended early"):
            write_file(tmp_path / f"{dtype}.safetensors", changed)


@given(values=st.lists(st.floats(width=32), min_size=1, max_size=50))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_conversions_are_torchs_own(tmp_path, values):
    source = {"a": torch.tensor(values, dtype=torch.float32), "i": torch.arange(3)}
    save_file(source, tmp_path / "a.safetensors")
    for code, dtype in safetensors_file.FLOATS.items():
        target = tmp_path / f"{code}.safetensors"
        target.unlink(missing_ok=True)
        pieces = [
            TensorCopy(p.name, p.source, code if p.source.dtype == "F32" else p.source.dtype)
            for p in pieces_of(tmp_path / "a.safetensors")
        ]
        right = source["a"].to(dtype)
        if (right.isinf() & ~source["a"].isinf()).any():
            with pytest.raises(CheckpointError, match="too large"):
                write_file(target, pieces)
            continue
        write_file(target, pieces)
        found = load_file(target)
        assert found["a"].view(torch.uint8).tolist() == right.view(torch.uint8).tolist()
        assert torch.equal(found["i"], source["i"])


def test_conversions_in_many_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "CHUNK", 64)
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    save_file({"a": values}, tmp_path / "a.safetensors")
    write_file(tmp_path / "b.safetensors", pieces_of(tmp_path / "a.safetensors", "BF16"))
    assert torch.equal(load_file(tmp_path / "b.safetensors")["a"], values.bfloat16())


MEMORY = """
import json, sys
from pathlib import Path
from hf_familial.hub import export_exit
from transformers.models.llama import modeling_llama

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(name)).split()[1]) / 1024

# what is imported and set up once, whatever the weights
export_exit(sys.argv[1], 0, sys.argv[2] + "/small")
export_exit(sys.argv[1], 0, sys.argv[2] + "/rounded", dtype="bfloat16")
peaks = []
for i, options in enumerate(({}, {"dtype": "float32"}, {"max_shard_size": "20MB"})):
    Path("/proc/self/clear_refs").write_text("5")
    start = status("VmRSS")
    export_exit(sys.argv[3], 0, f"{sys.argv[2]}/{i}", **options)
    peaks.append(status("VmHWM") - start)
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_weights(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 32768}
    tiny_family("llama", [1, 2], depth=2).save_pretrained(tmp_path / "small")
    text_config = LlamaConfig(num_hidden_layers=6, num_attention_heads=8, **sizes)
    large = FamilialForCausalLM(FamilialConfig(text_config=text_config, exits=[5, 6])).bfloat16()
    large.save_pretrained(tmp_path / "large")
    nbytes = sum(p.nbytes for p in member_parameters(large, 0))
    assert nbytes > 100 * 2**20
    command = [sys.executable, "-c", MEMORY]
    command += [str(tmp_path / n) for n in ("small", "out", "large")]
    (tmp_path / "out").mkdir()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peaks = json.loads(output.splitlines()[-1])
    assert all(peak <= 20 for peak in peaks), peaks


def test_nothing_of_the_standard_reader_is_used_unchecked(tmp_path):
    """The format's own reader refuses what we refuse: a gap, an overlap, bytes left over."""
    for name in ("overlap", "gap", "left-over"):
        path = forged(tmp_path / f"{name}.safetensors", *FORGED[name])
        with pytest.raises(SafetensorError):
            safe_open(path, "pt").__enter__()

"""Tensors and a few words as bytes: a safetensors file with a checksum, read with suspicion.

Every size that a header names is held against the bytes that are there before anything is made of
it. The checksum finds accidents; it is no signature, so a stranger's bytes need a safe channel.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import HandoffError


MAX_HEADER = 1 << 20  # bytes; three hundred layers fill a tenth of it
MAX_DIMS = 8
TOO_LARGE = 1 << 48  # for any size, even of a tensor without elements

# name in the header -> dtype; bool is left out, for not every byte is one
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Entry:
    """One tensor as the header describes it; offsets count from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def encode(tensors: Mapping[str, torch.Tensor], words: Mapping[str, Any]) -> bytes:
    """Write tensors and JSON words as the bytes of a safetensors file.

    The words, and a checksum of both, go into the header's `__metadata__`.
    """
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text, end, parts = _canonical(words), 0, []
    header: dict[str, Any] = {"__metadata__": {"relay": text, "checksum": _checksum(here, text)}}
    # the widest first, so that every tensor starts where its dtype may
    for name, tensor in sorted(here.items(), key=lambda item: (-item[1].itemsize, item[0])):
        parts.append(bytes(_bytes_of(tensor)))
        offsets, end = [end, end + len(parts[-1])], end + len(parts[-1])
        entry = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": offsets}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])


def decode(payload: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `encode` wrote, from anywhere: tensors in memory of their own, and the words."""
    metadata, entries, data = _header(payload)
    text = metadata["relay"]
    tensors = {name: _tensor(data, entry) for name, entry in entries.items()}
    if metadata["checksum"] != _checksum(tensors, text):
        raise HandoffError("the checksum does not match: the bytes were changed on the way.")
    words = _parse(text)
    if not isinstance(words, dict):
        raise HandoffError(f"`relay` must be a JSON object, got {type(words).__name__}.")
    return tensors, words


def _header(payload: bytes) -> tuple[dict[str, str], dict[str, _Entry], memoryview]:
    """The checked header of a safetensors file, and the data behind it."""
    if not isinstance(payload, (bytes, bytearray, memoryview)):
        raise HandoffError(f"a payload must be `bytes`, got {type(payload).__name__}.")
    view = memoryview(payload).cast("B")
    if len(view) < 8:
        raise HandoffError(f"a payload has at least 8 bytes, got {len(view)}.")
    size = int.from_bytes(view[:8], "little")
    if size > min(len(view) - 8, MAX_HEADER):
        raise HandoffError(
            f"the header claims {size} bytes; {len(view) - 8} follow, and {MAX_HEADER} is the most."
        )
    header, data = _parse(bytes(view[8 : 8 + size])), view[8 + size :]
    if not isinstance(header, dict):
        raise HandoffError(f"the header must be an object, got {type(header).__name__}.")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or set(metadata) != {"relay", "checksum"}:
        raise HandoffError("the header's `__metadata__` must hold `relay` and `checksum`.")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise HandoffError("the header's `__metadata__` must hold strings.")
    entries = {name: _entry(name, entry) for name, entry in header.items()}
    _check_layout(entries, len(data))
    return metadata, entries, data


def _entry(name: str, entry: Any) -> _Entry:
    """One tensor's description, with the types and sizes it must have."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise HandoffError(f"tensor {name!r:.60} must have a dtype, a shape and offsets.")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise HandoffError(
            f"tensor {name!r:.60} must be one of {', '.join(DTYPES)}, got {entry['dtype']!r:.40}."
        )
    if not _are_sizes(shape) or len(shape) > MAX_DIMS or not _are_sizes(offsets):
        raise HandoffError(f"tensor {name!r:.60} has a shape or offsets that are no sizes.")
    if len(offsets) != 2 or math.prod(size or 1 for size in shape) >= TOO_LARGE:
        raise HandoffError(f"tensor {name!r:.60} must have two offsets and fit in memory.")
    return _Entry(DTYPES[entry["dtype"]], tuple(shape), *offsets)


def _are_sizes(values: Any) -> bool:
    """Whether these are whole numbers that a tensor's size may be."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < TOO_LARGE for v in values)


def _check_layout(entries: Mapping[str, _Entry], size: int) -> None:
    """The tensors must fill the data exactly, one after the other."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        needed = math.prod(entry.shape) * entry.dtype.itemsize
        if entry.start != end or entry.stop - entry.start != needed:
            raise HandoffError(
                f"tensor {name!r:.60} of shape {list(entry.shape)} takes {needed} bytes from "
                f"{end} on, its offsets are {entry.start} and {entry.stop}."
            )
        end = entry.stop
    if end != size:
        raise HandoffError(f"the tensors take {end} bytes, the payload has {size} for them.")


def _tensor(data: memoryview, entry: _Entry) -> torch.Tensor:
    """A copy of one tensor's bytes, aligned and writable."""
    if entry.start == entry.stop:
        return torch.empty(entry.shape, dtype=entry.dtype)
    raw = bytearray(data[entry.start : entry.stop])
    return torch.frombuffer(raw, dtype=entry.dtype).reshape(entry.shape)


def _checksum(tensors: Mapping[str, torch.Tensor], text: str) -> str:
    """SHA-256 of the words and of every tensor's name, dtype, shape and bytes."""
    table = {
        name: [
            NAMES[tensor.dtype],
            list(tensor.shape),
            hashlib.sha256(_bytes_of(tensor)).hexdigest(),
        ]
        for name, tensor in tensors.items()
    }
    return hashlib.sha256(_canonical([text, table]).encode()).hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _canonical(value: Any) -> str:
    """The one JSON text of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _parse(text: str | bytes) -> Any:
    """JSON without its traps: names given twice, NaN, endless numbers, endless nesting."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_constant)
    except HandoffError:
        raise
    except (ValueError, RecursionError) as error:
        raise HandoffError(f"the header is no JSON: {error}.") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise HandoffError("the header names something twice.")
    return found


def _constant(name: str) -> Any:
    raise HandoffError(f"the header holds {name}, which is no number.")

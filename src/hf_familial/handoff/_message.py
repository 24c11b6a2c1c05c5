"""The byte format of a hand-off message: a safetensors file with JSON fields and a checksum.

The reader compares every size in a header with the number of received bytes before it allocates
memory. The checksum detects accidental changes only. It is not a signature, so use a channel that
authenticates the sender.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoints.safetensors_file import Limits, TensorEntry, parse_header, parse_json
from ..errors import CheckpointError, HandoffError


# name in the header -> dtype; bool is missing because not every byte is a valid bool
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
# 300 layers need a tenth of this header size; `size` also limits tensors without elements
LIMITS = Limits(header=1 << 20, dims=8, size=1 << 48, dtypes=tuple(DTYPES))


def encode(tensors: Mapping[str, torch.Tensor], words: Mapping[str, Any]) -> bytes:
    """Return tensors and JSON fields as the bytes of a safetensors file.

    The header's `__metadata__` contains the fields (`words`) and a checksum of fields and tensors.
    """
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text, end, parts = _canonical(words), 0, []
    header: dict[str, Any] = {"__metadata__": {"relay": text, "checksum": _checksum(here, text)}}
    # the widest dtypes come first, so that every tensor is aligned to its dtype
    for name, tensor in sorted(here.items(), key=lambda item: (-item[1].itemsize, item[0])):
        parts.append(bytes(_bytes_of(tensor)))
        offsets, end = [end, end + len(parts[-1])], end + len(parts[-1])
        entry = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": offsets}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])


def decode(payload: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and JSON fields of a message from `encode`. The bytes may be untrusted."""
    if not isinstance(payload, (bytes, bytearray, memoryview)):
        raise HandoffError(f"a payload must be `bytes`, got {type(payload).__name__}.")
    payload = bytes(payload)
    try:
        metadata, entries = parse_header(io.BytesIO(payload).read, len(payload), LIMITS)
        if not isinstance(metadata, dict) or set(metadata) != {"relay", "checksum"}:
            raise HandoffError("the header's `__metadata__` must contain `relay` and `checksum`.")
        if not all(isinstance(value, str) for value in metadata.values()):
            raise HandoffError("the values of the header's `__metadata__` must be strings.")
        tensors = {name: _tensor(payload, entry) for name, entry in entries.items()}
        if metadata["checksum"] != _checksum(tensors, metadata["relay"]):
            raise HandoffError("the checksum does not match. The bytes changed on the way.")
        words = parse_json(metadata["relay"])
    except CheckpointError as error:
        raise HandoffError(str(error)) from None
    if not isinstance(words, dict):
        raise HandoffError(f"`relay` must be a JSON object, got {type(words).__name__}.")
    return tensors, words


def _tensor(payload: bytes, entry: TensorEntry) -> torch.Tensor:
    """Copy one tensor of the payload into aligned and writable memory."""
    dtype = DTYPES[entry.dtype]
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=dtype)
    raw = bytearray(memoryview(payload)[entry.start : entry.start + entry.nbytes])
    return torch.frombuffer(raw, dtype=dtype).reshape(entry.shape)


def _checksum(tensors: Mapping[str, torch.Tensor], text: str) -> str:
    """Return the SHA-256 of the JSON text and of every tensor's name, dtype, shape and bytes."""
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
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)

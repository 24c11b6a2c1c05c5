"""Safetensors files as bytes: headers checked before anything is believed, data never in memory.

The format: 8 bytes of length, a JSON header, the tensors one after another.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError, PickleCheckpointError


# bits of one element; https://github.com/huggingface/safetensors/blob/main/safetensors/src/tensor.rs
BITS: Mapping[str, int] = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

# the dtypes that a conversion reads and writes; others stay as they are
FLOATS: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

MAX_HEADER = 100_000_000  # bytes, as in the format's own reader
CHUNK = 1 << 20  # bytes in memory at once
KERNEL_CHUNK = 1 << 30  # bytes that the kernel is asked to copy at once

# what a file system that cannot copy inside the kernel says
NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        path (`Path`): The file.
        dtype (`str`): safetensors' name of it.
        shape (`tuple[int, ...]`): Its shape.
        start (`int`): First byte in the file.
        nbytes (`int`): Number of bytes.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file; only its header is read.

    Args:
        path (`Path`): A safetensors file.

    Returns:
        `dict[str, Stored]`: By name, in the order of the header.

    Raises:
        CheckpointError: If the header is not sound: its own length, the dtypes, the sizes, or
            tensors that overlap, leave gaps or run past the end of the file.
        OSError: If the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"`{path}` is not a safetensors file, or is cut off: its {size} bytes cannot hold "
                f"a header of {length}."
            )
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"`{path}` has a damaged header: {error}.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"`{path}` has a damaged header: it is not a JSON object.")
    header.pop("__metadata__", None)
    data = 8 + length
    tensors = {name: _stored(path, name, row, data) for name, row in header.items()}
    end = data
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.nbytes)):
        if tensor.start != end:
            kind = "overlap" if tensor.start < end else "leave a gap"
            raise CheckpointError(f"`{path}` has a damaged header: tensors {kind} at byte {end}.")
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(f"`{path}` is damaged: {size} bytes where its header says {end}.")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _stored(path: Path, name: str, row: Any, data: int) -> Stored:
    """A row of a header, checked."""

    if not isinstance(row, dict) or row.get("dtype") not in BITS:
        raise CheckpointError(f"`{path}`: tensor `{name}` has no known dtype: {row!r:.200}.")
    shape, offsets = _sizes(row.get("shape")), _sizes(row.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"`{path}`: tensor `{name}` has no shape and offsets: {row!r:.200}.")
    nbytes, bits = offsets[1] - offsets[0], math.prod(shape) * BITS[row["dtype"]]
    if bits % 8 or nbytes != bits // 8:
        raise CheckpointError(
            f"`{path}`: tensor `{name}` of {shape} {row['dtype']} takes {bits // 8} bytes, but "
            f"{nbytes} are set aside."
        )
    return Stored(path, row["dtype"], tuple(shape), data + offsets[0], nbytes)


def _sizes(value: Any) -> list[int] | None:
    """A list of sizes, or `None` if it is none."""
    sound = isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
    return value if sound else None


@dataclass(frozen=True)
class Piece:
    """One tensor to be written.

    Attributes:
        name (`str`): Its name in the new file.
        source ([`Stored`]): Where it is.
        dtype (`str`): What it is to be; its own unless it is converted.
    """

    name: str
    source: Stored
    dtype: str

    @property
    def nbytes(self) -> int:
        """`int`: Size in the new file."""
        return math.prod(self.source.shape) * BITS[self.dtype] // 8


def write_file(path: Path, pieces: Sequence[Piece]) -> int:
    """Write a file of tensors that are in other files, and bring it to the disk.

    Args:
        path (`Path`): The new file.
        pieces (`Sequence[Piece]`): What it holds.

    Returns:
        `int`: Its size in bytes.

    Raises:
        CheckpointError: If a source is cut off, or a value does not fit the dtype asked for.
        OSError: If it cannot be written.
    """
    # widest first, then by name: every tensor starts at a multiple of its element, as the format
    # wants it, however the pieces came
    pieces = sorted(pieces, key=lambda piece: (-BITS[piece.dtype], piece.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        header[piece.name] = {
            "dtype": piece.dtype,
            "shape": list(piece.source.shape),
            "data_offsets": [end, end + piece.nbytes],
        }
        end += piece.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("xb", buffering=0) as target:
            _write(target, len(text).to_bytes(8, "little") + text)
            for file, start, nbytes, convert in _runs(pieces):
                with file.open("rb", buffering=0) as source:
                    if convert is None:
                        _copy(source, target, start, nbytes)
                    else:
                        _convert(source, target, convert)
            os.fsync(target.fileno())
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)  # the calls on descriptors do not know it
        raise
    return 8 + len(text) + end


def _runs(pieces: Sequence[Piece]) -> Iterator[tuple[Path, int, int, Piece | None]]:
    """What to copy at once: neighbours that were neighbours before."""
    run: list[Any] = []
    for piece in pieces:
        source = piece.source
        if run and piece.dtype == source.dtype and run[0] == source.path:
            if run[1] + run[2] == source.start:
                run[2] += source.nbytes
                continue
        if run:
            yield (*run, None)
            run = []
        if piece.dtype == source.dtype:
            run = [source.path, source.start, source.nbytes]
        else:
            yield source.path, source.start, source.nbytes, piece
    if run:
        yield (*run, None)


def _copy(source: BinaryIO, target: BinaryIO, start: int, nbytes: int) -> None:
    """Copy bytes to the end of the target: inside the kernel where that works."""
    done = 0
    for copy in (_copy_file_range, _sendfile):
        try:
            while done < nbytes:
                count = copy(source, target, start + done, min(KERNEL_CHUNK, nbytes - done))
                if not count:
                    break
                done += count
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
    while done < nbytes:
        chunk = os.pread(source.fileno(), min(CHUNK, nbytes - done), start + done)
        if not chunk:
            raise _cut_off(source)
        _write(target, chunk)
        done += len(chunk)


def _copy_file_range(source: BinaryIO, target: BinaryIO, start: int, count: int) -> int:
    if not hasattr(os, "copy_file_range"):
        return 0
    return os.copy_file_range(source.fileno(), target.fileno(), count, start)


def _sendfile(source: BinaryIO, target: BinaryIO, start: int, count: int) -> int:
    if not hasattr(os, "sendfile"):
        return 0
    return os.sendfile(target.fileno(), source.fileno(), start, count)


def _convert(source: BinaryIO, target: BinaryIO, piece: Piece) -> None:
    """Copy a tensor chunk by chunk, converted."""
    stored, done = piece.source, 0
    kind, wanted = FLOATS[stored.dtype], FLOATS[piece.dtype]
    while done < stored.nbytes:
        count = min(CHUNK, stored.nbytes - done)
        chunk = _read(source, stored.start + done, count)
        values = to_dtype(piece.name, torch.frombuffer(chunk, dtype=kind), wanted)
        _write(target, values.view(torch.uint8).numpy().data)
        done += count


def to_dtype(name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert values; one that does not fit is an error, and not an infinity.

    Args:
        name (`str`): Of their tensor.
        values (`torch.Tensor`): Of any shape.
        dtype (`torch.dtype`): What they become.

    Returns:
        `torch.Tensor`: The same object where nothing changes.

    Raises:
        CheckpointError: If a finite value is too large.
    """
    converted = values.to(dtype)
    if converted is values:
        return values
    if (converted.isinf() & ~values.isinf()).any():
        raise CheckpointError(
            f"tensor `{name}` has values too large for {dtype}: the largest is "
            f"{values.abs().max().item():.3g}. Choose bfloat16 or float32."
        )
    return converted


def _read(source: BinaryIO, start: int, count: int) -> bytearray:
    found = bytearray()
    while len(found) < count:
        chunk = os.pread(source.fileno(), count - len(found), start + len(found))
        if not chunk:
            raise _cut_off(source)
        found += chunk
    return found


def _write(target: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target.fileno(), view) :]


def _cut_off(source: BinaryIO) -> CheckpointError:
    return CheckpointError(f"`{source.name}` ended early: it changed while it was read.")


__all__ = [
    "BITS",
    "FLOATS",
    "CheckpointError",
    "PickleCheckpointError",
    "Piece",
    "Stored",
    "read_header",
    "to_dtype",
    "write_file",
]

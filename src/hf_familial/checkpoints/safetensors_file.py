"""A reader and writer of safetensors files that checks the whole header before it uses a tensor.

The format is 8 bytes of length, a JSON header, then the tensors one after another:
https://github.com/huggingface/safetensors#format. Tensors are copied in chunks from file to file.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError


# bits of one element; https://github.com/huggingface/safetensors/blob/main/safetensors/src/tensor.rs
BITS: Mapping[str, int] = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

# dtypes that can be converted; tensors of other dtypes are copied unchanged
FLOATS: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

CHUNK = 1 << 20  # bytes in memory at once
KERNEL_CHUNK = 1 << 30  # bytes of one copy inside the kernel

# errors of file systems that do not support a copy inside the kernel
NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


@dataclass(frozen=True)
class Limits:
    """The limits of a header that a reader accepts. The defaults are those of the format.

    Attributes:
        header (`int`): The largest size of the header in bytes.
        dims (`int`): The largest number of dimensions of a tensor.
        size (`int`): An upper bound for all sizes, offsets and numbers of elements.
        dtypes (`Collection[str]`): The accepted dtypes, by their names in the format.
    """

    header: int = 100_000_000
    dims: int = 1 << 10
    size: int = 1 << 63
    dtypes: Collection[str] = tuple(BITS)


@dataclass(frozen=True)
class TensorEntry:
    """The description of one tensor in the header of a file.

    Attributes:
        dtype (`str`): The name of the dtype in the format, for example `"BF16"`.
        shape (`tuple[int, ...]`): The shape.
        start (`int`): The offset of the first byte from the start of the file.
        nbytes (`int`): The number of bytes.
        path (`Path`): The path of the file. It is empty for data in memory.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    path: Path = Path()


def parse_header(
    read: Callable[[int], bytes], size: int, limits: Limits = Limits()
) -> tuple[Any, dict[str, TensorEntry]]:
    """Read and check the header of a safetensors file.

    Args:
        read (`Callable[[int], bytes]`): A function that returns the next n bytes, as `file.read`.
        size (`int`): The size of the whole file in bytes.
        limits ([`Limits`], *optional*): The limits that the header must not exceed.

    Returns:
        `tuple[Any, dict[str, TensorEntry]]`: The value of `__metadata__`, which is not checked, and
        the tensors by name. The tensors fill the rest of the file exactly.

    Raises:
        CheckpointError: If the header is not valid.
    """
    if size < 8:
        raise CheckpointError(f"the file must have at least 8 bytes, got {size}.")
    length = int.from_bytes(read(8), "little")
    if length > min(size - 8, limits.header):
        raise CheckpointError(
            f"the header claims {length} bytes, but {size - 8} follow and {limits.header} is the "
            "limit."
        )
    header = parse_json(read(length))
    if not isinstance(header, dict):
        raise CheckpointError(f"the header must be a JSON object, got {type(header).__name__}.")
    metadata = header.pop("__metadata__", None)
    data = 8 + length
    entries = {name: _entry(name, row, data, limits) for name, row in header.items()}
    end = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        needed, rest = divmod(math.prod(entry.shape) * BITS[entry.dtype], 8)
        if entry.start != end or entry.nbytes != needed or rest:
            start = entry.start - data
            raise CheckpointError(
                f"tensor {name!r:.60} of shape {list(entry.shape)} needs {needed} bytes at offset "
                f"{end - data}, but its offsets are {start} and {start + entry.nbytes}."
            )
        end += needed
    if end != size:
        raise CheckpointError(
            f"the tensors need {end - data} bytes, but the file has {size - data} after the header."
        )
    return metadata, entries


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. Duplicate names, NaN, infinity, huge numbers and deep nesting are rejected."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header is not valid JSON: {error}.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise CheckpointError("the header has the same name twice.")
    return found


def _no_constant(name: str) -> Any:
    raise CheckpointError(f"the header contains {name}, which is not a JSON number.")


def _entry(name: str, row: Any, data: int, limits: Limits) -> TensorEntry:
    """Check the types and sizes of one tensor in a header, and return its entry."""
    if not isinstance(row, dict) or row.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"tensor {name!r:.60} must have a dtype, a shape and offsets.")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in limits.dtypes:
        raise CheckpointError(
            f"the dtype of tensor {name!r:.60} must be one of {', '.join(limits.dtypes)}, got "
            f"{dtype!r:.40}."
        )
    if not (
        _are_sizes(shape, limits) and len(shape) <= limits.dims and _are_sizes(offsets, limits)
    ):
        raise CheckpointError(
            f"the shape and offsets of tensor {name!r:.60} must be lists of sizes, got "
            f"{shape!r:.40} and {offsets!r:.40}."
        )
    if len(offsets) != 2 or math.prod(n or 1 for n in shape) >= limits.size:
        raise CheckpointError(f"tensor {name!r:.60} must have two offsets and fit in memory.")
    return TensorEntry(dtype, tuple(shape), data + offsets[0], offsets[1] - offsets[0])


def _are_sizes(values: Any, limits: Limits) -> bool:
    if not isinstance(values, list):
        return False
    return all(type(n) is int and 0 <= n < limits.size for n in values)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a file by name, in the order of its header. Only the header is read."""
    try:
        with path.open("rb") as file:
            _, entries = parse_header(file.read, os.fstat(file.fileno()).st_size)
    except CheckpointError as error:
        raise CheckpointError(f"`{path}` is damaged or not a safetensors file: {error}") from None
    return {name: replace(entry, path=path) for name, entry in entries.items()}


@dataclass(frozen=True)
class TensorCopy:
    """A tensor to write: its new name, its source, and its new dtype."""

    name: str
    source: TensorEntry
    dtype: str

    @property
    def nbytes(self) -> int:
        """The number of bytes in the new file."""
        return math.prod(self.source.shape) * BITS[self.dtype] // 8


def write_file(path: Path, copies: Sequence[TensorCopy]) -> int:
    """Write a new file with tensors of other files, flush it to disk, and return its size."""
    # the widest dtypes come first, because the format requires aligned tensors; then by name
    copies = sorted(copies, key=lambda copy: (-BITS[copy.dtype], copy.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for copy in copies:
        offsets, end = [end, end + copy.nbytes], end + copy.nbytes
        row = {"dtype": copy.dtype, "shape": list(copy.source.shape), "data_offsets": offsets}
        header[copy.name] = row
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("xb", buffering=0) as target:
            _write(target, len(text).to_bytes(8, "little") + text)
            for run in _runs(copies):
                with run[0].source.path.open("rb", buffering=0) as source:
                    if run[0].dtype == run[0].source.dtype:
                        nbytes = sum(copy.source.nbytes for copy in run)
                        _copy(source, target, run[0].source.start, nbytes)
                    else:
                        _convert(source, target, run[0])
            os.fsync(target.fileno())
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)  # calls on file descriptors do not set it
        raise
    return 8 + len(text) + end


def _runs(copies: Sequence[TensorCopy]) -> list[list[TensorCopy]]:
    """Group copies that are adjacent in one source file. A converted copy is alone in its group."""
    runs: list[list[TensorCopy]] = []
    end: tuple[Path, int] | None = None
    for copy in copies:
        source = copy.source
        unchanged = copy.dtype == source.dtype
        if unchanged and end == (source.path, source.start):
            runs[-1].append(copy)
        else:
            runs.append([copy])
        end = (source.path, source.start + source.nbytes) if unchanged else None
    return runs


def _copy(source: BinaryIO, target: BinaryIO, start: int, nbytes: int) -> None:
    """Copy bytes to the end of the target, inside the kernel if the file system supports it."""
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
        done += _write(target, _read(source, start + done, min(CHUNK, nbytes - done)))


def _copy_file_range(source: BinaryIO, target: BinaryIO, start: int, count: int) -> int:
    if not hasattr(os, "copy_file_range"):
        return 0
    return os.copy_file_range(source.fileno(), target.fileno(), count, start)


def _sendfile(source: BinaryIO, target: BinaryIO, start: int, count: int) -> int:
    if not hasattr(os, "sendfile"):
        return 0
    return os.sendfile(target.fileno(), source.fileno(), start, count)


def _convert(source: BinaryIO, target: BinaryIO, copy: TensorCopy) -> None:
    """Copy a tensor and convert it chunk by chunk."""
    stored, done = copy.source, 0
    while done < stored.nbytes:
        chunk = _read(source, stored.start + done, min(CHUNK, stored.nbytes - done))
        values = torch.frombuffer(chunk, dtype=FLOATS[stored.dtype])
        converted = to_dtype(copy.name, values, FLOATS[copy.dtype])
        _write(target, converted.view(torch.uint8).numpy().data)
        done += len(chunk)


def to_dtype(name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a tensor to a dtype. Return the same tensor if it has this dtype already.

    Raises:
        CheckpointError: If a finite value becomes infinite.
    """
    converted = values.to(dtype)
    if converted is values:
        return values
    if (converted.isinf() & ~values.isinf()).any():
        raise CheckpointError(
            f"tensor `{name}` has values too large for {dtype}. The largest is "
            f"{values.abs().max().item():.3g}. Choose bfloat16 or float32."
        )
    return converted


def _read(source: BinaryIO, start: int, count: int) -> bytearray:
    found = bytearray()
    while len(found) < count:
        chunk = os.pread(source.fileno(), count - len(found), start + len(found))
        if not chunk:
            raise CheckpointError(f"`{source.name}` ended early. It changed while it was read.")
        found += chunk
    return found


def _write(target: BinaryIO, data: bytes | bytearray | memoryview) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(target.fileno(), view) :]
    return len(data)

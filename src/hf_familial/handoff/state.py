"""The state of a text between two processes: tokens, taps, keys and values, saved as bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._files import write_whole
from ..errors import HandoffError
from ._cache_layers import BY_POSITION, LayerState
from ._message import DTYPES, NAMES, decode, encode
from ._quantization import SCALE, check_format, dequantize, quantize, quantized_bytes
from ._settings import check_settings


VERSION = 1
TAPS, LAYERS = "taps", "layers"
# fields with one value per token -> the dtype in the message
COLUMNS: Mapping[str, torch.dtype] = {
    "tokens": torch.int32,
    "attention_mask": torch.uint8,
    "position_ids": torch.int32,
}
OPTIONAL = ("finished", "generator")
WORDS = {"version", "start", "fingerprint", "settings", "dtype", "floats", "layers"}


@dataclass(frozen=True, eq=False, repr=False)
class HandoffState:
    """The part of a text that one process sends to another in a hand-off.

    All its columns have run through the layers below an exit.

    Attributes:
        tokens (`torch.LongTensor` of shape `(batch, seq)`): The token ids of the columns.
        attention_mask (`torch.LongTensor` of shape `(batch, seq)`): 0 for padding, else 1.
        position_ids (`torch.LongTensor` of shape `(batch, seq)`): The position ids of the columns.
        taps (`Mapping[int, torch.Tensor]`): The hidden states of pending positions, by depth,
            shape `(batch, pending, hidden)`. At the shallowest depth they belong to the last
            columns.
        weights_digest (`str`): The digest of the layers that computed the taps. See
            [`weights_digest`].
        layers (`Mapping[int, LayerState]`): The keys and values of each layer below the exit. It is
            empty if they are not sent.
        start (`int`): The number of earlier columns, which the other process already has.
        finished (`torch.Tensor` of shape `(batch,)`, *optional*): 1 for rows that have ended, else
            0.
        settings (`Mapping[str, Any]`): Fields of `GenerationConfig` such as `temperature`.
            `max_new_tokens` counts the tokens still to generate.
        generator (`torch.Tensor` of shape `(bytes,)`, *optional*): The state of the CPU generator
            for sampling.
        dtype (`str`, *optional*): The format of taps, keys and values in the message: `"fp32"`,
            `"bf16"`, or `"int8"` with one scale per row. By default they keep their dtype.

    Raises:
        HandoffError: If two fields do not fit together, or if a number is not finite.

    Example:
        >>> payload = text.state("migrate").to_bytes()
        >>> state = HandoffState.from_bytes(payload)
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    taps: Mapping[int, torch.Tensor]
    weights_digest: str
    layers: Mapping[int, LayerState] = field(default_factory=dict)
    start: int = 0
    finished: torch.Tensor | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    generator: torch.Tensor | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        check_format(self.dtype)
        check_settings(self.settings)
        self._check_columns()
        self._check_taps()
        self._check_layers()

    def __repr__(self) -> str:
        rows, columns = self.shape
        pending = {depth: tap.shape[1] for depth, tap in self.taps.items()}
        return (
            f"HandoffState(rows={rows}, columns={columns}, start={self.start}, pending={pending}, "
            f"layers={sorted(self.layers)}, dtype={self.dtype!r}, "
            f"bytes_per_token={self.bytes_per_token:.1f})"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """The number of rows and columns."""
        return self.tokens.shape[0], self.tokens.shape[1]

    @property
    def bytes_by_part(self) -> dict[str, float]:
        """Bytes per token in the message, for `columns`, `taps` and `keys_and_values`."""
        count = max(1, self.tokens.numel())
        sizes = {
            name: quantized_bytes(tensor, self.dtype if _is_quantized(name) else None) / count
            for name, tensor in self._floating().items()
        }
        taps = sum(size for name, size in sizes.items() if name.startswith(TAPS))
        layers = sum(size for name, size in sizes.items() if name.startswith(LAYERS))
        columns = sum(dtype.itemsize for dtype in COLUMNS.values())
        return {"columns": columns, "taps": taps, "keys_and_values": layers}

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token in the message, without the header."""
        return sum(self.bytes_by_part.values())

    def to_bytes(self) -> bytes:
        """Return the state as the bytes of a safetensors file.

        Returns:
            `bytes`: The file. Fields that are not tensors are JSON in the header's `__metadata__`.

        Raises:
            HandoffError: If a number is too large for the format `dtype`.
        """
        tensors = {name: getattr(self, name).to(dtype) for name, dtype in COLUMNS.items()}
        floating = self._floating()
        for name, tensor in floating.items():
            tensors |= quantize(name, tensor, self.dtype if _is_quantized(name) else None)
            check_finite(f"`{name}`", tensors[name])
        for name in OPTIONAL:
            if getattr(self, name) is not None:
                tensors[name] = getattr(self, name).to(torch.uint8)
        words = {
            "version": VERSION,
            "start": self.start,
            "fingerprint": self.weights_digest,
            "settings": dict(self.settings),
            "dtype": self.dtype,
            "floats": {name: NAMES[tensor.dtype] for name, tensor in floating.items()},
            "layers": {str(slot): [la.kind, la.seen] for slot, la in self.layers.items()},
        }
        return encode(tensors, words)

    @classmethod
    def from_bytes(cls, payload: bytes) -> HandoffState:
        """Read a state from bytes that `to_bytes` returned.

        Args:
            payload (`bytes`): The bytes. They may come from an untrusted sender: no code in them
                runs, and each size is checked against the number of bytes before its use.

        Returns:
            [`HandoffState`]: The state on the CPU. Taps, keys and values have their original dtype.

        Raises:
            HandoffError: If the bytes are incomplete, changed, or not a state.
        """
        tensors, words = decode(payload)
        if set(words) != WORDS or words["version"] != VERSION:
            version = words.get("version")
            raise HandoffError(
                f"the state must have version {VERSION}, got {version!r:.20}. Use the same version "
                "of hf_familial in both processes."
            )
        missing = sorted(COLUMNS.keys() - tensors.keys())
        _require(not missing, f"the state has no `{''.join(missing[:1])}`.")
        columns: dict[str, Any] = {name: tensors.pop(name) for name in COLUMNS}
        optional: dict[str, Any] = {name: tensors.pop(name, None) for name in OPTIONAL}
        for name, expected in COLUMNS.items():
            _require(columns[name].dtype == expected, f"`{name}` must be in {expected}.")
        floats, dtype = _floats(words, tensors), words["dtype"]
        found = {
            name: dequantize(name, tensors, dtype if _is_quantized(name) else None, original)
            for name, original in floats.items()
        }
        scales = {name + SCALE for name in found if dtype == "int8" and _is_quantized(name)}
        odd = tensors.keys() ^ (found.keys() | scales)
        _require(not odd, f"unknown tensor {min(odd, default='')!r:.60}.")
        return cls(
            **{name: tensor.long() for name, tensor in columns.items()},
            **optional,
            **_grouped(found, words["layers"]),
            weights_digest=words["fingerprint"],
            start=words["start"],
            settings=words["settings"],
            dtype=dtype,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the state as a safetensors file in one atomic write. An existing file is replaced.

        Raises:
            OSError: If the file cannot be written.
        """
        write_whole(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HandoffState:
        """Load a state from a file that `save` wrote.

        Raises:
            OSError: If the file cannot be read.
            HandoffError: If the file is not a complete, unchanged state.
        """
        return cls.from_bytes(Path(path).read_bytes())

    def _floating(self) -> dict[str, torch.Tensor]:
        """Return taps, keys, values and recurrent states by their names in the message."""
        taps = {f"{TAPS}.{depth}": tap for depth, tap in self.taps.items()}
        return taps | {
            f"{LAYERS}.{slot}.{name}": tensor
            for slot, state in self.layers.items()
            for name, tensor in state.tensors.items()
        }

    def _check_columns(self) -> None:
        """Check the shapes and ranges of all fields except taps and layers."""
        shape, start, finished, generator = (
            self.tokens.shape, self.start, self.finished, self.generator
        )  # fmt: skip
        _require(
            len(shape) == 2 and self.tokens.numel() > 0,
            f"`tokens` must have the shape (batch, seq) and not be empty, got {tuple(shape)}.",
        )
        _require(
            type(start) is int and 0 <= start < 1 << 31,
            f"`start` must be a number of columns, 0 or more, got {start!r:.60}.",
        )
        most = {"tokens": 1 << 31, "attention_mask": 2, "position_ids": start + shape[1]}
        for name, limit in most.items():
            tensor = getattr(self, name)
            _require(
                tensor.shape == shape and not tensor.is_floating_point(),
                f"`{name}` must be integers of shape {tuple(shape)}, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}.",
            )
            _require(_within(tensor, limit), f"`{name}` must be from 0 to {limit - 1}.")
        _require(
            isinstance(self.weights_digest, str) and self.weights_digest != "",
            f"`weights_digest` must be a non-empty string, got {self.weights_digest!r:.60}.",
        )
        if finished is not None:
            by_row = finished.shape == shape[:1] and not finished.is_floating_point()
            _require(by_row and _within(finished, 2), "`finished` must be 0 or 1 for each row.")
        _require(
            generator is None or (generator.dtype == torch.uint8 and generator.ndim == 1),
            "`generator` must be the uint8 tensor of `torch.Generator.get_state()`.",
        )

    def _check_taps(self) -> None:
        """Check the taps, and that the depths together do not have more taps than columns."""
        batch, columns = self.shape
        for depth, tap in self.taps.items():
            _require(
                type(depth) is int and depth >= 1,
                f"the keys of `taps` must be depths, 1 or more, got {depth!r:.60}.",
            )
            _require(
                _is_floating(tap) and tap.ndim == 3 and tap.shape[0] == batch,
                f"the taps at depth {depth} must have the shape ({batch}, pending, hidden) and a "
                f"floating dtype, got {tap.dtype} of shape {tuple(tap.shape)}.",
            )
            check_finite(f"the taps at depth {depth}", tap)
        pending = sum(tap.shape[1] for tap in self.taps.values())
        _require(pending <= columns, f"at most {columns} positions can be pending, got {pending}.")

    def _check_layers(self) -> None:
        """Check the layers as far as possible without the model. See `check_against_model`."""
        batch, columns = self.shape
        _require(
            not (self.layers and self.start),
            f"`start` must be 0 in a state with keys and values, got {self.start}.",
        )
        for slot, layer in self.layers.items():
            _require(
                0 <= layer.seen <= columns,
                f"layer {slot} can have processed at most {columns} positions, got {layer.seen}.",
            )
            for name, tensor in layer.tensors.items():
                what = f"`{name:.60}` of layer {slot}"
                _require(_is_floating(tensor), f"{what} must be floating, got {tensor.dtype}.")
                _require(
                    tensor.ndim > 0 and tensor.shape[0] == batch,
                    f"{what} must have {batch} rows, got {tuple(tensor.shape)}.",
                )
                check_finite(what, tensor)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise `HandoffError` if a tensor contains NaN or infinity."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise HandoffError(f"{name} contains numbers that are not finite.")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise HandoffError(message)


def _within(tensor: torch.Tensor, limit: int) -> bool:
    return int(tensor.min()) >= 0 and int(tensor.max()) < limit


def _is_floating(tensor: torch.Tensor) -> bool:
    return tensor.dtype in NAMES and tensor.is_floating_point()


def _is_quantized(name: str) -> bool:
    """Return whether a tensor is quantised. Recurrent states are not, because errors add up."""
    return name.startswith(TAPS) or name.rpartition(".")[2] in BY_POSITION


def _floats(words: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the original dtypes of floating tensors, and check the types of the JSON fields."""
    floats, dtype = words["floats"], words["dtype"]
    _require(
        isinstance(floats, dict) and isinstance(words["layers"], dict),
        "`floats` and `layers` of the message must be JSON objects.",
    )
    _require(dtype is None or isinstance(dtype, str), f"`dtype` must be a name, got {dtype!r:.60}.")
    check_format(dtype)
    found = {}
    for name, original in floats.items():
        known = DTYPES.get(original) if isinstance(original, str) else None
        if name not in tensors or known is None or not known.is_floating_point:
            raise HandoffError(f"`{name:.60}` must be a floating tensor, got {original!r:.60}.")
        found[name] = known
    return found


def _grouped(found: Mapping[str, torch.Tensor], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Sort the tensors of a message into taps by depth and layers by slot."""
    taps: dict[int, torch.Tensor] = {}
    parts: dict[int, dict[str, torch.Tensor]] = {_index(slot): {} for slot in kinds}
    for name, tensor in found.items():
        group, _, rest = name.partition(".")
        index, _, part = rest.partition(".")
        if group == TAPS and not part:
            taps[_index(index)] = tensor
        elif group == LAYERS and part and _index(index) in parts:
            parts[_index(index)][part] = tensor
        else:
            raise HandoffError(f"unknown tensor {name!r:.60}.")
    layers = {}
    for slot, kind in kinds.items():
        _require(
            isinstance(kind, list) and [type(word) for word in kind] == [str, int],
            f"layer {slot:.20} must be a list of kind and length, got {kind!r:.60}.",
        )
        layers[_index(slot)] = LayerState(kind[0], kind[1], parts[_index(slot)])
    return {"taps": taps, "layers": layers}


def _index(text: str) -> int:
    """Parse the index of a layer. Only the canonical decimal form is accepted."""
    canonical = text.isascii() and text.isdigit() and len(text) < 7 and str(int(text)) == text
    _require(canonical, f"{text!r:.60} is not the index of a layer.")
    return int(text)

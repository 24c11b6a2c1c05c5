"""A text on its way from one process to another: tokens, taps, keys and values, and their bytes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import RelayStateError
from ._cache_layers import BY_POSITION, LayerState
from ._checks import check_columns, check_finite, check_layers, check_taps
from ._message import DTYPES, NAMES, seal, unseal
from ._quantization import SCALE, check_format, pack, packed_bytes, unpack
from ._settings import check_settings


VERSION = 1
TAPS, LAYERS = "taps", "layers"
# the columns of the text, and the dtype that each travels in
COLUMNS: Mapping[str, torch.dtype] = {
    "tokens": torch.int32,
    "attention_mask": torch.uint8,
    "position_ids": torch.int32,
}
OPTIONAL = ("finished", "generator")
WORDS = {"version", "start", "fingerprint", "settings", "dtype", "floats", "layers"}


@dataclass(frozen=True, eq=False, repr=False)
class RelayState:
    """Some columns of a text, all of them run through the layers below an exit.

    Attributes:
        tokens (`torch.LongTensor` of shape `(batch, seq)`): The columns' token ids.
        attention_mask (`torch.LongTensor` of shape `(batch, seq)`): 0 for padding, else 1.
        position_ids (`torch.LongTensor` of shape `(batch, seq)`): As the layers were given them.
        taps (`Mapping[int, torch.Tensor]`): By depth, the taps of the positions pending there, of
            shape `(batch, pending, hidden)`; at the shallowest depth they are the last columns.
        fingerprint (`str`): Of the layers that made the taps, see `fingerprint`.
        layers (`Mapping[int, LayerState]`): Keys and values by layer, where they travel too.
        start (`int`): Columns of the text before these, which the other side has.
        finished (`torch.Tensor` of shape `(batch,)`, *optional*): 1 for rows that have ended.
        settings (`Mapping[str, Any]`): How tokens are chosen: fields of `GenerationConfig`;
            `max_new_tokens` counts those still to come.
        generator (`torch.Tensor` of shape `(bytes,)`, *optional*): State of the CPU generator that
            tokens are drawn with.
        dtype (`str`, *optional*): What taps, keys and values travel in: `"fp32"`, `"bf16"`,
            `"int8"` (a scale for each row), or as they are.

    Raises:
        RelayStateError: If the parts do not fit together, or a number is not finite.
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    taps: Mapping[int, torch.Tensor]
    fingerprint: str
    layers: Mapping[int, LayerState] = field(default_factory=dict)
    start: int = 0
    finished: torch.Tensor | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    generator: torch.Tensor | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        check_format(self.dtype)
        check_settings(self.settings)
        check_columns(self)
        check_taps(self)
        check_layers(self)

    def __repr__(self) -> str:
        rows, columns = self.shape
        pending = {depth: tap.shape[1] for depth, tap in self.taps.items()}
        return (
            f"RelayState(rows={rows}, columns={columns}, start={self.start}, pending={pending}, "
            f"layers={sorted(self.layers)}, dtype={self.dtype!r}, "
            f"bytes_per_token={self.bytes_per_token:.1f})"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.tokens.shape[0], self.tokens.shape[1]

    @property
    def bytes_by_part(self) -> dict[str, float]:
        """Bytes per token of the columns, of the taps, and of the keys and values, on the way."""
        count = max(1, self.tokens.numel())
        columns = sum(dtype.itemsize for dtype in COLUMNS.values())
        taps = sum(packed_bytes(tap, self.dtype) for tap in self.taps.values())
        layers = sum(
            packed_bytes(tensor, self.dtype if name in BY_POSITION else None)
            for state in self.layers.values()
            for name, tensor in state.tensors.items()
        )
        return {"columns": columns, "taps": taps / count, "keys_and_values": layers / count}

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token on the way, all parts together; a header comes once."""
        return sum(self.bytes_by_part.values())

    def to_bytes(self) -> bytes:
        """Write the state as a safetensors file in memory.

        Returns:
            `bytes`: Tensors, and the rest as JSON in the header's `__metadata__`.

        Raises:
            RelayStateError: If a number is too large for the dtype it travels in.
        """
        tensors = {name: getattr(self, name).to(dtype) for name, dtype in COLUMNS.items()}
        floats = {}
        for name, tensor in self._floating().items():
            floats[name] = NAMES[tensor.dtype]
            tensors |= pack(name, tensor, self.dtype if _by_row(name) else None)
        for name in OPTIONAL:
            if getattr(self, name) is not None:
                tensors[name] = getattr(self, name).to(torch.uint8)
        for name in floats:
            check_finite(f"`{name}`", tensors[name])
        words = {
            "version": VERSION,
            "start": self.start,
            "fingerprint": self.fingerprint,
            "settings": dict(self.settings),
            "dtype": self.dtype,
            "floats": floats,
            "layers": {str(slot): [la.kind, la.seen] for slot, la in self.layers.items()},
        }
        return seal(tensors, words)

    def _floating(self) -> dict[str, torch.Tensor]:
        """Taps, keys, values and recurrent states, by their names on the way."""
        taps = {f"{TAPS}.{depth}": tap for depth, tap in self.taps.items()}
        return taps | {
            f"{LAYERS}.{slot}.{name}": tensor
            for slot, state in self.layers.items()
            for name, tensor in state.tensors.items()
        }

    @classmethod
    def from_bytes(cls, payload: bytes) -> RelayState:
        """Read what `to_bytes` wrote.

        Args:
            payload (`bytes`): From anywhere: nothing in it is run, and no size in it is believed
                before it is held against the number of bytes.

        Returns:
            [`RelayState`]: On the CPU, taps, keys and values in the dtype they had.

        Raises:
            RelayStateError: If the payload is not such a state, complete and unchanged.
        """
        tensors, words = unseal(payload)
        if set(words) != WORDS or words["version"] != VERSION:
            version = words.get("version")
            raise RelayStateError(f"a state of version {VERSION} is wanted, not {version!r:.20}.")
        missing = sorted(COLUMNS.keys() - tensors.keys())
        if missing:
            raise RelayStateError(f"the state has no `{missing[0]}`.")
        columns: dict[str, Any] = {name: tensors.pop(name) for name in COLUMNS}
        optional: dict[str, Any] = {name: tensors.pop(name, None) for name in OPTIONAL}
        wrong = [name for name, dtype in COLUMNS.items() if columns[name].dtype != dtype]
        if wrong:
            raise RelayStateError(f"`{wrong[0]}` must be in {COLUMNS[wrong[0]]}.")
        floats, dtype = _floats(words, tensors), words["dtype"]
        found = {
            name: unpack(name, tensors, dtype if _by_row(name) else None, original)
            for name, original in floats.items()
        }
        known = found.keys() | {name + SCALE for name in found if dtype == "int8" and _by_row(name)}
        if tensors.keys() != known:
            raise RelayStateError(f"unknown tensor {min(tensors.keys() ^ known)!r:.60}.")
        return cls(
            **{name: tensor.long() for name, tensor in columns.items()},
            **optional,
            **_grouped(found, words["layers"]),
            fingerprint=words["fingerprint"],
            start=words["start"],
            settings=words["settings"],
            dtype=dtype,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, whole or not at all.

        Args:
            path (`str` or `os.PathLike`): Of a safetensors file; replaced if there is one.

        Raises:
            OSError: If it cannot be written.
        """
        payload, path = self.to_bytes(), Path(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(payload)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RelayState:
        """Read a state from a file.

        Args:
            path (`str` or `os.PathLike`): As given to `save`.

        Returns:
            [`RelayState`]: As from `from_bytes`.

        Raises:
            OSError: If it cannot be read.
            RelayStateError: If it is not such a state.
        """
        return cls.from_bytes(Path(path).read_bytes())


def _by_row(name: str) -> bool:
    """Whether a tensor is packed; recurrent states are not, for their errors would add up."""
    return name.startswith(TAPS) or name.rpartition(".")[2] in BY_POSITION


def _floats(words: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The dtypes that packed tensors had, and the types of the other words."""
    floats, dtype = words["floats"], words["dtype"]
    if not isinstance(floats, dict) or not isinstance(words["layers"], dict):
        raise RelayStateError("`floats` and `layers` must be objects.")
    if dtype is not None and not isinstance(dtype, str):
        raise RelayStateError(f"`dtype` must be a name, got {dtype!r:.60}.")
    check_format(dtype)
    found = {}
    for name, original in floats.items():
        known = DTYPES.get(original) if isinstance(original, str) else None
        if name not in tensors or known is None or not known.is_floating_point:
            raise RelayStateError(f"`{name:.60}` must be a floating tensor, got {original!r:.60}.")
        found[name] = known
    return found


def _grouped(found: Mapping[str, torch.Tensor], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Taps by depth, and layers by slot, from the names they had on the way."""
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
            raise RelayStateError(f"unknown tensor {name!r:.60}.")
    layers = {}
    for slot, kind in kinds.items():
        if not isinstance(kind, list) or [type(word) for word in kind] != [str, int]:
            raise RelayStateError(
                f"layer {slot:.20} must have a kind and a length, got {kind!r:.60}."
            )
        layers[_index(slot)] = LayerState(kind[0], kind[1], parts[_index(slot)])
    return {"taps": taps, "layers": layers}


def _index(text: str) -> int:
    """A depth or slot, written in the one way it can be."""
    if not (text.isascii() and text.isdigit() and len(text) < 7 and str(int(text)) == text):
        raise RelayStateError(f"{text!r:.60} is no index of a layer.")
    return int(text)

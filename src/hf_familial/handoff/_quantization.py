"""Taps, keys and values in fewer bytes: as they are, in float32, in bfloat16, or in int8."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import RelayStateError


FORMATS: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}
SCALE = ".scale"
SCALE_DTYPE = torch.float32
LARGEST = 127  # of int8, on both sides of zero
TINY = torch.finfo(SCALE_DTYPE).tiny


def check_format(name: str | None) -> None:
    """Refuse a name that is no format.

    Args:
        name (`str`, *optional*): One of `FORMATS`; `None` leaves every tensor as it is.

    Raises:
        RelayStateError: If it is not.
    """
    if name is not None and name not in FORMATS:
        raise RelayStateError(f"`dtype` must be one of {', '.join(FORMATS)} or None, got {name!r}.")


def pack(name: str, tensor: torch.Tensor, dtype: str | None) -> dict[str, torch.Tensor]:
    """Encode a tensor row by row.

    In int8 a row `x` along the last dimension is `scale * q`, `scale = max |x| / 127` in float32,
    which is off by at most half a scale (symmetric quantisation, arXiv:2004.09602, equation 4).

    Args:
        name (`str`): Name of the tensor.
        tensor (`torch.Tensor` of shape `(..., width)`): Of a floating dtype.
        dtype (`str`, *optional*): One of `FORMATS`.

    Returns:
        `dict[str, torch.Tensor]`: The tensor and, for int8, its scales of shape `(..., 1)`.
    """
    if dtype != "int8":
        return {name: tensor if dtype is None else tensor.to(FORMATS[dtype])}
    rows = tensor.to(SCALE_DTYPE)
    # a row of zeros, or of numbers too small to divide by, is all zeros
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=TINY * LARGEST) / LARGEST
    return {name: (rows / scale).round().to(torch.int8), name + SCALE: scale}


def unpack(
    name: str, packed: Mapping[str, torch.Tensor], dtype: str | None, original: torch.dtype
) -> torch.Tensor:
    """Decode what `pack` encoded.

    Args:
        name (`str`): Name of the tensor.
        packed (`Mapping[str, torch.Tensor]`): All tensors of a payload.
        dtype (`str`, *optional*): The format it was packed in.
        original (`torch.dtype`): Floating dtype to return.

    Returns:
        `torch.Tensor` of shape `(..., width)`.

    Raises:
        RelayStateError: If it is of another dtype, or its scales do not fit.
    """
    tensor = packed[name]
    expected = original if dtype is None else FORMATS[dtype]
    if tensor.dtype != expected:
        raise RelayStateError(f"`{name}` must be in {expected}, got {tensor.dtype}.")
    if dtype != "int8":
        return tensor.to(original)
    scale = packed.get(name + SCALE)
    fits = scale is not None and scale.dtype == SCALE_DTYPE
    if scale is None or not fits or scale.shape != (*tensor.shape[:-1], 1):
        raise RelayStateError(f"`{name}` of shape {tuple(tensor.shape)} has no scale for each row.")
    return (tensor * scale).to(original)


def packed_bytes(tensor: torch.Tensor, dtype: str | None) -> int:
    """Number of bytes that `pack` makes of a tensor.

    Args:
        tensor (`torch.Tensor` of shape `(..., width)`): As given to `pack`.
        dtype (`str`, *optional*): One of `FORMATS`.

    Returns:
        `int`: Scales included.
    """
    size = tensor.numel() * (tensor.dtype if dtype is None else FORMATS[dtype]).itemsize
    rows = tensor.numel() // max(1, tensor.shape[-1])
    return size + rows * SCALE_DTYPE.itemsize * (dtype == "int8")

"""Compression of hidden states, keys and values to float32, bfloat16, or int8 with row scales."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import HandoffError


FORMATS: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}
SCALE = ".scale"
SCALE_DTYPE = torch.float32
LARGEST = 127  # int8 values are between -127 and 127
TINY = torch.finfo(SCALE_DTYPE).tiny


def check_format(name: str | None) -> None:
    """Raise `HandoffError` if `name` is not in `FORMATS`. `None` is valid and means no change."""
    if name is not None and name not in FORMATS:
        raise HandoffError(f"`dtype` must be one of {', '.join(FORMATS)} or None, got {name!r}.")


def quantize(name: str, tensor: torch.Tensor, dtype: str | None) -> dict[str, torch.Tensor]:
    """Convert a floating tensor of shape `(..., width)` to the format `dtype`.

    In int8 each row `x` is stored as integers `q` and one float32 `scale = max |x| / 127`. The row
    is `scale * q` with an error of at most half a scale (symmetric quantisation, arXiv:2004.09602,
    equation 4). The result then also contains the scales under `name + SCALE`, shape `(..., 1)`.
    """
    if dtype != "int8":
        return {name: tensor if dtype is None else tensor.to(FORMATS[dtype])}
    rows = tensor.to(SCALE_DTYPE)
    # this minimum turns rows of zeros or of very small numbers into zeros
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=TINY * LARGEST) / LARGEST
    return {name: (rows / scale).round().to(torch.int8), name + SCALE: scale}


def dequantize(
    name: str, tensors: Mapping[str, torch.Tensor], dtype: str | None, original: torch.dtype
) -> torch.Tensor:
    """Return a tensor that `quantize` encoded, converted back to its `original` dtype."""
    tensor = tensors[name]
    expected = original if dtype is None else FORMATS[dtype]
    if tensor.dtype != expected:
        raise HandoffError(f"`{name}` must be in {expected}, got {tensor.dtype}.")
    if dtype != "int8":
        return tensor.to(original)
    scale = tensors.get(name + SCALE)
    fits = scale is not None and scale.dtype == SCALE_DTYPE
    if scale is None or not fits or scale.shape != (*tensor.shape[:-1], 1):
        raise HandoffError(f"`{name}` of shape {tuple(tensor.shape)} needs one scale for each row.")
    return (tensor * scale).to(original)


def quantized_bytes(tensor: torch.Tensor, dtype: str | None) -> int:
    """Return the size in bytes of a tensor after `quantize`, scales included."""
    size = tensor.numel() * (tensor.dtype if dtype is None else FORMATS[dtype]).itemsize
    rows = tensor.numel() // max(1, tensor.shape[-1])
    return size + rows * SCALE_DTYPE.itemsize * (dtype == "int8")

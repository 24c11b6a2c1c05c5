"""A digest of layers that two processes can compare without sending weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..checkpoints.cuts import truncated_config


WORD = 8  # bytes of one summed word
WIDTH = 1021  # words per row; a prime, so that rows here never match the rows of a weight matrix
FACTOR = 0x5851F42D4C957F2D  # Knuth's multiplier: odd, with well-mixed bits
BLOCK = 8192  # rows per step on devices without integer matrix products

# fields of a backbone's config that do not change hidden states; fields of all configs follow below
SILENT = frozenset(
    """
    architectures attention_dropout attn_pdrop bos_token_id dtype embd_pdrop eos_token_id
    hidden_dropout initializer_range pad_token_id resid_pdrop tie_word_embeddings use_cache
    """.split()
)


def weights_digest(model: Any, depth: int) -> str:
    """Return a digest of everything that determines the hidden states at a depth.

    The digest covers the token embedding, the layers below the depth, and their config. Two
    processes with equal digests compute the same hidden states, up to rounding.

    The config is that of a model cut at this depth, without fields that do not change hidden
    states. Each weight contributes its name, shape, dtype and bits. The bits form rows of 1021
    64-bit words. Each row is multiplied by its own odd number, and the column sums are hashed. So
    one changed bit or two exchanged numbers change the digest.

    The digest distinguishes checkpoints. It does not protect against weights that someone
    constructs on purpose. The function reads every weight once.

    Args:
        model ([`FamilialForCausalLM`]): The whole family, or one cut at `depth` or above.
        depth (`int`): Number of backbone layers that the digest covers.

    Returns:
        `str`: SHA-256 in hexadecimal.

    Raises:
        ValueError: If a weight is on the meta device and therefore has no values.

    Example:
        >>> weights_digest(family, depth=8) == weights_digest(device_model, depth=8)
        True
    """
    weights = {name: _weight(name, tensor) for name, tensor in _weights(model, depth)}
    text = json.dumps([_config(model, depth), weights], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _config(model: Any, depth: int) -> dict[str, Any]:
    """Return the config of the layers below a depth, without the fields in `SILENT`."""
    fields = truncated_config(model.model.backbone.config, depth).to_dict()
    silent = SILENT | PreTrainedConfig().to_dict().keys() - {"model_type"}
    return {name: value for name, value in fields.items() if name not in silent}


def _weights(model: Any, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and saved buffers of the backbone up to a depth, without its norm."""
    decoder, segment = model.model.decoder, model.model.members.segment(0, depth)
    norm = decoder.spec.path(decoder.spec.norm)
    for name, tensor in decoder.view(segment).state_dict().items():
        if not norm or not name.startswith(f"{norm}."):
            yield name, tensor


def _weight(name: str, tensor: torch.Tensor) -> list[Any]:
    """Return the shape, the dtype and a digest of the bits of one weight."""
    if tensor.is_meta:
        raise ValueError(
            f"`{name}` is on the meta device: it is offloaded or not loaded. A hand-off needs all "
            "weights in memory. Load the family without `device_map`."
        )
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if raw.storage_offset() % WORD:
        raw = raw.clone()
    whole = raw.numel() // (WORD * WIDTH) * WORD * WIDTH
    rows = raw[:whole].view(torch.int64).view(-1, WIDTH)
    digest = hashlib.sha256()
    for part in (_column_sums(rows), raw[whole:]):
        digest.update(part.cpu().numpy().tobytes())
    return [list(tensor.shape), str(tensor.dtype), digest.hexdigest()]


def _column_sums(rows: torch.Tensor) -> torch.Tensor:
    """Return column sums of shape `(WIDTH,)` over rows of 64-bit words, shape `(rows, WIDTH)`.

    Each row is first multiplied by its own odd number. Sums wrap around, so the order of the
    additions, which differs by device, does not change them.
    """
    factors = torch.arange(len(rows), device=rows.device) * FACTOR
    factors = ((factors >> 29) ^ factors) * FACTOR | 1
    if rows.device.type == "cpu":
        return torch.mv(rows.t(), factors)
    total = rows.new_zeros(WIDTH)
    for some, by in zip(rows.split(BLOCK), factors.split(BLOCK), strict=True):
        total += (some * by[:, None]).sum(0)
    return total

"""A digest of layers that two processes can compare without sending weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..checkpoints.cuts import truncated_config


WORD = 8  # bytes summed at a time
WIDTH = 1021  # words in a row of a weight's bits; prime, so that no row of a weight is one of these
FACTOR = 0x5851F42D4C957F2D  # odd, its bits in no order: Knuth's multiplier
BLOCK = 8192  # rows at a time, on devices without products of whole numbers

# fields of a backbone's config that change no tap, beside those that every config has
SILENT = frozenset(
    """
    architectures attention_dropout attn_pdrop bos_token_id dtype embd_pdrop eos_token_id
    hidden_dropout initializer_range pad_token_id resid_pdrop tie_word_embeddings use_cache
    """.split()
)


def weights_digest(model: Any, depth: int) -> str:
    """Digest what makes the taps at a depth: embedding, layers below it, and their config.

    The config counts as of a model cut at the depth, without the fields that change no tap; the
    weights by name, shape, dtype and bits. The bits of each are laid out in rows of 64-bit words,
    every row is multiplied by an odd number of its own, and the sums of all columns are digested: a
    change of one bit changes its column, and an exchange of numbers changes theirs. It tells
    checkpoints apart; it does not stop someone who makes weights on purpose. It reads every weight
    once, at the speed of memory.

    Args:
        model ([`FamilialForCausalLM`]): A family that has these layers; whole, or cut
            anywhere from the depth on.
        depth (`int`): Number of layers.

    Returns:
        `str`: SHA-256 in hexadecimal.

    Raises:
        ValueError: If a weight has no values, being on the meta device.
    """
    weights = {name: _weight(name, tensor) for name, tensor in _weights(model, depth)}
    text = json.dumps([_config(model, depth), weights], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _config(model: Any, depth: int) -> dict[str, Any]:
    """Return the config of the layers below a depth, without the fields that change no tap."""
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
    """Return the shape, dtype and a digest of the bits of one weight."""
    if tensor.is_meta:
        raise ValueError(
            f"`{name}` is on the meta device: it is offloaded, or was never loaded. Load the "
            "family without `device_map` to hand a text over."
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
    """Sum rows of 64-bit words, each times an odd number; `(rows, WIDTH)` to `(WIDTH,)`.

    Sums wrap around, so that their order, which differs by device, does not matter.
    """
    factors = torch.arange(len(rows), device=rows.device) * FACTOR
    factors = ((factors >> 29) ^ factors) * FACTOR | 1
    if rows.device.type == "cpu":
        return torch.mv(rows.t(), factors)
    total = rows.new_zeros(WIDTH)
    for some, by in zip(rows.split(BLOCK), factors.split(BLOCK), strict=True):
        total += (some * by[:, None]).sum(0)
    return total

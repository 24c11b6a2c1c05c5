"""Which layers made a tap: a digest that two processes can compare without sending weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..models.familial.cuts import truncated_config
from ..models.familial.segments import segment_view


SAMPLES = 256  # numbers of each weight that are digested in order
WORD = 8  # bytes summed at a time

# fields of a backbone's config that change no tap, beside those that every config has
SILENT = frozenset(
    """
    architectures attention_dropout attn_pdrop bos_token_id dtype embd_pdrop eos_token_id
    hidden_dropout initializer_range pad_token_id resid_pdrop tie_word_embeddings use_cache
    """.split()
)


def fingerprint(model: Any, depth: int) -> str:
    """Digest what makes the taps at a depth: embedding, layers below it, and their config.

    The config counts as of a model cut at the depth, without the fields that change no tap; the
    weights by name, shape and dtype, by the sum of all their bits as 64-bit words, and by 256
    numbers of each in order. Any change of one weight changes the sum; one that keeps the sum, such
    as two rows exchanged, changes the numbers unless it falls between them. It tells checkpoints
    apart; it does not stop someone who makes weights on purpose. One pass over the weights, as fast
    as memory: keep the result.

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
    """What the config of the layers below a depth says of them."""
    fields = truncated_config(model.model.backbone.config, depth).to_dict()
    silent = SILENT | PreTrainedConfig().to_dict().keys() - {"model_type"}
    return {name: value for name, value in fields.items() if name not in silent}


def _weights(model: Any, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and saved buffers of the backbone up to a depth, final norm left out."""
    contract = model.model.contract
    trunk = model.model.members.trunk(0, depth)
    norm = ".".join(filter(None, (contract.owner, contract.norm))) + "."
    for name, tensor in segment_view(model.model.backbone, contract, trunk).state_dict().items():
        if not name.startswith(norm) or contract.norm is None:
            yield name, tensor


def _weight(name: str, tensor: torch.Tensor) -> list[Any]:
    """Shape, dtype, sum of bits and some numbers of one weight."""
    if tensor.is_meta:
        raise ValueError(f"`{name}` is on the meta device: load the weights first.")
    flat = tensor.detach().contiguous().reshape(-1)
    count = min(SAMPLES, flat.numel())
    picked = torch.arange(count, device=flat.device) * flat.numel() // max(1, count)
    numbers = flat[picked].view(torch.uint8).cpu().numpy().tobytes()
    raw = flat.view(torch.uint8)
    if raw.storage_offset() % WORD:
        raw = raw.clone()
    whole = raw.numel() // WORD * WORD
    # wraps around, so that the order of summation, which differs by device, does not matter
    total = int(raw[:whole].view(torch.int64).sum()) + int(raw[whole:].sum())
    return [list(tensor.shape), str(tensor.dtype), total, hashlib.sha256(numbers).hexdigest()]

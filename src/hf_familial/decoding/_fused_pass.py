"""The fused passes of segments and heads, for the few tokens of a decoding step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ._fused_layers import FusedLayer, Projection


# with more new tokens, such as a prompt, the backbone's own pass is as fast
MAX_TOKENS = 16


class FusedPass:
    """A fused pass through the layers of one segment."""

    def __init__(self, layers: Sequence[FusedLayer], rotary: RotaryTable) -> None:
        self._layers, self._rotary = layers, rotary

    def part(self, start: int, stop: int) -> FusedPass:
        """Return the fused pass of the layers `[start, stop)`, counted from the first one here."""
        return FusedPass(self._layers[start:stop], self._rotary)

    def takes(self, new: int, attention_mask: torch.Tensor | None) -> bool:
        """Return whether this pass can run `new` tokens, in place of the backbone's own pass."""
        return new <= MAX_TOKENS and attention_mask is None

    @torch.no_grad()
    def __call__(
        self,
        hidden_states: torch.Tensor,
        cache_layers: Sequence[Any],
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the segment on new tokens. Each of them attends to all tokens before it.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, seq, hidden)`): The taps at the start of
                the segment, or the embeddings for the first segment.
            cache_layers (`Sequence[DynamicLayer]`): The cache layers of the segment, all of the
                same length and without padding. They are updated in place.
            position_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*): The positions of
                the tokens. By default they follow the cached tokens, which is faster.

        Returns:
            `torch.Tensor` of shape `(batch, seq, hidden)`: The taps at the end of the segment.
        """
        batch, count, width = hidden_states.shape
        past = cache_layers[0].get_seq_length()
        layers = self._layers
        cos, sin = self._rotary.at(hidden_states, past, position_ids)
        mask = causal_mask(count, past, layers[0].groups, hidden_states) if count > 1 else None
        rows = hidden_states.reshape(-1, width)
        for layer, slot in zip(layers, cache_layers, strict=True):
            attended = _attend(layer, rows, batch, count, cos, sin, mask, slot)
            rows = layer.out.add_to(rows, attended)
            gate, up = layer.gate_up(layer.mlp_norm(rows)).chunk(2, -1)
            rows = layer.down.add_to(rows, F.silu(gate).mul_(up))
        return rows.view(batch, count, width)


def _attend(
    layer: FusedLayer,
    rows: torch.Tensor,
    batch: int,
    count: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    mask: torch.Tensor | None,
    slot: Any,
) -> torch.Tensor:
    """Return the attention of rows `(batch * seq, hidden)`, before its output projection."""
    queries, keys, width, groups = layer.queries, layer.keys, layer.head_dim, layer.groups
    qkv = layer.qkv(layer.input_norm(rows)).view(batch, count, -1, width)
    qk, v = qkv.split_with_sizes((queries + keys, keys), 2)
    if layer.qk_norm is not None:
        qk = layer.qk_norm(qk)
    if layer.rotary:
        qk = (qk * cos).addcmul_(qk.roll(width // 2, -1), sin)
    q, k = qk.split_with_sizes((queries, keys), 2)
    k, v = slot.update(k.transpose(1, 2), v.transpose(1, 2))
    if groups == 1:
        q = q.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=layer.scale)
        return out.transpose(1, 2).reshape(batch * count, -1)
    # query heads that share a key head become more queries of one head, so no key is copied
    q = q.view(batch, count, keys, groups, width).permute(0, 2, 3, 1, 4)
    q = q.reshape(batch, keys, groups * count, width)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=layer.scale)
    out = out.view(batch, keys, groups, count, width).permute(0, 3, 1, 2, 4)
    return out.reshape(batch * count, -1)


def causal_mask(count: int, past: int, groups: int, like: torch.Tensor) -> torch.Tensor:
    """Return the attention mask of new tokens: 0 if a token may attend, else minus infinity.

    The shape is `(groups * count, past + count)`. The mask repeats its rows for each of the
    `groups` query heads that share a key head. Dtype and device are those of `like`.
    """
    mask = like.new_full((count, past + count), -torch.inf).triu_(past + 1)
    return mask.repeat(groups, 1) if groups > 1 else mask


class RotaryTable:
    """A table of the backbone's rotary cosines and sines, so that a step need not compute them."""

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary = rotary
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None
        self._buffers: list[Any] = []

    def fresh(self) -> RotaryTable:
        """Return this table. Clear it first if a buffer of the rotary module has changed."""
        buffers = [buffer.tolist() for buffer in self._rotary.buffers()]
        if buffers != self._buffers:
            self._table, self._buffers = None, buffers
        return self

    @property
    def nbytes(self) -> int:
        """`int`: The size of the table in bytes. It is 0 before the first use."""
        return sum(part.nbytes for part in self._table or ())

    def at(
        self, hidden_states: torch.Tensor, past: int, position_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and signed sines, both of shape `(1 or batch, seq, 1, head_dim)`.

        They belong to `position_ids`, or by default to the positions that start at `past`.
        """
        if position_ids is not None:
            return self._compute(hidden_states, position_ids)
        count = hidden_states.shape[1]
        table = self._table
        if (
            table is None
            or table[0].shape[1] < past + count
            or table[0].dtype != hidden_states.dtype
        ):
            positions = torch.arange(max(256, 2 * (past + count)), device=hidden_states.device)
            table = self._table = self._compute(hidden_states, positions.unsqueeze(0))
        return table[0].narrow(1, past, count), table[1].narrow(1, past, count)

    def _compute(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self._rotary(hidden_states, position_ids)
        first, second = sin.chunk(2, -1)
        # the backbone rotates (x1, x2) into (-x2, x1); here the sine contains the sign
        return cos.unsqueeze(2), torch.cat((-first, second), -1).unsqueeze(2)


class FusedHead:
    """The fused form of an output head."""

    def __init__(self, head: Projection) -> None:
        self._head, self.weight = head, head.weight

    @torch.no_grad()
    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return logits of shape `(..., vocab)` from normed states of shape `(..., hidden)`."""
        logits = self._head(states.reshape(-1, states.shape[-1]))
        return logits.view(*states.shape[:-1], -1)

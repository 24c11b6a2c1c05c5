"""What the familial models return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput


@dataclass
class FamilialModelOutput(ModelOutput):
    """Output of [`FamilialModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, seq, hidden)`): After the norm of
            the deepest exit that ran.
        past_key_values (`Cache`, *optional*): The family's cache.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): As the host returns them.
        attentions (`tuple[torch.FloatTensor]`, *optional*): As the host returns them.
        router_logits (`tuple[torch.FloatTensor]`, *optional*): As the host returns them.
        exit_hidden_states (`tuple[torch.FloatTensor]`, *optional*): With `output_exits=True`: G
            tensors of shape `(batch, seq, hidden)`, after each exit's norm, shallowest first.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    exit_hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class FamilialCausalLMOutput(ModelOutput):
    """Output of [`FamilialForCausalLM`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): Mean of `exit_losses`, in nats per
            token, plus the weighted `aux_loss` if there is one.
        aux_loss (`torch.FloatTensor` of shape `()`, *optional*): Load-balancing loss of a mixture
            of experts, when its router logits are asked for.
        logits (`torch.FloatTensor` of shape `(batch, seq, vocab)`): Of the exit asked for.
        past_key_values (`Cache`, *optional*): The family's cache.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): As the host returns them.
        attentions (`tuple[torch.FloatTensor]`, *optional*): As the host returns them.
        router_logits (`tuple[torch.FloatTensor]`, *optional*): As the host returns them.
        exit_losses (`torch.FloatTensor` of shape `(G,)`, *optional*): Loss of every exit in nats
            per token, detached from the graph; of shape `(1,)` when `exit_idx` chose one.
        exit_logits (`tuple[torch.FloatTensor]`, *optional*): With `output_exits=True`: G tensors of
            shape `(batch, seq, vocab)`, shallowest first.
    """

    loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    exit_losses: torch.Tensor | None = None
    exit_logits: tuple[torch.Tensor, ...] | None = None


@dataclass(frozen=True)
class RelayStats:
    """What a relay did.

    Attributes:
        token_exits (`torch.LongTensor` of shape `(batch, new)`): Index of the exit that each new
            token came from; -1 after the end of a row.
        exits (`tuple[int, ...]`): The exits that were read, shallowest first.
        positions (`tuple[int, ...]`): For each, positions that its segment ran, drafts that were
            rejected among them; the same in every row.
        layer_passes (`int`): Layers times positions, of one row.
        plain_layer_passes (`int`): What decoding at the deepest of these exits would have taken.
        flops (`float`): FLOPs spent by all rows: two for each weight of a matrix and position,
            heads as often as they were read, private layers and attention over the past left out;
            of a mixture, all experts count.
        plain_flops (`float`): Counted likewise, of decoding at the deepest of these exits.
        rounds (`int`): Checks of drafts; without drafts, steps.
        drafted (`int`): Drafted tokens that were checked, of one row.
        accepted (`int`): Those that every unfinished row accepted.
        seconds (`float`): Wall time.
    """

    token_exits: torch.Tensor
    exits: tuple[int, ...]
    positions: tuple[int, ...]
    layer_passes: int
    plain_layer_passes: int
    flops: float
    plain_flops: float
    rounds: int
    drafted: int
    accepted: int
    seconds: float

    @property
    def acceptance(self) -> float:
        """`float`: Share of the checked drafts that were accepted; 0 if there were none."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_round(self) -> float:
        """`float`: New tokens of a row per check; 1 without drafts."""
        return self.token_exits.shape[1] / max(1, self.rounds)

    @property
    def flops_saved(self) -> float:
        """`float`: Share of the plain FLOPs that were not spent; negative if more were."""
        return 1 - self.flops / self.plain_flops

    @property
    def note(self) -> str:
        """`str`: What to do where more FLOPs were spent than plain text takes; else empty."""
        if self.flops <= self.plain_flops:
            return ""
        cause = f"{self.acceptance:.0%} of the drafts were accepted" if self.drafted else "no gain"
        return (
            f"more FLOPs than plain text, {self.flops / self.plain_flops:.2f} times ({cause}): "
            "train the early exits further, draft from another exit, or draft fewer tokens"
        )

    def __str__(self) -> str:
        drafts = f"; {self.accepted} of {self.drafted} drafts accepted" if self.drafted else ""
        note = self.note or f"{self.flops / self.plain_flops:.2f} times the FLOPs of plain text"
        return (
            f"{self.token_exits.shape[1]} tokens of {self.token_exits.shape[0]} rows in "
            f"{self.rounds} rounds{drafts}; {self.layer_passes:,} layer passes, plain text "
            f"{self.plain_layer_passes:,}; {note}"
        )


@dataclass
class RelayOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns, and what the relay did.

    Args:
        relay_stats ([`RelayStats`]): Exit of every token, acceptance, layer passes, FLOPs, time.
    """

    relay_stats: RelayStats | None = None

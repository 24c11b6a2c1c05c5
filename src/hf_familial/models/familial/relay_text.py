"""The text that a relay writes: how tokens are chosen, when rows end, what is recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Block:
    """Tokens that one round yields.

    Attributes:
        tokens (`torch.LongTensor` of shape `(batch, count)`): At least one.
        sources (`torch.LongTensor` of shape `(batch, count)`): Exit that each came from.
        scores (`list[torch.Tensor]`): For each, processed scores of shape `(batch, vocab)`; empty
            if not asked for.
        logits (`list[torch.Tensor]`): For each, logits of shape `(batch, vocab)`; likewise.
    """

    tokens: torch.Tensor
    sources: torch.Tensor
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


class RelayText:
    """What is written so far, and the rules of `generate` for writing on.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, seq)`): The prompt.
        processors (`LogitsProcessorList`): As `generate` prepared them.
        stopping_criteria (`StoppingCriteriaList`): Likewise.
        generation_config (`GenerationConfig`): Likewise.
        streamer (`BaseStreamer`, *optional*): Gets every token as it is certain.

    Raises:
        ValueError: If rows that end are padded and there is no padding token.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        processors: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
    ) -> None:
        self.input_ids, self.processors, self.streamer = input_ids, processors, streamer
        self.prompt_length = input_ids.shape[1]
        self.criteria, self.config = stopping_criteria, generation_config
        self.do_sample = bool(generation_config.do_sample)
        self.unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        if self.pads and generation_config._pad_token_tensor is None:
            raise ValueError(
                "a stopping criterion has `eos_token_id`, so rows that end are padded: give "
                "`pad_token_id` too."
            )
        asked = generation_config.return_dict_in_generate
        self.scores: list[torch.Tensor] | None = (
            [] if asked and generation_config.output_scores else None
        )
        self.logits: list[torch.Tensor] | None = (
            [] if asked and generation_config.output_logits else None
        )
        self.sources: list[torch.Tensor] = []
        self.done = False

    @property
    def wants_scores(self) -> bool:
        """Whether blocks must bring the scores and logits of their tokens."""
        return self.scores is not None or self.logits is not None

    @property
    def kept_rows(self) -> torch.Tensor:
        """Rows whose next token is written as it is: all, where rows that end are not padded."""
        return self.unfinished if self.pads else torch.ones_like(self.unfinished)

    @property
    def room(self) -> int:
        """Number of tokens that fit still."""
        limit = self.criteria.max_length
        return 2**31 if limit is None else max(1, limit - self.input_ids.shape[1])

    def process(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Scores to choose from, shape `(batch, vocab)`, given the text before."""
        if not self.processors:
            return logits
        # some processors write into what they are given
        return self.processors(input_ids, logits.clone())

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """A token for every row, shape `(batch, 1)`."""
        if self.do_sample:
            return torch.multinomial(scores.softmax(-1), 1)
        return scores.argmax(-1, keepdim=True)

    def write(self, block: Block) -> None:
        """Append a block's tokens one by one, until every row has ended.

        Args:
            block ([`Block`]): What a round yielded.
        """
        for i in range(block.tokens.shape[1]):
            token = block.tokens[:, i]
            if self.pads:
                pad = self.config._pad_token_tensor.to(token.device)
                token = torch.where(self.unfinished, token, pad)
            self.input_ids = torch.cat((self.input_ids, token[:, None]), 1)
            self.sources.append(block.sources[:, i].masked_fill(~self.unfinished, -1))
            if self.scores is not None:
                self.scores.append(block.scores[i])
            if self.logits is not None:
                self.logits.append(block.logits[i])
            if self.streamer is not None:
                self.streamer.put(token.cpu())
            scores = None if self.scores is None else tuple(self.scores)
            self.unfinished = self.unfinished & ~self.criteria(self.input_ids, scores)
            if not self.unfinished.any():
                self.done = True
                return

"""The device side of a hand-off: it runs the layers below an exit and keeps their taps.

A *tap* is the hidden state at an exit: the backbone's output at that depth, before any norm.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from ..errors import HandoffError
from ..models.familial.backbones import LogitTransform
from ..models.familial.relay_cache import check_positions, check_relay
from ..models.familial.segments import Segment, SegmentRunner
from ._cache_layers import capture, probe_layers
from ._settings import check_length, check_settings, remaining
from ._text import HandoffText, PortableText, generator_state
from ._weights_digest import weights_digest
from .state import HandoffState


MODES = ("split", "migrate", "migrate-light")
ENDLESS = 1 << 30  # `max_new_tokens` when the settings have no limit


class DeviceSide:
    """The device side of a hand-off, which runs a family cut at an exit.

    Args:
        model ([`FamilialForCausalLM`]): The family cut at the exit, as
            `export_exit(..., format="familial")` writes it. Private layers of the exit are the last
            layers of its backbone.
        depth (`int`, *optional*): The depth of the exit in the whole family. The device sends the
            hidden states at this depth. Defaults to all layers of `model`, which is correct if the
            exit has no private layers.
        answer_idx (`int`, *optional*, defaults to -1): The exit of `model` whose member generates
            on the device.

    Attributes:
        weights_digest (`str`): The digest of the layers below `depth` when the last text started.

    Raises:
        IndexError: If `model` does not have the exit `answer_idx`.
        ValueError: If `depth` is not between 1 and the depth of that exit, or if the backbone does
            not support hand-offs.

    Example:
        >>> device = DeviceSide(FamilialForCausalLM.from_pretrained("device"), depth=8)
        >>> text = device.start(input_ids, max_new_tokens=100)
    """

    def __init__(self, model: Any, depth: int | None = None, answer_idx: int = -1) -> None:
        check_relay(model)
        self.answer_idx = model.config.resolve_exit(answer_idx)
        highest = model.config.exits[self.answer_idx]
        self.model, self.depth = model, highest if depth is None else depth
        if not 1 <= self.depth <= highest:
            raise ValueError(f"`depth` must be from 1 to {highest}, got {depth}.")
        self.weights_digest = weights_digest(model, self.depth)
        probe_layers(model, 0, self.depth)

    def start(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> DeviceText:
        """Start a text: run its prompt through the layers below the exit.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`): The prompt, padded on the left.
            attention_mask (`torch.Tensor` of shape `(batch, seq)`, *optional*): 0 for padding,
                else 1. Defaults to no padding.
            generator (`torch.Generator`, *optional*): The CPU generator for sampling.
            **settings: Fields of `GenerationConfig` such as `max_new_tokens`, `do_sample`,
                `temperature`, `top_p`. They apply on this side and after the hand-off.

        Returns:
            [`DeviceText`]: The text on this side.

        Raises:
            HandoffError: If a setting cannot be sent, or if the text could grow beyond the
                positions of the model.
        """
        check_settings(settings)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_length(settings, int(mask.sum(1).max()) - 1, self.model.config)
        return DeviceText(self, input_ids, mask, generator, settings)


class DeviceText(HandoffText):
    """A batch of texts on the device side of a hand-off, created by [`DeviceSide.start`].

    Attributes:
        tokens (`torch.LongTensor` of shape `(batch, seq)`): The text so far.
        sent (`int`): Number of columns already sent to the server in the mode `"split"`.
    """

    @torch.no_grad()
    def __init__(
        self,
        side: DeviceSide,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        generator: torch.Generator | None,
        settings: dict[str, Any],
    ) -> None:
        model, depth = side.model, side.depth
        self.side, self.settings, self.sent = side, settings, 0
        if not model.model.frozen:  # the weights may have changed since the last text
            side.weights_digest = weights_digest(model, depth)
        self._weights_digest = side.weights_digest
        self._prompt_length = input_ids.shape[1]
        input_ids = input_ids.to(model.device)
        mask = attention_mask.to(input_ids)
        chosen = {"max_new_tokens": ENDLESS, **settings}
        super().__init__(
            PortableText(model, side.answer_idx, input_ids, mask, generator=generator, **chosen)
        )
        generator_state(generator)  # raise early if it is not a CPU generator
        inner = model.model
        decoder, members = inner.decoder, inner.members
        self._cache = DynamicCache(config=decoder.config)
        members.grow(self._cache, [side.answer_idx])
        whole = members.member_segment(side.answer_idx)
        rest = Segment(whole.layers[depth:], depth, whole.norm, whole.slots[depth:])
        self._norm = whole.norm
        self._below = SegmentRunner(decoder, members.segment(0, depth), self._cache)
        self._above = SegmentRunner(decoder, rest, self._cache) if rest.layers else None
        self._taps: list[torch.Tensor] = []
        self._answered = 0  # columns that the layers above `depth` have run
        self._run(mask)

    def _run(self, mask: torch.Tensor) -> None:
        """Run new columns with the mask `(batch, new)` through the layers below the exit."""
        ran, new = self._mask.shape[1], mask.shape[1]
        if ran:
            prompt = int(self._mask[:, : self._prompt_length].sum(1).max())
            check_positions(self.side.model.config.text_config, prompt, ran + new)
        self._add_columns(mask)
        tokens = self.tokens[:, ran : ran + new]
        self._taps.append(self._below(input_ids=tokens, **self._inputs(ran)))

    def _tap(self, start: int) -> torch.Tensor:
        """Return the taps of the columns from `start`, shape `(batch, seq - start, hidden)`."""
        pieces: list[torch.Tensor] = []
        first = self._mask.shape[1]
        while first > start:
            pieces.insert(0, self._taps[-1 - len(pieces)])
            first -= pieces[0].shape[1]
        taps = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        return taps[:, start - first :]

    @torch.no_grad()
    def answer(self, max_new_tokens: int) -> torch.Tensor:
        """Continue the text on the device with the member at `answer_idx`.

        Args:
            max_new_tokens (`int`): The number of new tokens per row. Generation stops earlier if
                the text ends.

        Returns:
            `torch.LongTensor` of shape `(batch, seq)`: The whole text, prompt included.

        Raises:
            HandoffError: If a logits processor remembers past tokens, because that memory cannot
                be sent.
        """
        if self._text.memory:
            raise HandoffError(
                f"`{self._text.memory[0]}` may remember past tokens, and that memory cannot be "
                "sent. Use this logits processor on the server side, and generate all tokens there."
            )
        for _ in range(max_new_tokens):
            if self.done:
                break
            tokens = self._text.choose_next(self._logits())
            self._run(torch.ones_like(tokens))
        return self.tokens

    def _logits(self) -> torch.Tensor:
        start, self._answered = self._answered, self._mask.shape[1]
        if self._above is None:
            states = self._norm(self._taps[-1][:, -1:])
        else:
            states = self._above(inputs_embeds=self._tap(start), **self._inputs(start))[:, -1:]
        model = self.side.model
        transform = LogitTransform.of(model.config.text_config)
        return transform.read(states, model.head(self.side.answer_idx))[:, -1]

    @torch.no_grad()
    def take(self, tokens: torch.Tensor) -> None:
        """Append tokens that the server chose, and run them through the layers below the exit.

        Args:
            tokens (`torch.LongTensor` of shape `(batch, new)`): The next columns of the text.

        Raises:
            HandoffError: If a token id is outside the vocabulary.
        """
        vocab = self.side.model.config.vocab_size
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocab:
            raise HandoffError(
                f"token ids must be from 0 to {vocab - 1}, got {tokens.tolist()!s:.60}."
            )
        for column in tokens.split(1, dim=1):
            self._text.follow(column)
        self._run(torch.ones_like(tokens, device=self._mask.device))

    def state(self, mode: str, dtype: str | None = None) -> HandoffState:
        """Return the state that the server needs to continue the text.

        Args:
            mode (`str`): One of three modes.

                - `"split"`: The device continues to run the layers below the exit. The state
                  contains tokens and taps of the columns that are not sent yet.
                - `"migrate"`: The server continues alone. The state contains the whole text, its
                  taps, and the keys and values of the layers below the exit.
                - `"migrate-light"`: As `"migrate"` without keys and values. The server computes
                  them again.
            dtype (`str`, *optional*): The format of taps, keys and values: `"fp32"`, `"bf16"` or
                `"int8"`. Defaults to the model's dtype.

        Returns:
            [`HandoffState`]: The state. `bytes_per_token` is its size.

        Raises:
            HandoffError: If `mode` is unknown, if all columns are sent already, or if the text has
                ended.

        Example:
            >>> payload = text.state("migrate", dtype="bf16").to_bytes()
        """
        if mode not in MODES:
            raise HandoffError(f"`mode` must be one of {', '.join(MODES)}, got {mode!r}.")
        start, columns = self.sent if mode == "split" else 0, self._mask.shape[1]
        if start == columns:
            raise HandoffError(f"all {columns} columns are sent already.")
        if self.done:
            raise HandoffError("the text has ended on this side. A hand-off needs an open text.")
        depth = self.side.depth
        whole: dict[str, Any] = {}
        if start == 0:
            whole = {
                "finished": (~self._text.unfinished).long().cpu(),
                "settings": remaining(self.settings, columns - self._prompt_length),
                "generator": generator_state(self._text.generator),
            }
        state = HandoffState(
            tokens=self.tokens[:, start:columns].cpu(),
            attention_mask=self._mask[:, start:].cpu(),
            position_ids=self._positions[:, start:].cpu(),
            taps={depth: self._tap(start)},
            weights_digest=self._weights_digest,
            layers=capture(self._cache, range(depth)) if mode == "migrate" else {},
            start=start,
            dtype=dtype,
            **whole,
        )
        if mode == "split":
            self.sent = columns
        return state

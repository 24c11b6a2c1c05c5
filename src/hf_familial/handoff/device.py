"""The device's side of a hand-off: it runs the layers below an exit and keeps their taps.

A *tap* is the hidden states after some layers of the backbone, before any norm.
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
ENDLESS = 1 << 30  # tokens, where the settings name no limit


class DeviceSide:
    """A process that holds a family cut at an exit.

    Args:
        model ([`FamilialForCausalLM`]): As `export_exit(format="familial")` writes it: the exit is
            its deepest, the exit's private layers are the last ones of its backbone.
        depth (`int`, *optional*): Layers below the tap that is handed over: the depth of the exit
            in the whole family. Defaults to all layers, which is right without private layers.
        answer_idx (`int`, *optional*, defaults to -1): The exit that answers here.

    Attributes:
        weights_digest (`str`): Of the layers below the tap, as they were when the last text began.

    Raises:
        IndexError: If there is no such exit.
        ValueError: If the depth is not among its layers, or the host's layers cannot go on from a
            tap, or from what is in the cache.

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
        """Run a prompt through the layers below the exit.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`): The prompt, padded on the left.
            attention_mask (`torch.Tensor` of shape `(batch, seq)`, *optional*): 0 for padding.
            generator (`torch.Generator`, *optional*): Of the CPU, to draw tokens with.
            **settings: How tokens are chosen, here and after the hand-off: fields of
                `GenerationConfig` such as `max_new_tokens`, `do_sample`, `temperature`, `top_p`.

        Returns:
            [`DeviceText`]: The text on this side.

        Raises:
            HandoffError: If a setting cannot travel, or the model has too few positions.
        """
        check_settings(settings)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_length(settings, int(mask.sum(1).max()) - 1, self.model.config)
        return DeviceText(self, input_ids, mask, generator, settings)


class DeviceText(HandoffText):
    """A text, or a batch of them, on the side that runs the layers below the exit.

    Made by [`DeviceSide.start`].

    Attributes:
        tokens (`torch.LongTensor` of shape `(batch, seq)`): The text so far.
        sent (`int`): Columns that the other side was sent.
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
        generator_state(generator)  # an accelerator's is refused before anything runs
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
        self._answered = 0  # columns that the layers above the tap have run
        self._run(mask)

    def _run(self, mask: torch.Tensor) -> None:
        """Run new columns, whose mask has the shape `(batch, new)`, through the layers below."""
        ran, new = self._mask.shape[1], mask.shape[1]
        if ran:
            prompt = int(self._mask[:, : self._prompt_length].sum(1).max())
            check_positions(self.side.model.config.text_config, prompt, ran + new)
        self._add_columns(mask)
        tokens = self.tokens[:, ran : ran + new]
        self._taps.append(self._below(input_ids=tokens, **self._inputs(ran)))

    def _tap(self, start: int) -> torch.Tensor:
        """Return the taps from column `start` on, shape `(batch, seq - start, hidden)`."""
        pieces: list[torch.Tensor] = []
        first = self._mask.shape[1]
        while first > start:
            pieces.insert(0, self._taps[-1 - len(pieces)])
            first -= pieces[0].shape[1]
        taps = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        return taps[:, start - first :]

    @torch.no_grad()
    def answer(self, max_new_tokens: int) -> torch.Tensor:
        """Go on with the member that this side holds.

        Args:
            max_new_tokens (`int`): At most so many tokens; fewer if the text ends.

        Returns:
            `torch.LongTensor` of shape `(batch, seq)`: The whole text.

        Raises:
            HandoffError: If a logits processor remembers what it sees, for that cannot travel.
        """
        if self._text.memory:
            raise HandoffError(
                f"`{self._text.memory[0]}` may remember the tokens that it has seen, and its "
                "memory does not travel: let the other side choose all tokens, with it."
            )
        for _ in range(max_new_tokens):
            if self.done:
                break
            tokens = self._text.choose_next(self._logits())
            self._run(torch.ones_like(tokens))
        return self.tokens

    def _logits(self) -> torch.Tensor:
        """Return the logits of the last column, shape `(batch, vocab)`."""
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
        """Run tokens that the other side chose.

        Args:
            tokens (`torch.LongTensor` of shape `(batch, new)`): The columns that follow.

        Raises:
            HandoffError: If the vocabulary has no such token.
        """
        vocab = self.side.model.config.vocab_size
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocab:
            raise HandoffError(f"token ids must be below {vocab}, got {tokens.tolist()!s:.60}.")
        for column in tokens.split(1, dim=1):
            self._text.follow(column)
        self._run(torch.ones_like(tokens, device=self._mask.device))

    def state(self, mode: str, dtype: str | None = None) -> HandoffState:
        """Return what the other side needs to go on.

        Args:
            mode (`str`): `"split"`: tokens and taps of the columns it was not sent yet, for as long
                as this side runs the layers below the exit. `"migrate"`: the whole text with taps,
                keys and values, so that it goes on alone. `"migrate-light"`: the whole text with
                taps; it computes the keys and values of the layers below the exit anew.
            dtype (`str`, *optional*): `"fp32"`, `"bf16"` or `"int8"`; by default as they are.

        Returns:
            [`HandoffState`]: See its `bytes_per_token`.

        Raises:
            HandoffError: If there is no such mode, nothing to send, or nothing left to say.
        """
        if mode not in MODES:
            raise HandoffError(f"`mode` must be one of {', '.join(MODES)}, got {mode!r}.")
        start, columns = self.sent if mode == "split" else 0, self._mask.shape[1]
        if start == columns:
            raise HandoffError(f"all {columns} columns were sent: there is nothing new.")
        if self.done:
            raise HandoffError("the text has ended on this side: there is nothing left to say.")
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

"""The text on one side of a hand-off: its tokens, its sampling rules, and the columns that ran."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMode

from ..errors import HandoffError
from ..models.familial.backbones import LogitTransform
from ..models.familial.relay import ASSISTED, UNUSED, GeneratedText, processors_with_memory


# arguments of `generate` that are not fields of `GenerationConfig`
LISTS = {
    "generation_config",
    "logits_processor",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
}
# fields of `GenerationConfig` that a hand-off does not support
LEFT_OUT = {
    *ASSISTED,
    *UNUSED,
    "cache_config",
    "cache_implementation",
    "output_logits",
    "output_scores",
    "return_dict_in_generate",
    "token_healing",
}


class PortableText(GeneratedText):
    """A text whose next tokens are chosen as in `generate`, with a random state that can be sent.

    The model's `generate` prepares the logits processors and stopping criteria from `settings`.
    Streamers and beam search are not supported. Sampling runs on the CPU with a CPU generator.
    """

    def __init__(
        self,
        model: Any,
        answer_idx: int,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor,
        finished: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> None:
        _check_options(settings)
        # `generate` prepares processors and criteria and passes them to `_as_prepared`
        prepared = model.generate(
            tokens,
            attention_mask=attention_mask,
            exit_idx=answer_idx,
            custom_generate=_as_prepared,
            **settings,
        )
        super().__init__(tokens, *prepared)
        mode, copies = self.config.get_generation_mode(), self.config.num_return_sequences
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or copies > 1:
            raise ValueError(
                "a hand-off supports greedy search and sampling with one text per row, got "
                f"generation mode `{mode.value}` and `num_return_sequences={copies}`."
            )
        self.scores = self.logits = None
        if finished is not None:
            self.unfinished = finished.to(tokens) == 0
        if generator is None and self.do_sample:
            generator = torch.Generator().manual_seed(int(torch.randint(1 << 62, ())))
        self.generator = generator
        # some backbones drop the last logits
        size = model.config.vocab_size
        self._width = min(size, LogitTransform.of(model.config.text_config).vocab_size or size)

    @property
    def memory(self) -> list[str]:
        """Names of the logits processors that may remember tokens. That memory cannot be sent."""
        return processors_with_memory(self.processors)

    def choose_next(self, logits: torch.Tensor) -> torch.Tensor:
        """Choose the next token of each row from logits `(batch, vocab)`, append and return it.

        The result has the shape `(batch, 1)`.
        """
        scores = self.process(self.input_ids, logits.float())
        token = self.choose(scores, self.input_ids.shape[1])
        return self.append(token[:, 0])[:, None]

    def draw(self, chances: torch.Tensor, column: int) -> torch.Tensor:
        """Draw a token for each row on the CPU, so that another process can continue the draws."""
        drawn = torch.multinomial(chances.cpu(), 1, generator=self.generator)
        return drawn.to(self.input_ids.device)

    def follow(self, tokens: torch.Tensor) -> None:
        """Append tokens of shape `(batch, 1)` that the other side chose with the same settings."""
        if self.do_sample:
            # a draw with any probabilities advances this generator as far as the other side's
            self.draw(torch.ones((len(tokens), self._width)), self.input_ids.shape[1])
        pads, self.pads = self.pads, False  # the other side has already padded finished rows
        self.append(tokens[:, 0].to(self.input_ids))
        self.pads = pads


def _check_options(settings: dict[str, Any]) -> None:
    """Raise `ValueError` if an argument of `generate` would be ignored."""
    if "stop_strings" in settings or "tokenizer" in settings:
        raise ValueError(
            "a hand-off has no tokenizer. Instead of `stop_strings`, pass `stopping_criteria="
            "StoppingCriteriaList([StopStringCriteria(tokenizer, stop_strings)])`."
        )
    fields = vars(GenerationConfig()).keys() - LEFT_OUT
    unknown = sorted(
        name
        for name, value in settings.items()
        if name not in fields | LISTS and value is not None and value is not False
    )
    if unknown or settings.get("use_cache") is False:
        name = unknown[0] if unknown else "use_cache=False"
        raise ValueError(f"a hand-off does not support `{name}`. Remove this argument.")


def _as_prepared(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    **kwargs: Any,
) -> tuple[Any, Any, GenerationConfig]:
    """Return what `generate` passes to a `custom_generate` function."""
    return logits_processor, stopping_criteria, generation_config


def generator_state(generator: torch.Generator | None) -> torch.Tensor | None:
    """Return the state of a CPU generator as bytes, shape `(bytes,)`, or `None` for `None`."""
    if generator is not None and generator.device.type != "cpu":
        raise HandoffError(
            f"`generator` must be a CPU generator, got one on {generator.device}. Only the state "
            "of a CPU generator can be sent."
        )
    return None if generator is None else generator.get_state()


def restored_generator(state: torch.Tensor | None) -> torch.Generator | None:
    """Return a CPU generator with a state from `generator_state`."""
    if state is None:
        return None
    generator = torch.Generator()
    try:
        generator.set_state(state)
    except (RuntimeError, TypeError) as error:
        raise HandoffError(f"`generator` must be the state of a CPU generator: {error}") from None
    return generator


class HandoffText:
    """The base class of [`DeviceText`] and [`ServerText`].

    Attributes:
        tokens (`torch.LongTensor` of shape `(batch, seq)`): The text so far.
        done (`bool`): `True` if every row of the text has ended.
    """

    def __init__(self, text: PortableText) -> None:
        self._text = text
        # mask and positions of the columns that the layers have run
        self._mask = self._positions = text.input_ids[:, :0]

    @property
    def tokens(self) -> torch.Tensor:
        """The text so far, shape `(batch, seq)`."""
        return self._text.input_ids

    @property
    def done(self) -> bool:
        """`True` if the text has ended."""
        return self._text.done

    def _add_columns(self, mask: torch.Tensor, positions: torch.Tensor | None = None) -> None:
        """Add mask and positions of new columns. By default positions count unmasked tokens."""
        ran = self._mask.shape[1]
        self._mask = torch.cat((self._mask, mask), 1)
        if positions is None:
            positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, ran:]
        self._positions = torch.cat((self._positions, positions), 1)

    def _inputs(self, start: int = 0) -> dict[str, torch.Tensor]:
        """Return the positions and mask of a pass over the columns from `start` to the end."""
        inputs = {"position_ids": self._positions[:, start:]}
        return inputs if bool(self._mask.all()) else inputs | {"attention_mask": self._mask}

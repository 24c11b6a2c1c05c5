"""The text on one side of a hand-off: its tokens, how the next one is chosen, what ran so far."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMode

from ..errors import HandoffError
from ..models.familial.contract import logit_ops
from ..models.familial.relay import ASSISTED, UNUSED, processors_with_memory


# arguments of `generate` beside the fields of `GenerationConfig`
LISTS = {
    "generation_config",
    "logits_processor",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
}
# fields that a hand-off does nothing with
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


class PortableText:
    """Tokens chosen as `generate` chooses them, with a random stream that can travel.

    The host's own `generate` prepares the logits processors and stopping criteria, from its
    arguments, streamers and beams apart. Sampling draws on the CPU, with a CPU generator.

    Attributes:
        tokens (`torch.LongTensor` of shape `(batch, seq)`): The text, grown by each call.
        finished (`torch.Tensor` of shape `(batch,)`): 1 for rows that have ended.
        done (`bool`): Whether the stopping criteria end the text.
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
        # `generate` hands what it has prepared to the loop it is given; this one gives it back
        prepared = model.generate(
            tokens,
            attention_mask=attention_mask,
            exit_idx=answer_idx,
            custom_generate=_as_prepared,
            **settings,
        )
        self._processors, self._criteria, self._config = prepared
        mode, copies = self._config.get_generation_mode(), self._config.num_return_sequences
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or copies > 1:
            raise ValueError(
                "a hand-off writes one text per row, greedily or by sampling, got generation mode "
                f"`{mode.value}` and `num_return_sequences={copies}`: leave out what asks for it."
            )
        self.tokens, self.done = tokens, False
        self.finished = tokens.new_zeros(len(tokens)) if finished is None else finished.to(tokens)
        if generator is None and self._config.do_sample:
            seed = int(torch.randint(1 << 62, ()))
            generator = torch.Generator().manual_seed(seed)
        self.generator = generator
        # of the logits: some hosts drop the last ones
        ops = logit_ops(model.config.text_config)
        kept = [int(number) for kind, number in ops if kind == "keep"]
        self._width = min([model.config.vocab_size, *kept])

    @property
    def memory(self) -> list[str]:
        """Names of the logits processors that may remember tokens, which does not travel."""
        return processors_with_memory(self._processors)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Append the next token of every row, shape `(batch, 1)`, given logits `(batch, vocab)`."""
        scores = self._processors(self.tokens, logits.float())
        chosen = self._drawn(scores) if self._config.do_sample else scores.argmax(-1, keepdim=True)
        if any(hasattr(criterion, "eos_token_id") for criterion in self._criteria):
            ended = self.finished[:, None] > 0
            chosen = torch.where(ended, self._config._pad_token_tensor, chosen)
        self._append(chosen)
        return chosen

    def follow(self, tokens: torch.Tensor) -> None:
        """Append tokens of shape `(batch, 1)` that the other side chose by the same settings."""
        if self._config.do_sample:
            # a draw uses up as much of the stream whatever the scores: it stays abreast
            self._drawn(torch.zeros((len(tokens), self._width)))
        self._append(tokens.to(self.tokens))

    def _drawn(self, scores: torch.Tensor) -> torch.Tensor:
        # on the CPU whatever computed the logits, so that the stream goes on elsewhere
        shares = scores.softmax(-1).cpu()
        return torch.multinomial(shares, 1, generator=self.generator).to(self.tokens.device)

    def _append(self, tokens: torch.Tensor) -> None:
        self.tokens = torch.cat((self.tokens, tokens), 1)
        stopped: Any = self._criteria(self.tokens, None)
        self.finished = self.finished | stopped.long()
        self.done = bool(self.finished.all())


def _check_options(settings: dict[str, Any]) -> None:
    """Raise `ValueError` for arguments that would be ignored."""
    if "stop_strings" in settings or "tokenizer" in settings:
        raise ValueError(
            "a hand-off has no tokenizer: instead of `stop_strings` give `stopping_criteria="
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
        raise ValueError(f"a hand-off does nothing with `{name}`: leave it out.")


def _as_prepared(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    **kwargs: Any,
) -> tuple[Any, Any, GenerationConfig]:
    """Return what `generate` gives to its `custom_generate`."""
    return logits_processor, stopping_criteria, generation_config


def generator_state(generator: torch.Generator | None) -> torch.Tensor | None:
    """Return the bytes of a CPU generator's state, shape `(bytes,)`; `None` stays `None`."""
    if generator is not None and generator.device.type != "cpu":
        raise HandoffError(
            f"the generator must be the CPU's to go on elsewhere, got one of {generator.device}."
        )
    return None if generator is None else generator.get_state()


def restored_generator(state: torch.Tensor | None) -> torch.Generator | None:
    """Return a CPU generator in a state that `generator_state` returned."""
    if state is None:
        return None
    generator = torch.Generator()
    try:
        generator.set_state(state)
    except (RuntimeError, TypeError) as error:
        raise HandoffError(f"`generator` is no state of the CPU's generator: {error}") from None
    return generator


class HandoffText:
    """What both sides' texts have in common.

    Attributes:
        tokens (`torch.LongTensor` of shape `(batch, seq)`): The text so far.
        done (`bool`): Whether the text has ended.
    """

    def __init__(self, text: PortableText) -> None:
        self._text = text
        # of the columns that ran
        self._mask = self._positions = text.tokens[:, :0]

    @property
    def tokens(self) -> torch.Tensor:
        """The text so far, shape `(batch, seq)`."""
        return self._text.tokens

    @property
    def done(self) -> bool:
        """Whether the text has ended."""
        return self._text.done

    def _add_columns(self, mask: torch.Tensor, positions: torch.Tensor | None = None) -> None:
        """Add the mask and positions of new columns; positions default to counts of tokens."""
        ran = self._mask.shape[1]
        self._mask = torch.cat((self._mask, mask), 1)
        if positions is None:
            positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, ran:]
        self._positions = torch.cat((self._positions, positions), 1)

    def _inputs(self, start: int = 0) -> dict[str, torch.Tensor]:
        """Return positions and mask for a pass over all columns from `start` on."""
        inputs = {"position_ids": self._positions[:, start:]}
        return inputs if bool(self._mask.all()) else inputs | {"attention_mask": self._mask}

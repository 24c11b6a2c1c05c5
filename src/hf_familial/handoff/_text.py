"""Choosing the next token as the host's `generate` does, one call at a time."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMode

from ..errors import RelayStateError
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
# fields that a hand-over does nothing with
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


class Chooser:
    """The host's logits processors and stopping criteria, with a random stream that can travel.

    Args:
        model ([`FamilialForCausalLM`]): Whose `generate` prepares them.
        answer_idx (`int`): Exit whose logits it will be given.
        tokens (`torch.LongTensor` of shape `(batch, seq)`): The text so far.
        attention_mask (`torch.LongTensor` of shape `(batch, seq)`): 0 for padding.
        finished (`torch.Tensor` of shape `(batch,)`, *optional*): 1 for rows that have ended.
        generator (`torch.Generator`, *optional*): Of the CPU; made when tokens are drawn and there
            is none.
        **settings: As for `generate`, streamers and beams apart.

    Attributes:
        tokens (`torch.LongTensor` of shape `(batch, seq)`): The text, grown by each call.
        finished (`torch.Tensor` of shape `(batch,)`): 1 for rows that have ended.
        done (`bool`): Whether the stopping criteria end the text: all rows have ended, or it is as
            long as it may be.

    Raises:
        ValueError: If `generate` would refuse the settings, or they ask for what a hand-over does
            not do.
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
                "a hand-over writes one text per row, greedily or by sampling, got generation mode "
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

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Choose the next token of every row and add it to the text.

        Args:
            logits (`torch.Tensor` of shape `(batch, vocab)`): Of the last position.

        Returns:
            `torch.LongTensor` of shape `(batch, 1)`: The padding token in rows that have ended.
        """
        scores = self._processors(self.tokens, logits.float())
        chosen = self._drawn(scores) if self._config.do_sample else scores.argmax(-1, keepdim=True)
        if any(hasattr(criterion, "eos_token_id") for criterion in self._criteria):
            ended = self.finished[:, None] > 0
            chosen = torch.where(ended, self._config._pad_token_tensor, chosen)
        self._add(chosen)
        return chosen

    def follow(self, tokens: torch.Tensor) -> None:
        """Add a token of every row that was chosen elsewhere, by the same settings.

        Args:
            tokens (`torch.LongTensor` of shape `(batch, 1)`): The tokens.
        """
        if self._config.do_sample:
            # a draw uses up as much of the stream whatever the scores: it stays abreast
            self._drawn(torch.zeros((len(tokens), self._width)))
        self._add(tokens.to(self.tokens))

    def _drawn(self, scores: torch.Tensor) -> torch.Tensor:
        """One token of every row, drawn from scores of shape `(batch, vocab)`."""
        # on the CPU whatever computed the logits, so that the stream goes on elsewhere
        shares = scores.softmax(-1).cpu()
        return torch.multinomial(shares, 1, generator=self.generator).to(self.tokens.device)

    def _add(self, tokens: torch.Tensor) -> None:
        self.tokens = torch.cat((self.tokens, tokens), 1)
        stopped: Any = self._criteria(self.tokens, None)
        self.finished = self.finished | stopped.long()
        self.done = bool(self.finished.all())


def _check_options(settings: dict[str, Any]) -> None:
    """Refuse arguments that would be ignored."""
    if "stop_strings" in settings or "tokenizer" in settings:
        raise ValueError(
            "a hand-over has no tokenizer: instead of `stop_strings` give `stopping_criteria="
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
        raise ValueError(f"a hand-over does nothing with `{name}`: leave it out.")


def _as_prepared(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    **kwargs: Any,
) -> tuple[Any, Any, GenerationConfig]:
    """A loop for `custom_generate` that only hands back what it was given."""
    return logits_processor, stopping_criteria, generation_config


def generator_state(generator: torch.Generator | None) -> torch.Tensor | None:
    """The state of a random stream, as bytes.

    Args:
        generator (`torch.Generator`, *optional*): Of the CPU.

    Returns:
        `torch.Tensor` of shape `(bytes,)` and dtype uint8, or `None`.

    Raises:
        RelayStateError: If it is an accelerator's, whose stream no other device can continue.
    """
    if generator is not None and generator.device.type != "cpu":
        raise RelayStateError(
            f"the generator must be the CPU's to go on elsewhere, got one of {generator.device}."
        )
    return None if generator is None else generator.get_state()


def restored_generator(state: torch.Tensor | None) -> torch.Generator | None:
    """The random stream that `generator_state` was taken of.

    Args:
        state (`torch.Tensor` of shape `(bytes,)`, *optional*): Of dtype uint8.

    Returns:
        `torch.Generator`: Of the CPU, at the same place in its stream; or `None`.

    Raises:
        RelayStateError: If the bytes are no such state.
    """
    if state is None:
        return None
    generator = torch.Generator()
    try:
        generator.set_state(state)
    except (RuntimeError, TypeError) as error:
        raise RelayStateError(f"`generator` is no state of the CPU's generator: {error}") from None
    return generator

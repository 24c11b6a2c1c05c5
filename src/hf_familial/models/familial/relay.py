"""The decoding loop of `relay_generate`, its argument checks, and its statistics."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode, logits_process

from .relay_cache import RelayCache, check_positions, check_relay
from .relay_policies import FixedExit, NewTokens, RelayPolicy, SpeculativeRelay, check_chain


# logits processors of Transformers whose result depends on their two arguments only
STATELESS = frozenset(
    "AlternatingCodebooksLogitsProcessor BarkEosPrioritizerLogitsProcessor EpsilonLogitsWarper "
    "ClassifierFreeGuidanceLogitsProcessor DiaClassifierFreeGuidanceLogitsProcessor "
    "DiaEOSChannelFilterLogitsProcessor EncoderNoRepeatNGramLogitsProcessor EtaLogitsWarper "
    "EncoderRepetitionPenaltyLogitsProcessor ExponentialDecayLengthPenalty TypicalLogitsWarper "
    "ForcedBOSTokenLogitsProcessor ForcedEOSTokenLogitsProcessor InfNanRemoveLogitsProcessor "
    "LogitNormalization MinLengthLogitsProcessor MinNewTokensLengthLogitsProcessor "
    "MinPLogitsWarper NoBadWordsLogitsProcessor NoRepeatNGramLogitsProcessor TopHLogitsWarper "
    "RepetitionPenaltyLogitsProcessor SequenceBiasLogitsProcessor TopKLogitsWarper "
    "SuppressTokensAtBeginLogitsProcessor SuppressTokensLogitsProcessor TopPLogitsWarper "
    "TemperatureLogitsWarper WatermarkLogitsProcessor WhisperTimeStampLogitsProcessor".split()
)
# arguments of Transformers' assisted generation, which a relay replaces
ASSISTED = frozenset(
    "assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight use_mtp "
    "assistant_lookbehind assistant_model assistant_tokenizer is_assistant target_lookbehind "
    "max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule speculation_type "
    "prompt_lookup_num_tokens".split()
)
# fields of `GenerationConfig` that have no effect on a relay
UNUSED = frozenset({"output_attentions", "output_hidden_states", "prefill_chunk_size"})
# other arguments that `generate` may pass (the tokenizer is for stop strings)
INPUTS = frozenset(
    "attention_mask inputs_embeds logits_to_keep past_key_values position_ids tokenizer "
    "use_cache".split()
)


def relay_decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    relay: RelayPolicy | None = None,
    streamer: Any = None,
    fused_weights: bool | None = None,
    **model_kwargs: Any,
) -> RelayOutput | torch.Tensor:
    """Run a relay as the decoding method of `generate`, as `relay_generate` does.

    Args:
        relay ([`RelayPolicy`], *optional*): Decides when deeper layers run. Defaults to
            `SpeculativeRelay()`.
        streamer (`BaseStreamer`, *optional*): Receives each token as soon as it is final.
        fused_weights (`bool`, *optional*): Whether to use the package's fused passes, which are
            faster on a CPU. Defaults to `True` on a CPU for models of up to 2 GiB.

    Example:
        >>> model.generate(**inputs, custom_generate=relay_decode, relay=FixedExit(0))
    """
    began = time.perf_counter()
    check_relay(model)  # first, because its message says why `use_cache` is off
    relay = SpeculativeRelay() if relay is None else relay
    # duck typing, because a checkpoint's own code has a copy of these classes
    if isinstance(relay, type) or not hasattr(relay, "rolls_back"):
        raise ValueError(
            "`relay` must be an instance of `SpeculativeRelay`, `ConfidenceRelay`, `HandoffRelay`, "
            f"`FixedExit` or your own `RelayPolicy`, got {type(relay).__name__}."
        )
    check_decoding(generation_config, model_kwargs)
    exits = check_chain(relay.exits(model.config.num_exits), model.config.num_exits)
    check_healing(model.config, generation_config, exits[-1])
    memory = processors_with_memory(logits_processor)
    if memory and relay.rolls_back:
        warnings.warn(
            f"`{memory[0]}` may depend on earlier calls, so this relay runs without drafts. "
            "If its result depends on its arguments only, set its attribute `stateless = True`.",
            stacklevel=2,
        )
        relay, exits = FixedExit(exits[-1]), exits[-1:]
    past = model_kwargs.get("past_key_values")
    cache = RelayCache(model, exits, past, rollback=relay.rolls_back, fused_weights=fused_weights)
    processors = guided_at(logits_processor, model, exits[-1])
    text = GeneratedText(input_ids, processors, stopping_criteria, generation_config, streamer)
    decoder = cache.accelerator.decoder(relay.decoder(cache, text))
    inputs = _first_inputs(text, cache, model_kwargs)
    while not text.done:
        text.write(decoder.step(**inputs))
        inputs = {"input_ids": text.input_ids[:, -1:]}
    decoder.finish()
    # the cache must contain the whole text except its last token, as after `generate`
    new = text.input_ids.shape[1] - text.prompt_length
    if excess := cache.length - (cache.prompt_end + new - 1):  # the text ended within a round
        cache.crop(excess)
    cache.commit(last=True)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return text.input_ids
    return RelayOutput(
        # first, because `to_plain` runs passes that are not part of the relay
        relay_stats=_stats(cache, text, decoder, time.perf_counter() - began),
        sequences=text.input_ids,
        scores=None if text.scores is None else tuple(text.scores),
        logits=None if text.logits is None else tuple(text.logits),
        past_key_values=cache.to_plain() if exits[-1] == model.config.num_exits - 1 else None,
    )


@dataclass(eq=False)
class GeneratedText:
    """A text or batch that grows by the rules of `generate`."""

    input_ids: torch.Tensor
    processors: Any
    criteria: Any
    config: Any
    streamer: Any = None

    def __post_init__(self) -> None:
        ids, self.prompt_length = self.input_ids, self.input_ids.shape[1]
        self.do_sample = bool(self.config.do_sample)
        self.unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)
        if self.pads and self.config._pad_token_tensor is None:
            raise ValueError(
                "`pad_token_id` must be set, because a stopping criterion has `eos_token_id` and "
                "rows that end are padded."
            )
        asked = self.config.return_dict_in_generate
        self.scores: list[Any] | None = [] if asked and self.config.output_scores else None
        self.logits: list[Any] | None = [] if asked and self.config.output_logits else None
        self.wants_scores = self.scores is not None or self.logits is not None  # of each token
        self.sources: list[torch.Tensor] = []
        self.done = False

    @property
    def kept_rows(self) -> torch.Tensor:
        """`torch.Tensor` of shape `(batch,)`: Mask of rows whose next token is not padding."""
        return self.unfinished if self.pads else torch.ones_like(self.unfinished)

    @property
    def tokens_left(self) -> int:
        """`int`: Number of tokens that the text may still grow by."""
        limit = self.criteria.max_length
        return 2**31 if limit is None else max(1, limit - self.input_ids.shape[1])

    def process(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Apply the logits processors to logits `(batch, vocab)` that follow `input_ids`."""
        if not self.processors:
            return logits
        return self.processors(input_ids, logits.clone())  # some change their input in place

    def choose(self, scores: torch.Tensor, column: int) -> torch.Tensor:
        """Choose a token for every row, shape `(batch, 1)`, for one column of the text."""
        if self.do_sample:
            return self.draw(scores.softmax(-1), column)
        return scores.argmax(-1, keepdim=True)

    def draw(self, chances: torch.Tensor, column: int) -> torch.Tensor:
        """Sample a token for every row, shape `(batch, 1)`, from chances `(batch, vocab)`."""
        return torch.multinomial(chances, 1)

    def uniform(self, drafts: torch.Tensor, column: int) -> torch.Tensor:
        """Sample a number in [0, 1) for each draft, shape `(batch, count)`."""
        return torch.rand(drafts.shape, device=drafts.device)

    def write(self, new: NewTokens) -> None:
        """Append tokens column by column. Stop when every row has ended."""
        for i in range(new.tokens.shape[1]):
            self.sources.append(new.sources[:, i].masked_fill(~self.unfinished, -1))
            if self.scores is not None:
                self.scores.append(new.scores[i])
            if self.logits is not None:
                self.logits.append(new.logits[i])
            self.append(new.tokens[:, i])
            if self.done:
                break

    def append(self, token: torch.Tensor) -> torch.Tensor:
        """Append one token per row, shape `(batch,)`. Return it with padding in ended rows."""
        if self.pads:
            pad = self.config._pad_token_tensor.to(token.device)
            token = torch.where(self.unfinished, token, pad)
        self.input_ids = torch.cat((self.input_ids, token[:, None]), 1)
        if self.streamer is not None:
            self.streamer.put(token.cpu())
        scores = None if self.scores is None else tuple(self.scores)
        self.unfinished = self.unfinished & ~self.criteria(self.input_ids, scores)
        self.done = not self.unfinished.any()
        return token


def _first_inputs(text: GeneratedText, cache: RelayCache, given: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of the first pass, the part of the prompt that is not in the cache."""
    past = cache.length
    embeds, mask, positions = map(given.get, ("inputs_embeds", "attention_mask", "position_ids"))
    prompt, length = (text.input_ids if embeds is None else embeds), text.prompt_length
    # If there are fewer ids than columns of the mask, `generate` treats all of them as new.
    columns = getattr(text.config, "_mask_length", length) if mask is None else mask.shape[1]
    new = prompt.shape[1] - (past if embeds is not None or columns == length else 0)
    if new < 1:
        raise ValueError(
            f"The prompt must be longer than `past_key_values` ({past} tokens), got "
            f"{prompt.shape[1]}. Pass the whole text, as for `generate`."
        )
    inputs = {"input_ids" if embeds is None else "inputs_embeds": prompt[:, -new:]}
    if positions is not None:
        inputs["position_ids"] = positions[:, -new:]
    if mask is not None:
        inputs["attention_mask"] = mask
    seen = past or (new if positions is None else int(positions[:, -new:].max()) + 1)
    # minus 1, because the last token is never run
    check_positions(cache.model.config.text_config, seen, past + new + text.tokens_left - 1)
    return inputs


def check_arguments(asked: Mapping[str, Any]) -> None:
    """Raise for arguments of `generate` that a relay would ignore."""
    given = {name for name, value in asked.items() if value is not None and value is not False}
    if assisted := sorted(given & ASSISTED):
        raise ValueError(
            f"`{assisted[0]}` has no effect, because a relay drafts with the family's own exits. "
            "Pass `relay=SpeculativeRelay(draft_exit=..., draft_length=...)` instead."
        )
    if "synced_gpus" in given:
        raise ValueError(
            "`synced_gpus` (the default under FSDP and ZeRO-3) does not work with a relay, whose "
            "number of passes differs between processes. Call `generate(exit_idx=...)` instead."
        )
    if unused := sorted(given & UNUSED):
        raise ValueError(f"`{unused[0]}` has no effect on a relay. Leave it out.")
    cache = asked.get("cache_implementation")
    if cache not in (None, "dynamic", "hybrid"):  # `generate` treats "hybrid" as the default
        raise ValueError(
            f"`cache_implementation={cache!r}` does not work with a relay, which needs a "
            "`DynamicCache` in the device's memory. Leave it out."
        )


def check_decoding(generation_config: Any, model_kwargs: Mapping[str, Any]) -> None:
    """Raise for settings that `generate` prepared and a relay does not support."""
    mode, exit_idx = generation_config.get_generation_mode(), model_kwargs.get("exit_idx")
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            "A relay supports greedy decoding and sampling only, got generation mode "
            f"`{mode.value}`. Leave out `num_beams` and similar arguments."
        )
    if model_kwargs.get("use_cache") is False:
        raise ValueError(
            "`use_cache` is off (in the call or in the generation config), but a relay needs the "
            "cache. Pass `use_cache=True`."
        )
    if exit_idx is not None:
        raise ValueError(
            f"Pass `exit_idx` to the policy instead, as in `SpeculativeRelay(exit_idx={exit_idx})`."
        )
    fields = {name: getattr(generation_config, name, None) for name in UNUSED}
    check_arguments(fields | {"cache_implementation": generation_config.cache_implementation})
    for name, value in model_kwargs.items():
        if name not in INPUTS and value is not None and value is not False:
            raise ValueError(f"`{name}` has no effect on a relay. Leave it out.")


def check_healing(config: Any, generation_config: Any, exit_idx: int) -> None:
    """Raise if `token_healing` would run another exit than the one that generates."""
    if generation_config.token_healing and exit_idx != config.resolve_exit():
        raise ValueError(
            f"`token_healing` would run exit {config.default_exit} (`config.default_exit`), but "
            f"the text is from exit {exit_idx}. Set `model.config.default_exit = {exit_idx}`."
        )


def processors_with_memory(processors: Iterable[Any]) -> list[str]:
    """Return the names of processors whose result may depend on earlier calls."""
    prefix, names = logits_process.PrefixConstrainedLogitsProcessor, []
    for one in processors:
        one = one._prefix_allowed_tokens_fn if type(one) is prefix else one
        kind = type(one)
        known = kind.__module__ == logits_process.__name__ and kind.__name__ in STATELESS
        if not known and getattr(one, "stateless", False) is not True:
            named = one if hasattr(one, "__qualname__") else kind  # only functions have a name
            names.append(f"{named.__module__}.{named.__qualname__}")
    return names


def guided_at(processors: Iterable[Any], model: Any, exit_idx: int) -> LogitsProcessorList:
    """Return the processors, with classifier-free guidance set to run one exit."""
    found = LogitsProcessorList()
    for one in processors:
        guide = type(one) is logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor
        if guide and one.model is model:
            one = copy.copy(one)
            one.model = partial(model, exit_idx=exit_idx)
        found.append(one)
    return found


@dataclass(frozen=True)
class RelayStats:
    """The statistics of one `relay_generate` call. `print` shows them in one line.

    Attributes:
        token_exits (`torch.LongTensor` of shape `(batch, new)`): Exit that produced each token, or
            -1 for padding after the end of a row.
        exits (`tuple[int, ...]`): Indices of the exits in use, shallowest first.
        positions (`tuple[int, ...]`): For each of these exits, how many positions of one row ran
            through its segment.
        layer_passes, plain_layer_passes (`int`): Layers times positions of one row, in this relay
            and in plain decoding at the deepest of these exits.
        flops, plain_flops (`float`, *optional*): FLOPs of all rows, in this relay and in plain
            decoding. Private layers and attention over past tokens do not count, but all experts
            do. `None` without the package.
        rounds (`int`): Number of verifying passes. Without drafts, the number of steps.
        drafted, accepted (`int`): Number of drafts of one row, and of those that all rows accepted.
        seconds (`float`): Wall-clock time in seconds.

    Example:
        >>> output = model.relay_generate(**inputs, return_dict_in_generate=True)
        >>> print(output.relay_stats)
    """

    token_exits: torch.Tensor
    exits: tuple[int, ...]
    positions: tuple[int, ...]
    layer_passes: int
    plain_layer_passes: int
    flops: float | None
    plain_flops: float | None
    rounds: int
    drafted: int
    accepted: int
    seconds: float

    @property
    def acceptance(self) -> float:
        """`float`: Share of the verified drafts that were accepted. It is 0 without drafts."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_round(self) -> float:
        """`float`: New tokens of a row per verifying pass. It is 1 without drafts."""
        return self.token_exits.shape[1] / max(1, self.rounds)

    @property
    def flops_saved(self) -> float | None:
        """`float`, *optional*: Share of `plain_flops` that the relay saved. It can be negative."""
        known = self.flops is not None and self.plain_flops is not None
        return 1 - self.flops / self.plain_flops if known else None  # type: ignore[operator]

    @property
    def note(self) -> str:
        """`str`: Advice if the relay used more FLOPs than plain decoding, else empty."""
        if (saved := self.flops_saved or 0.0) >= 0:
            return ""
        cause = f" ({self.acceptance:.0%} of the drafts were accepted)" if self.drafted else ""
        return (
            f"{1 - saved:.2f} times the FLOPs of plain decoding{cause}. To save FLOPs, "
            "train the early exits longer, draft from another exit, or draft fewer tokens"
        )

    def __str__(self) -> str:
        drafts = f"; {self.accepted} of {self.drafted} drafts accepted" if self.drafted else ""
        saved, note = self.flops_saved, self.note
        if saved is not None and not note:
            note = f"{1 - saved:.2f} times the FLOPs of plain decoding"
        return (
            f"{self.token_exits.shape[1]} tokens of {self.token_exits.shape[0]} rows in "
            f"{self.rounds} rounds{drafts}; {self.layer_passes:,} layer passes (plain decoding: "
            f"{self.plain_layer_passes:,})" + (f"; {note}" if note else "")
        )


@dataclass
class RelayOutput(GenerateDecoderOnlyOutput):
    """The output of `relay_generate` with `return_dict_in_generate=True`.

    It has the fields of the output of `generate`, and `relay_stats`, a [`RelayStats`].
    """

    relay_stats: RelayStats | None = None


def _stats(cache: RelayCache, text: Any, decoder: Any, seconds: float) -> RelayStats:
    layers = [b - a for a, b in zip(cache.depths, cache.depths[1:], strict=False)]
    sources = torch.stack(text.sources, 1)
    flops, plain_flops = cache.accelerator.flops(cache, *sources.shape)
    return RelayStats(
        token_exits=sources,
        exits=cache.exits,
        positions=tuple(cache.ran),
        layer_passes=sum(n * positions for n, positions in zip(layers, cache.ran, strict=True)),
        plain_layer_passes=cache.depths[-1] * (cache.length - cache.first),
        flops=flops,
        plain_flops=plain_flops,
        rounds=decoder.rounds,
        drafted=decoder.drafted,
        accepted=decoder.accepted,
        seconds=seconds,
    )

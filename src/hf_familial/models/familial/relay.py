"""The loop behind `relay_generate`, a callable for `generate(custom_generate=relay_decode)`."""

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
from .relay_policies import (
    FixedExit,
    NewTokens,
    RelayDecoder,
    RelayPolicy,
    SpeculativeRelay,
    check_chain,
)


# logits processors of transformers whose answer depends on their two arguments alone
STATELESS = frozenset(
    """
    AlternatingCodebooksLogitsProcessor BarkEosPrioritizerLogitsProcessor
    ClassifierFreeGuidanceLogitsProcessor DiaClassifierFreeGuidanceLogitsProcessor
    DiaEOSChannelFilterLogitsProcessor EncoderNoRepeatNGramLogitsProcessor
    EncoderRepetitionPenaltyLogitsProcessor EpsilonLogitsWarper EtaLogitsWarper
    ExponentialDecayLengthPenalty ForcedBOSTokenLogitsProcessor ForcedEOSTokenLogitsProcessor
    InfNanRemoveLogitsProcessor LogitNormalization MinLengthLogitsProcessor
    MinNewTokensLengthLogitsProcessor MinPLogitsWarper NoBadWordsLogitsProcessor
    NoRepeatNGramLogitsProcessor RepetitionPenaltyLogitsProcessor SequenceBiasLogitsProcessor
    SuppressTokensAtBeginLogitsProcessor SuppressTokensLogitsProcessor TemperatureLogitsWarper
    TopHLogitsWarper TopKLogitsWarper TopPLogitsWarper TypicalLogitsWarper
    WatermarkLogitsProcessor WhisperTimeStampLogitsProcessor
    """.split()
)
# arguments of the host's assisted generation, which a relay replaces
ASSISTED = frozenset(
    """
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
    assistant_lookbehind assistant_model assistant_tokenizer is_assistant max_matching_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule prompt_lookup_num_tokens speculation_type
    target_lookbehind use_mtp
    """.split()
)
# fields of `GenerationConfig` that a relay does nothing with
UNUSED = frozenset({"output_attentions", "output_hidden_states", "prefill_chunk_size"})
# what `generate` may hand to the loop beside its named arguments; the tokenizer, for stop strings
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
    """Decode by relay; a decoding method for `generate(custom_generate=relay_decode, relay=...)`.

    `generate` prepares the other arguments; see [`FamilialForCausalLM.relay_generate`] for the
    result and what is raised.

    Args:
        relay ([`RelayPolicy`], *optional*): When to go deeper; defaults to `SpeculativeRelay()`.
        streamer (`BaseStreamer`, *optional*): Gets every token as it is certain.
        fused_weights (`bool`, *optional*): Whether to run the package's fused passes where there
            are some, which is faster on a CPU. By default on a CPU, for at most 2 GiB of weights.
    """
    began = time.perf_counter()
    check_relay(model)  # first: a host without a cache has switched it off by itself
    relay = SpeculativeRelay() if relay is None else relay
    if isinstance(relay, type) or not hasattr(relay, "rolls_back"):  # of this or another copy
        raise ValueError(
            "`relay` must be a `SpeculativeRelay`, `ConfidenceRelay`, `HandoffRelay`, `FixedExit` "
            f"or a `RelayPolicy` of your own, got {type(relay).__name__}."
        )
    check_decoding(generation_config, model_kwargs)
    exits = check_chain(relay.exits(model.config.num_exits), model.config.num_exits)
    check_healing(model.config, generation_config, exits[-1])
    memory = processors_with_memory(logits_processor)
    if memory and relay.rolls_back:
        warnings.warn(
            f"`{memory[0]}` may remember the tokens that it has seen, so the relay writes without "
            "drafts. If its answer depends on its arguments alone, give it `stateless = True`.",
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
    # the cache, which may be the caller's, holds the text but its last token
    new = text.input_ids.shape[1] - text.prompt_length
    if excess := cache.length - (cache.prompt_end + new - 1):  # the text ended within a round
        cache.crop(excess)
    cache.commit(last=True)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return text.input_ids
    # before the rest of the cache is completed
    stats = _stats(cache, text, decoder, time.perf_counter() - began)
    whole = exits[-1] == model.config.num_exits - 1
    return RelayOutput(
        sequences=text.input_ids,
        scores=None if text.scores is None else tuple(text.scores),
        logits=None if text.logits is None else tuple(text.logits),
        past_key_values=cache.to_plain() if whole else None,
        relay_stats=stats,
    )


@dataclass(eq=False)
class GeneratedText:
    """A text (or a batch of them) as it grows by the rules of `generate`."""

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
                "a stopping criterion has `eos_token_id`, so rows that end are padded: give "
                "`pad_token_id` too."
            )
        asked = self.config.return_dict_in_generate
        self.scores: list[Any] | None = [] if asked and self.config.output_scores else None
        self.logits: list[Any] | None = [] if asked and self.config.output_logits else None
        self.sources: list[torch.Tensor] = []
        self.done = False

    @property
    def wants_scores(self) -> bool:
        """`bool`: Whether decoders must return the scores and logits of their tokens."""
        return self.scores is not None or self.logits is not None

    @property
    def kept_rows(self) -> torch.Tensor:
        """`torch.Tensor` of shape `(batch,)`: Rows whose next token is not replaced by padding."""
        return self.unfinished if self.pads else torch.ones_like(self.unfinished)

    @property
    def tokens_left(self) -> int:
        """`int`: Number of tokens that may still be written."""
        limit = self.criteria.max_length
        return 2**31 if limit is None else max(1, limit - self.input_ids.shape[1])

    def process(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return scores to choose from, `(batch, vocab)`, given the text before."""
        if not self.processors:
            return logits
        return self.processors(input_ids, logits.clone())  # some write into what they are given

    def choose(self, scores: torch.Tensor, column: int) -> torch.Tensor:
        """Choose a token for every row, shape `(batch, 1)`, to stand in a column of the text."""
        if self.do_sample:
            return self.draw(scores.softmax(-1), column)
        return scores.argmax(-1, keepdim=True)

    def draw(self, chances: torch.Tensor, column: int) -> torch.Tensor:
        """Draw a token for every row, shape `(batch, 1)`, from probabilities `(batch, vocab)`."""
        return torch.multinomial(chances, 1)

    def uniform(self, drafts: torch.Tensor, column: int) -> torch.Tensor:
        """Draw a number in [0, 1) for each of `drafts`, `(batch, count)`, from a column on."""
        return torch.rand(drafts.shape, device=drafts.device)

    def write(self, new: NewTokens) -> None:
        """Append tokens column by column, until every row has ended."""
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
        """Append one token of every row, shape `(batch,)`; return it, padded in ended rows."""
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
    """Return what the first pass takes: the part of the prompt that the cache has not seen."""
    past = cache.length
    embeds, mask, positions = map(given.get, ("inputs_embeds", "attention_mask", "position_ids"))
    prompt, length = (text.input_ids if embeds is None else embeds), text.prompt_length
    # as `generate` has it: ids that are fewer than the mask's columns are the new ones alone
    columns = getattr(text.config, "_mask_length", length) if mask is None else mask.shape[1]
    new = prompt.shape[1] - (past if embeds is not None or columns == length else 0)
    if new < 1:
        raise ValueError(
            f"the prompt must go beyond `past_key_values`, which holds {past} tokens; got "
            f"{prompt.shape[1]}. Give the whole text, as for `generate`."
        )
    inputs = {"input_ids" if embeds is None else "inputs_embeds": prompt[:, -new:]}
    if positions is not None:
        inputs["position_ids"] = positions[:, -new:]
    if mask is not None:
        inputs["attention_mask"] = mask
    seen = past or (new if positions is None else int(positions[:, -new:].max()) + 1)
    # the last token is never run
    check_positions(cache.model.config.text_config, seen, past + new + text.tokens_left - 1)
    return inputs


def check_arguments(asked: Mapping[str, Any]) -> None:
    """Raise for arguments of `generate`, given by name, that a relay would ignore."""
    given = {name for name, value in asked.items() if value is not None and value is not False}
    if assisted := sorted(given & ASSISTED):
        raise ValueError(
            f"a relay drafts with the family's own exits: leave out `{assisted[0]}`, and say how "
            "to draft with `relay=SpeculativeRelay(draft_exit=..., draft_length=...)`."
        )
    if "synced_gpus" in given:
        raise ValueError(
            "a relay runs another number of passes in each process, so it cannot wait for others "
            "(`synced_gpus`, the default under FSDP and ZeRO-3): use `generate(exit_idx=...)`."
        )
    if unused := sorted(given & UNUSED):
        raise ValueError(f"a relay does nothing with it: leave out `{unused[0]}`.")
    cache = asked.get("cache_implementation")
    if cache not in (None, "dynamic", "hybrid"):  # `generate` takes "hybrid" for the default
        raise ValueError(
            "a relay needs a `DynamicCache` in the device's memory, got "
            f"`cache_implementation={cache!r}`: leave it out."
        )


def check_decoding(generation_config: Any, model_kwargs: Mapping[str, Any]) -> None:
    """Raise for ways of decoding, as `generate` prepared them, that a relay does not have."""
    mode, exit_idx = generation_config.get_generation_mode(), model_kwargs.get("exit_idx")
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            "a relay decodes greedily or by sampling, got generation mode "
            f"`{mode.value}`: leave out `num_beams` and what else asks for it."
        )
    if model_kwargs.get("use_cache") is False:
        raise ValueError(
            "a relay lives in the cache, which is off here, as asked for or as the model's "
            "generation config says: pass `use_cache=True`."
        )
    if exit_idx is not None:
        raise ValueError(
            "a relay says itself whose text it writes: give `exit_idx` to it, as in "
            f"`SpeculativeRelay(exit_idx={exit_idx})`, not beside it."
        )
    fields = {name: getattr(generation_config, name, None) for name in UNUSED}
    check_arguments(fields | {"cache_implementation": generation_config.cache_implementation})
    for name, value in model_kwargs.items():
        if name not in INPUTS and value is not None and value is not False:
            raise ValueError(f"a relay does nothing with `{name}`: leave it out.")


def check_healing(config: Any, generation_config: Any, exit_idx: int) -> None:
    """Raise if the host would heal a prompt with another exit than the one that goes on."""
    if generation_config.token_healing and exit_idx != config.resolve_exit():
        raise ValueError(
            f"`token_healing` heals the prompt with `config.default_exit` ({config.default_exit}), "
            f"got `exit_idx={exit_idx}`: set `model.config.default_exit = {exit_idx}`, or leave "
            "out `token_healing`."
        )


def processors_with_memory(processors: Iterable[Any]) -> list[str]:
    """Return the names of processors that may remember: not known as `STATELESS`, nor so marked."""
    prefix, names = logits_process.PrefixConstrainedLogitsProcessor, []
    for one in processors:
        one = one._prefix_allowed_tokens_fn if type(one) is prefix else one
        kind = type(one)
        known = kind.__module__ == logits_process.__name__ and kind.__name__ in STATELESS
        if not known and getattr(one, "stateless", False) is not True:
            named = one if hasattr(one, "__qualname__") else kind  # a function, or an object
            names.append(f"{named.__module__}.{named.__qualname__}")
    return names


def guided_at(processors: Iterable[Any], model: Any, exit_idx: int) -> LogitsProcessorList:
    """Return the processors; the guide of `guidance_scale` becomes a copy that reads one exit."""
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
    """A report of what a relay did.

    Attributes:
        token_exits (`torch.LongTensor` of shape `(batch, new)`): Of each token; -1 after a row.
        exits (`tuple[int, ...]`): The exits that were read, shallowest first.
        positions (`tuple[int, ...]`): For each, positions of a row that its segment ran.
        layer_passes, plain_layer_passes (`int`): Layers times positions, of one row; and what
            decoding at the deepest of these exits would have taken.
        flops, plain_flops (`float`, *optional*): Likewise the FLOPs of all rows, two for each
            weight of a matrix (of all experts) and position, without private layers and attention
            over the past. `None` without the package.
        rounds (`int`): Checks of drafts; without drafts, steps.
        drafted, accepted (`int`): Drafts of one row that were checked, and that all rows accepted.
        seconds (`float`): Wall time.
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
        """`float`: Share of the checked drafts that were accepted; 0 if there were none."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_round(self) -> float:
        """`float`: New tokens of a row per check; 1 without drafts."""
        return self.token_exits.shape[1] / max(1, self.rounds)

    @property
    def flops_saved(self) -> float | None:
        """`float`, *optional*: Share of the plain FLOPs not spent; negative if more were."""
        known = self.flops is not None and self.plain_flops is not None
        return 1 - self.flops / self.plain_flops if known else None  # type: ignore[operator]

    @property
    def note(self) -> str:
        """`str`: What to do where more FLOPs were spent than plain text takes; else empty."""
        saved = self.flops_saved or 0.0
        if saved >= 0:
            return ""
        cause = f"{self.acceptance:.0%} of the drafts were accepted" if self.drafted else "no gain"
        return (
            f"more FLOPs than plain text, {1 - saved:.2f} times ({cause}): "
            "train the early exits further, draft from another exit, or draft fewer tokens"
        )

    def __str__(self) -> str:
        drafts = f"; {self.accepted} of {self.drafted} drafts accepted" if self.drafted else ""
        saved, note = self.flops_saved, self.note
        if saved is not None and not note:
            note = f"{1 - saved:.2f} times the FLOPs of plain text"
        return (
            f"{self.token_exits.shape[1]} tokens of {self.token_exits.shape[0]} rows in "
            f"{self.rounds} rounds{drafts}; {self.layer_passes:,} layer passes, plain text "
            f"{self.plain_layer_passes:,}" + (f"; {note}" if note else "")
        )


@dataclass
class RelayOutput(GenerateDecoderOnlyOutput):
    """The output of `generate` with the report of the relay, a [`RelayStats`]."""

    relay_stats: RelayStats | None = None


def _stats(cache: RelayCache, text: Any, decoder: RelayDecoder, seconds: float) -> RelayStats:
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

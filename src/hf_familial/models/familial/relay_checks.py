"""Checks of what a relay cannot run on or take into account, before anything runs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from transformers import LogitsProcessorList
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)
from transformers.generation import GenerationMode, logits_process


# logits processors of transformers whose answer depends on their two arguments alone
STATELESS = frozenset(
    {
        "AlternatingCodebooksLogitsProcessor",
        "BarkEosPrioritizerLogitsProcessor",
        "ClassifierFreeGuidanceLogitsProcessor",
        "DiaClassifierFreeGuidanceLogitsProcessor",
        "DiaEOSChannelFilterLogitsProcessor",
        "EncoderNoRepeatNGramLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
        "WatermarkLogitsProcessor",
        "WhisperTimeStampLogitsProcessor",
    }
)
# arguments of the host's assisted generation, which a relay replaces
ASSISTED = (
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "assistant_model",
    "assistant_tokenizer",
    "is_assistant",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "prompt_lookup_num_tokens",
    "speculation_type",
    "target_lookbehind",
    "use_mtp",
)
# fields of `GenerationConfig` that a relay does nothing with
UNUSED = ("output_attentions", "output_hidden_states", "prefill_chunk_size")
# what `generate` may hand to the loop beside its named arguments
INPUTS = (
    "attention_mask",
    "inputs_embeds",
    "logits_to_keep",
    "past_key_values",
    "position_ids",
    "tokenizer",  # for stop strings
    "use_cache",
)


def check_relay(model: Any) -> None:
    """Refuse a host whose layers cannot go on from a tap.

    Args:
        model ([`FamilialForCausalLM`]): The family.

    Raises:
        ValueError: With the reason.
    """
    contract, name = model.model.contract, model.config.text_config.model_type
    reason = contract.whole or ("" if contract.cache else "it has no cache of transformers' kinds")
    if reason:
        raise ValueError(
            f"`{name}` cannot be relayed: {reason}. `generate(exit_idx=...)` runs one member of it."
        )


def check_healing(config: Any, generation_config: Any, exit_idx: int) -> None:
    """Refuse to heal a prompt with another exit than the one that goes on.

    Args:
        config ([`FamilialConfig`]): The family's.
        generation_config (`GenerationConfig`): Says whether to heal.
        exit_idx (`int`): Exit that writes the text.

    Raises:
        ValueError: If the host would heal with another exit.
    """
    if generation_config.token_healing and exit_idx != config.resolve_exit():
        raise ValueError(
            f"`token_healing` heals the prompt with `config.default_exit` ({config.default_exit}), "
            f"got `exit_idx={exit_idx}`: set `model.config.default_exit = {exit_idx}`, or leave "
            "out `token_healing`."
        )


def check_positions(config: Any, seen: int, ran: int) -> None:
    """Refuse a text that runs on past the length at which the host changes its rotary angles.

    There the angles of a position depend on how far the same pass goes. A relay runs positions in
    other groups than `generate` does, so its text would differ.

    Args:
        config (`PreTrainedConfig`): Config of the backbone.
        seen (`int`): Positions of the prompt, which run in one pass.
        ran (`int`): Positions that will have run at the end.

    Raises:
        ValueError: With the length.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        name = str(kind.get("rope_type"))
        if name != "longrope" and "dynamic" not in name:
            continue
        lengths = [config.max_position_embeddings]
        if name == "longrope":
            # the angles change at the first; some hosts drop their cache at the second
            original = "original_max_position_embeddings"
            named = (kind.get(original), getattr(config, original, None))
            lengths = [length for length in named if length] or lengths
            if seen > max(lengths):
                continue  # all positions have the angles of a long text
        if ran > min(lengths):
            raise ValueError(
                f"`{config.model_type}` changes its `{name}` angles at {min(lengths)} tokens, "
                f"which a relay cannot run past: the prompt has {seen} and the text may have "
                f"{ran + 1}. Give a smaller `max_new_tokens`, or call `generate(exit_idx=...)`."
            )


def check_cache(cache: Any) -> None:
    """Refuse a cache that cannot be of different lengths, or taken back.

    Args:
        cache ([`Cache`]): What the caller or `generate` made.

    Raises:
        ValueError: If it is not a plain [`DynamicCache`].
    """
    plain, away = isinstance(cache, DynamicCache), getattr(cache, "offloading", False)
    kinds = (DynamicLayer, LinearAttentionCacheLayerMixin, DummyLayer)
    odd = [] if not plain else [la for la in cache.layers if not isinstance(la, kinds)]
    if not plain or away or odd:
        name = type(odd[0] if odd else cache).__name__
        where = " that offloads its layers (`offloading=True`)" if away else ""
        raise ValueError(
            f"a relay needs a `DynamicCache` in the device's memory, got {name}{where}: leave out "
            "`cache_implementation`, or give `past_key_values=DynamicCache(config=...)`."
        )


def check_rollback(cache: DynamicCache, model_type: str) -> None:
    """Refuse a cache whose last positions cannot be taken back.

    Args:
        cache ([`DynamicCache`]): With a slot for every layer.
        model_type (`str`): The host's.

    Raises:
        ValueError: If it holds recurrent states.
    """
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        raise ValueError(
            f"`{model_type}` has recurrent layers, whose state cannot be taken back: drafts that "
            "may be rejected cannot run on it. Use a relay that never takes a token back, such as "
            "`ConfidenceRelay`."
        )


def past_positions(cache: DynamicCache) -> int:
    """Number of positions that every layer of a cache has seen.

    Args:
        cache ([`DynamicCache`]): Filled by a plain forward, or empty.

    Returns:
        `int`: 0 for a new cache.

    Raises:
        ValueError: If its layers differ.
    """
    lengths = {la.get_seq_length() for la in cache.layers if isinstance(la, CacheLayerMixin)}
    if len(lengths) > 1:
        raise ValueError(
            "a relay can go on from `past_key_values` only if every layer holds the same number of "
            f"tokens, got {sorted(lengths)}: use the cache of the deepest exit."
        )
    return lengths.pop() if lengths else 0


def check_arguments(asked: Mapping[str, Any]) -> None:
    """Refuse arguments of `generate` that a relay would ignore.

    Args:
        asked (`Mapping[str, Any]`): What the caller gave, by name.

    Raises:
        ValueError: Naming the first of them.
    """
    given = {name for name, value in asked.items() if value is not None and value is not False}
    assisted = sorted(given.intersection(ASSISTED))
    if assisted:
        raise ValueError(
            f"a relay drafts with the family's own exits: leave out `{assisted[0]}`, and say how "
            "to draft with `relay=SpeculativeRelay(draft_exit=..., draft_length=...)`."
        )
    if "synced_gpus" in given:
        raise ValueError(
            "a relay runs another number of passes in each process, so it cannot wait for others "
            "(`synced_gpus`, the default under FSDP and ZeRO-3): use `generate(exit_idx=...)`."
        )
    unused = sorted(given.intersection(UNUSED))
    if unused:
        raise ValueError(f"a relay does nothing with it: leave out `{unused[0]}`.")
    cache = asked.get("cache_implementation")
    if cache not in (None, "dynamic", "hybrid"):  # `generate` takes "hybrid" for the default
        raise ValueError(
            "a relay needs a `DynamicCache` in the device's memory, got "
            f"`cache_implementation={cache!r}`: leave it out."
        )


def check_decoding(generation_config: Any, model_kwargs: Mapping[str, Any]) -> None:
    """Refuse ways of decoding that a relay does not have.

    Args:
        generation_config (`GenerationConfig`): As `generate` prepared it.
        model_kwargs (`Mapping[str, Any]`): Likewise.

    Raises:
        ValueError: Naming what to leave out.
    """
    mode = generation_config.get_generation_mode()
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
    if model_kwargs.get("exit_idx") is not None:
        raise ValueError(
            "a relay says itself whose text it writes: give `exit_idx` to it, as in "
            f"`SpeculativeRelay(exit_idx={model_kwargs['exit_idx']})`, not beside it."
        )
    fields = {name: getattr(generation_config, name, None) for name in UNUSED}
    check_arguments(fields | {"cache_implementation": generation_config.cache_implementation})
    for name, value in model_kwargs.items():
        if name not in INPUTS and value is not None and value is not False:
            raise ValueError(f"a relay does nothing with `{name}`: leave it out.")


def processors_with_memory(processors: Iterable[Any]) -> list[str]:
    """Return the names of the logits processors that must see every kept token once, in order.

    Those of transformers that are known to have no memory may see drafts too. Any other may, if it,
    its class or the function given as `prefix_allowed_tokens_fn` has the attribute
    `stateless = True`.

    Args:
        processors (`Iterable[LogitsProcessor]`): As `generate` prepared them.

    Returns:
        `list[str]`: With their modules; empty if all of them may see drafts.
    """
    prefix = logits_process.PrefixConstrainedLogitsProcessor
    found = [one._prefix_allowed_tokens_fn if type(one) is prefix else one for one in processors]
    # a function has a name of its own, an object that of its class
    named = [one if hasattr(one, "__qualname__") else type(one) for one in found]
    return [
        f"{name.__module__}.{name.__qualname__}"
        for one, name in zip(found, named, strict=True)
        if not _stateless(one)
    ]


def _stateless(one: Any) -> bool:
    kind = type(one)
    known = kind.__module__ == logits_process.__name__ and kind.__name__ in STATELESS
    return known or getattr(one, "stateless", False) is True


def guided_at(processors: Iterable[Any], model: Any, exit_idx: int) -> LogitsProcessorList:
    """Let the guide of `guidance_scale` read the exit whose text is written.

    Args:
        processors (`Iterable[LogitsProcessor]`): As `generate` prepared them.
        model ([`FamilialForCausalLM`]): The family, which would answer with its default exit.
        exit_idx (`int`): The exit.

    Returns:
        `LogitsProcessorList`: A new list. A guide is copied, its memory is not.
    """
    guide, found = logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor, []
    for one in processors:
        if type(one) is guide and one.model is model:
            one = copy.copy(one)
            one.model = partial(model, exit_idx=exit_idx)
        found.append(one)
    return LogitsProcessorList(found)

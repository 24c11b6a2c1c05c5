"""The loop behind `relay_generate`, a callable for `generate(custom_generate=relay_decode)`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from .draft_length import follow_weights
from .members import matrix_sizes
from .outputs import RelayOutput, RelayStats
from .relay_cache import RelayCache
from .relay_checks import (
    check_decoding,
    check_healing,
    check_positions,
    check_relay,
    guided_at,
    processors_with_memory,
)
from .relay_policies import FixedExit, RelayPolicy, SpeculativeRelay, check_chain
from .relay_text import Block, RelayText
from .speculative import Speculation


# bytes of weights up to which modules and masks take a good part of a step
LEAN_LIMIT = 2 * 2**30


def relay_decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    relay: RelayPolicy | SpeculativeRelay | None = None,
    streamer: Any = None,
    lean: bool | None = None,
    **model_kwargs: Any,
) -> RelayOutput | torch.Tensor:
    """Decode by relay; a decoding method for `generate(custom_generate=relay_decode, relay=...)`.

    Args:
        model ([`FamilialForCausalLM`]): The family.
        input_ids (`torch.LongTensor` of shape `(batch, seq)`): The prompt.
        logits_processor (`LogitsProcessorList`): As `generate` prepares it.
        stopping_criteria (`StoppingCriteriaList`): As `generate` prepares it.
        generation_config (`GenerationConfig`): As `generate` prepares it.
        relay ([`RelayPolicy`] or [`SpeculativeRelay`], *optional*): When to go deeper; defaults to
            `SpeculativeRelay()`.
        streamer (`BaseStreamer`, *optional*): Gets every token as it is certain.
        lean (`bool`, *optional*): Whether to decode by lean passes (`lean.py`) where there are
            some, which is faster on a CPU. By default on a CPU, for weights of at most 2 GiB.
        **model_kwargs: As `generate` prepares them: `past_key_values`, `attention_mask`,
            `position_ids`.

    Returns:
        [`RelayOutput`] or `torch.LongTensor` of shape `(batch, seq + new)`: As `generate` returns.

    Raises:
        ValueError: If the host, the cache or the way of decoding cannot be relayed.
        IndexError: If the relay asks for an exit that is not there.
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
    relay, exits = _without_drafts(relay, exits, logits_processor)
    logits_processor = guided_at(logits_processor, model, exits[-1])
    drafts = relay.rolls_back
    past = model_kwargs.get("past_key_values")
    lean = pays(model) if lean is None else lean
    follow_weights(model)
    cache = RelayCache(model, exits, past, rollback=drafts, lean=lean)
    text = RelayText(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    decide: Any
    if drafts:
        decide = Speculation(relay, exits, cache, text)
    else:
        decide = Decisions(relay, exits, cache, text)
    inputs = _first_inputs(input_ids, cache.length, generation_config, model_kwargs)
    _check_length(model, inputs, cache.length, text.room)
    while not text.done:
        text.write(decide(**inputs))
        inputs = {"input_ids": text.input_ids[:, -1:]}
    if drafts:
        decide.remember()
    _forget_excess(cache, text)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return text.input_ids
    stats = _stats(model, exits, cache, text, decide, time.perf_counter() - began)
    return RelayOutput(
        sequences=text.input_ids,
        scores=None if text.scores is None else tuple(text.scores),
        logits=None if text.logits is None else tuple(text.logits),
        past_key_values=_returned_cache(model, cache),
        relay_stats=stats,
    )


def pays(model: Any) -> bool:
    """Return whether lean passes are faster: on a CPU, for a small model."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return model.device.type == "cpu" and size <= LEAN_LIMIT


class Decisions:
    """Makes tokens one by one, each at the first exit that is sure of it.

    Args:
        relay ([`RelayPolicy`]): The policy.
        exits (`tuple[int, ...]`): Its exits, shallowest first.
        cache ([`RelayCache`]): Over them.
        text ([`RelayText`]): What is written so far, and how tokens are chosen.
    """

    def __init__(
        self, relay: RelayPolicy, exits: tuple[int, ...], cache: RelayCache, text: RelayText
    ) -> None:
        self.relay, self.exits, self.cache, self.text = relay, exits, cache, text
        self.state = relay.new_state(len(text.input_ids))
        self.rounds = self.drafted = self.accepted = 0

    def __call__(self, **inputs: Any) -> Block:
        """One token for every row; `inputs` are for `RelayCache.feed`."""
        self.rounds += 1
        self.cache.feed(**inputs)
        open_rows, chosen = self.text.kept_rows, None
        for k in self.exits:
            last = k == self.exits[-1]
            if not last and not self.relay.asks(k, self.state):
                continue
            self.cache.catch_up(k)
            logits = self.cache.logits(k)[:, -1].float()
            sure = None if last else self.relay.sure(k, logits, self.state)
            leaving = open_rows if sure is None else open_rows & sure
            chosen = _merge(chosen, leaving, k, logits)
            if last or not (open_rows := open_rows & ~leaving).any():
                break
        assert chosen is not None
        logits, sources = chosen
        scores = self.text.process(self.text.input_ids, logits)
        tokens = self.text.choose(scores)
        return Block(tokens, sources[:, None], [scores], [logits])


def _merge(
    chosen: tuple[torch.Tensor, torch.Tensor] | None,
    leaving: torch.Tensor,
    exit_idx: int,
    logits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and exits of the rows so far, with those that leave at this exit."""
    here = torch.full_like(leaving, exit_idx, dtype=torch.long)
    if chosen is None:
        return logits, here
    return (
        torch.where(leaving[:, None], logits, chosen[0]),
        torch.where(leaving, here, chosen[1]),
    )


def _without_drafts(
    relay: RelayPolicy | SpeculativeRelay, exits: tuple[int, ...], processors: Any
) -> tuple[RelayPolicy | SpeculativeRelay, tuple[int, ...]]:
    """Let the deciding exit write alone where a logits processor must not see drafts."""
    memory = processors_with_memory(processors)
    if not memory or not relay.rolls_back:
        return relay, exits
    warnings.warn(
        f"`{memory[0]}` may remember the tokens that it has seen, so the relay writes without "
        "drafts. If its answer depends on its arguments alone, give it `stateless = True`.",
        stacklevel=3,
    )
    return FixedExit(exits[-1]), exits[-1:]


def _first_inputs(
    input_ids: torch.Tensor, past: int, generation_config: Any, model_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What the first pass takes: the part of the prompt that the cache has not seen."""
    mask, positions = (model_kwargs.get(name) for name in ("attention_mask", "position_ids"))
    embeds = model_kwargs.get("inputs_embeds")
    given, length = (input_ids if embeds is None else embeds), input_ids.shape[1]
    # as `generate` has it: ids that are fewer than the mask's columns are the new ones alone
    columns = getattr(generation_config, "_mask_length", length) if mask is None else mask.shape[1]
    new = given.shape[1] - (past if embeds is not None or columns == length else 0)
    if new < 1:
        raise ValueError(
            f"the prompt must go beyond `past_key_values`, which holds {past} tokens; got "
            f"{given.shape[1]}. Give the whole text, as for `generate`."
        )
    inputs = {"input_ids" if embeds is None else "inputs_embeds": given[:, -new:]}
    if positions is not None:
        inputs["position_ids"] = positions[:, -new:]
    if mask is not None:
        inputs["attention_mask"] = mask
    return inputs


def _check_length(model: Any, inputs: dict[str, Any], past: int, room: int) -> None:
    """Refuse a text that may get too long for the host's position angles."""
    given = inputs["inputs_embeds"] if "inputs_embeds" in inputs else inputs["input_ids"]
    ends, positions = past + given.shape[1], inputs.get("position_ids")
    seen = past or (ends if positions is None else int(positions.max()) + 1)
    # the last token is never run
    check_positions(model.config.text_config, seen, ends + room - 1)


def _forget_excess(cache: RelayCache, text: RelayText) -> None:
    """Let the cache, which may be the caller's, hold the text but its last token."""
    new = text.input_ids.shape[1] - text.prompt_length
    excess = cache.length - (cache.prompt_end + new - 1)
    if excess:  # the text ended among the tokens of a round
        cache.crop(excess)
    cache.settle(last=True)


def _returned_cache(model: Any, cache: RelayCache) -> Any:
    """An ordinary cache of the text but its last token, as `generate` returns; `None` if ragged."""
    return cache.to_plain() if cache.exits[-1] == model.config.num_exits - 1 else None


def _stats(
    model: Any,
    exits: Sequence[int],
    cache: RelayCache,
    text: RelayText,
    decide: Decisions | Speculation,
    seconds: float,
) -> RelayStats:
    """What the relay did, from the counts it kept."""
    depths = [0, *(model.config.exits[k] for k in exits)]
    layers = [b - a for a, b in zip(depths, depths[1:], strict=False)]
    passes = sum(n * positions for n, positions in zip(layers, cache.ran, strict=True))
    whole = depths[-1] * (cache.length - cache.first)
    sources = torch.stack(text.sources, 1)
    rows = len(text.input_ids)
    flops, heads = ([2 * size for size in sizes] for sizes in matrix_sizes(model, exits))
    spent = sum(f * n for f, n in zip(flops, cache.ran, strict=True))
    reads = sum(f * n for f, n in zip(heads, cache.reads, strict=True))
    dense = (cache.length - cache.first) * sum(flops) + sources.shape[1] * heads[-1]
    return RelayStats(
        token_exits=sources,
        exits=tuple(exits),
        positions=tuple(cache.ran),
        layer_passes=passes,
        plain_layer_passes=whole,
        flops=rows * (spent + reads),
        plain_flops=rows * dense,
        rounds=decide.rounds,
        drafted=decide.drafted,
        accepted=decide.accepted,
        seconds=seconds,
    )

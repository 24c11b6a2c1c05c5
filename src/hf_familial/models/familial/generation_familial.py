"""The host's generation at the exit asked for."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import CacheLayerMixin, DynamicCache
from transformers.generation import GenerationMode

from .backbones import host_class
from .relay import check_arguments, check_healing, guided_at, relay_decode
from .segments import hide_unused


class FamilialGenerationMixin(GenerationMixin):
    """The host's generation: its own hooks, and `exit_idx` wherever it can be given."""

    _batched_exit: int | None = None  # the one that continuous batching was started with

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare inputs as the host's own class does, where it does."""
        given = {
            "next_sequence_length": next_sequence_length,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
        }
        prepare = host_class(self.config.text_config).prepare_inputs_for_generation
        if prepare is GenerationMixin.prepare_inputs_for_generation:
            return super().prepare_inputs_for_generation(input_ids, **given, **kwargs)
        inputs = prepare(_as_host(self), input_ids, **given, **kwargs)
        if past_key_values is not None and inputs.get("past_key_values") is None:
            # the host drops its cache and starts anew: an empty one keeps its kind and its slots
            past_key_values.reset()
            inputs["past_key_values"] = past_key_values
        return inputs

    def create_masks_for_generate(
        self, *, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor | None:
        """Leave the mask as it is: only the member that runs knows the lengths of its own slots."""
        if not self.model.spec.host.own_mask:
            return attention_mask
        make = host_class(self.config.text_config).create_masks_for_generate
        return make(_as_host(self), attention_mask=attention_mask, **kwargs)

    def _prepare_generation_config(
        self, generation_config: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        # a config that has `exit_idx` also takes that of the caller
        if getattr(config, "exit_idx", None) is not None:
            model_kwargs.setdefault("exit_idx", config.exit_idx)
        # without a cache, each step must run the whole text, whatever is asked for
        config.use_cache = config.use_cache and bool(self.model.spec.cache)
        exit_idx = self.model.resolve_exit(model_kwargs.get("exit_idx"))
        check_healing(self.config, config, exit_idx)
        return config, model_kwargs

    def _supports_default_dynamic_cache(self) -> bool:
        # `generate` asks a cache of its own making for its length, which purely recurrent layers do
        # not count; one that the first forward makes it does not ask
        layers = DynamicCache(config=self.config.text_config).layers
        counts = any(isinstance(layer, CacheLayerMixin) for layer in layers)
        return counts and bool(self.model.spec.cache)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.use_cache and not self.model.spec.cache:
            raise ValueError(  # the host switches it on for these
                f"`{self.config.text_config.model_type}` has no cache of transformers' kinds, so a "
                "text cannot go on from `inputs_embeds`: give `input_ids`."
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        mode = generation_config.get_generation_mode()
        if isinstance(cache, DynamicCache) and (
            GenerationMode.ASSISTED_GENERATION in (mode, *args) or generation_config.is_assistant
        ):
            exit_idx = self.model.resolve_exit(model_kwargs.get("exit_idx"))
            self.model.members.grow(cache, (exit_idx,))
            hide_unused(cache, self.model.members.slots(exit_idx))
            if generation_config.is_assistant:
                cache.activate_past_recording()  # of the slots added here too

    def _get_candidate_generator(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "`assistant_early_exit` is not for families: it shortens the config while it runs. "
                "Use `relay_generate(relay=SpeculativeRelay(draft_exit=...))`, which drafts at a "
                "trained exit and recomputes nothing."
            )
        # the exit is this model's: the assistant has exits of its own, or none
        generation_config = copy.copy(generation_config)
        generation_config.__dict__.pop("exit_idx", None)
        model_kwargs = dict(kwargs.pop("model_kwargs"))
        model_kwargs.pop("exit_idx", None)
        return super()._get_candidate_generator(
            generation_config, *args, model_kwargs=model_kwargs, **kwargs
        )

    def _extract_generation_mode_kwargs(
        self, custom_generate: Any, kwargs: dict[str, Any], *given: Any
    ) -> dict[str, Any]:
        if getattr(custom_generate, "func", custom_generate) is not relay_decode:
            return super()._extract_generation_mode_kwargs(custom_generate, kwargs, *given)
        hook = "prepare_inputs_for_generation"
        method = getattr(self, hook)
        if getattr(method, "__func__", method) is not getattr(FamilialGenerationMixin, hook):
            raise ValueError(
                f"a relay does not call `{hook}`, which is replaced here, as peft does for a "
                "prompt that it has learned: call `generate(exit_idx=...)` without a relay."
            )
        # a callable gets neither streamer nor tokenizer, and drops the rest without a word
        mode = super()._extract_generation_mode_kwargs(None, kwargs, *given)
        check_arguments(kwargs | mode)
        asked = {name: kwargs.pop(name) for name in ("relay", "fused_weights") if name in kwargs}
        return {name: mode[name] for name in ("streamer", "tokenizer") if name in mode} | asked

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(*args, **kwargs)
        exit_idx = (kwargs.get("model_kwargs") or {}).get("exit_idx")
        return processors if exit_idx is None else guided_at(processors, self, exit_idx)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the host does, at `config.default_exit`; raise for another or a relay."""
        if kwargs.pop("relay", None) is not None:
            raise ValueError("continuous batching cannot relay: call `relay_generate`.")
        self._check_batched(kwargs.pop("exit_idx", None))
        return super().generate_batch(*args, **kwargs)

    def init_continuous_batching(
        self, generation_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Start as the host does, at `config.default_exit`; raise for what runs another exit."""
        config = self.generation_config if generation_config is None else generation_config
        self._check_batched(getattr(config, "exit_idx", None))
        exit_idx = self.config.resolve_exit()
        kept = getattr(self, "_cached_continuous_batching_manager", None)
        if kept is not None and self._batched_exit != exit_idx:
            # prompts share its blocks, which hold keys and values of that exit's layers alone
            raise ValueError(
                f"the manager that is kept ran exit {self._batched_exit}, and `config.default_exit`"
                f" is {exit_idx} now: call `destroy_cached_continuous_batching_manager()` first."
            )
        self._batched_exit = exit_idx
        return super().init_continuous_batching(generation_config, *args, **kwargs)

    def _check_batched(self, exit_idx: int | None) -> None:
        if self.config.resolve_exit(exit_idx) != self.config.resolve_exit():
            raise ValueError(
                "continuous batching runs all requests at `config.default_exit` "
                f"({self.config.default_exit}), got `exit_idx={exit_idx}`: set "
                f"`model.config.default_exit = {exit_idx}`, or export that member."
            )


def _as_host(family: Any) -> Any:
    """Return a view of the family as an object of the host's class, for the host's own methods."""
    view = object.__new__(host_class(family.config.text_config))
    own = {"create_masks_for_generate": family.create_masks_for_generate}
    view.__dict__.update(family.__dict__, config=family.config.text_config, **own)
    return view

"""`generate` of Transformers, extended by `exit_idx`."""

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
    """The part of a family that changes `generate`. It uses the hooks of the backbone's class."""

    _batched_exit: int | None = None  # exit of the running continuous batching

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Prepare the inputs of one step as the backbone's causal LM does."""
        kwargs["inputs_embeds"] = inputs_embeds  # `generate` looks for it in the signature
        prepare = host_class(self.config.text_config).prepare_inputs_for_generation
        if prepare is GenerationMixin.prepare_inputs_for_generation:
            return super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs = prepare(_as_host(self), input_ids, **kwargs)
        cache = kwargs.get("past_key_values")
        if cache is not None and inputs.get("past_key_values") is None:
            # this class drops its cache to start again, but its type and slots must stay
            cache.reset()
            inputs["past_key_values"] = cache
        return inputs

    def create_masks_for_generate(
        self, *, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor | None:
        """Return the mask unchanged, unless only the host's causal LM can build it (`own_mask`)."""
        if not self.model.spec.host.own_mask:
            return attention_mask
        make = host_class(self.config.text_config).create_masks_for_generate
        return make(_as_host(self), attention_mask=attention_mask, **kwargs)

    def _prepare_generation_config(
        self, generation_config: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        # if the config has the attribute, Transformers stores the caller's `exit_idx` there
        if getattr(config, "exit_idx", None) is not None:
            model_kwargs.setdefault("exit_idx", config.exit_idx)
        # a backbone without a cache must run the whole text in each step
        config.use_cache = config.use_cache and bool(self.model.spec.cache)
        check_healing(self.config, config, self.model.resolve_exit(model_kwargs.get("exit_idx")))
        return config, model_kwargs

    def _supports_default_dynamic_cache(self) -> bool:
        # `generate` reads the length of a cache that it creates, and purely recurrent layers have
        # none. It does not do so if the first forward creates the cache.
        layers = DynamicCache(config=self.config.text_config).layers
        counts = any(isinstance(layer, CacheLayerMixin) for layer in layers)
        return counts and bool(self.model.spec.cache)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.use_cache and not self.model.spec.cache:
            raise ValueError(  # `generate` switches the cache on for `inputs_embeds`
                f"`inputs_embeds` needs a cache, which `{self.config.text_config.model_type}` does "
                "not support. Pass `input_ids` instead."
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
                cache.activate_past_recording()  # again, for the slots added here

    def _get_candidate_generator(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "`assistant_early_exit` does not work with a family. Call "
                "`relay_generate(relay=SpeculativeRelay(draft_exit=...))` instead."
            )
        # `exit_idx` is for this model, not for the assistant
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
                f"`{hook}` is replaced on this model (as by peft for prompt tuning), but a relay "
                "does not call it. Call `generate(exit_idx=...)` instead."
            )
        # for a callable, Transformers passes neither streamer nor tokenizer and ignores the rest
        mode = super()._extract_generation_mode_kwargs(None, kwargs, *given)
        check_arguments(kwargs | mode)
        asked = {name: kwargs.pop(name) for name in ("relay", "fused_weights") if name in kwargs}
        return {name: mode[name] for name in ("streamer", "tokenizer") if name in mode} | asked

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(*args, **kwargs)
        exit_idx = (kwargs.get("model_kwargs") or {}).get("exit_idx")
        return processors if exit_idx is None else guided_at(processors, self, exit_idx)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with continuous batching, which always runs `config.default_exit`."""
        if kwargs.pop("relay", None) is not None:
            raise ValueError("`relay` does not work in `generate_batch`. Call `relay_generate`.")
        self._check_batched(kwargs.pop("exit_idx", None))
        return super().generate_batch(*args, **kwargs)

    def init_continuous_batching(
        self, generation_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Start continuous batching, which always runs `config.default_exit`."""
        config = self.generation_config if generation_config is None else generation_config
        self._check_batched(getattr(config, "exit_idx", None))
        exit_idx = self.config.resolve_exit()
        kept = getattr(self, "_cached_continuous_batching_manager", None)
        if kept is not None and self._batched_exit != exit_idx:
            # its blocks of keys and values, which prompts share, belong to the layers of that exit
            raise ValueError(
                f"`config.default_exit` is now {exit_idx}, but continuous batching started with "
                f"{self._batched_exit}. Call `destroy_cached_continuous_batching_manager()` first."
            )
        self._batched_exit = exit_idx
        return super().init_continuous_batching(generation_config, *args, **kwargs)

    def _check_batched(self, exit_idx: int | None) -> None:
        if self.config.resolve_exit(exit_idx) != self.config.resolve_exit():
            raise ValueError(
                f"`exit_idx` must equal `config.default_exit` ({self.config.default_exit}) in a "
                f"batch, got {exit_idx}. Set `model.config.default_exit = {exit_idx}`."
            )


def _as_host(family: Any) -> Any:
    """Return a view of the family as an object of the backbone's causal LM class."""
    view = object.__new__(host_class(family.config.text_config))
    own = {"create_masks_for_generate": family.create_masks_for_generate}
    view.__dict__.update(family.__dict__, config=family.config.text_config, **own)
    return view

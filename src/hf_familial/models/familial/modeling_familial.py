"""A family: one decoder of transformers with G exits."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import resolve_hidden_states_indices

from .configuration_familial import FamilialConfig, evenly_spaced_exits
from .contract import find_contract, logit_ops, refusal
from .exits import build_exits, build_head, copy_module, read_out
from .losses import balance_loss, multi_exit_loss
from .outputs import FamilialCausalLMOutput, FamilialModelOutput
from .segments import (
    Segment,
    check_lengths,
    grow_cache,
    hook_private_layers,
    run_segment,
    segment_view,
    slice_config,
)


class FamilialPreTrainedModel(PreTrainedModel):
    """Flags and initialisation shared by the familial models; the backbone brings its own."""

    config: FamilialConfig
    config_class = FamilialConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        self.base_model.backbone._init_weights(module)

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: custom code is not trusted to initialise buffers on load, but ours is the host's own."""
        return False


class FamilialModel(FamilialPreTrainedModel):
    """A host's decoder with early exits, without heads.

    Args:
        config ([`FamilialConfig`]): Backbone and exits.

    Raises:
        ValueError: If the backbone cannot be cut at a depth.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"^exit_heads\."]

    def __init__(self, config: FamilialConfig) -> None:
        super().__init__(config)
        config.check()  # it may have been changed since it was made
        # the default dtype, not the sub-config's: heads and exits are made in it too
        self.backbone = AutoModel.from_config(config.text_config, dtype=torch.get_default_dtype())
        self.contract = find_contract(self.backbone)
        self.exits = build_exits(config, self.backbone, self.contract, keep=False)
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.num_exit_layers:
            # some hosts initialise layers from the model that holds them: here, a view does
            for exit_idx in range(len(self.exits)):
                private = self._private_segment(exit_idx)
                self.backbone._init_weights(segment_view(self.backbone, self.contract, private))

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embedding."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's token embedding."""
        self.backbone.set_input_embeddings(value)

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        exit_idx: int | None = None,
        output_exits: bool = False,
        **kwargs: Any,
    ) -> FamilialModelOutput:
        r"""Run the backbone up to one exit, or through all of them.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*): Token ids.
            attention_mask (`torch.Tensor`, *optional*): As the host takes it.
            position_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*): As the host takes it.
            past_key_values (`Cache`, *optional*): The family's cache; updated up to the exit.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, seq, hidden)`, *optional*): Instead of
                `input_ids`.
            use_cache (`bool`, *optional*): Whether to return a cache.
            exit_idx (`int`, *optional*): Exit to stop at; defaults to `config.default_exit`.
            output_exits (`bool`, *optional*, defaults to `False`): Run to the deepest exit and return
                the hidden states of all.
            **kwargs: Passed to the backbone.

        Returns:
            [`FamilialModelOutput`]: With `output_exits`, the hidden states of every exit.

        Raises:
            IndexError: If there is no exit `exit_idx`.
            ValueError: If `past_key_values` was filled to different depths.
        """
        exit_idx = self.config.resolve_exit(exit_idx)
        reached = range(self.config.num_exits) if output_exits else (exit_idx,)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.backbone.config)
        if past_key_values is not None:
            self._prepare_cache(past_key_values, reached)
        inputs = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "output_hidden_states": self._requested("output_hidden_states", kwargs),
            "output_attentions": self._requested("output_attentions", kwargs),
            **kwargs,
        }
        entry = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        if output_exits:
            outputs, exit_hidden_states = self._run_exits(entry, inputs)
        else:
            outputs, exit_hidden_states = self._run_member(exit_idx, entry | inputs), None
        return FamilialModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=past_key_values,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            router_logits=outputs.get("router_logits"),
            exit_hidden_states=exit_hidden_states,
        )

    def _run_member(self, exit_idx: int, inputs: dict[str, Any]) -> Any:
        """One pass through the layers below an exit, its private layers and its norm."""
        cache = inputs["past_key_values"]
        if exit_idx == self.config.num_exits - 1 and not self._has_private_slots(cache):
            return self._run_backbone(inputs)
        depth, layers = self.config.exits[exit_idx], self._layers
        private = list(self.exits[exit_idx].layers) if exit_idx < len(self.exits) else []
        if private and (inputs["output_hidden_states"] or inputs["output_attentions"]):
            hook_private_layers(self.backbone, self.contract, self._private_segment(exit_idx))
        segment = Segment(
            layers=[*layers[:depth], *private],
            start=0,
            norm=self._norm(exit_idx),
            slots=self._slots(exit_idx),
        )
        return run_segment(self.backbone, self.contract, segment, **inputs)

    def _run_exits(
        self, entry: dict[str, Any], inputs: dict[str, Any]
    ) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """One pass through the whole backbone, with taps at the early exits."""
        depths, requested = self.config.exits[:-1], inputs["output_hidden_states"]
        position_ids = self._positions(entry, inputs)
        taps = requested if requested is True else [*depths, *_as_list(requested)]
        outputs = self._run_member(
            self.config.num_exits - 1, entry | inputs | {"output_hidden_states": taps or None}
        )
        hidden_states = outputs.get("hidden_states") or ()
        readings = [
            self._read_tap(k, hidden_states[depth], inputs | {"position_ids": position_ids})
            for k, depth in enumerate(depths)
        ]
        if requested is not True:
            wanted = resolve_hidden_states_indices(
                self.backbone, _as_list(requested), len(hidden_states)
            )
            kept = tuple(h if i in wanted else None for i, h in enumerate(hidden_states))
            outputs["hidden_states"] = kept if requested else None
        return outputs, (*readings, outputs.last_hidden_state)

    def _read_tap(self, exit_idx: int, tap: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """From the tap of an early exit to its normed hidden state, shapes `(batch, seq, hidden)`."""
        if not self.config.num_exit_layers:
            return self._norm(exit_idx)(tap)
        segment = self._private_segment(exit_idx)
        inputs = inputs | {
            "inputs_embeds": tap,
            "output_hidden_states": None,
            "output_attentions": None,
            "output_router_logits": None,
        }
        outputs = run_segment(self.backbone, self.contract, segment, **inputs)
        return outputs.last_hidden_state

    def _run_backbone(self, inputs: dict[str, Any]) -> Any:
        """The host's own forward, untouched: what makes the deepest exit the dense model."""
        inputs = self.contract.accepted(inputs)
        cache = inputs.pop("past_key_values", None)
        if cache is not None:
            check_lengths(cache, range(min(len(cache.layers), self.config.num_hidden_layers)))
            inputs[self.contract.cache] = cache
        return self.backbone(**inputs)

    def _positions(self, entry: dict[str, Any], inputs: dict[str, Any]) -> torch.Tensor | None:
        """Position ids for private layers, which cannot count the cache's tokens themselves."""
        if inputs["position_ids"] is not None or not self.config.num_exit_layers:
            return inputs["position_ids"]
        shape_of = entry["inputs_embeds"] if entry["input_ids"] is None else entry["input_ids"]
        cache = inputs["past_key_values"]
        past = cache.get_seq_length() if cache is not None else 0
        return (torch.arange(shape_of.shape[1], device=shape_of.device) + past).unsqueeze(0)

    def _requested(self, flag: str, kwargs: dict[str, Any]) -> Any:
        """What the caller, else the config, else the backbone's config asks to be returned."""
        value = kwargs.pop(flag, None)
        configs = (self.config, self.backbone.config)
        return value if value is not None else any(getattr(c, flag, None) for c in configs) or None

    @property
    def _layers(self) -> nn.ModuleList:
        return getattr(self.backbone.get_submodule(self.contract.owner), self.contract.layers)

    def _norm(self, exit_idx: int) -> nn.Module:
        own = self.exits[exit_idx].norm if exit_idx < len(self.exits) else None
        final = getattr(self.backbone.get_submodule(self.contract.owner), self.contract.norm)
        return final if own is None else own

    def _private_segment(self, exit_idx: int) -> Segment:
        """The private layers of an early exit and its norm."""
        layers, depth = self.exits[exit_idx].layers, self.config.exits[exit_idx]
        slots = self._slots(exit_idx)[depth:]
        return Segment(layers=list(layers), start=depth, norm=self._norm(exit_idx), slots=slots)

    def _slots(self, exit_idx: int) -> list[int]:
        """Cache slots of a member: the backbone's up to its depth, then its private layers' own."""
        slots = list(range(self.config.exits[exit_idx]))
        if exit_idx < self.config.num_exits - 1:
            count = self.config.num_exit_layers
            first = self.config.num_hidden_layers + exit_idx * count
            slots += range(first, first + count)
        return slots

    def _has_private_slots(self, cache: Cache | None) -> bool:
        return cache is not None and len(cache.layers) > self.config.num_hidden_layers

    def _prepare_cache(self, cache: Cache, reached: Iterable[int]) -> None:
        """Give the cache every slot that the exits to be reached write to."""
        num_slots = 1 + max(slot for exit_idx in reached for slot in self._slots(exit_idx))
        if len(cache.layers) >= num_slots:
            return
        config, count = self.backbone.config, self.config.num_exit_layers
        sources = [(config, i) for i in range(config.num_hidden_layers)]
        for depth in self.config.exits[:-1]:
            member = slice_config(config, 0, depth + count)
            sources += [(member, depth + j) for j in range(count)]
        grow_cache(cache, num_slots, sources)


class FamilialForCausalLM(FamilialPreTrainedModel, GenerationMixin):
    """A family of causal language models on one backbone.

    Args:
        config ([`FamilialConfig`]): Backbone and exits.

    Raises:
        ValueError: If the backbone cannot be cut at a depth, or has no causal language model.

    Example:
        >>> from hf_familial import FamilialConfig, FamilialForCausalLM
        >>> sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        >>> model = FamilialForCausalLM(FamilialConfig(text_config={"model_type": "llama", **sizes}))
        >>> model(input_ids, exit_idx=0).logits  # runs one layer of four
    """

    _tied_weights_keys = {"lm_head.weight": "model.backbone.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: FamilialConfig) -> None:
        super().__init__(config)
        self.model = FamilialModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = build_head(config.text_config)
        self.exit_heads = self._build_exit_heads(keep=False)
        self._tied_weights_keys = {"lm_head.weight": f"model.backbone.{self._embedding_name}.weight"}
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike[str] | PreTrainedModel,
        *,
        exits: list[int] | None = None,
        num_exits: int | None = None,
        num_exit_layers: int = 0,
        exit_norm: str = "own",
        exit_head: str = "shared",
        default_exit: int = -1,
        **kwargs: Any,
    ) -> FamilialForCausalLM:
        r"""Turn a pretrained decoder into a family.

        The deepest exit is the decoder itself, bit for bit. Early exits start from copies: of the final
        norm, of the output head where it is their own, and, for private layers, of the backbone layers
        that follow the exit.

        Args:
            backbone (`str`, `os.PathLike` or `PreTrainedModel`): Name on the Hub, folder, or a causal LM
                in memory. A model in memory is taken over: the family shares its modules and config
                (pass a `copy.deepcopy` to keep the two apart).
            exits (`list[int]`, *optional*): Depth of every exit, see [`FamilialConfig`].
            num_exits (`int`, *optional*): Instead of `exits`: G exits, evenly spaced.
            num_exit_layers (`int`, *optional*, defaults to 0): Private layers of each early exit.
            exit_norm (`str`, *optional*, defaults to `"own"`): `"own"` or `"shared"`.
            exit_head (`str`, *optional*, defaults to `"shared"`): `"shared"` or `"own"`.
            default_exit (`int`, *optional*, defaults to -1): Exit used when none is asked for.
            **kwargs: Passed to `AutoModelForCausalLM.from_pretrained` (`dtype`, `revision`, ...).

        Returns:
            [`FamilialForCausalLM`]: In the mode (training or evaluation) of the decoder.

        Raises:
            OSError: If there is no such checkpoint.
            TypeError: If `backbone` is neither a name nor a model, or `kwargs` come with a model.
            ValueError: If the exits are wrong or the decoder cannot be cut at a depth.

        Example:
            >>> model = FamilialForCausalLM.from_backbone("Qwen/Qwen3-0.6B", exits=[8, 16, 28])
        """
        if exits is not None and num_exits is not None:
            raise ValueError(f"give `exits` or `num_exits`, not both: got {exits} and {num_exits}.")
        host = _load_host(backbone, kwargs)
        if num_exits is not None:
            exits = evenly_spaced_exits(host.config.num_hidden_layers, num_exits)
        config = FamilialConfig(
            text_config=host.config,
            exits=exits,
            num_exit_layers=num_exit_layers,
            exit_norm=exit_norm,
            exit_head=exit_head,
            default_exit=default_exit,
            dtype=host.dtype,
        )
        with torch.device("meta"):
            family = cls(config)
        family._adopt(host)
        return family

    def _adopt(self, host: PreTrainedModel) -> None:
        """Put a host's modules, and copies of them for the early exits, where the empty ones are."""
        model, base = self.model, host.base_model
        if type(base) is not type(model.backbone):
            raise refusal(host.config.model_type, f"{type(host).__name__} has another base model")
        model.backbone = base
        model.exits = build_exits(self.config, base, model.contract, keep=True)
        self.lm_head = host.get_output_embeddings()
        self.exit_heads = self._build_exit_heads(keep=True)
        self.generation_config = host.generation_config
        self.name_or_path = self.config.name_or_path = host.name_or_path
        self.tie_weights()
        self.train(host.training)

    def _build_exit_heads(self, keep: bool) -> nn.ModuleList:
        count = self.config.num_exits - 1 if self.config.exit_head == "own" else 0
        return nn.ModuleList(copy_module(self.lm_head, keep) for _ in range(count))

    @property
    def _embedding_name(self) -> str:
        """Dotted path of the token embedding inside the backbone."""
        embedding = self.get_input_embeddings()
        return next(n for n, m in self.model.backbone.named_modules() if m is embedding)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Resize the vocabulary of the embedding and of every head; arguments as in the host."""
        embedding = super().resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        self.exit_heads = nn.ModuleList(
            self._get_resized_lm_head(
                head, embedding.weight.shape[0], mean_resizing=mean_resizing
            )
            for head in self.exit_heads
        )
        return embedding

    @staticmethod
    def create_masks_for_generate(
        *, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor | None:
        """Leave the mask as it is: only the member that runs knows the lengths of its own slots."""
        return attention_mask

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        exit_idx: int | None = None,
        output_exits: bool = False,
        **kwargs: Any,
    ) -> FamilialCausalLMOutput:
        r"""Logits of one exit; with `labels`, the loss of all of them.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*): Token ids.
            attention_mask (`torch.Tensor`, *optional*): As the host takes it.
            position_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*): As the host takes it.
            past_key_values (`Cache`, *optional*): The family's cache; updated up to the exit.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, seq, hidden)`, *optional*): Instead of
                `input_ids`.
            labels (`torch.LongTensor` of shape `(batch, seq)`, *optional*): Targets, -100 where there is
                none; shifted here unless `shift_labels` is given too.
            use_cache (`bool`, *optional*): Whether to return a cache.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): As in the host.
            exit_idx (`int`, *optional*): Exit to stop at, with `labels` the only one that has a loss.
                Defaults to `config.default_exit`, with `labels` to the loss of all exits.
            output_exits (`bool`, *optional*, defaults to `False`): Return the logits of all exits.
            **kwargs: Passed to the backbone and to the loss: `num_items_in_batch`, `shift_labels`, ...

        Returns:
            [`FamilialCausalLMOutput`]: `loss` is the mean of `exit_losses`, weights 1/G.

        Raises:
            IndexError: If there is no exit `exit_idx`.
            ValueError: If `past_key_values` was filled to different depths.
        """
        losses_wanted = labels is not None
        every_exit = output_exits or (losses_wanted and exit_idx is None)
        trained = range(self.config.num_exits) if exit_idx is None else None
        exit_idx = self.config.resolve_exit(exit_idx)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            exit_idx=exit_idx,
            output_exits=every_exit,
            **kwargs,
        )
        reached = outputs.exit_hidden_states if every_exit else (outputs.last_hidden_state,)
        first = 0 if every_exit else exit_idx
        hidden = {first + i: slice_logits_to_keep(h, logits_to_keep) for i, h in enumerate(reached)}
        chosen = self._read_out(hidden[exit_idx], exit_idx)

        def logits_of(exit_idx_: int) -> torch.Tensor:
            return chosen if exit_idx_ == exit_idx else self._read_out(hidden[exit_idx_], exit_idx_)

        loss = aux_loss = exit_losses = None
        if losses_wanted:
            exit_losses = multi_exit_loss(
                trained or [exit_idx], logits_of, self.loss_function, labels, **kwargs
            )
            loss = exit_losses.mean()
        if outputs.router_logits is not None:
            aux_loss, weight = balance_loss(
                self.config.text_config, outputs.router_logits, attention_mask
            )
            loss = loss + weight * aux_loss.to(loss.device) if losses_wanted else None
        return FamilialCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=chosen,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            exit_losses=exit_losses.detach() if losses_wanted else None,
            exit_logits=tuple(map(logits_of, hidden)) if output_exits else None,
        )

    def _read_out(self, hidden_states: torch.Tensor, exit_idx: int) -> torch.Tensor:
        own = exit_idx < len(self.exit_heads)
        head = self.exit_heads[exit_idx] if own else self.lm_head
        return read_out(hidden_states, head, logit_ops(self.config.text_config))


def _load_host(backbone: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
    """The decoder to start from, loaded or given."""
    if isinstance(backbone, PreTrainedModel):
        if kwargs:
            raise TypeError(
                f"{sorted(kwargs)} cannot be applied to a model in memory; pass a name or a path."
            )
        host = backbone
    elif isinstance(backbone, (str, os.PathLike)):
        host = AutoModelForCausalLM.from_pretrained(backbone, **kwargs)
    else:
        raise TypeError(
            "`backbone` must be a name, a path or a causal language model, got "
            f"{type(backbone).__name__}."
        )
    if isinstance(host, FamilialPreTrainedModel):
        raise ValueError("`backbone` is a family already; load it with `from_pretrained`.")
    if host.get_output_embeddings() is None:
        raise refusal(host.config.model_type, f"{type(host).__name__} has no language-model head")
    return host


def _as_list(indices: Any) -> list[int]:
    """Indices of hidden states as the host takes them: none, one or several."""
    if indices is None or isinstance(indices, bool):
        return []
    return [indices] if isinstance(indices, int) else list(indices)


__all__ = ["FamilialForCausalLM", "FamilialModel", "FamilialPreTrainedModel"]

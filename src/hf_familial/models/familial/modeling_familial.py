"""A family of causal language models: one decoder of transformers with G exits."""

from .configuration_familial import Accelerator, FamilialConfig, check_transformers, extension


check_transformers()  # before the imports that an older one lacks

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.generation import GenerationMode
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .backbones import LogitTransform, balance_loss, balances, can_tie, host_class
from .losses import Distillation, ExitStates, multi_exit_loss, target_share
from .modeling_base import FamilialModel, FamilialPreTrainedModel, build_head, copy_module
from .relay import RelayOutput, check_arguments, check_healing, guided_at, relay_decode
from .relay_cache import RelayCache
from .relay_policies import FixedExit, RelayPolicy
from .segments import hide_unused
from .speculation import SpeculativeRelay


@dataclass
class FamilialCausalLMOutput(MoeCausalLMOutputWithPast):
    """Output of [`FamilialForCausalLM`]: the host's own fields, and those of every exit.

    `loss` is the weighted sum of `exit_losses`, in nats per token, plus the weighted `aux_loss` of
    a mixture of experts whose router logits are asked for.

    Args:
        exit_losses (`torch.FloatTensor` of shape `(G,)`, *optional*): Loss of every exit in nats
            per token, detached from the graph; of shape `(1,)` when `exit_idx` chose one.
        exit_logits (`tuple[torch.FloatTensor]`, *optional*): With `output_exits=True`: G tensors of
            shape `(batch, seq, vocab)`, shallowest first.
    """

    exit_losses: torch.Tensor | None = None
    exit_logits: tuple[torch.Tensor, ...] | None = None


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
        # a config that holds `exit_idx` as an entry of its own also takes that of the caller
        if getattr(config, "exit_idx", None) is not None:
            model_kwargs.setdefault("exit_idx", config.exit_idx)
        # without a cache, each step must run the whole text, whatever is asked for
        config.use_cache = config.use_cache and bool(self.model.spec.cache)
        exit_idx = self.config.resolve_exit(model_kwargs.get("exit_idx"))
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
                f"`{self.config.text_config.model_type}` has no cache of transformers' kinds, and "
                "without one a text cannot go on from `inputs_embeds`: give `input_ids`."
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        mode = generation_config.get_generation_mode()
        if isinstance(cache, DynamicCache) and (
            GenerationMode.ASSISTED_GENERATION in (mode, *args) or generation_config.is_assistant
        ):
            exit_idx = self.config.resolve_exit(model_kwargs.get("exit_idx"))
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
    view.__dict__.update(family.__dict__)
    view.__dict__["config"] = family.config.text_config
    view.__dict__["create_masks_for_generate"] = family.create_masks_for_generate
    return view


class FamilialForCausalLM(FamilialPreTrainedModel, FamilialGenerationMixin):
    """A family of causal language models on one backbone.

    Args:
        config ([`FamilialConfig`]): Backbone and exits.

    Raises:
        ValueError: If the backbone cannot be cut at a depth, or has no causal language model.

    Example:
        >>> from hf_familial import FamilialConfig, FamilialForCausalLM
        >>> sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        >>> config = FamilialConfig(text_config={"model_type": "llama", **sizes})
        >>> model = FamilialForCausalLM(config)
        >>> model(input_ids, exit_idx=0).logits  # runs one layer of four
    """

    # by which names code that was loaded with a checkpoint finds the relay policies
    policies: ClassVar[dict[str, type[RelayPolicy]]] = {
        "fixed": FixedExit,
        "speculative": SpeculativeRelay,
    }
    _accelerator: Accelerator | None = None
    _tied_weights_keys = {"lm_head.weight": "model.backbone.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight", "model.exits.*.layers.*": "free_full_weight"}

    def __init__(self, config: FamilialConfig) -> None:
        super().__init__(config)
        self.model = FamilialModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = build_head(config.text_config)
        self.exit_heads = self.build_exit_heads(keep=False)
        embedding = f"model.backbone.{self._embedding_name}.weight"
        self._tied_weights_keys = (
            {"lm_head.weight": embedding} if can_tie(config.text_config) else {}
        )
        if not self.model.spec.cache:
            self.generation_config.use_cache = False
        self.post_init()
        extension().check_backbone(self)

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
    ) -> "FamilialForCausalLM":
        r"""Turn a pretrained decoder into a family.

        The deepest exit is the decoder itself, bit for bit. Early exits start from copies: of the
        final norm, of the output head where it is their own, and, for private layers, of the
        backbone layers that follow the exit.

        Args:
            backbone (`str`, `os.PathLike` or `PreTrainedModel`): Name on the Hub, folder, or a
                causal LM in memory. A model in memory is taken over: the family shares its modules
                and config (pass a `copy.deepcopy` to keep the two apart).
            exits (`list[int]`, *optional*): Depth of every exit.
            num_exits (`int`, *optional*): Instead of `exits`: G exits, evenly spaced.
            num_exit_layers, exit_norm, exit_head, default_exit: See [`FamilialConfig`].
            **kwargs: Passed to `AutoModelForCausalLM.from_pretrained` (`dtype`, `revision`, ...).

        Returns:
            [`FamilialForCausalLM`]: In the mode (training or evaluation) of the decoder.

        Raises:
            ImportError: If the package is not installed.
            OSError: If there is no such checkpoint.
            TypeError: If `backbone` is neither a name nor a model, or `kwargs` come with a model.
            ValueError: If the exits are wrong or the decoder cannot be cut at a depth.

        Example:
            >>> model = FamilialForCausalLM.from_backbone("Qwen/Qwen3-0.6B", exits=[8, 16, 28])
        """
        return extension().warm_start(
            cls,
            backbone,
            kwargs,
            exits=exits,
            num_exits=num_exits,
            num_exit_layers=num_exit_layers,
            exit_norm=exit_norm,
            exit_head=exit_head,
            default_exit=default_exit,
        )

    def build_exit_heads(self, keep: bool) -> nn.ModuleList:
        """Build copies of `lm_head` for early exits that have their own; as in `build_exits`."""
        count = self.config.num_exits - 1 if self.config.exit_head == "own" else 0
        return nn.ModuleList(copy_module(self.lm_head, keep) for _ in range(count))

    @property
    def _embedding_name(self) -> str:
        embedding = self.get_input_embeddings()
        return next(n for n, m in self.model.backbone.named_modules() if m is embedding)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Resize the embedding and every head; arguments as in the host."""
        embedding = super().resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        size = embedding.weight.shape[0]
        head: Any
        for head in self.exit_heads:
            resized = self._get_resized_lm_head(head, size, mean_resizing=mean_resizing)
            # the module stays, with its hooks, and what was frozen stays frozen
            for name, parameter in resized.named_parameters():
                setattr(head, name, parameter.requires_grad_(getattr(head, name).requires_grad))
            head.out_features = resized.out_features
        return embedding

    def dequantize(self, dtype: torch.dtype | None = None) -> Any:
        """Dequantise as in the host; the backbone's config says so too."""
        model = super().dequantize(dtype)
        vars(self.config.text_config).pop("quantization_config", None)
        return model

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
        skip_logits: bool = False,
        exit_weights: Sequence[float] | None = None,
        distillation: Distillation | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FamilialCausalLMOutput:
        r"""Logits of one exit; with `labels`, the loss of all of them.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*): Token ids.
            attention_mask, position_ids, use_cache, logits_to_keep: As the host takes them.
            past_key_values (`Cache`, *optional*): The family's cache; updated up to the exit.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, seq, hidden)`, *optional*): Instead
                of `input_ids`.
            labels (`torch.LongTensor` of shape `(batch, seq)`, *optional*): Targets, -100 where
                there is none; shifted here unless `shift_labels` is given too.
            exit_idx (`int`, *optional*): Exit to stop at, with `labels` the only one that has a
                loss. Defaults to `config.default_exit`, with `labels` to the loss of all exits.
            output_exits (`bool`, *optional*, defaults to `False`): Return the logits of all exits.
            skip_logits (`bool`, *optional*, defaults to `False`): Return no logits: then the loss
                needs no more memory than a chunk of them, however many exits there are.
            exit_weights (`Sequence[float]` of length G, *optional*): Weight of each exit's loss;
                defaults to 1/G each.
            distillation ([`Distillation`], *optional*): What the deepest exit teaches the others.
            **kwargs: Passed to the backbone and to the loss: `num_items_in_batch`, `shift_labels`.

        Returns:
            [`FamilialCausalLMOutput`]: `loss` is the weighted sum of `exit_losses`.

        Raises:
            IndexError: If there is no exit `exit_idx`.
            ValueError: If `past_key_values` was filled to different depths, or `labels` do not have
                the shape of the positions.
        """
        every_exit = output_exits or (labels is not None and exit_idx is None)
        chosen = self.config.resolve_exit(exit_idx)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            exit_idx=chosen,
            output_exits=every_exit,
            **kwargs,
        )
        reached = outputs.exit_hidden_states if every_exit else (outputs.last_hidden_state,)
        first = 0 if every_exit else chosen
        hidden = {first + i: slice_logits_to_keep(h, logits_to_keep) for i, h in enumerate(reached)}
        wanted = hidden if output_exits else [] if skip_logits else [chosen]
        logits = {k: self._read_out(hidden[k], k) for k in wanted}
        loss: torch.Tensor | None = None
        exit_losses: torch.Tensor | None = None
        if labels is not None:
            loss, exit_losses = self._loss(
                hidden if exit_idx is None else [chosen],
                hidden,
                logits,
                labels,
                exit_weights=exit_weights,
                distillation=distillation,
                **kwargs,
            )
        aux_loss: torch.Tensor | None = None
        if balances(self.config.text_config, outputs.router_logits):
            aux_loss, weight = balance_loss(
                self.config.text_config, outputs.router_logits, attention_mask
            )
            if loss is not None and labels is not None:
                # a mean over accumulated batches, as the cross entropy is
                share = weight * target_share(labels, **kwargs)
                loss = loss + share.to(loss.device) * aux_loss.to(loss.device)
        return FamilialCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits.get(chosen),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            exit_losses=exit_losses,
            exit_logits=tuple(logits.values()) if output_exits else None,
        )

    def _loss(
        self,
        trained: Iterable[int],
        hidden: Mapping[int, torch.Tensor],
        logits: Mapping[int, torch.Tensor],
        labels: torch.Tensor,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss over the trained exits, and the loss of each."""

        def make_logits(k: int) -> torch.Tensor:
            return logits[k] if k in logits else self._read_out(hidden[k], k)

        states = {
            k: ExitStates(hidden[k], self.head(k), partial(make_logits, k), wanted=k in logits)
            for k in trained
        }
        transform = LogitTransform.of(self.config.text_config)
        return multi_exit_loss(states, transform, self.loss_function, labels, **kwargs)

    @property
    def accelerator(self) -> Accelerator:
        """[`Accelerator`]: What makes relays of this model faster; made when first asked for."""
        if self._accelerator is None:
            self._accelerator = extension().accelerator(self)
        return self._accelerator

    def __getstate__(self) -> dict[str, Any]:
        """Leave the accelerator out of copies and pickles: it belongs to these modules."""
        return self.__dict__ | {"_accelerator": None}

    def head(self, exit_idx: int) -> nn.Module:
        """Return the output head that an exit reads with: its own, or the shared `lm_head`."""
        exit_idx = self.config.resolve_exit(exit_idx)
        return self.exit_heads[exit_idx] if exit_idx < len(self.exit_heads) else self.lm_head

    def member_parameters(self, exit_idx: int) -> Iterator[nn.Parameter]:
        """Yield the parameters that one member needs, its head's too, each once."""
        parts = (self.model.member_view(exit_idx), self.head(exit_idx))
        return iter({p: None for part in parts for p in part.parameters()})

    def exit_module_names(self) -> list[str]:
        """Return the names of the modules that only early exits have.

        They are norms, private layers and own heads, as peft's `modules_to_save` takes them: it
        cannot take the lists that hold these modules.
        """
        names = []
        early: Any
        for k, early in enumerate(self.model.exits):
            names += [f"model.exits.{k}.layers.{j}" for j in range(len(early.layers))]
            names += [f"model.exits.{k}.norm"] if early.norm is not None else []
        return names + [f"exit_heads.{k}" for k in range(len(self.exit_heads))]

    def relay_generate(
        self,
        inputs: torch.Tensor | None = None,
        relay: RelayPolicy | None = None,
        streamer: Any = None,
        **kwargs: Any,
    ) -> RelayOutput | torch.Tensor:
        r"""Generate by relay: a shallow exit starts, deeper layers take over where they must.

        Exact: what a deeper exit reads is what it would read had it run from the start, and nothing
        is computed twice.

        Args:
            inputs (`torch.LongTensor` of shape `(batch, seq)`, *optional*): The prompt, padded on
                the left; or `input_ids` among `kwargs`.
            relay ([`RelayPolicy`], *optional*): When to go deeper; defaults
                to `SpeculativeRelay()`, which writes the text of the deepest exit.
            streamer (`BaseStreamer`, *optional*): As for `generate`.
            **kwargs: As for `generate`: `generation_config`, `logits_processor`,
                `stopping_criteria`, `max_new_tokens`, `return_dict_in_generate`, ...

        Returns:
            [`RelayOutput`] or `torch.LongTensor` of shape `(batch, seq + new)`: As `generate`
            returns, with `relay_stats`.

        Raises:
            ValueError: If the host cannot go on from a tap, or the way of decoding asked for cannot
                be relayed.
            IndexError: If the relay asks for an exit that is not there.

        Example:
            >>> model.relay_generate(**inputs, relay=hff.SpeculativeRelay(draft_exit=0))
        """
        # before `generate` turns to its continuous batching
        check_arguments({"cache_implementation": kwargs.get("cache_implementation")})
        return self.generate(
            inputs, custom_generate=relay_decode, relay=relay, streamer=streamer, **kwargs
        )

    @torch.no_grad()
    def prepare_drafts(self) -> None:
        """Do now what the first `relay_generate` would do before its first token.

        Fused passes are compared with the host's own passes once, which takes as long as some
        tokens. A server calls `model.eval().prepare_drafts()` before it listens.
        """
        if self.training:
            raise ValueError("`prepare_drafts` needs a model that is not training: call `eval()`.")
        RelayCache(self, range(self.config.num_exits), fused_weights=None)

    def _read_out(self, hidden_states: torch.Tensor, exit_idx: int) -> torch.Tensor:
        return LogitTransform.of(self.config.text_config).read(hidden_states, self.head(exit_idx))

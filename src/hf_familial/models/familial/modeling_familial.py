"""A family of causal language models: one decoder of transformers with G exits."""

from .configuration_familial import Accelerator, FamilialConfig, check_transformers, extension


check_transformers()  # before the imports that an older one lacks

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .backbones import LogitTransform, balance_loss, can_tie
from .generation_familial import FamilialGenerationMixin
from .losses import Distillation, ExitStates, multi_exit_loss, target_share
from .modeling_base import FamilialModel, FamilialPreTrainedModel, build_head, copy_module
from .relay import RelayOutput, check_arguments, relay_decode
from .relay_cache import RelayCache
from .relay_policies import FixedExit, RelayPolicy, SpeculativeRelay


@dataclass
class FamilialCausalLMOutput(MoeCausalLMOutputWithPast):
    """Output of [`FamilialForCausalLM`]: the host's own fields, and those of every exit.

    `loss` is the weighted sum of `exit_losses`, in nats per token, plus the weighted `aux_loss` of
    a mixture of experts whose router logits are asked for. `exit_losses` are of shape `(G,)`, or
    `(1,)` when `exit_idx` chose one, without a graph. With `output_exits=True`, `exit_logits` are G
    tensors of shape `(batch, seq, vocab)`, shallowest first.
    """

    exit_losses: torch.Tensor | None = None
    exit_logits: tuple[torch.Tensor, ...] | None = None


class FamilialForCausalLM(FamilialPreTrainedModel, FamilialGenerationMixin):
    """A family of causal language models on one backbone, both as a [`FamilialConfig`] says.

    Raises:
        ValueError: If the backbone cannot be cut at a depth, or has no causal language model.

    Example:
        >>> config = FamilialConfig(text_config={"model_type": "llama", "num_hidden_layers": 4})
        >>> FamilialForCausalLM(config)(input_ids, exit_idx=0).logits  # runs one layer of four
    """

    # by which names code that was loaded with a checkpoint finds the relay policies
    policies: ClassVar[dict[str, Any]] = {"fixed": FixedExit, "speculative": SpeculativeRelay}
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
        embedding = self.get_input_embeddings()
        name = next(n for n, m in self.named_modules() if m is embedding)
        tied = {"lm_head.weight": f"{name}.weight"}
        self._tied_weights_keys = tied if can_tie(config.text_config) else {}
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

        The deepest exit is the decoder itself, bit for bit and in its mode. Early exits start from
        copies of the final norm, of the head, and, for private layers, of the layers that follow.

        Args:
            backbone (`str`, `os.PathLike` or `PreTrainedModel`): Name on the Hub, folder, or a
                causal LM in memory, whose modules and config the family then shares.
            num_exits (`int`, *optional*): Instead of `exits`: G exits, evenly spaced.
            exits, num_exit_layers, exit_norm, exit_head, default_exit: See [`FamilialConfig`].
            **kwargs: Passed to `AutoModelForCausalLM.from_pretrained` (`dtype`, `revision`, ...).

        Raises:
            ImportError: If the package is not installed.
            ValueError: If the exits are wrong or the decoder cannot be cut at a depth.

        Example:
            >>> model = FamilialForCausalLM.from_backbone("Qwen/Qwen3-0.6B", exits=[8, 16, 28])
        """
        fields = {"num_exit_layers": num_exit_layers, "exit_norm": exit_norm}
        fields |= {"exit_head": exit_head, "default_exit": default_exit}
        fields |= {"exits": exits, "num_exits": num_exits}
        return extension().warm_start(cls, backbone, kwargs, **fields)

    def build_exit_heads(self, keep: bool) -> nn.ModuleList:
        """Build copies of `lm_head` for early exits that have their own; as in `build_exits`."""
        count = self.config.num_exits - 1 if self.config.exit_head == "own" else 0
        return nn.ModuleList(copy_module(self.lm_head, keep) for _ in range(count))

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
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds: As the host
                takes them. The cache is updated up to the exit.
            use_cache, logits_to_keep: As the host takes them.
            labels (`torch.LongTensor` of shape `(batch, seq)`, *optional*): Targets, -100 where
                there is none; shifted here unless `shift_labels` is given too.
            exit_idx (`int`, *optional*): Exit to stop at, with `labels` the only one that has a
                loss. Defaults to `config.default_exit`, with `labels` to the loss of all exits.
            output_exits (`bool`, *optional*, defaults to `False`): Return the logits (of
                [`FamilialModel`], the hidden states) of all exits.
            skip_logits (`bool`, *optional*, defaults to `False`): Return no logits, to save memory.
            exit_weights (`Sequence[float]` of length G, *optional*): Weight of each exit's loss;
                defaults to 1/G each.
            distillation ([`Distillation`], *optional*): What the deepest exit teaches the others.
            **kwargs: Passed to the backbone and to the loss: `num_items_in_batch`, `shift_labels`.

        Raises:
            IndexError: If there is no exit `exit_idx`.
            ValueError: If `past_key_values` was filled to different depths, or `labels` have
                another shape than the positions.
        """
        chosen = self.model.resolve_exit(exit_idx)
        one_loss = exit_idx is not None or self.model.active_exit is not None
        every_exit = output_exits or (labels is not None and not one_loss)
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
        first = 0 if every_exit else chosen
        hidden = {first + i: slice_logits_to_keep(h, logits_to_keep) for i, h in enumerate(reached)}
        wanted = hidden if output_exits else [] if skip_logits else [chosen]
        transform = LogitTransform.of(self.config.text_config)
        logits = {k: transform.read(hidden[k], self.head(k)) for k in wanted}
        loss: Any = None
        exit_losses: Any = None
        if labels is not None:
            trained = [chosen] if one_loss else hidden
            states = {k: ExitStates(hidden[k], self.head(k), logits.get(k)) for k in trained}
            loss, exit_losses = multi_exit_loss(
                states, transform, self.loss_function, labels, exit_weights, distillation, **kwargs
            )
        routers, text_config = outputs.router_logits, self.config.text_config
        aux_loss, weight = balance_loss(text_config, routers, attention_mask)
        if aux_loss is not None and labels is not None:
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

    @property
    def accelerator(self) -> Accelerator:
        """[`Accelerator`]: Makes relays of this model faster; built when first asked for."""
        if self._accelerator is None:
            self._accelerator = extension().accelerator(self)
        return self._accelerator

    def __getstate__(self) -> dict[str, Any]:
        """Leave the accelerator out of copies and pickles: it belongs to these modules."""
        return self.__dict__ | {"_accelerator": None}

    def get_output_embeddings(self) -> nn.Module:
        """Return `lm_head`, or the active exit's head while a multi-exit loss is computed."""
        return (
            self.lm_head if self.model.active_exit is None else self.head(self.model.resolve_exit())
        )

    def head(self, exit_idx: int) -> nn.Module:
        """Return the output head of an exit: its own, or the shared `lm_head`."""
        exit_idx = self.config.resolve_exit(exit_idx)
        return self.exit_heads[exit_idx] if exit_idx < len(self.exit_heads) else self.lm_head

    def member_parameters(self, exit_idx: int) -> Iterator[nn.Parameter]:
        """Yield the parameters that one member needs, its head's too, each once."""
        parts = (self.model.member_view(exit_idx), self.head(exit_idx))
        return iter({p: None for part in parts for p in part.parameters()})

    def exit_module_names(self) -> list[str]:
        """Return the names of the modules that only early exits have, for peft's options."""
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

        A deeper exit reads what it would read had it run from the start; nothing is computed twice.

        Args:
            inputs (`torch.LongTensor` of shape `(batch, seq)`, *optional*): The prompt, padded on
                the left; or `input_ids` among `kwargs`.
            relay, streamer: As for [`relay_decode`].
            **kwargs: As for `generate`.

        Returns:
            [`RelayOutput`] or `torch.LongTensor` of shape `(batch, seq + new)`: As of `generate`.

        Raises:
            ValueError: If the host, the cache or the way of decoding cannot be relayed.
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
        """Do now, before a server listens, what the first `relay_generate` would do once."""
        if self.training:
            raise ValueError("`prepare_drafts` needs a model that is not training: call `eval()`.")
        RelayCache(self, range(self.config.num_exits), fused_weights=None)

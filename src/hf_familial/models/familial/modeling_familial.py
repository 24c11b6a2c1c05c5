"""The family with heads: training loss, `generate` at any exit, and relay."""

from .configuration_familial import Accelerator, FamilialConfig, check_transformers, extension


check_transformers()  # before imports that fail with an older version

import os
from collections.abc import Sequence
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
    """The output of [`FamilialForCausalLM`]. It extends Transformers' output of a causal LM.

    Attributes:
        loss (`torch.Tensor`): Weighted sum of the exit losses in nats per token, if `labels` were
            passed. With `output_router_logits=True`, a mixture of experts adds its `aux_loss`.
        logits (`torch.Tensor` of shape `(batch, seq, vocab)`): Logits of the exit that ran.
        exit_losses (`torch.Tensor` of shape `(G,)`): Cross entropy of each exit in nats per token,
            without gradients. The shape is `(1,)` if `exit_idx` was passed.
        exit_logits (`tuple[torch.Tensor, ...]`): Logits of all exits, shallowest first, if
            `output_exits=True`.
    """

    exit_losses: torch.Tensor | None = None
    exit_logits: tuple[torch.Tensor, ...] | None = None


class FamilialForCausalLM(FamilialPreTrainedModel, FamilialGenerationMixin):
    """A causal LM with several exits. Every exit is a language model of its own, called a member.

    `generate` works as in Transformers. With `exit_idx=k` it runs only the layers of member k. For
    LoRA, pass `target_modules=hf_familial.training.lora_targets(model)` to `LoraConfig`. The exits
    stay frozen unless you also pass `modules_to_save=model.exit_module_names()`.

    Args:
        config ([`FamilialConfig`]): Describes the backbone and the exits. The weights are random.
            Call `from_backbone` to start from a pretrained model.

    Example:
        >>> from hf_familial.toy import toy_family
        >>> model, tokenizer = toy_family(exits=[1, 2, 4])
        >>> inputs = tokenizer("import os", return_tensors="pt")
        >>> model.generate(**inputs, exit_idx=0, max_new_tokens=20)  # runs 1 of the 4 layers
    """

    # code that was loaded with a checkpoint finds its own relay policies here
    policies: ClassVar[dict[str, Any]] = {"fixed": FixedExit, "speculative": SpeculativeRelay}
    _accelerator: Accelerator | None = None
    _tied_weights_keys = {"lm_head.weight": "model.backbone.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight", "model.exits.*.layers.*": "free_full_weight"}

    def __init__(self, config: FamilialConfig) -> None:
        super().__init__(config)
        with extension().construction(self):
            self.model = FamilialModel(config)
            self.vocab_size = config.vocab_size
            self.lm_head = build_head(config.text_config)
            self.exit_heads = self.build_exit_heads(keep=False)
            name = next(n for n, m in self.named_modules() if m is self.get_input_embeddings())
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
        r"""Turn a pretrained model into a family.

        The deepest exit computes exactly what the pretrained model computes. Early exits start with
        copies of its final norm and head, so their text is poor until you train them.

        Args:
            backbone (`str`, `os.PathLike` or `PreTrainedModel`): Name on the Hub, a folder, or a
                loaded causal LM. A loaded model shares its weights and its config with the family.
            exits (`list[int]`, *optional*): Depths of the exits, the last one being the full depth.
            num_exits (`int`, *optional*): Number of evenly spaced exits. Use it instead of `exits`.
            num_exit_layers, exit_norm, exit_head, default_exit: See [`FamilialConfig`]. Private
                layers start as copies of the backbone layers above the exit.
            **kwargs: Arguments for `AutoModelForCausalLM.from_pretrained`, such as `dtype`.

        Raises:
            ImportError: If the package `hf_familial` is not installed.
            ValueError: If `exits` do not fit, or layers of this model type cannot run in parts.

        Example:
            >>> model = FamilialForCausalLM.from_backbone("Qwen/Qwen3-0.6B", exits=[8, 16, 28])
        """
        fields = {"num_exit_layers": num_exit_layers, "exit_norm": exit_norm}
        fields |= {"exit_head": exit_head, "default_exit": default_exit}
        fields |= {"exits": exits, "num_exits": num_exits}
        return extension().warm_start(cls, backbone, kwargs, **fields)

    def build_exit_heads(self, keep: bool) -> nn.ModuleList:
        """Build the early exits' own heads, if any. `keep` is as in `build_exits`."""
        count = self.config.num_exits - 1 if self.config.exit_head == "own" else 0
        return nn.ModuleList(copy_module(self.lm_head, keep) for _ in range(count))

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Resize the embedding and every head. The arguments are those of Transformers."""
        embedding = super().resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        size = embedding.weight.shape[0]
        head: Any
        for head in self.exit_heads:
            resized = self._get_resized_lm_head(head, size, mean_resizing=mean_resizing)
            # keep the module with its hooks, and keep frozen parameters frozen
            for name, parameter in resized.named_parameters():
                setattr(head, name, parameter.requires_grad_(getattr(head, name).requires_grad))
            head.out_features = resized.out_features
        return embedding

    def dequantize(self, dtype: torch.dtype | None = None) -> Any:
        """Dequantise the weights, as in Transformers. Update the backbone's config too."""
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
        r"""Return the logits of one exit. With `labels`, also return the loss of all exits.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, use_cache, logits_to_keep: As
                in every causal LM of Transformers.
            past_key_values (`Cache`, *optional*): KV cache. Use a cache of its own for each exit.
            labels (`torch.LongTensor` of shape `(batch, seq)`, *optional*): Target tokens, -100 to
                ignore a position. The loss shifts them, so usually `labels=input_ids`.
            exit_idx (`int`, *optional*): Exit to run to. Defaults to `config.default_exit`. With
                `labels`, only this exit has a loss. Without `exit_idx`, all exits have one.
            output_exits (`bool`, *optional*, defaults to `False`): Whether to return the logits
                (in [`FamilialModel`], the normed hidden states) of all exits.
            skip_logits (`bool`, *optional*, defaults to `False`): Whether to return `logits=None`,
                which saves memory in training.
            exit_weights (`Sequence[float]` of length G, *optional*): Weight of each exit's loss.
                Defaults to 1/G each.
            distillation ([`Distillation`], *optional*): Adds self-distillation to the loss.
            **kwargs: Arguments for the backbone, and `num_items_in_batch` and `shift_labels`.

        Raises:
            IndexError: If the family has no exit `exit_idx`.
            ValueError: If a shallower exit ran on `past_key_values`, or `labels` have a wrong
                shape.

        Example:
            >>> output = model(**inputs, labels=inputs["input_ids"])
            >>> output.exit_losses  # shape (G,), in nats per token
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
        routers = outputs.router_logits
        aux_loss, weight = balance_loss(self.config.text_config, routers, attention_mask)
        if aux_loss is not None and labels is not None:
            # average over accumulated batches, like the cross entropy
            share = weight * target_share(labels, **kwargs)
            loss = loss + share.to(loss.device) * aux_loss.to(loss.device)
        kept = ("past_key_values", "hidden_states", "attentions", "router_logits")
        return FamilialCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits.get(chosen),
            exit_losses=exit_losses,
            exit_logits=tuple(logits.values()) if output_exits else None,
            **{name: outputs.get(name) for name in kept},
        )

    @property
    def accelerator(self) -> Accelerator:
        """[`Accelerator`]: The parts that make relays of this model faster, built on first use."""
        if self._accelerator is None:
            self._accelerator = extension().accelerator(self)
        return self._accelerator

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, which need an accelerator of their own."""
        return self.__dict__ | {"_accelerator": None}

    def get_output_embeddings(self) -> nn.Module:
        """Return `lm_head`, or the active exit's head while a multi-exit loss is computed."""
        active = self.model.active_exit
        return self.lm_head if active is None else active.head(self)

    def head(self, exit_idx: int) -> nn.Module:
        """Return the head of an exit, which is the shared `lm_head` or its own."""
        exit_idx = self.config.resolve_exit(exit_idx)
        return self.exit_heads[exit_idx] if exit_idx < len(self.exit_heads) else self.lm_head

    def exit_module_names(self) -> list[str]:
        """Return the names of the modules of early exits, for `modules_to_save` of peft."""
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
        r"""Generate text by relay: a shallow exit starts, and deeper layers continue.

        By default a shallow exit drafts tokens, and the deeper layers verify them. Greedy text is
        then the same as that of `generate`, and is ready sooner if the drafts are often right.

        Args:
            inputs (`torch.LongTensor` of shape `(batch, seq)`, *optional*): Token ids of the
                prompt. Pad on the left. You can also pass them as `input_ids=...`.
            relay ([`RelayPolicy`], *optional*): Decides when deeper layers run. Defaults to
                [`SpeculativeRelay`], in which exit 0 drafts.
            streamer (`BaseStreamer`, *optional*): Receives each token as soon as it is final.
            **kwargs: Arguments of `generate` (such as `max_new_tokens`) and of [`relay_decode`].

        Returns:
            [`RelayOutput`] or `torch.LongTensor` of shape `(batch, seq + new)`: The token ids, or
            with `return_dict_in_generate=True` a [`RelayOutput`] that contains them.

        Raises:
            ValueError: If the model type, the cache or an argument of `generate` does not work in
                a relay. The message suggests an alternative.
            IndexError: If `relay` names an exit that the family does not have.

        Example:
            >>> relay = SpeculativeRelay(draft_exit=0)
            >>> model.relay_generate(**inputs, relay=relay, max_new_tokens=20)
        """
        # check before `generate`, which would switch to continuous batching
        check_arguments({"cache_implementation": kwargs.get("cache_implementation")})
        return self.generate(
            inputs, custom_generate=relay_decode, relay=relay, streamer=streamer, **kwargs
        )

    @torch.no_grad()
    def prepare_drafts(self) -> None:
        """Build the fused passes now, so that the first `relay_generate` is as fast as others."""
        if self.training:
            raise ValueError("`prepare_drafts` needs evaluation mode. Call `model.eval()` first.")
        RelayCache(self, range(self.config.num_exits), fused_weights=None)

"""The family without heads: a backbone that can stop at any of its exits."""

from .configuration_familial import PACKAGE, FamilialConfig, check_transformers, extension


check_transformers()  # before imports that fail with an older version

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import resolve_hidden_states_indices

from .backbones import TRAITS, find_backbone_spec, host_class, unsupported_backbone
from .segments import HostDecoder, Members, is_recurrent


logger = logging.get_logger(__name__)
ONE_EXIT = (
    "This family trains exit %d only. To train every exit, use the trainer class that "
    f"`{PACKAGE}.multi_exit(YourTrainer)` returns. To train one exit, pass `exit_idx`."
)
SHOWN = ("output_hidden_states", "output_attentions", "output_router_logits")


@dataclass
class FamilialModelOutput(MoeModelOutputWithPast):
    """The output of [`FamilialModel`]. It extends Transformers' output of a decoder.

    Attributes:
        exit_hidden_states (`tuple[torch.Tensor, ...]`): With `output_exits=True`, the normed hidden
            states `(batch, seq, hidden)` of all exits, shallowest first.
    """

    exit_hidden_states: tuple[torch.Tensor, ...] | None = None


class Exit(nn.Module):
    """The private layers of one early exit and its norm. A shared norm is `None`."""

    def __init__(self, norm: nn.Module | None, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm


def copy_module(module: nn.Module, keep: bool) -> nn.Module:
    """Return a deep copy of a module. With `keep=False`, `post_init` draws new weights for it."""
    # share the config, because later changes of the model's config must reach the copies too
    configs = [part.config for part in module.modules() if hasattr(part, "config")]
    copied = copy.deepcopy(module, {id(config): config for config in configs})
    if not keep:
        for part in copied.modules():
            part.__dict__.pop("_is_hf_initialized", None)
    return copied


def _private_layer(layers: nn.ModuleList, index: int, keep: bool) -> nn.Module:
    """Return a copy of the decoder layer at `index`, or of the last layer beyond the end."""
    source = min(index, len(layers) - 1)
    layer: Any = copy_module(layers[source], keep)
    for part in layer.modules():
        if getattr(part, "layer_idx", None) == source:
            part.layer_idx = index
    return layer


def build_head(text_config: Any) -> nn.Linear:
    """Build the head of the backbone's causal LM. Raise unless it is one linear map."""
    # only an instance shows its head's shape, and on the meta device it uses no memory
    with torch.device("meta"):
        try:
            host = AutoModelForCausalLM.from_config(copy.deepcopy(text_config))
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            reason = "it has no causal language model"
            raise unsupported_backbone(text_config.model_type, reason) from None
    head = host.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        reason = f"its output head is {type(head).__name__}, not a Linear"
        raise unsupported_backbone(text_config.model_type, reason)
    return nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)


class FamilialPreTrainedModel(PreTrainedModel):
    """The base class of the familial models. It loads and saves checkpoints."""

    config: FamilialConfig
    config_class = FamilialConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: FamilialConfig) -> None:
        host = host_class(getattr(config, "text_config", None))
        # set these first, because `PreTrainedModel.__init__` reads some of them
        self.__dict__.update({name: getattr(host, name) for name in TRAITS if hasattr(host, name)})
        super().__init__(config)
        # FSDP2 changes the class, and saving finds the code of a checkpoint by its module
        self.__module__ = type(self).__module__

    def _init_weights(self, module: nn.Module) -> None:
        self.base_model.backbone._init_weights(module)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        max_exit: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a family. `max_exit` is added to the arguments of Transformers.

        Args:
            max_exit (`int`, *optional*): Index of the deepest exit to load. Tensors and files of
                deeper exits are neither read nor downloaded. This needs the package `hf_familial`.

        Raises:
            IndexError: If the family has no exit `max_exit`.
            ValueError: If the family cannot be cut at `max_exit`.

        Example:
            >>> small = FamilialForCausalLM.from_pretrained("family", max_exit=0)
        """
        load = super().from_pretrained
        if max_exit is None:
            return load(pretrained_model_name_or_path, *model_args, **kwargs)
        name = pretrained_model_name_or_path
        return extension().load_cut(load, name, max_exit, *model_args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        by_segment: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the family. `by_segment` is added to the arguments of Transformers.

        With the package `hf_familial`, an older checkpoint in the folder stays usable until the new
        one is complete.

        Args:
            by_segment (`bool`, *optional*): Whether to write each segment into files of its own, so
                that a shallow member loads without the others. Defaults to `True` from 100 MB of
                weights on. This needs the package. Adapters, variants, distributed checkpoints and
                quantised models are never split.
        """
        save = super().save_pretrained
        extension().save(save, self, save_directory, *args, by_segment=by_segment, **kwargs)

    def freeze_weights(self, frozen: bool = True) -> None:
        """Declare that the weights will not change. Relays and hand-offs then skip checks of them.

        `freeze_weights(False)` and `train()` end this. It does not affect `requires_grad`.
        """
        if frozen and self.training:
            raise ValueError("`freeze_weights` needs evaluation mode. Call `model.eval()` first.")
        self.base_model.frozen = frozen

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return `False`, because all modules and buffers are those of Transformers."""
        return False


class FamilialModel(FamilialPreTrainedModel):
    """A backbone with early exits and without heads. `AutoModel` loads it."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"^exit_heads\."]
    active_exit: Any = None  # runs calls without `exit_idx` while a multi-exit loss is computed

    def __init__(self, config: FamilialConfig) -> None:
        super().__init__(config)
        config.check()  # a field may have changed since the config was created
        # pass the default dtype, not that of `text_config`, because heads and exits have it too
        dtype = torch.get_default_dtype()
        with extension().construction(self):
            self.backbone = AutoModel.from_config(config.text_config, dtype=dtype)
            self.spec = find_backbone_spec(self.backbone)
            self.frozen = False
            if config.num_exit_layers and self.spec.host.whole:
                reason = f"`num_exit_layers` must be 0, got {config.num_exit_layers}, because "
                kind = config.text_config.model_type
                raise unsupported_backbone(kind, reason + self.spec.host.whole)
            self.exits = self.build_exits(keep=False)
            self.gradient_checkpointing = False
            self.post_init()

    def build_exits(self, keep: bool) -> nn.ModuleList:
        """Build the early exits. With `keep=False`, `post_init` draws new weights for them."""
        config, decoder = self.config, self.decoder
        exits = nn.ModuleList()
        for depth in config.exits[:-1]:
            private = range(depth, depth + config.num_exit_layers)
            layers = [_private_layer(decoder.layers, index, keep) for index in private]
            norm = copy_module(decoder.norm, keep) if config.exit_norm == "own" else None
            exits.append(Exit(norm, layers))
        return exits

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.num_exit_layers:
            # some backbones initialise layers only as part of a model, and a view is such a model
            for exit_idx in range(len(self.exits)):
                private = self.members.private_segment(exit_idx)
                self.backbone._init_weights(self.decoder.view(private))

    def train(self, mode: bool = True) -> "FamilialModel":
        """Set the mode, as in torch. Training ends `freeze_weights`."""
        self.frozen = self.frozen and not mode
        return super().train(mode)

    def get_input_embeddings(self) -> nn.Module:
        """Return the backbone's token embedding."""
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> FamilialModelOutput:
        r"""Run to one exit. The arguments are those of [`FamilialForCausalLM.forward`]."""
        entry = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        if exit_idx is None and not output_exits:
            if self.active_exit is not None:
                given = {"past_key_values": past_key_values, "use_cache": use_cache}
                return self.active_exit.run(self, entry | inputs | given)
            if self.training and torch.is_grad_enabled() and self.config.num_exits > 1:
                logger.warning_once(ONE_EXIT, self.config.resolve_exit())
        exit_idx = self.config.resolve_exit(exit_idx)
        reached = range(self.config.num_exits) if output_exits else (exit_idx,)
        past_key_values, use_cache = self._cache_for(reached, past_key_values, use_cache)
        inputs |= {"past_key_values": past_key_values, "use_cache": use_cache}
        inputs |= {name: self._requested(name, kwargs.get(name)) for name in SHOWN}
        if past_key_values is not None and is_recurrent(past_key_values):
            # these backbones mask padding in the prompt only
            states = past_key_values.layers[0].has_previous_state
            inputs["attention_mask"] = None if any(states.values()) else attention_mask
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

    def _cache_for(
        self, exits: Iterable[int], cache: Cache | None, use_cache: bool | None
    ) -> tuple[Cache | None, bool | None]:
        if not self.spec.cache:
            if cache is not None:
                raise ValueError(
                    f"`{self.backbone.config.model_type}` cannot use `past_key_values`, got a "
                    f"{type(cache).__name__}. Pass `use_cache=False`."
                )
            return None, False
        if use_cache and cache is None:
            cache = DynamicCache(config=self.backbone.config)
        if cache is not None and not isinstance(getattr(cache, "layers", None), list):
            raise ValueError(
                "`past_key_values` must be a `DynamicCache` or a `StaticCache` of Transformers, "
                f"got a {type(cache).__name__}."
            )
        if cache is not None:
            self.members.grow(cache, exits)
        return cache, use_cache

    def _run_member(self, exit_idx: int, inputs: dict[str, Any]) -> Any:
        """Run the layers below an exit, its private layers and its norm in one pass."""
        cache = inputs["past_key_values"]
        deepest = exit_idx == self.config.num_exits - 1
        # the whole backbone must not see the slots of private layers in a cache
        if deepest and (cache is None or len(cache.layers) <= self.config.num_hidden_layers):
            return self.decoder.run_whole(**inputs)
        segment = self.members.member_segment(exit_idx)
        if len(segment.layers) > self.config.exits[exit_idx]:
            self.decoder.hook_private(self.members.private_segment(exit_idx), inputs)
        return self.decoder.run(segment, **inputs)

    def _run_exits(
        self, entry: dict[str, Any], inputs: dict[str, Any]
    ) -> tuple[Any, tuple[torch.Tensor, ...]]:
        depths, requested = self.config.exits[:-1], inputs["output_hidden_states"]
        position_ids = self._positions(entry, inputs)
        indices = [depth + self.spec.host.tap_shift for depth in depths]
        asked = [] if requested is None or isinstance(requested, bool) else requested
        asked = [asked] if isinstance(asked, int) else list(asked)
        taps = requested if requested is True else [*indices, *asked]
        outputs = self._run_member(
            self.config.num_exits - 1, entry | inputs | {"output_hidden_states": taps or None}
        )
        hidden_states = outputs.get("hidden_states") or ()
        inputs = inputs | {"position_ids": position_ids}
        readings = [
            self._read_tap(k, hidden_states[index], inputs, outputs)
            for k, index in enumerate(indices)
        ]
        if requested is not True:
            wanted = resolve_hidden_states_indices(self.backbone, asked, len(hidden_states))
            kept = tuple(h if i in wanted else None for i, h in enumerate(hidden_states))
            outputs["hidden_states"] = kept if requested else None
        return outputs, (*readings, outputs.last_hidden_state)

    def _read_tap(
        self, exit_idx: int, tap: torch.Tensor, inputs: dict[str, Any], whole: Any
    ) -> torch.Tensor:
        """Compute the normed states of an early exit from its tap, both `(batch, seq, hidden)`."""
        if not self.config.num_exit_layers:
            return self.members.norm(exit_idx)(tap)
        segment = self.members.private_segment(exit_idx)
        inputs = inputs | dict.fromkeys(SHOWN[:2]) | {"inputs_embeds": tap}
        self.decoder.hook_private(segment, inputs)
        outputs = self.decoder.run(segment, **inputs)
        name = "router_logits"
        if inputs["output_router_logits"]:  # the balance loss covers private routers too
            whole[name] = (*(whole.get(name) or ()), *(outputs.get(name) or ()))
        return outputs.last_hidden_state

    def _positions(self, entry: dict[str, Any], inputs: dict[str, Any]) -> torch.Tensor | None:
        """Return position ids for private layers, which cannot infer them from the cache."""
        if inputs["position_ids"] is not None or not self.config.num_exit_layers:
            return inputs["position_ids"]
        shape_of = entry["inputs_embeds"] if entry["input_ids"] is None else entry["input_ids"]
        if shape_of is None:
            return None  # the backbone raises its own error
        cache = inputs["past_key_values"]
        past = 0 if cache is None or is_recurrent(cache) else cache.get_seq_length()
        return (torch.arange(shape_of.shape[1], device=shape_of.device) + past).unsqueeze(0)

    def _requested(self, flag: str, given: Any) -> Any:
        configs = (self.config, self.backbone.config)
        return given if given is not None else any(getattr(c, flag, None) for c in configs) or None

    def resolve_exit(self, exit_idx: int | None = None) -> int:
        """Return the index of the exit that a call runs: the named, active or default exit."""
        active = self.active_exit if exit_idx is None else None
        return self.config.resolve_exit(active.exit_idx if active else exit_idx)

    @property
    def decoder(self) -> HostDecoder:
        """[`HostDecoder`]: The backbone, wrapped to run segments of its layers."""
        return HostDecoder(self.backbone, self.spec)

    @property
    def members(self) -> Members:
        """[`Members`]: The segments of each member."""
        return Members(self.config, self.decoder, self.exits)

    def member_view(self, exit_idx: int) -> PreTrainedModel:
        """Return one member as a view, a backbone with fewer layers that shares the weights."""
        return self.decoder.view(self.members.member_segment(self.config.resolve_exit(exit_idx)))

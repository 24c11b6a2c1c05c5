"""Host decoders: where they keep their parts, how they differ, which cannot be cut.

One generic rule finds the parts. A host type that differs has a row in `HOSTS`.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedModel


# Names that hosts give to the list of layers and to the final norm, most common first.
LAYERS = ("layers", "h", "blocks", "block")
NORMS = tuple(
    "norm final_layernorm final_layer_norm ln_f embedding_norm norm_f final_norm layer_norm "
    "ln_out".split()
)

# What a forward does once, before the first layer, and a later segment must not do again: modules
# to replace by an identity or by zeros, numbers to make neutral, switches to turn off.
IDENTITY, ZERO, ONE, OFF = "identity", "zero", "one", "off"
ENTRY_ONLY: Mapping[str, str] = {
    "wpe": ZERO,
    "embed_positions": ZERO,
    "drop": IDENTITY,
    "emb_dropout": IDENTITY,
    "embed_dropout": IDENTITY,
    "embedding_dropout": IDENTITY,
    "word_embeddings_layernorm": IDENTITY,
    "embedding_multiplier": ONE,
    "mup_enabled": OFF,
}

# What the host's class says of itself and transformers asks of the family. The rest comes from the
# backbone, which is a module of the family (`post_init`), or is the family's own.
TRAITS = tuple(
    "_is_stateful _supported_generation_modes _can_compile_fullgraph "
    "_compatible_flash_implementations _supports_attention_backend _supports_context_parallel "
    "_supports_flash_attn _supports_flex_attn _supports_sdpa supports_gradient_checkpointing "
    "is_backend_compatible _can_set_attn_implementation _can_set_experts_implementation".split()
)


@dataclass(frozen=True)
class HostRow:
    """How one host type differs from the generic rule.

    Attributes:
        owner (`str`): Dotted path, inside the backbone, of the module that owns the layers.
        norm (`str`): Name of the final norm, when the generic rule would find another module.
        normed (`bool`): Whether there is a final norm at all.
        entry_norm (`bool`): Whether the final norm is also applied to the embedding.
        entry_only (`Mapping[str, str]`): What else acts once, before the first layer.
        logits (`Mapping[str, str]`): For fields of [`LogitTransform`], the fields of the host's
            config that hold the numbers.
        tap_shift (`int`): Index of the tap after `depth` layers in `hidden_states`, minus `depth`.
        keep_depth (`bool`): Whether the forward needs the config's full depth to split its inputs.
        cached (`bool`): Whether its cache is one that transformers' `generate` makes.
        own_mask (`bool`): Whether `generate` must make the mask for a static cache as the host's
            causal LM says; elsewhere the backbone makes it.
        whole (`str`): Why a segment cannot go on from a tap alone; empty if it can. Members work.
    """

    owner: str = ""
    norm: str = ""
    normed: bool = True
    entry_norm: bool = False
    entry_only: Mapping[str, str] = field(default_factory=dict)
    logits: Mapping[str, str] = field(default_factory=dict)
    tap_shift: int = 0
    keep_depth: bool = False
    cached: bool = True
    own_mask: bool = False
    whole: str = ""


_SOFTCAP = {"softcap": "final_logit_softcapping"}
_SOFTCAPPED = HostRow(logits=_SOFTCAP)
_MULTIPLIED = HostRow(logits={"multiplier": "logit_scale"})
_DIVIDED = HostRow(logits={"divisor": "logits_scaling"})
_PER_LAYER = "every layer reads an embedding of its own of the token ids"
_LAYERWISE = HostRow(logits=_SOFTCAP, keep_depth=True, whole=_PER_LAYER)
_RECURRENT = HostRow(tap_shift=-1)
_REUSED_EMBEDDING = HostRow(whole="its attention layers read the token embedding again")

HOSTS: Mapping[str, HostRow] = {
    "beam": HostRow(logits={"float_softcap": "final_logit_softcapping"}),
    "bloom": HostRow(own_mask=True),
    **dict.fromkeys("cohere cohere2 cohere2_moe cohere_compass_text".split(), _MULTIPLIED),
    "ctrl": HostRow(norm="layernorm", entry_only={"d_model_size": ONE, "pos_encoding": ZERO}),
    "falcon_h1": HostRow(logits={"multiplier": "lm_head_multiplier"}),
    **dict.fromkeys("falcon_mamba mamba mamba2".split(), _RECURRENT),
    **dict.fromkeys("gemma2 gemma3_text vaultgemma".split(), _SOFTCAPPED),
    **dict.fromkeys("gemma4_text gemma4_unified_text".split(), _LAYERWISE),
    # their configs say `is_decoder=False`
    **dict.fromkeys("gpt_neox gpt_neox_japanese".split(), HostRow()),
    **dict.fromkeys(
        "granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared".split(),
        _DIVIDED,
    ),
    "hyperclovax": HostRow(logits={"multiplier": "logits_scaling"}),
    "inkling_text": HostRow(
        logits={
            "hidden_divisor": "logits_mup_width_multiplier",
            "vocab_size": "unpadded_vocab_size",
        }
    ),
    "minicpm3": HostRow(logits={"hidden_divisor": "logits_scaling"}),
    "minimax": HostRow(cached=False),
    "nanochat": HostRow(logits=_SOFTCAP, entry_norm=True),
    "openai-gpt": HostRow(normed=False, entry_only={"positions_embed": ZERO}, cached=False),
    "opt": HostRow(owner="decoder"),
    "recurrent_gemma": HostRow(
        entry_only={"normalizer": ONE}, logits={"softcap": "logits_soft_cap"}
    ),
    "xlstm": HostRow(norm="out_norm", cached=False, logits={"softcap": "output_logit_soft_cap"}),
    **dict.fromkeys("zamba zamba2".split(), _REUSED_EMBEDDING),
    "zaya": HostRow(
        entry_only={"input_hidden_states_bias": ZERO, "input_hidden_states_scale": ONE},
        whole="each layer's router reads the router of the layer before",
    ),
}

_STREAMS = "it carries several residual streams, which no norm alone can read"

UNSUPPORTED: Mapping[str, str] = {
    "cpmant": "it is not causal: it puts a prompt of its own before the text",
    "deepseek_v4": _STREAMS,
    "gemma3n_text": _STREAMS,
    "hrm_text": "its layers are not one list",
    "hy_v4": _STREAMS,
    "inkling2_text": _STREAMS,
    "longcat_flash": "each of its layers counts as two, with two slots in the cache",
    "modernbert-decoder": "its causal LM has a dense layer between final norm and head",
    "prophetnet": "it is not causal: it predicts several tokens at once",
    "qwen4_exp_text": _STREAMS,
    "reformer": "it is not causal: its hashing depends on the whole text",
    "rwkv": "its forward rescales the weights in place, by depth",
    "xlm": "its layers are lists of parts, not decoder layers",
    "xlnet": "its final state is not read through a norm, and its memory is not a cache",
}


def unsupported_backbone(model_type: str, reason: str) -> ValueError:
    """Return the error for a backbone that cannot be right."""
    return ValueError(
        f"`{model_type}` cannot be the backbone of a family: {reason}. Supported are decoder-only "
        "language models with one list of layers and a final norm, such as llama, qwen3, "
        "gemma3_text, mixtral or gpt2; docs/backbones.md lists all that were tried."
    )


def host_row(config: Any) -> HostRow:
    """Return how a host differs, given its config."""
    return HOSTS.get(config.model_type, HostRow())


@dataclass(frozen=True)
class LogitTransform:
    """What a host's causal LM does around its output head, in the order of the fields.

    Attributes:
        hidden_divisor (`float`, *optional*): Divides the hidden states before the head.
        multiplier (`float`, *optional*): Multiplies the logits.
        divisor (`float`, *optional*): Divides them. A multiplier of its inverse rounds otherwise.
        softcap (`float`, *optional*): `cap * tanh(logits / cap)`, in the logits' dtype.
        float_softcap (`float`, *optional*): The same in float32.
        vocab_size (`int`, *optional*): Number of logits that are tokens; the rest is dropped.
    """

    hidden_divisor: float | None = None
    multiplier: float | None = None
    divisor: float | None = None
    softcap: float | None = None
    float_softcap: float | None = None
    vocab_size: int | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """Return the transform of a host, given its config."""
        return cls(
            **{k: getattr(config, name, None) for k, name in host_row(config).logits.items()}
        )

    @property
    def capped(self) -> bool:
        """`bool`: Whether a softcap bends the logits."""
        return self.softcap is not None or self.float_softcap is not None

    def read(self, hidden_states: torch.Tensor, head: nn.Module) -> torch.Tensor:
        """Return the logits `(..., vocab)` that the host would, for states after the norm."""
        hidden_states = self.hidden(hidden_states)
        weight = getattr(head, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.is_floating_point():
            # some hosts keep the residual in float32 and narrow it here
            hidden_states = hidden_states.to(weight.dtype)
        logits = head(hidden_states)
        if self.multiplier is not None:
            logits = logits * self.multiplier
        if self.divisor is not None:
            logits = logits / self.divisor
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.float_softcap is not None:
            # in half precision, tanh is coarse near saturation
            logits = torch.tanh(logits.float() / self.float_softcap) * self.float_softcap
        return self.tokens(logits)

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        """Return hidden states as the head reads them; the same factor takes gradients back."""
        return states if self.hidden_divisor is None else states / self.hidden_divisor

    def tokens(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the columns that are tokens."""
        return logits if self.vocab_size is None else logits[..., : self.vocab_size]

    def logits_(self, logits: torch.Tensor) -> torch.Tensor:
        """Transform float32 outputs of the head in place; return the columns that are tokens."""
        if self.multiplier is not None:
            logits.mul_(self.multiplier)
        if self.divisor is not None:
            logits.div_(self.divisor)
        for cap in (self.softcap, self.float_softcap):
            if cap is not None:
                logits.div_(cap).tanh_().mul_(cap)
        return self.tokens(logits)

    def slope_(self, slope: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Turn the slope at transformed logits into the slope at the head's output, in place."""
        for cap in (self.float_softcap, self.softcap):
            if cap is not None:
                slope.mul_(1 - (logits / cap).square_())
        if self.divisor is not None:
            slope.div_(self.divisor)
        if self.multiplier is not None:
            slope.mul_(self.multiplier)
        return slope


@dataclass(frozen=True)
class BackboneSpec:
    """Where a backbone keeps what a segment needs.

    Attributes:
        layers (`str`): Name of the list of decoder layers in `host.owner`.
        norm (`str`, *optional*): Name of the final norm there; `None` if the host has none.
        entry_only (`Mapping[str, str]`): What acts once, before the first layer.
        cache (`str`): Name of the forward's argument that takes the cache; empty if the host has
            no cache of transformers' kinds.
        takes (`frozenset[str]`, *optional*): Names of all its arguments; `None` if it takes any.
        host ([`HostRow`]): How the host type differs from the generic rule.
    """

    layers: str
    norm: str | None
    entry_only: Mapping[str, str]
    cache: str
    takes: frozenset[str] | None
    host: HostRow

    @property
    def owner(self) -> str:
        """`str`: Dotted path of the module that owns the layers; empty for the backbone itself."""
        return self.host.owner

    @property
    def whole(self) -> str:
        """`str`: Why no segment can go on from a tap alone; empty if one can."""
        return self.host.whole

    def path(self, name: str | None) -> str:
        """Return the dotted path, in the backbone, of a part of the owner; empty for `None`."""
        return "" if name is None else f"{self.owner}.{name}".lstrip(".")

    def accepted(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs that are given and that the host's forward takes."""
        return {
            name: value
            for name, value in inputs.items()
            if value is not None and (self.takes is None or name in self.takes)
        }


def find_backbone_spec(backbone: Any) -> BackboneSpec:
    """Find the layers and the final norm of a host's decoder, as `AutoModel` builds it."""
    config = backbone.config
    model_type = config.model_type
    if model_type in UNSUPPORTED:
        raise unsupported_backbone(model_type, UNSUPPORTED[model_type])
    row = host_row(config)
    try:
        owner = backbone.get_submodule(row.owner)
    except AttributeError:
        raise unsupported_backbone(model_type, f"it has no `{row.owner}`") from None
    depth = config.num_hidden_layers
    lists = {n: m for n, m in owner.named_children() if isinstance(m, nn.ModuleList)}
    layers = next((name for name in LAYERS if len(lists.get(name, ())) == depth), None)
    if layers is None:
        raise unsupported_backbone(model_type, f"it has no list of {depth} decoder layers")
    names = (row.norm,) if row.norm else NORMS
    norm = next((name for name in names if isinstance(getattr(owner, name, None), nn.Module)), None)
    if norm is None and row.normed:
        raise unsupported_backbone(model_type, "it has no final norm for an exit to copy")
    parameters = inspect.signature(type(backbone).forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    cache = next((name for name in ("past_key_values", "cache_params") if name in parameters), "")
    return BackboneSpec(
        layers=layers,
        norm=norm if row.normed else None,
        entry_only={**ENTRY_ONLY, **row.entry_only},
        cache=cache if row.cached else "",
        takes=None if takes_any else frozenset(parameters),
        host=row,
    )


def decoder_of(host: Any) -> Any:
    """Return the decoder inside a causal LM or a composite, the part that `AutoModel` builds."""
    config = host.config.get_text_config(decoder=True)
    if config.model_type in UNSUPPORTED:
        raise unsupported_backbone(config.model_type, UNSUPPORTED[config.model_type])
    wanted = MODEL_MAPPING.get(type(config), None)
    for module in host.modules():
        if type(module) is wanted:
            return module
    reason = f"its base model {getattr(wanted, '__name__', wanted)} is no part of "
    raise unsupported_backbone(config.model_type, reason + type(host).__name__)


def host_class(config: Any) -> Any:
    """Return the host's causal LM class, given its config, or the decoder's where there is none."""
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        found = mapping.get(type(config), None)
        if isinstance(found, type):
            return found
    return PreTrainedModel


def host_traits(config: Any) -> dict[str, Any]:
    """Return the attributes of the host's class that a family takes over."""
    host = host_class(config)
    return {name: getattr(host, name) for name in TRAITS if hasattr(host, name)}


def can_tie(text_config: Any) -> bool:
    """Return whether the host can tie its head: in some hosts the config's switch does nothing."""
    host = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text_config), None)
    return bool(getattr(host, "_tied_weights_keys", True))


# under which names hosts keep the number of experts, of those chosen, and the weight of the loss
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_top_k")
WEIGHT = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")


def balances(config: Any, router_logits: Sequence[torch.Tensor] | None) -> bool:
    """Return whether routers ran, and the host (or one that is unknown) has a loss for them."""
    return bool(router_logits) and _balance_function(config) is not None


def _balance_function(config: Any) -> Callable[..., torch.Tensor] | None:
    """Return the function in the module of the host's causal LM; `None` where it has none."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    host = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if host is None:
        return load_balancing_loss_func
    return getattr(sys.modules[host.__module__], "load_balancing_loss_func", None)


def _field(config: Any, names: Sequence[str]) -> Any:
    """Return the first of these fields that a config has, or the config of its experts."""
    configs = (config, getattr(config, "ffn_config", None))
    found = (getattr(c, name, None) for c in configs for name in names)
    return next((value for value in found if value is not None), None)


def balance_loss(
    config: Any, router_logits: Sequence[torch.Tensor], attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, float]:
    """Compute the load-balancing loss of a mixture of experts as its host does, and its weight.

    `router_logits` are `(batch * seq, experts)` for each layer. Reference: Switch Transformers,
    arXiv:2101.03961, equations 4 to 6.
    """
    num_experts = _field(config, EXPERTS)
    if num_experts is None:
        raise ValueError(
            f"`{config.model_type}` has router logits but none of {EXPERTS} in its config: train "
            "it with `output_router_logits=False`."
        )
    function: Any = _balance_function(config)
    known = {
        "num_experts": num_experts,
        "num_keys": math.isqrt(num_experts),  # of doge, which finds experts by two keys
        "top_k": _field(config, CHOSEN),
        "attention_mask": attention_mask,
    }
    taken = inspect.signature(function).parameters.keys()
    loss = function(tuple(router_logits), **{n: v for n, v in known.items() if n in taken})
    return loss, _field(config, WEIGHT) or 0.0

"""Facts about hosts, the model types that can be a backbone. `HOSTS` lists the special cases."""

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


# attribute names of the list of layers and of the final norm, most common first
LAYERS = ("layers", "h", "blocks", "block")
NORMS = tuple(
    "norm final_layernorm final_layer_norm ln_f embedding_norm norm_f final_norm layer_norm "
    "ln_out".split()
)

# Attributes that act once, before the first layer. Later segments replace them by neutral values.
IDENTITY, ZERO, ONE, OFF = "identity", "zero", "one", "off"
ENTRY_ONLY: Mapping[str, str] = {
    **dict.fromkeys(("wpe", "embed_positions"), ZERO),
    **dict.fromkeys("drop emb_dropout embed_dropout embedding_dropout".split(), IDENTITY),
    "word_embeddings_layernorm": IDENTITY,
    "embedding_multiplier": ONE,
    "mup_enabled": OFF,
}

# Class attributes that Transformers reads and that the family copies from the host's causal LM.
# `post_init` collects the others from the backbone.
TRAITS = tuple(
    "_is_stateful _supported_generation_modes _can_compile_fullgraph "
    "_compatible_flash_implementations _supports_attention_backend _supports_context_parallel "
    "_supports_flash_attn _supports_flex_attn _supports_sdpa supports_gradient_checkpointing "
    "is_backend_compatible _can_set_attn_implementation _can_set_experts_implementation".split()
)


@dataclass(frozen=True)
class HostRow:
    """The ways in which a host differs from the generic rule."""

    owner: str = ""  # dotted path, in the backbone, of the module that owns the layers
    norm: str = ""  # name of the final norm, if the generic rule would find another module
    normed: bool = True  # whether there is a final norm
    entry_norm: bool = False  # whether the final norm is also applied to the embedding
    entry_only: Mapping[str, str] = field(default_factory=dict)  # additions to `ENTRY_ONLY`
    # maps fields of `LogitTransform` to fields of the host's config
    logits: Mapping[str, str] = field(default_factory=dict)
    tap_shift: int = 0  # index of the tap after `depth` layers in `hidden_states`, minus `depth`
    keep_depth: bool = False  # whether the forward splits its inputs by the config's full depth
    cached: bool = True  # whether it uses a cache that Transformers' `generate` creates
    own_mask: bool = False  # whether its causal LM, not the backbone, builds static cache masks
    whole: str = ""  # reason why a segment cannot continue from a tap (members still work)


_SOFTCAP = {"softcap": "final_logit_softcapping"}

# keys are model types, several if they differ in the same way
_ROWS: Mapping[str, HostRow] = {
    "beam": HostRow(logits={"float_softcap": "final_logit_softcapping"}),
    "bloom": HostRow(own_mask=True),
    "cohere cohere2 cohere2_moe cohere_compass_text": HostRow(logits={"multiplier": "logit_scale"}),
    "ctrl": HostRow(norm="layernorm", entry_only={"d_model_size": ONE, "pos_encoding": ZERO}),
    "falcon_h1": HostRow(logits={"multiplier": "lm_head_multiplier"}),
    "falcon_mamba mamba mamba2": HostRow(tap_shift=-1),
    "gemma2 gemma3_text vaultgemma": HostRow(logits=_SOFTCAP),
    "gemma4_text gemma4_unified_text": HostRow(
        logits=_SOFTCAP,
        keep_depth=True,
        whole="every layer has its own embedding of the token ids",
    ),
    # a row that marks them as decoders, because their configs have `is_decoder=False`
    "gpt_neox gpt_neox_japanese": HostRow(),
    "granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared": HostRow(
        logits={"divisor": "logits_scaling"}
    ),
    "hyperclovax": HostRow(logits={"multiplier": "logits_scaling"}),
    "inkling_text": HostRow(
        logits={
            "vocab_size": "unpadded_vocab_size",
            "hidden_divisor": "logits_mup_width_multiplier",
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
    "zamba zamba2": HostRow(whole="its attention layers use the token embedding again"),
    "zaya": HostRow(
        entry_only={"input_hidden_states_bias": ZERO, "input_hidden_states_scale": ONE},
        whole="the router of each layer uses the router output of the layer before",
    ),
}

# the same keys, and the reason why the host does not work
_REASONS: Mapping[str, str] = {
    "cpmant": "it is not causal, because it puts its own prompt before the text",
    "deepseek_v4 gemma3n_text hy_v4 inkling2_text qwen4_exp_text": (
        "it has several residual streams, and one norm cannot read them"
    ),
    "hrm_text": "its layers are not one list",
    "longcat_flash": "each of its layers counts as two, with two slots in the cache",
    "modernbert-decoder": "its causal LM has a dense layer between final norm and head",
    "prophetnet": "it is not causal, because it predicts several tokens at once",
    "reformer": "it is not causal, because its hashing depends on the whole text",
    "rwkv": "its forward rescales the weights in place, by depth",
    "xlm": "its layers are lists of parts, not decoder layers",
    "xlnet": "it has no norm before its head, and its memory is not a KV cache",
}

HOSTS = {name: row for names, row in _ROWS.items() for name in names.split()}
UNSUPPORTED = {name: why for names, why in _REASONS.items() for name in names.split()}


def unsupported_backbone(model_type: str, reason: str) -> ValueError:
    """Return the error for a backbone that does not work."""
    return ValueError(
        f"`{model_type}` cannot be the backbone of a family: {reason}. Use a decoder-only language "
        "model with one list of layers and a final norm, such as llama, qwen3, gemma3_text, "
        "mixtral or gpt2. docs/backbones.md lists all types that were tried."
    )


def host_row(config: Any) -> HostRow:
    """Return the entry of a host in `HOSTS`, or the defaults."""
    return HOSTS.get(config.model_type, HostRow())


@dataclass(frozen=True)
class LogitTransform:
    """The operations of a host's causal LM around its head, in this order."""

    hidden_divisor: float | None = None  # divides the hidden states before the head
    multiplier: float | None = None
    divisor: float | None = None  # multiplying by the inverse would round differently
    softcap: float | None = None  # `cap * tanh(logits / cap)`, in the dtype of the logits
    float_softcap: float | None = None  # the same in float32
    vocab_size: int | None = None  # number of logits to keep

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """Build the transform of a host, given its config."""
        numbers = host_row(config).logits.items()
        return cls(**{field: getattr(config, name, None) for field, name in numbers})

    @property
    def capped(self) -> bool:
        """`bool`: Whether there is a softcap."""
        return self.softcap is not None or self.float_softcap is not None

    def read(self, hidden_states: torch.Tensor, head: nn.Module) -> torch.Tensor:
        """Compute the host's logits `(..., vocab)` from normed hidden states."""
        hidden_states = self.hidden(hidden_states)
        weight = getattr(head, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.is_floating_point():
            # some hosts have float32 residuals with a half-precision head
            hidden_states = hidden_states.to(weight.dtype)
        logits = head(hidden_states)
        if self.multiplier is not None:
            logits = logits * self.multiplier
        if self.divisor is not None:
            logits = logits / self.divisor
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.float_softcap is not None:
            # tanh near 1 is too coarse in half precision
            logits = torch.tanh(logits.float() / self.float_softcap) * self.float_softcap
        return self.tokens(logits)

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        """Divide hidden states, or their gradients in the backward pass, by `hidden_divisor`."""
        return states if self.hidden_divisor is None else states / self.hidden_divisor

    def tokens(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits without those of vocabulary padding."""
        return logits if self.vocab_size is None else logits[..., : self.vocab_size]

    def logits_(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply the steps after the head to its float32 outputs, in place, and return `tokens`."""
        if self.multiplier is not None:
            logits.mul_(self.multiplier)
        if self.divisor is not None:
            logits.div_(self.divisor)
        for cap in (self.softcap, self.float_softcap):
            if cap is not None:
                logits.div_(cap).tanh_().mul_(cap)
        return self.tokens(logits)

    def slope_(self, slope: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Turn gradients of the logits into gradients of the head's output, in place."""
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
    """The names of the parts of a backbone that segments use."""

    layers: str  # list of decoder layers in the owner
    norm: str | None  # final norm in the owner, or `None` if the host has none
    entry_only: Mapping[str, str]  # attributes that act once, before the first layer
    cache: str  # argument of the forward for the cache, or empty if a relay cannot use its cache
    takes: frozenset[str] | None  # arguments of the forward, or `None` if it accepts any
    host: HostRow

    def path(self, name: str | None) -> str:
        """Return the dotted path, in the backbone, of a part of the owner. It may be empty."""
        return "" if name is None else f"{self.host.owner}.{name}".lstrip(".")

    def accepted(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs that are not `None` and that the host's forward accepts."""
        given = {name: value for name, value in inputs.items() if value is not None}
        return {n: v for n, v in given.items() if self.takes is None or n in self.takes}


def find_backbone_spec(backbone: Any) -> BackboneSpec:
    """Find the layers and the final norm of a backbone that `AutoModel` has built."""
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
        raise unsupported_backbone(model_type, "it has no final norm")
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


def host_class(config: Any) -> Any:
    """Return the class of a host's causal LM, or else of its decoder, given its config."""
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        found = mapping.get(type(config), None)
        if isinstance(found, type):
            return found
    return PreTrainedModel


def can_tie(text_config: Any) -> bool:
    """Return whether the host can tie its head. Some hosts ignore `tie_word_embeddings`."""
    host = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text_config), None)
    return bool(getattr(host, "_tied_weights_keys", True))


# names in configs of the number of experts, the experts per token and the weight of the loss
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_top_k")
WEIGHT = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")


def _balance_function(config: Any) -> Callable[..., torch.Tensor] | None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    # most hosts have the function of this name in the module of their causal LM
    host = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if host is None:
        return load_balancing_loss_func
    return getattr(sys.modules[host.__module__], "load_balancing_loss_func", None)


def _field(config: Any, names: Sequence[str]) -> Any:
    """Return the first of these fields that is set in a config or in its `ffn_config`."""
    configs = (config, getattr(config, "ffn_config", None))
    found = (getattr(c, name, None) for c in configs for name in names)
    return next((value for value in found if value is not None), None)


def balance_loss(
    config: Any, router_logits: Sequence[torch.Tensor] | None, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor | None, float]:
    """Compute the host's load-balancing loss of experts. Return it (or `None`) and its weight.

    `router_logits` are of shape `(batch * seq, experts)` for each layer. Reference: Fedus et al.,
    arXiv:2101.03961, equations 4 to 6.
    """
    function: Any
    if not router_logits or (function := _balance_function(config)) is None:
        return None, 0.0
    num_experts = _field(config, EXPERTS)
    if num_experts is None:
        raise ValueError(
            f"`{config.model_type}` returns router logits, but its config has none of {EXPERTS}. "
            "Set `output_router_logits=False`."
        )
    known = {
        "num_experts": num_experts,
        "num_keys": math.isqrt(num_experts),  # for doge, which selects experts by two keys
        "top_k": _field(config, CHOSEN),
        "attention_mask": attention_mask,
    }
    taken = inspect.signature(function).parameters.keys()
    loss = function(tuple(router_logits), **{n: v for n, v in known.items() if n in taken})
    return loss, _field(config, WEIGHT) or 0.0

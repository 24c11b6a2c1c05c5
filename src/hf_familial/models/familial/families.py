"""How each host family differs from the generic rule; which work, which cannot and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


# What a forward does once, before the first layer, and a later segment must not do again: modules
# to replace by an identity or by zeros, numbers to make neutral, switches to turn off.
IDENTITY, ZERO, ONE, OFF = "identity", "zero", "one", "off"
ONCE: Mapping[str, str] = {
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


@dataclass(frozen=True)
class LogitOp:
    """One operation between the normed hidden state and the logits a host returns.

    Attributes:
        kind (`str`): `"scale_hidden"` divides the hidden states before the head; `"multiply"` and
            `"divide"` scale the logits; `"softcap"` is `cap * tanh(logits / cap)`,
            `"softcap_float"` the same in float32; `"keep"` drops the logits from that number on.
        name (`str`): Field of the backbone's config that holds the number; none there, no
            operation.
    """

    kind: str
    name: str


@dataclass(frozen=True)
class Row:
    """How one family differs from the generic rule.

    Attributes:
        owner (`str`): Dotted path, inside the backbone, of the module that owns the layers.
        norm (`str`): Name of the final norm, when the generic rule would find another module.
        normed (`bool`): Whether there is a final norm at all.
        entry_norm (`bool`): Whether the final norm is also applied to the embedding.
        once (`Mapping[str, str]`): What else acts once, before the first layer.
        logits (`tuple[LogitOp, ...]`): What the host's causal LM does around its head, in order.
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
    once: Mapping[str, str] = field(default_factory=dict)
    logits: tuple[LogitOp, ...] = ()
    tap_shift: int = 0
    keep_depth: bool = False
    cached: bool = True
    own_mask: bool = False
    whole: str = ""


_SOFTCAP = (LogitOp("softcap", "final_logit_softcapping"),)
_SOFTCAPPED = Row(logits=_SOFTCAP)
_MULTIPLIED = Row(logits=(LogitOp("multiply", "logit_scale"),))
_DIVIDED = Row(logits=(LogitOp("divide", "logits_scaling"),))
_PER_LAYER = "every layer reads an embedding of its own of the token ids"
_LAYERWISE = Row(logits=_SOFTCAP, keep_depth=True, whole=_PER_LAYER)
_RECURRENT = Row(tap_shift=-1)
_REUSED_EMBEDDING = Row(whole="its attention layers read the token embedding again")

ROWS: Mapping[str, Row] = {
    "beam": Row(logits=(LogitOp("softcap_float", "final_logit_softcapping"),)),
    "bloom": Row(own_mask=True),
    "cohere": _MULTIPLIED,
    "cohere2": _MULTIPLIED,
    "cohere2_moe": _MULTIPLIED,
    "cohere_compass_text": _MULTIPLIED,
    "ctrl": Row(norm="layernorm", once={"d_model_size": ONE, "pos_encoding": ZERO}),
    "falcon_h1": Row(logits=(LogitOp("multiply", "lm_head_multiplier"),)),
    "falcon_mamba": _RECURRENT,
    "gemma2": _SOFTCAPPED,
    "gemma3_text": _SOFTCAPPED,
    "gemma4_text": _LAYERWISE,
    "gemma4_unified_text": _LAYERWISE,
    # their configs call themselves no decoder's
    "gpt_neox": Row(),
    "gpt_neox_japanese": Row(),
    "granite": _DIVIDED,
    "granite_swa": _DIVIDED,
    "granitemoe": _DIVIDED,
    "granitemoe_swa": _DIVIDED,
    "granitemoehybrid": _DIVIDED,
    "granitemoeshared": _DIVIDED,
    "hyperclovax": Row(logits=(LogitOp("multiply", "logits_scaling"),)),
    "inkling_text": Row(
        logits=(
            LogitOp("scale_hidden", "logits_mup_width_multiplier"),
            LogitOp("keep", "unpadded_vocab_size"),
        )
    ),
    "mamba": _RECURRENT,
    "mamba2": _RECURRENT,
    "minicpm3": Row(logits=(LogitOp("scale_hidden", "logits_scaling"),)),
    "minimax": Row(cached=False),
    "nanochat": Row(logits=_SOFTCAP, entry_norm=True),
    "openai-gpt": Row(normed=False, once={"positions_embed": ZERO}, cached=False),
    "opt": Row(owner="decoder"),
    "recurrent_gemma": Row(
        once={"normalizer": ONE}, logits=(LogitOp("softcap", "logits_soft_cap"),)
    ),
    "vaultgemma": _SOFTCAPPED,
    "xlstm": Row(
        norm="out_norm", cached=False, logits=(LogitOp("softcap", "output_logit_soft_cap"),)
    ),
    "zamba": _REUSED_EMBEDDING,
    "zamba2": _REUSED_EMBEDDING,
    "zaya": Row(
        once={"input_hidden_states_bias": ZERO, "input_hidden_states_scale": ONE},
        whole="each layer's router reads the router of the layer before",
    ),
}

_STREAMS = "it carries several residual streams, which no norm alone can read"
_SPLIT = "its layers are not one list"

REFUSED: Mapping[str, str] = {
    "cpmant": "it is not causal: it puts a prompt of its own before the text",
    "deepseek_v4": _STREAMS,
    "gemma3n_text": _STREAMS,
    "hrm_text": _SPLIT,
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


def refusal(model_type: str, reason: str) -> ValueError:
    """The error for a backbone that cannot be right: its name, the reason, what is supported."""
    return ValueError(
        f"`{model_type}` cannot be the backbone of a family: {reason}. Supported are decoder-only "
        "language models with one list of layers and a final norm, such as llama, qwen3, "
        "gemma3_text, mixtral or gpt2; docs/backbones.md lists all that were tried."
    )

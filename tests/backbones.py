"""The zoo: a tiny config of every causal language model in Transformers.

`SIZES` gives values for the attributes that a config class declares. `FAMILIES` adds values for
single model types. The configs switch on everything special in a model type. Windows are short, all
kinds of layers occur, and scalings are not 1, so that differences are visible at 20 tokens.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


MUST_WORK: tuple[str, ...] = (
    "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text",
    "olmo2", "olmo3", "phi3", "granite", "cohere2", "smollm3", "stablelm", "starcoder2", "glm4",
    "gpt_oss", "deepseek_v3", "exaone4", "nemotron", "gpt_neox", "gpt2", "phi", "lfm2", "falcon_h1",
)  # fmt: skip

# Attribute (its standard name, if there is one) -> tiny value. Only attributes that the config
# class declares are set. A tuple is a pattern that repeats over the layers.
# fmt: off
SIZES: dict[str, Any] = {
    "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 128, "max_seq_len": 128, "n_ctx": 128, "is_decoder": True,
    "initializer_range": 0.2,  # about 1 / sqrt(hidden), so that attention is not uniform
    "init_std": 0.2,
    # widths
    "hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48,
    "dense_intermediate_size": 48, "ffn_dim": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "encoder_layers": 2,
    # windows
    "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1,
    "attention_chunk_size": 8, "window_size": 8, "attention_window_size": 8, "local_attention": 16,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "num_shared_experts": 1,
    "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16, "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16, "shared_intermediate_size": 16,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "mlp_only_layers": [0],
    "routed_scaling_factor": 1.5, "route_scale": 1.5,
    # latent and indexed attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "index_topk": 6, "index_head_dim": 8,
    "index_n_heads": 16,  # with fewer heads, scores tie at zero and the top k is ambiguous
    # linear attention, short convolutions, state spaces
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_head_dim": 8, "linear_num_heads": 4, "block_size": 8,
    "chunk_size": 8, "state_size": 8, "mamba_chunk_size": 8, "mamba_d_head": 8, "mamba_d_ssm": 32,
    "mamba_d_state": 8, "mamba_expand": 1, "mamba_n_heads": 4,
    # scalings
    "scale_embedding": True, "mup_enabled": True, "use_qk_norm": True, "lm_head_bias": True,
    "clip_qkv": 1.5, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0,
    "query_pre_attn_scalar": 12, "logits_scaling": 3.0, "logit_scale": 0.5,
    "embedding_multiplier": 1.5, "residual_multiplier": 0.5, "attention_multiplier": 0.5,
    "key_multiplier": 0.7, "lm_head_multiplier": 0.5, "attention_in_multiplier": 0.8,
    "attention_out_multiplier": 0.9, "ssm_in_multiplier": 0.8, "ssm_out_multiplier": 0.9,
}
# fmt: on

# Attribute that a class declares -> values that it implies for other attributes.
IMPLIED: dict[str, dict[str, Any]] = {
    "kv_lora_rank": {"num_key_value_heads": 4},  # latent attention has no grouped heads
}

# Names that config classes use for the number of layers.
DEPTHS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers", "num_layers")

SLIDING_FULL = ("sliding_attention", "full_attention")
LINEAR_FULL = ("linear_attention", "full_attention")
DENSE_SPARSE = ("dense", "sparse")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TOWER = {  # a vision encoder, which text does not use
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}

# model_type -> additions to SIZES. A function gets the number of layers.
# Three values avoid bugs in Transformers. moshi's masks ignore the window that its cache has. A
# cached step of nemotron_h or zamba2 does not clip at `time_step_min`, but a full forward does.
# fmt: off
FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": lambda n: list(range(1, n, 2))},
    "codegen": {"num_key_value_heads": 4},
    "cohere2_moe": {"mlp_layer_types": DENSE_SPARSE, "prefix_dense_intermediate_size": 48},
    "cohere_compass_text": {
        "layer_types": SLIDING_FULL, "rope_parameters": dict.fromkeys(SLIDING_FULL, ROPE),
    },
    "cpmant": {"dim_head": 8, "dim_ff": 48, "position_bias_num_buckets": 32, "prompt_length": 4},
    "ctrl": {"dff": 48},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "o_groups": 2, "o_lora_rank": 8, "hc_mult": 2,
    },
    "doge": {"keep_window_size": 8},
    "dots1": {"layer_types": SLIDING_FULL},
    "dots3_note_text": {
        "head_dim": 16, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "exaone4": {"sliding_window_pattern": 2},
    "falcon_h1": {"mlp_multipliers": [0.8, 0.9], "ssm_multipliers": [0.7, 0.8, 0.9, 1.1, 1.2]},
    "gemma3n_text": {
        "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "laurel_rank": 8,
        "altup_num_inputs": 2, "num_kv_shared_layers": lambda n: max(n - 2, 0),
        "activation_sparsity_pattern": (0.5, 0.0),
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "global_head_dim": 16,
        "enable_moe_block": True, "top_k_experts": 2,
        "layer_types": lambda n: [SLIDING_FULL[(n - layer) % 2] for layer in range(n)],
    },
    "gemma4_unified_text": {
        "global_head_dim": 16, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
        "layer_types": lambda n: [SLIDING_FULL[(n - layer) % 2] for layer in range(n)],
    },
    "git": {"vision_config": TOWER},
    "gpt_neo": {"attention_types": lambda n: [[[kind], 1] for kind in ("global", "local") * n][:n]},
    "granitemoehybrid": {"layer_types": LINEAR_FULL, "position_embedding_type": "rope"},
    "hrm_text": {"H_cycles": 1, "L_cycles": 1, "num_layers_per_stack": lambda n: n // 2},
    "inkling2_text": {
        "vocab_size": 136, "unpadded_vocab_size": 128, "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 1, "swa_head_dim": 8, "d_rel": 4, "rel_extent": 16,
        "log_scaling_n_floor": 4, "n_layers_per_attn_res_block": 2,
    },
    "inkling_text": {
        "vocab_size": 136, "unpadded_vocab_size": 128, "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 1, "swa_head_dim": 8, "d_rel": 4, "rel_extent": 16,
        "log_scaling_n_floor": 4, "mlp_layer_types": DENSE_SPARSE,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0},
    "laguna": {"layer_types": SLIDING_FULL, "num_attention_heads_per_layer": (4, 2)},
    "lfm2": {"layer_types": ("conv", "full_attention")},
    "lfm2_moe": {"layer_types": ("conv", "full_attention")},
    "llama4_text": {"no_rope_layers": (1, 0), "interleave_moe_layer_step": 2, "floor_scale": 4},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "mellum": {"layer_types": SLIDING_FULL, "mlp_layer_types": DENSE_SPARSE},
    "minicpm3": {"dim_model_base": 16},
    "minimax": {
        "full_attn_alpha_factor": 1.5, "full_attn_beta_factor": 0.9,
        "linear_attn_alpha_factor": 1.4, "linear_attn_beta_factor": 0.8, "mlp_alpha_factor": 1.3,
        "mlp_beta_factor": 0.7,
    },
    "minimax_m3_vl_text": {
        "layer_types": ("full_attention", "minimax_m3_sparse"), "mlp_layer_types": DENSE_SPARSE,
        "index_n_heads": 2, "index_block_size": 4, "index_topk_blocks": 2,
    },
    "ministral": {"layer_types": SLIDING_FULL},
    "moshi": {"sliding_window": 128},
    "nemotron_h": {
        "layers_block_type": ("linear_attention", "full_attention", "moe", "mlp"),
        "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "expand": 1,
        "time_step_min": 1e-6, "moe_shared_expert_intermediate_size": 16,
    },
    "phi4_multimodal": {
        "vision_config": TOWER | {"crop_size": 8},
        "audio_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2,
            "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 16,
        },
    },
    "qwen2": {"layer_types": SLIDING_FULL},
    "qwen2_moe": {"layer_types": SLIDING_FULL},
    "qwen3": {"layer_types": SLIDING_FULL, "head_dim": 16},
    "qwen4_exp_text": {
        "hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [1], "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
        "indexer_budget": 8, "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "logits_soft_cap": 2.0},
    "reformer": {
        "attn_layers": ("local", "lsh"), "attention_head_size": 8, "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16], "feed_forward_size": 48, "num_buckets": 4, "hash_seed": 0,
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
    "roc_bert": {"shape_vocab_size": 128, "pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "smollm3": {"layer_types": SLIDING_FULL, "no_rope_layers": (1, 0)},
    "xlm": {"causal": True, "use_lang_emb": False},
    "xlnet": {"attn_type": "uni", "d_inner": 48},
    "xlstm": {
        "hidden_size": 64, "num_heads": 4, "qk_dim_factor": 1.0, "output_logit_soft_cap": 2.0,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {  # at least two hybrid layers, because they share one block
        "layers_block_type": lambda n: [
            "hybrid" if n < 4 or layer % 2 else "linear_attention" for layer in range(n)
        ]
    },
    "zamba2": {
        "layers_block_type": ("linear_attention", "hybrid"), "mamba_ngroups": 2,
        "time_step_min": 1e-6,
    },
    "zaya": {
        "layer_types": ("hybrid_sliding", "hybrid"), "num_experts_per_tok": 1,
        "router_hidden_size": 16,
    },
}
# fmt: on

# Model of several parts -> the type of its decoder, which is in the zoo.
COMPOSITES: dict[str, str] = {
    "dots3_note": "dots3_note_text",
    "fuyu": "persimmon",
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "got_ocr2": "qwen2",
    "llama4": "llama4_text",
    "moss_transcribe_diarize": "qwen3",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen4_exp": "qwen4_exp_text",
}

# model_type -> reason why the zoo has no tiny config of it.
UNRUNNABLE: dict[str, str] = {
    **{
        name: f"it has several parts, with the decoder `{text}`"
        for name, text in COMPOSITES.items()
    },
    "blt": "it is a hierarchy of four byte-level transformers, without a single list of layers",
    "emu3": "it has several parts, and its decoder has no causal LM type",
    "gemma4_assistant": "it drafts from the keys and values of another model",
    "gemma4_unified_assistant": "it drafts from the keys and values of another model",
    "mllama": "it has several parts, and its decoder has no causal LM type",
    "musicgen": "its decoder reads several audio codebooks at once",
    "musicgen_melody": "its decoder reads several audio codebooks at once",
}

# model_type -> reason why decoding token by token does not give the logits of one forward pass.
UNCACHED: dict[str, str] = {
    "cpmant": "it puts its own prompt before every call, and attends to both sides",
    "openai-gpt": "it has no cache",
    "prophetnet": "the logits of a position change with the length of the text",
    "reformer": "it hashes positions into buckets that depend on the whole text",
    "rwkv": "its step of one token is right only for a batch of one",
    "xlm": "it has no cache",
}

# model_type -> name of the cache argument, if it is not `past_key_values`.
CACHE_ARGUMENT: dict[str, str] = {
    "falcon_mamba": "cache_params",
    "mamba": "cache_params",
    "mamba2": "cache_params",
    "reformer": "past_buckets_states",
    "rwkv": "state",
    "xlnet": "mems",
    "xlstm": "cache_params",
}


def causal_lm_types() -> list[str]:
    """Return every `model_type` of `AutoModelForCausalLM`, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, num_hidden_layers: int = 4, **overrides: Any) -> PreTrainedConfig:
    """Build the tiny config of a decoder.

    Args:
        model_type (`str`): Key of `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`.
        num_hidden_layers (`int`, *optional*, defaults to 4): Number of decoder layers.
        overrides (`Any`): Attributes that replace the zoo's values, under the names of the class.

    Returns:
        `PreTrainedConfig` of the class of `model_type`.

    Raises:
        ValueError: If `model_type` is in `UNRUNNABLE`.
    """
    if model_type in UNRUNNABLE:
        raise ValueError(f"`{model_type}` has no tiny config: {UNRUNNABLE[model_type]}.")
    config_class = CONFIG_MAPPING[model_type]
    declared = {field.name for field in dataclasses.fields(config_class)}
    names = config_class.attribute_map
    values = SIZES | {names.get(name, name): value for name, value in SIZES.items()}
    values |= layer_patterns(config_class)
    for name in declared & IMPLIED.keys():
        values |= IMPLIED[name]
    values |= {names.get(name, name): num_hidden_layers for name in DEPTHS}
    values = {name: value for name, value in values.items() if name in declared}
    values |= FAMILIES.get(model_type, {})
    values = {name: spread(value, num_hidden_layers) for name, value in values.items()}
    return config_class(**(values | overrides))


def layer_patterns(config_class: type[PreTrainedConfig]) -> dict[str, tuple[str, ...]]:
    """Return patterns in which each kind of layer of a default config occurs."""
    default = config_class()
    kinds = {}
    for name in ("layer_types", "mlp_layer_types"):
        layers = getattr(default, name, None)
        if layers:
            kinds[name] = tuple(dict.fromkeys(layers))
    return kinds


def spread(value: Any, num_hidden_layers: int) -> Any:
    """Repeat a pattern over the layers, call a function, or copy any other value."""
    if callable(value):
        return value(num_hidden_layers)
    if isinstance(value, tuple):
        return [value[layer % len(value)] for layer in range(num_hidden_layers)]
    return copy.deepcopy(value)


def tiny_model(
    model_type: str, num_hidden_layers: int = 4, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """Build a tiny causal LM in eval mode. Biases and norm weights are random, not 0 and 1."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        tiny_config(model_type, num_hidden_layers, **overrides)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()

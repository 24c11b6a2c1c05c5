"""A tiny decoder and a tiny family with random weights, to try out code without downloads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .models.familial import FamilialForCausalLM


END_OF_TEXT = "<|endoftext|>"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def toy_decoder(seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Build a Llama with 4 layers, 58,000 parameters and random weights, and a byte tokenizer.

    Args:
        seed (`int`, *optional*, defaults to 0): Seed of the weights.

    Returns:
        `tuple`: The model, in evaluation mode, and its tokenizer of 257 tokens.

    Example:
        >>> decoder, tokenizer = toy_decoder()
        >>> family = FamilialForCausalLM.from_backbone(decoder, exits=[2, 4])
    """
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END_OF_TEXT]
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
    # without `eos_token_id`, `generate` always writes `max_new_tokens` tokens
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    fields = {"model_type": "llama", "vocab_size": len(letters), **SIZES, **ends}
    config = AutoConfig.for_model(**fields)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    torch.random.set_rng_state(state)
    return model.eval(), tokenizer


def toy_family(
    exits: Sequence[int] = (1, 2, 4), seed: int = 0
) -> tuple[FamilialForCausalLM, PreTrainedTokenizerBase]:
    """Build a family from `toy_decoder`. Its text makes no sense, but every function works on it.

    Args:
        exits (`Sequence[int]`, *optional*, defaults to `(1, 2, 4)`): Depths of the exits. The last
            must be 4, the number of layers.
        seed (`int`, *optional*, defaults to 0): Seed of the weights.

    Returns:
        `tuple`: The family, in evaluation mode, and its tokenizer of 257 tokens.

    Raises:
        ValueError: If `exits` do not increase from 1 or more up to 4.

    Example:
        >>> model, tokenizer = toy_family()
        >>> inputs = tokenizer("import os", return_tensors="pt")
        >>> tokenizer.decode(model.generate(**inputs, exit_idx=0, max_new_tokens=8)[0])
    """
    decoder, tokenizer = toy_decoder(seed)
    family = FamilialForCausalLM.from_backbone(decoder, exits=list(exits))
    return family.eval(), tokenizer

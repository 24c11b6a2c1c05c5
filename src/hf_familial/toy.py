"""A tiny decoder and a tiny family that learnt nothing, to try scripts on."""

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
    """Make a Llama of 4 layers and 58 thousand parameters, and a tokenizer of 257 bytes.

    Args:
        seed (`int`): Seed of the weights.

    Returns:
        `tuple`: The model, in evaluation mode, and its tokenizer.
    """
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END_OF_TEXT]
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
    # without an end of text in its config it writes as many tokens as it is asked for
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
    """Make a family of the same decoder: its text says nothing, but it does all a family does.

    Args:
        exits (`Sequence[int]`): Depth of every exit; the last must be 4.
        seed (`int`): Seed of the weights.

    Returns:
        `tuple`: The family, in evaluation mode, and its tokenizer.

    Raises:
        ValueError: If `exits` do not fit 4 layers.

    Example:
        >>> model, tokenizer = toy_family()
        >>> inputs = tokenizer("import os", return_tensors="pt")
        >>> tokenizer.decode(model.generate(**inputs, exit_idx=0, max_new_tokens=8)[0])
    """
    decoder, tokenizer = toy_decoder(seed)
    family = FamilialForCausalLM.from_backbone(decoder, exits=list(exits))
    return family.eval(), tokenizer

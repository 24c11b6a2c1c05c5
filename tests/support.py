"""Helpers that several test files use."""

import torch
from backbones import tiny_model
from reference import stir

from hf_familial import FamilialForCausalLM


def family_of(model_type="llama", tied=False, exits=(1, 3, 4), **fields):
    """Build a small family on a backbone of 4 layers. Noise in the exits makes them differ."""
    host = tiny_model(model_type, tie_word_embeddings=tied)
    return stir(FamilialForCausalLM.from_backbone(host, exits=list(exits), **fields))


def assert_same_tensors(found, right):
    """Check that two state dicts have equal names, dtypes, shapes and bits."""
    assert found.keys() == right.keys()
    for name, tensor in right.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        bits = (t.contiguous().view(-1).view(torch.uint8) for t in (found[name], tensor))
        assert not tensor.numel() or torch.equal(*bits), name

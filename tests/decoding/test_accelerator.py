"""A model's accelerator makes its relays faster, also for the code of a checkpoint."""

import pytest
import torch
from reference import tiny_family, token_ids
from relays import family_of
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import hf_familial as hff
from hf_familial.decoding._growing_cache import GrowingLayer
from hf_familial.decoding._learned_drafts import LearnedDecoder
from hf_familial.decoding.accelerator import ModelAccelerator
from hf_familial.models.familial.relay import GeneratedText
from hf_familial.models.familial.relay_policies import SpeculativeDecoder


GREEDY = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}


def test_the_code_of_a_checkpoint_is_as_fast(tmp_path):
    """It gets the package's fused passes, growing caches and learned lengths."""
    family_of().save_pretrained(tmp_path)
    cls = get_class_from_dynamic_module("modeling_familial.FamilialForCausalLM", str(tmp_path))
    copied = cls.from_pretrained(tmp_path).eval()
    found = copied.relay_generate(token_ids(1, 8), **GREEDY)
    assert torch.equal(found.sequences, copied.generate(token_ids(1, 8), **GREEDY).sequences)
    assert type(copied.accelerator) is ModelAccelerator
    assert copied.accelerator.fused.nbytes
    assert copied.accelerator.draft_lengths
    assert {type(layer) for layer in found.past_key_values.layers} == {GrowingLayer}


@torch.no_grad()
@pytest.mark.parametrize("fused", [None, True, False])
def test_fused_passes_are_asked_for(fused):
    family = tiny_family("llama", [1, 4])
    cache = hff.RelayCache(family, [0, 1], fused_weights=fused)
    spans = [] if fused is False else [(0, 0), (0, 1), (1, 1)]
    assert sorted(cache.passes) == spans
    assert not hff.RelayCache(family, [0, 1]).passes


@pytest.mark.parametrize(
    ("relay", "learns"),
    [
        (hff.SpeculativeRelay(0), True),
        (hff.SpeculativeRelay("auto", draft_length=2), True),
        (hff.SpeculativeRelay((0, 1), draft_length=2), True),
        (hff.SpeculativeRelay(0, draft_length=2), False),
        (hff.ConfidenceRelay(0.5), False),
    ],
    ids=str,
)
def test_decoders_that_adapt_learn(relay, learns, monkeypatch):
    family, made = family_of(), []
    accelerate = ModelAccelerator.decoder

    def decoder(self, plain):
        made.append(accelerate(self, plain))
        return made[-1]

    monkeypatch.setattr(ModelAccelerator, "decoder", decoder)
    family.relay_generate(token_ids(1, 8), relay=relay, **GREEDY)
    assert [type(one) is LearnedDecoder for one in made] == [learns]


def test_a_decoder_of_ones_own_keeps_its_place():
    """It rolls its own dice too: noise keyed by column, so that a text repeats without a seed."""

    class Keyed(GeneratedText):
        def draw(self, chances, column):
            generator = torch.Generator().manual_seed(column)
            return torch.multinomial(chances, 1, generator=generator)

        def uniform(self, drafts, column):
            return torch.rand(drafts.shape, generator=torch.Generator().manual_seed(column))

    class Own(SpeculativeDecoder):
        steps = 0

        def __init__(self, *args):
            super().__init__(*args)
            self.adapts = False
            self.text.__class__ = Keyed

        def step(self, **inputs):
            Own.steps += 1
            return super().step(**inputs)

    class Policy(hff.SpeculativeRelay):
        def decoder(self, cache, text):
            return Own(self, cache, text)

    family = family_of()
    asked = GREEDY | {"do_sample": True, "relay": Policy(0)}
    texts = [family.relay_generate(token_ids(2, 8), **asked).sequences for _ in range(2)]
    assert torch.equal(*texts)
    assert Own.steps

"""A relay against `generate`: random arguments, greedy text, samples by seed or count."""

import random

import pytest
import torch
from reference import token_ids
from test_processors import GREEDY, MEMORY, SAMPLED, SYNTHID, Countdown, Grammar, Told, stops
from test_relay import DEEPEST, DRAFTS, family_of, padding
from transformers import LogitsProcessorList, StoppingCriteriaList

from hf_familial import SpeculativeRelay


FAMILIES = ("llama", "gemma2", "qwen3_moe", "gpt2", "mistral", "gemma3_text")
pytestmark = pytest.mark.filterwarnings("ignore")


def case(seed, family):
    """Arguments of one call, made anew each time since processors and criteria remember."""
    rng = random.Random(seed)
    batch, length = rng.choice([1, 2, 4]), rng.randint(2, 14)
    ids = token_ids(batch, length, seed=seed)
    new = rng.randint(1, 18)
    asked = {"max_new_tokens": new, "do_sample": False}
    if rng.random() < 0.5:
        asked["attention_mask"] = padding(ids) if length > 6 else torch.ones_like(ids)
    for name in rng.sample(sorted(GREEDY), rng.choice([0, 0, 1, 2, 3])):
        if "Encoder" not in name or "attention_mask" not in asked:
            asked |= GREEDY[name]
    if rng.random() < 0.5 or "exponential_decay_length_penalty" in asked:
        asked |= stops(family, ids)
    processors = [one() for one in rng.sample([Grammar, Told], rng.choice([0, 0, 0, 1, 2]))]
    asked["logits_processor"] = LogitsProcessorList(processors)
    criteria = []
    if rng.random() < 0.4:
        ends = [rng.randint(1, new + 2) for _ in range(batch)]
        eos = torch.tensor([127]) if rng.random() < 0.3 else None
        criteria.append(Countdown(ends, eos))
    asked["stopping_criteria"] = StoppingCriteriaList(criteria)
    if rng.random() < 0.3:
        asked |= {"return_dict_in_generate": True, "output_scores": True}
    return ids, asked


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_greedy_text_is_generates(model_type):
    family, drafted = family_of(model_type), 0
    family.generation_config.pad_token_id = 0
    for seed in range(120):
        relay = list(DEEPEST.values())[seed % len(DEEPEST)]
        ids, asked = case(seed, family)
        right = family.generate(ids, **asked)
        ids, asked = case(seed, family)
        more = {"return_dict_in_generate": True}
        found = family.relay_generate(ids, relay=relay, **asked | more)
        right = right if isinstance(right, torch.Tensor) else right.sequences
        assert torch.equal(found.sequences, right), (seed, relay, asked)
        drafted += found.relay_stats.drafted
    assert drafted > 200


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MEMORY & GREEDY.keys()) + ["SynthID"])
def test_sampled_text_of_processors_with_a_memory_is_generates_by_seed(name):
    """Written without drafts, a relay draws as often as `generate` does."""
    family, asked = family_of(), {"watermarking_config": SYNTHID, **GREEDY.get(name, {})}
    if name != "SynthID":
        del asked["watermarking_config"]
    for seed in range(12):
        ids = token_ids(1 + seed % 3, 9, seed=seed)
        warp = SAMPLED[sorted(SAMPLED)[seed % len(SAMPLED)]]
        torch.manual_seed(seed)
        right = family.generate(ids, max_new_tokens=14, do_sample=True, **asked, **warp)
        torch.manual_seed(seed)
        relay = list(DRAFTS.values())[seed % 6]
        found = family.relay_generate(
            ids, relay=relay, max_new_tokens=14, do_sample=True, **asked, **warp
        )
        assert torch.equal(found, right)


def homogeneity(ours, theirs, width):
    """Chi-squared over its degrees of freedom: whether two samples have one distribution."""
    counts = torch.stack([torch.bincount(one, minlength=width) for one in (ours, theirs)]).double()
    # rare tokens are one bin
    common = counts.sum(0) >= 20
    rest = counts[:, ~common].sum(1, keepdim=True)
    counts = torch.cat((counts[:, common], rest), 1) if rest.sum() >= 20 else counts[:, common]
    expected = counts.sum(1, keepdim=True) * counts.sum(0, keepdim=True) / counts.sum()
    return float(((counts - expected) ** 2 / expected).sum()), counts.shape[1] - 1


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", [*SAMPLED, "WatermarkLogitsProcessor", "RepetitionPenalty"])
def test_sampled_text_of_drafts_has_generates_distribution(name, batch):
    """Second and third token, whose processors saw drafts, against as many texts of `generate`."""
    family, ids = family_of(), token_ids(1, 6).expand(batch, -1)
    warp = SAMPLED.get(name) or GREEDY.get(name) or {"repetition_penalty": 1.5}
    # few tokens, so that the counts are large
    asked = {"max_new_tokens": 3, "do_sample": True, "suppress_tokens": list(range(20, 128))}
    torch.manual_seed(5)
    count, relay = 1200, SpeculativeRelay(0, draft_length=2)
    plain = family.generate(ids.repeat(count // batch, 1), **asked, **warp)[:, 6:]
    drafted = torch.cat(
        [
            family.relay_generate(ids, relay=relay, **asked, **warp)[:, 6:]
            for _ in range(count // batch)
        ]
    )
    for column in (1, 2):
        found, freedom = homogeneity(drafted[:, column], plain[:, column], 128)
        assert found < freedom + 5 * (2 * freedom) ** 0.5 + 5, (column, found, freedom)

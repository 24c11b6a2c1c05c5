"""Sampled text of a relay has the distribution that `generate` samples from.

Texts are long, so that every way of drafting is reached, and each token is turned into a number
that is uniform on [0, 1) if the token has the deepest exit's distribution given the text before it
(Rosenblatt, Ann. Math. Stat. 23, 1952). Batches are small: their rows keep the fewest drafts that
any row accepts, so a large batch would never test a second draft.
"""

from dataclasses import dataclass

import pytest
import torch
from reference import agreeing, endless, logits
from transformers import LogitsProcessorList
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hf_familial import (
    ConfidenceRelay,
    FamilialConfig,
    FamilialForCausalLM,
    FixedExit,
    HandoffRelay,
    SpeculativeRelay,
)


VOCABULARY, NEW = 12, 40
PROMPT = torch.tensor([[3, 1, 4]])
slow = pytest.mark.slow

WARPS = {
    "plain": ({}, []),
    "temperature": ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
    "hot": ({"temperature": 1.8}, [TemperatureLogitsWarper(1.8)]),
    "top-k": ({"top_k": 4}, [TopKLogitsWarper(4)]),
    "top-p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "typical": ({"typical_p": 0.7}, [TypicalLogitsWarper(0.7)]),
    "min-p": ({"min_p": 0.15}, [MinPLogitsWarper(0.15)]),
    "eta": ({"eta_cutoff": 0.05}, [EtaLogitsWarper(0.05)]),
    "epsilon": ({"epsilon_cutoff": 0.04}, [EpsilonLogitsWarper(0.04)]),
}
DRAFTING = {
    "auto": SpeculativeRelay(0),
    "one": SpeculativeRelay(0, draft_length=1),
    "three": SpeculativeRelay(0, draft_length=3),
    "any-exit": SpeculativeRelay("auto"),
    "any-exit-two": SpeculativeRelay("auto", draft_length=2),
    "chain": SpeculativeRelay((0, 1), draft_length=2),
    "chain-auto": SpeculativeRelay((0, 1)),
    "middle": SpeculativeRelay(1),
}
PLAIN = {
    "never-sure": ConfidenceRelay(1.1),
    "fixed": FixedExit(),
    "at-once": HandoffRelay(after=0),
}


@pytest.fixture(scope="module")
def family():
    """Three exits that agree often, but far from always, over few tokens."""
    config = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 3, "num_attention_heads": 2, "initializer_range": 0.6,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    model = FamilialForCausalLM(FamilialConfig(text_config=config, exits=[1, 2, 3])).eval()
    return endless(agreeing(model, share=0.5))


@dataclass
class Sample:
    """Texts of a relay, the chances of their tokens, and which exits wrote them."""

    tokens: torch.Tensor
    chances: torch.Tensor
    exits: torch.Tensor

    def uniforms(self):
        """A number per token, uniform and independent if the text has its distribution."""
        below = self.chances.cumsum(-1).gather(-1, self.tokens[..., None]).squeeze(-1)
        own = self.chances.gather(-1, self.tokens[..., None]).squeeze(-1)
        noise = torch.rand(own.shape, generator=torch.Generator().manual_seed(7))
        return (below - own * noise).clamp(0, 1 - 1e-6)

    def surprise(self):
        """Mean of `-log p - H(p)`, and its standard error; the mean is 0 if all is well."""
        logs = self.chances.clamp(min=1e-30).log()
        entropy = -(self.chances * logs).sum(-1)
        found = -logs.gather(-1, self.tokens[..., None]).squeeze(-1) - entropy
        return found.mean().item(), (found.std() / found.numel() ** 0.5).item()

    def accepted(self):
        """Number of drafts that stood at each place after a checked token."""
        counts = torch.zeros(NEW, dtype=torch.long)
        for row in (self.exits < 2).tolist():
            place = 0
            for drafted in row:
                counts[place] += drafted
                place = place + 1 if drafted else 0
        return counts


@torch.no_grad()
def sample(family, relay, warp, batch, texts):
    """Texts by relay, and the chances of every token from one uncached pass of the deepest exit."""
    asked, processors = WARPS[warp]
    asked = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW, **asked}
    torch.manual_seed(11)
    found = [
        family.relay_generate(
            PROMPT.expand(batch, -1), relay=relay, return_dict_in_generate=True, **asked
        )
        for _ in range(texts // batch)
    ]
    ids = torch.cat([output.sequences for output in found])
    scores = logits(family, ids)[:, PROMPT.shape[1] - 1 : -1].float()
    rows = LogitsProcessorList(processors)(None, scores.reshape(-1, VOCABULARY))
    exits = torch.cat([output.relay_stats.token_exits for output in found])
    return Sample(ids[:, PROMPT.shape[1] :], rows.softmax(-1).view_as(scores), exits)


def deviation(counts):
    """Chi-squared of equally likely cells, in standard deviations above its mean."""
    expected = counts.sum() / counts.numel()
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = counts.numel() - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


def check(found):
    """Fail unless single tokens, pairs of neighbours and the mean surprise are as they must be."""
    numbers = found.uniforms()
    assert deviation(torch.histc(numbers, 16, 0, 1)) < 4.5
    cells = (numbers * 6).long()
    assert deviation(torch.bincount((cells[:, 1:] * 6 + cells[:, :-1]).flatten()).float()) < 4.5
    mean, error = found.surprise()
    assert abs(mean) < 4.5 * error


FAST = [
    ("auto", "plain", 1),
    ("auto", "plain", 2),
    ("auto", "top-p", 4),
    ("three", "temperature", 2),
    ("any-exit", "plain", 1),
    ("chain-auto", "min-p", 1),
]
ALL = [(name, warp, 1) for name in DRAFTING for warp in WARPS]
ALL += [(name, "plain", batch) for name in DRAFTING for batch in (2, 4)]


@pytest.mark.parametrize(
    ("name", "warp", "batch"),
    [*FAST, *[pytest.param(*case, marks=slow) for case in ALL if case not in FAST]],
)
def test_drafted_text_has_the_deepest_exits_distribution(family, name, warp, batch):
    found = sample(family, DRAFTING[name], warp, batch, texts=60)
    check(found)
    accepted = found.accepted()
    places = 1 if name == "one" else 2
    assert (accepted[:places] > 20).all()


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow) for name in PLAIN])
@pytest.mark.parametrize("warp", ["plain", "top-p"])
def test_undrafted_text_has_the_deepest_exits_distribution(family, name, warp):
    check(sample(family, PLAIN[name], warp, 2, texts=60))

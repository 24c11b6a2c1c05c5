"""The types of docs/recipes.md: exits train, and an exported member equals its exit."""

import re
from pathlib import Path

import pytest
import torch
from backbones import tiny_model
from docs.blocks import ROOT
from transformers import AutoModelForCausalLM

from hf_familial import FamilialForCausalLM, SpeculativeRelay, export_exit
from hf_familial.training import train_exits_only


TYPES = ("llama", "qwen3", "qwen2", "gemma3_text", "mistral", "olmo2", "olmoe", "falcon_h1")


def test_the_page_names_these_types() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    listed = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
    known = set(re.findall(r"^\| `([\w-]+)` \| yes ", listed, re.M))
    assert set(re.findall(r"`([\w-]+)`", page)) & known == set(TYPES)
    assert f"the other {len(known) - len(TYPES)}." in page


@pytest.mark.parametrize("model_type", TYPES)
def test_a_recipe_works(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    family = FamilialForCausalLM.from_backbone(
        tiny_model(model_type, 4), exits=[2, 4], num_exit_layers=1
    )
    train_exits_only(family)
    ids = torch.randint(1, family.config.vocab_size, (2, 6))
    optimizer = torch.optim.SGD([p for p in family.parameters() if p.requires_grad], lr=0.1)
    family(ids, labels=ids).loss.backward()
    optimizer.step()
    family.eval()
    export_exit(family, 0, tmp_path / "member")
    member = AutoModelForCausalLM.from_pretrained(tmp_path / "member").eval()
    with torch.no_grad():
        assert torch.equal(member(ids).logits, family(ids, exit_idx=0).logits)
    relay = SpeculativeRelay(draft_exit=0)
    if model_type == "falcon_h1":
        with pytest.raises(ValueError, match="recurrent"):
            family.relay_generate(ids, relay=relay, max_new_tokens=2)
    else:
        assert family.relay_generate(ids, relay=relay, max_new_tokens=2).shape == (2, 8)

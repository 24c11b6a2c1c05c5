"""Cards: what they say, and what of them is their owner's."""

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from hf_familial import FamilialConfig, describe
from hf_familial.hub._cards import (
    BEGIN,
    END,
    Provenance,
    RepoRevision,
    family_card,
    index_card,
    member_card,
    merge_card,
    read_metadata,
)


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 100}
PLACES = {0: RepoRevision("me/fam-depth2"), 1: RepoRevision("me/fam-depth4")}
FULL = Provenance("some/base", RepoRevision("me/fam"), PLACES, {"license": "mit"})


def described(losses=(2.0, 1.0), **fields):
    config = FamilialConfig(
        text_config=LlamaConfig(**SIZES, num_attention_heads=4), exits=[2, 4], **fields
    )
    found = describe(config, context=8)
    rows = (replace(row, eval_loss=x) for row, x in zip(found.exits, losses, strict=True))
    return replace(found, exits=tuple(rows))


def body(card: ModelCard) -> str:
    return card.text.strip()


def test_metadata_of_a_member():
    data = member_card(described(), 0, FULL, "LlamaForCausalLM").data.to_dict()
    assert data["license"] == "mit"
    assert data["base_model"] == "some/base"
    assert data["base_model_relation"] == "finetune"
    assert data["pipeline_tag"] == "text-generation"
    assert data["library_name"] == "transformers"
    assert data["tags"] == ["familial", "early-exit"]
    (model,) = data["model-index"]
    assert model["name"] == "fam-depth2"
    metrics = [row["metrics"][0] for row in model["results"] for row in [row]]
    values = {m["type"]: m["value"] for row in model["results"] for m in row["metrics"]}
    assert values == {"loss": 2.0, "perplexity": pytest.approx(7.389056)}
    assert metrics


def test_results_of_a_family_are_those_of_every_member():
    results = family_card(described(), FULL).data.eval_results
    losses = {r.dataset_name: r.metric_value for r in results if r.metric_type == "loss"}
    assert losses == {
        "held-out text (exit 0, depth 2)": 2.0,
        "held-out text (exit 1, depth 4)": 1.0,
    }


def test_what_is_not_known_is_not_said():
    bare = Provenance(members=PLACES)
    card = member_card(described((None, None)), 1, bare, "LlamaForCausalLM")
    data = card.data.to_dict()
    assert {"license", "base_model", "base_model_relation", "model-index"} & set(data) == set()
    assert "## Relay" not in card.text
    assert "None" not in card.text
    assert card.text.count("| – |") == 2


def test_a_family_is_the_base_of_members_without_another():
    lineage = replace(FULL, base_model=None)
    assert member_card(described(), 0, lineage, "X").data.base_model == "me/fam"
    # in a branch of the family's own repository that would be the repository itself
    branches = {k: RepoRevision("me/fam", f"depth{depth}") for k, depth in enumerate((2, 4))}
    lineage = replace(lineage, members=branches)
    assert member_card(described(), 0, lineage, "X").data.base_model is None


def test_a_loss_beyond_any_perplexity():
    results = member_card(described((float(800), 1.0)), 0, FULL, "X").data.eval_results
    assert [r.metric_type for r in results] == ["loss"]


def test_the_shallowest_has_no_draft_and_private_layers_are_named():
    first = member_card(described(num_exit_layers=1), 0, FULL, "LlamaForCausalLM")
    last = member_card(described(num_exit_layers=1), 1, FULL, "LlamaForCausalLM")
    assert "assistant_model" not in first.text
    assert 'draft = AutoModelForCausalLM.from_pretrained("me/fam-depth2")' in last.text
    assert "It has the first 2 of the backbone's 4 layers and 1 private layer." in first.text
    assert "It has all 4 layers of the backbone." in last.text


def test_branches_are_loaded_by_revision():
    branches = {k: RepoRevision("me/all", f"depth{depth}") for k, depth in enumerate((2, 4))}
    lineage = Provenance(members=branches)
    card = member_card(described(), 0, lineage, "X")
    assert 'from_pretrained("me/all", revision="depth2")' in card.text
    assert "(https://huggingface.co/me/all/tree/depth4)" in card.text
    index = index_card(described(), lineage, "me/all")
    assert "The main branch has no model" in index.text
    assert index.data.eval_results is None


def test_code_on_a_card_compiles():
    for card in (
        family_card(described(), FULL),
        member_card(described(), 1, FULL, "LlamaForCausalLM"),
        index_card(described(), FULL, "me/all"),
    ):
        blocks = card.text.split("```python\n")[1:]
        assert blocks
        for block in blocks:
            compile(block.split("```")[0], "card", "exec")


def test_without_a_tokenizer_a_model_reads_ids():
    for card in (
        family_card(described(), FULL, tokenizer=False),
        member_card(described(), 1, FULL, "LlamaForCausalLM", tokenizer=False),
    ):
        assert "okenizer.from_pretrained" not in card.text
        assert "AutoTokenizer" not in card.text
        assert 'inputs = {"input_ids": torch.tensor([[1, 2, 3]])}' in card.text
        for block in card.text.split("```python\n")[1:]:
            compile(block.split("```")[0], "card", "exec")


def test_a_relay_needs_no_package():
    for card in (family_card(described(), FULL), member_card(described(), 0, FULL, "X")):
        relay = card.text.split("## Relay")[1].split("## ")[0]
        assert '"me/fam", trust_remote_code=True' in relay
        assert "hf_familial" not in relay
        assert "pip" not in card.text


def test_the_table_has_one_row_per_member_and_is_whole():
    lines = [line for line in body(family_card(described(), FULL)).splitlines() if line[:1] == "|"]
    assert len(lines) == 2 + 2
    assert {line.count("|") for line in lines} == {11}


# merging


def fresh(losses=(2.0, 1.0)) -> ModelCard:
    return member_card(described(losses), 0, FULL, "LlamaForCausalLM")


def test_a_new_card_is_valid_and_whole():
    text = merge_card(fresh(), None)
    card = ModelCard(text)
    assert body(card).startswith(BEGIN)
    assert body(card).endswith(END)
    assert card.data.to_dict() == fresh().data.to_dict()


def test_what_the_owner_wrote_stays_around_the_part():
    owned = merge_card(fresh(), "---\nlicense: apache-2.0\ntags:\n- mine\n---\n\nBefore.\n")
    owned = owned.rstrip() + "\n\nAfter.\n"
    text = merge_card(fresh((9.0, 8.0)), owned)
    card = ModelCard(text)
    assert body(card).startswith("Before.")
    assert body(card).endswith("After.")
    assert card.text.count(BEGIN) == card.text.count(END) == 1
    assert card.data.license == "apache-2.0"
    assert card.data.tags == ["familial", "early-exit", "mine"]
    assert "9.0000" in card.text
    assert "2.0000" not in card.text


def test_results_that_somebody_measured_stay_where_there_are_no_own():
    theirs = merge_card(fresh(), None)
    kept = ModelCard(merge_card(fresh((None, None)), theirs)).data
    assert kept.eval_results == ModelCard(theirs).data.eval_results


@pytest.mark.parametrize(
    "owned",
    [
        "",
        "Only text, no metadata.\n",
        "---\n[not: yaml\n---\nText.\n",
        "---\n- a list\n---\nText.\n",
        "---\r\nlicense: mit\r\n---\r\nText.\r\n",
        f"{END} wrong way round {BEGIN}",
        f"{BEGIN} without an end",
    ],
)
def test_any_card_can_be_merged_into(owned):
    text = merge_card(fresh(), owned)
    card = ModelCard(text)
    assert card.data.library_name == "transformers"
    assert body(fresh()) in card.text
    for word in ("Text.", "Only text"):
        assert (word in owned) == (word in card.text)
    assert merge_card(fresh(), text) == text


@given(
    before=st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=40),
    after=st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=40),
)
def test_merging_again_changes_nothing(before, after):
    owned = f"---\nlicense: mit\n---\n{before}\n{body(fresh())}\n{after}\n"
    once = merge_card(fresh(), owned)
    assert merge_card(fresh(), once) == once
    assert before.strip() in once
    assert after.strip() in once


def test_metadata_that_cannot_be_read_is_none():
    assert read_metadata(None) == {}
    assert read_metadata("no") == {}
    assert read_metadata("---\n[\n---\n") == {}
    assert read_metadata("---\nlicense: mit\n---\n") == {"license": "mit"}

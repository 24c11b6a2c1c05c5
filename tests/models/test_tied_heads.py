"""The output head of a family is tied where its host ties it, whatever a config says."""

import json

import pytest
import torch
from backbones import tiny_config, tiny_model
from reference import logits, stir, token_ids
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_familial import FamilialForCausalLM
from hf_familial.errors import CutError
from hf_familial.hub import export_exit
from hf_familial.models.backbone_verification import VERIFIED
from hf_familial.models.familial.backbones import can_tie


# hosts whose class ties nothing, also where a config says so
NEVER = ("bailing_hybrid", "inkling_text", "kimi_linear", "nemotron_h", "xlstm")


def check_type(model_type, tied, tmp_path):
    """Family, loaded family and exports of a saved host, against that host."""
    tiny_model(model_type, tie_word_embeddings=tied).save_pretrained(tmp_path / "host")
    host = AutoModelForCausalLM.from_pretrained(tmp_path / "host")
    right = logits(host, token_ids())
    shared = host.get_output_embeddings().weight is host.get_input_embeddings().weight
    host.save_pretrained(tmp_path / "host")
    family = FamilialForCausalLM.from_backbone(tmp_path / "host", exits=[2, 4])
    assert torch.equal(logits(family, token_ids()), right)
    assert (family.lm_head.weight is family.get_input_embeddings().weight) == shared
    family.save_pretrained(tmp_path / "family")
    family = FamilialForCausalLM.from_pretrained(tmp_path / "family")
    assert torch.equal(logits(family, token_ids()), right)
    files = load_file(tmp_path / "host" / "model.safetensors")
    fields = json.loads((tmp_path / "host" / "config.json").read_text())
    for source in (family, tmp_path / "family"):
        out = tmp_path / f"out-{type(source).__name__}"
        export_exit(source, -1, out)
        found = load_file(out / "model.safetensors")
        assert found.keys() == files.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in files.items())
        assert json.loads((out / "config.json").read_text()) == fields


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", *NEVER])
def test_the_deepest_exit_is_the_host_and_its_export_the_hosts_files(model_type, tied, tmp_path):
    check_type(model_type, tied, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", sorted(VERIFIED - {"dbrx"}))  # dbrx refuses to be tied
def test_every_type(model_type, tied, tmp_path):
    check_type(model_type, tied, tmp_path)


@pytest.mark.slow
def test_a_class_says_whether_it_ties():
    for model_type in VERIFIED - {"dbrx"}:
        config = tiny_config(model_type, 4, tie_word_embeddings=True)
        with torch.device("meta"):
            host = AutoModelForCausalLM.from_config(config)
        shared = host.get_output_embeddings().weight is host.get_input_embeddings().weight
        assert can_tie(config) == shared, model_type


def never_tied(**fields):
    host = tiny_model("xlstm", tie_word_embeddings=True)
    return stir(FamilialForCausalLM.from_backbone(host, exits=[2, 4], **fields))


@pytest.mark.parametrize("head", ["shared", "own"])
@pytest.mark.parametrize("by_segment", [True, False])
def test_members_of_a_host_that_never_ties_have_its_head(head, by_segment, tmp_path):
    family = never_tied(exit_head=head)
    family.save_pretrained(tmp_path / "family", by_segment=by_segment)
    for exit_idx in (0, 1):
        export_exit(tmp_path / "family", exit_idx, tmp_path / f"{exit_idx}")
        member = AutoModelForCausalLM.from_pretrained(tmp_path / f"{exit_idx}")
        right = logits(family, token_ids(), exit_idx=exit_idx)
        assert torch.equal(logits(member, token_ids()), right)
        cut = FamilialForCausalLM.from_pretrained(tmp_path / "family", max_exit=exit_idx)
        assert torch.equal(logits(cut, token_ids()), right)


def test_a_checkpoint_of_such_a_host_without_its_head_is_refused(tmp_path):
    family = never_tied()
    weights = {n: t for n, t in family.state_dict().items() if n != "lm_head.weight"}
    family.save_pretrained(tmp_path / "family", state_dict=weights)
    with pytest.raises(CutError, match="its output head"):
        export_exit(tmp_path / "family", 0, tmp_path / "out")


def test_a_checkpoint_that_holds_a_head_of_its_own_is_not_tied(tmp_path):
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "host")
    path = tmp_path / "host" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    host = AutoModelForCausalLM.from_pretrained(tmp_path / "host")
    right = logits(host, token_ids())
    family = FamilialForCausalLM.from_backbone(tmp_path / "host", exits=[2, 4])
    family.save_pretrained(tmp_path / "family")
    for source in (family, FamilialForCausalLM.from_pretrained(tmp_path / "family")):
        assert torch.equal(logits(source, token_ids()), right)
    export_exit(tmp_path / "family", -1, tmp_path / "out")
    member = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(member, token_ids()), right)
    assert member.config.tie_word_embeddings is False

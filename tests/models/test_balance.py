"""The load-balancing loss is the host's own, and there is none where nothing is routed."""

import json

import pytest
import torch
from backbones import tiny_config, tiny_model
from reference import copy_of, stir, tiny_family, token_ids, truncated_host
from transformers import AutoModelForCausalLM

from hf_familial import FamilialForCausalLM
from hf_familial.hub import export_exit
from hf_familial.models.backbone_verification import VERIFIED


EXITS = [1, 2, 4]
# dense first layers; a weight of another name; experts of another config; other arguments; no loss
SOME = {
    "qwen2_moe": {},
    "ernie4_5_moe": {},
    "jetmoe": {},
    "dbrx": {},
    "doge": {"is_moe": True},
    "llama4_text": {},
    "zaya": {},
}
ROUTED = sorted(t for t in VERIFIED if hasattr(tiny_config(t, 4), "output_router_logits"))


def check_type(model_type, **fields):
    """The loss of the deepest exit is the host's, that of every exit is one."""
    host, ids = tiny_model(model_type, **fields), token_ids()
    mask = (torch.arange(20) < torch.tensor([[20], [13]])).long()
    inputs = {"labels": ids, "attention_mask": mask, "use_cache": False}
    family = FamilialForCausalLM.from_backbone(copy_of(host), exits=EXITS)
    right = host(ids, output_router_logits=True, **inputs)
    found = family(ids, output_router_logits=True, exit_idx=-1, **inputs)
    torch.testing.assert_close(found.loss, right.loss)
    aux_loss = getattr(right, "aux_loss", None)
    assert (found.aux_loss is None) == (not isinstance(aux_loss, torch.Tensor))
    if found.aux_loss is not None:
        torch.testing.assert_close(found.aux_loss, aux_loss)
    for exit_idx in (0, 1, None):
        output = family(ids, output_router_logits=True, exit_idx=exit_idx, **inputs)
        plain = family(ids, exit_idx=exit_idx, **inputs)
        if output.aux_loss is None:
            assert torch.equal(output.loss, plain.loss)
        else:
            assert output.router_logits
            assert torch.isfinite(output.loss)


@pytest.mark.parametrize("model_type", SOME)
def test_the_balance_loss_is_the_hosts_own(model_type):
    check_type(model_type, **SOME[model_type])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ROUTED)
def test_every_type_that_routes(model_type):
    check_type(model_type)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe", "deepseek_v3", "mellum"])
@pytest.mark.parametrize("private", [0, 1])
def test_a_member_of_dense_layers_alone_has_no_balance_loss(model_type, private):
    mixed = {"mlp_layer_types": ["dense", "dense", "sparse", "sparse"]}
    if model_type.startswith("qwen"):
        mixed = {"mlp_only_layers": [0, 1]}
    elif model_type == "deepseek_v3":
        mixed = {"first_k_dense_replace": 2}
    family = stir(
        FamilialForCausalLM.from_backbone(
            tiny_model(model_type, **mixed), exits=EXITS, num_exit_layers=private
        )
    )
    ids = token_ids()
    inputs = {"labels": ids, "exit_idx": 0, "use_cache": False}
    found = family(ids, output_router_logits=True, **inputs)
    assert found.aux_loss is None
    assert torch.equal(found.loss, family(ids, **inputs).loss)
    found.loss.backward()
    torch.testing.assert_close(found.loss, truncated_host(family, 0)(ids, labels=ids).loss)
    whole = family(ids, labels=ids, output_router_logits=True)
    assert torch.isfinite(whole.loss)


@pytest.mark.parametrize("source", ["files", "memory"])
def test_a_dense_member_asks_for_no_router_logits(source, tmp_path):
    host = tiny_model("qwen3_moe", mlp_only_layers=[0, 1], output_router_logits=True)
    family = stir(FamilialForCausalLM.from_backbone(host, exits=[2, 4]))
    family.save_pretrained(tmp_path / "family")
    ids = token_ids()
    for k, asks in ((0, False), (1, True)):
        export_exit(family if source == "memory" else tmp_path / "family", k, tmp_path / f"{k}")
        fields = json.loads((tmp_path / f"{k}" / "config.json").read_text())
        assert fields["output_router_logits"] is asks
        member = AutoModelForCausalLM.from_pretrained(tmp_path / f"{k}")
        loss = member(ids, labels=ids).loss
        torch.testing.assert_close(loss, family(ids, labels=ids, exit_idx=k).loss)
        loss.backward()
    assert family.config.text_config.output_router_logits is True


# what a relay says of hosts that route and of others, where it cannot run


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        (
            "minimax",
            "`minimax` does not work with a relay: it does not use a cache of Transformers",
        ),
        ("xlstm", "`xlstm` does not work with a relay: it does not use a cache of Transformers"),
        ("openai-gpt", "it does not use a cache of Transformers"),
        ("mpt", "Pass `use_cache=True`"),
    ],
)
def test_a_relay_says_why_it_cannot_run(model_type, reason):
    family = tiny_family(model_type, [2, 4])
    with pytest.raises(ValueError, match=reason):
        family.relay_generate(token_ids(), max_new_tokens=3)
    if model_type == "mpt":
        inputs = {"max_new_tokens": 3, "use_cache": True, "do_sample": False}
        found = family.relay_generate(token_ids(), **inputs)
        assert torch.equal(found, family.generate(token_ids(), **inputs))

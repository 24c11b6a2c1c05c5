"""Config and names of plain members: data from data, for every type of decoder."""

import copy
import json

import pytest
import torch
from backbones import tiny_config, tiny_model
from reference import logits, tiny_family, token_ids
from transformers import AutoConfig, AutoModelForCausalLM

from hf_familial import FamilialConfig, FamilialForCausalLM
from hf_familial.checkpoints import plain_config, plain_tensors
from hf_familial.checkpoints.cuts import (
    DEPTH_MATTERS,
    INDEX_MATTERS,
    TIED_TOO,
    check_cut,
    cut_config,
    cut_names,
    find_layout,
    truncated_config,
)
from hf_familial.checkpoints.plain import FILE_NAMES, add_old_names
from hf_familial.checkpoints.safetensors_file import read_header
from hf_familial.errors import CutError
from hf_familial.hub import export_exit
from hf_familial.models.backbone_verification import VERIFIED
from hf_familial.models.familial.backbones import HOSTS


# one table holds an embedding of the tokens for every layer
LAYERWISE = {"gemma4_text", "gemma4_unified_text"}
FAST = ("llama", "gpt2", "gpt_neox", "nemotron_h", "bailing_hybrid", "biogpt", "opt", "mamba")


def config_of(model_type="llama", exits=(1, 3, 4), depth=4, **fields):
    return FamilialConfig(text_config=tiny_config(model_type, depth), exits=list(exits), **fields)


def state_names(config):
    with torch.device("meta"):
        family = FamilialForCausalLM(config)
    return [n for n in family.state_dict() if not (config.tie_word_embeddings and "lm_head" in n)]


LLAMA_LAYER = (
    "input_layernorm", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm",
    "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj",
)  # fmt: skip


@pytest.mark.parametrize("norm", ["own", "shared"])
@pytest.mark.parametrize("head", ["own", "shared"])
@pytest.mark.parametrize("private", [0, 2])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("exit_idx", [0, 1, -1])
def test_names_are_the_expected_ones(norm, head, private, tied, exit_idx):
    config = config_of(
        exit_norm=norm, exit_head=head, num_exit_layers=private, tie_word_embeddings=tied
    )
    k = config.resolve_exit(exit_idx)
    early, depth = k < 2, config.exits[k]
    right = {"model.backbone.embed_tokens.weight": "model.embed_tokens.weight"}
    for part in LLAMA_LAYER:
        for i in range(depth):
            right[f"model.backbone.layers.{i}.{part}.weight"] = f"model.layers.{i}.{part}.weight"
        for j in range(private if early else 0):
            source = f"model.exits.{k}.layers.{j}.{part}.weight"
            right[source] = f"model.layers.{depth + j}.{part}.weight"
    own_norm, own_head = early and norm == "own", early and head == "own"
    source = f"model.exits.{k}.norm.weight" if own_norm else "model.backbone.norm.weight"
    right[source] = "model.norm.weight"
    if own_head or not tied:
        right[f"exit_heads.{k}.weight" if own_head else "lm_head.weight"] = "lm_head.weight"
    names = state_names(config)
    assert plain_tensors(config, exit_idx, names) == right
    fields = plain_config(config, exit_idx)
    assert fields.num_hidden_layers == depth + (private if early else 0)
    assert fields.tie_word_embeddings is (tied and not own_head)


@pytest.mark.parametrize("exit_idx", [0, 1, 2])
def test_a_cut_twice_is_a_cut_once(exit_idx):
    config = config_of(exits=(1, 2, 3, 4), num_exit_layers=1, exit_head="own")
    names = state_names(config)
    twice = cut_config(cut_config(config, 2), exit_idx)
    once = cut_config(config, exit_idx)
    assert twice.to_dict() == once.to_dict()
    first = cut_names(config, 2, names, find_layout(cut_config(config, 2).text_config))
    layout = find_layout(once.text_config)
    second = cut_names(cut_config(config, 2), exit_idx, first.values(), layout)
    composed = {old: second[new] for old, new in first.items() if new in second}
    assert composed == cut_names(config, exit_idx, names, layout)


def test_nothing_is_changed_and_no_weights_are_made():
    config = config_of("qwen3", num_exit_layers=1)
    names = state_names(config)
    before = copy.deepcopy(config.to_dict())
    plain_config(config, 0)
    plain_tensors(config, 0, names)
    assert config.to_dict() == before


def test_the_default_exit_of_a_cut():
    for default, right in (
        (-1, [-1, -1, -1]),
        (0, [-1, 0, 0]),
        (1, [-1, -1, 1]),
        (-2, [-1, -1, 1]),
    ):
        config = config_of(default_exit=default)
        assert [cut_config(config, k).default_exit for k in range(3)] == right
        resolved = config.resolve_exit()
        for k in range(resolved, 3):
            assert cut_config(config, k).resolve_exit() == resolved


def test_missing_tensors_are_named():
    config = config_of()
    names = [n for n in state_names(config) if ".layers.0." not in n and "lm_head" not in n]
    with pytest.raises(CutError, match="layer 0, its output head, which exit 0"):
        plain_tensors(config, 0, names)


def test_a_private_layer_of_another_kind_is_refused():
    text_config = tiny_config("qwen3_moe", 4, decoder_sparse_step=3, mlp_only_layers=[])
    # layers 2, 5, ... have experts; the private layer at index 4 is a copy of layer 3, which has
    # none, the one at 5 as well, where the host has some
    config = FamilialConfig(text_config=text_config, exits=[1, 3, 4], num_exit_layers=3)
    names = state_names(config)
    with pytest.raises(CutError, match="layers of another kind"):
        plain_tensors(config, 1, names)
    assert plain_tensors(config, 0, names)


def test_shared_keys_and_values_are_refused():
    text_config = tiny_config("llama", 4)
    text_config.num_kv_shared_layers = 2
    config = FamilialConfig(text_config=text_config, exits=[1, 4])
    with pytest.raises(CutError, match="counted from the end"):
        check_cut(config, 0)
    text_config.num_kv_shared_layers, text_config.hidden_size_per_layer_input = 0, 8
    with pytest.raises(CutError, match="one table holds an embedding"):
        check_cut(config, 0)
    check_cut(config, 1)


def test_a_config_that_changes_its_layers_is_refused():
    # gemma4 wants its last layer to attend to everything; the third of this one does not
    text_config = tiny_config("gemma4_unified_text", 4)
    with pytest.raises(CutError, match="gemma4_unified_text` with 3 layers"):
        truncated_config(text_config, 3)
    assert truncated_config(text_config, 2).layer_types == text_config.layer_types[:2]


def test_every_exception_is_a_type_that_is_known():
    for table in (DEPTH_MATTERS, INDEX_MATTERS, TIED_TOO, FILE_NAMES):
        assert set(table) <= VERIFIED


# every type


def refused(config, exit_idx):
    try:
        check_cut(config, exit_idx)
        find_layout(cut_config(config, exit_idx).text_config)
    except CutError:
        return True
    return False


def check_type(model_type, tmp_path):
    """Members from files: logits of the exit, names and config as the host itself writes them."""
    whole = model_type in HOSTS and bool(HOSTS[model_type].whole)
    shapes = [
        ([2, 3, 6], {"num_exit_layers": 1, "exit_head": "own"}),
        ([2, 5, 6], {"num_exit_layers": 2, "exit_norm": "shared"}),
    ]
    refusals = 0
    for i, (exits, fields) in enumerate(shapes):
        fields |= {"num_exit_layers": 0} if whole else {}
        family = tiny_family(model_type, exits, depth=6, **fields)
        folder = tmp_path / f"family{i}"
        family.save_pretrained(folder, by_segment=True)
        for k in range(3):
            if refused(family.config, k):
                refusals += 1
                with pytest.raises(CutError):
                    export_exit(folder, k, tmp_path / "refused")
                continue
            out = tmp_path / f"{i}{k}"
            export_exit(folder, k, out)
            loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
            assert not any(info.values()), info
            right = logits(family, token_ids(), exit_idx=k)
            assert torch.equal(logits(loaded, token_ids()), right), (exits, k)
            if k == 2 or not fields["num_exit_layers"]:
                loaded.save_pretrained(tmp_path / f"again{i}{k}")
                again = read_header(tmp_path / f"again{i}{k}" / "model.safetensors")
                assert read_header(out / "model.safetensors").keys() == again.keys()
            fields_of = json.loads((out / "config.json").read_text())
            assert fields_of["model_type"] == family.config.text_config.model_type
    return refusals


@pytest.mark.parametrize("model_type", FAST)
def test_some_types(model_type, tmp_path):
    assert check_type(model_type, tmp_path) == 0


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(VERIFIED - set(FAST)))
def test_every_type(model_type, tmp_path):
    refusals = check_type(model_type, tmp_path)
    assert (refusals > 0) == (model_type in {*DEPTH_MATTERS, *INDEX_MATTERS, *TIED_TOO, *LAYERWISE})


@pytest.mark.parametrize("model_type", sorted(FILE_NAMES))
def test_the_deepest_member_has_the_names_of_the_hosts_own_files(model_type, tmp_path):
    host = tiny_model(model_type)
    host.save_pretrained(tmp_path / "host")
    family = FamilialForCausalLM.from_backbone(host, exits=[2, 4])
    family.save_pretrained(tmp_path / "family")
    export_exit(tmp_path / "family", -1, tmp_path / "out")
    found, right = (read_header(tmp_path / n / "model.safetensors") for n in ("out", "host"))
    assert found.keys() == right.keys()


def flat_rope(config):
    """Return the rotary settings of a config that has one set for all layers, else `None`."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope if "rope_theta" in rope else None


LONG_ROPE = {"phi3", "phi4_multimodal", "phimoe"}  # these reject other kinds of scaling
WITH_ROPE = [t for t in sorted(VERIFIED - LONG_ROPE) if flat_rope(tiny_config(t)) is not None]


@pytest.mark.parametrize("model_type", WITH_ROPE)
def test_a_member_reloads_with_the_rotary_settings_of_the_backbone(model_type, tmp_path):
    """Fields for Transformers 4 must not change what Transformers 5 reads."""
    config = tiny_config(model_type)
    usual = type(config)().rope_parameters or {}
    theta = usual.get("rope_theta", config.rope_parameters["rope_theta"])
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": theta}
    config.rope_parameters = dict(config.rope_parameters) | scaled
    config.save_pretrained(tmp_path)
    add_old_names(config, tmp_path)
    found = AutoConfig.from_pretrained(tmp_path)
    assert flat_rope(found) == config.rope_parameters

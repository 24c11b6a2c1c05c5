"""An export in another dtype is what the host's own loading in it, then saving, would write."""

import itertools

import pytest
import torch
from backbones import tiny_model
from reference import tiny_family
from safetensors.torch import load_file
from support import assert_same_tensors
from transformers import AutoModelForCausalLM

from hf_familial import FamilialForCausalLM
from hf_familial.errors import CheckpointError, CutError
from hf_familial.hub import export_exit
from hf_familial.models.backbone_verification import VERIFIED


# hosts that keep something in float32 in one dtype, in both, by pattern or by a module's own choice
KEEPERS = (
    "glm4_moe", "gpt_oss", "bailing_hybrid", "afmoe", "nemotron_h", "flint", "ernie4_5_moe",
    "inkling_text", "hunyuan_v1_moe", "lfm2_moe",
)  # fmt: skip
HALVES = (torch.bfloat16, torch.float16)


def tensors_in(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def check_type(model_type, exits, tmp_path):
    """Exports from files and from memory, and families loaded in that dtype, against the host."""
    family = tiny_family(model_type, [2, 4])
    family.save_pretrained(tmp_path / "family")
    for k, dtype in itertools.product(exits, HALVES):
        place = tmp_path / f"{k}-{dtype}"
        try:
            export_exit(family, k, place / "wide")
        except CutError:
            continue
        host = AutoModelForCausalLM.from_pretrained(place / "wide", dtype=dtype)
        host.save_pretrained(place / "right")
        right = tensors_in(place / "right")
        for source in (family, tmp_path / "family"):
            report = export_exit(source, k, place / type(source).__name__, dtype=dtype)
            assert report.dtype == str(dtype).removeprefix("torch.")
            assert_same_tensors(tensors_in(report.path), right)
        loaded = FamilialForCausalLM.from_pretrained(tmp_path / "family", dtype=dtype)
        export_exit(loaded, k, place / "loaded")
        assert_same_tensors(tensors_in(place / "loaded"), right)
        for source in (family, tmp_path / "family"):
            options = {"dtype": dtype, "format": "familial"}
            report = export_exit(source, k, place / f"cut-{type(source).__name__}", **options)
            export_exit(report.path, -1, place / f"of-{report.path.name}")
            assert_same_tensors(tensors_in(place / f"of-{report.path.name}"), right)


@pytest.mark.parametrize("model_type", ["llama", *KEEPERS])
def test_an_export_in_half_precision_is_what_the_host_loads_and_saves(model_type, tmp_path):
    check_type(model_type, [0], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(VERIFIED))
def test_every_type_in_half_precision(model_type, tmp_path):
    check_type(model_type, [0, 1], tmp_path)


@pytest.mark.parametrize("model_type", ["glm4_moe", "gpt_oss", "hunyuan_v1_moe"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_warm_start_keeps_what_the_host_keeps(model_type, dtype, tmp_path):
    tiny_model(model_type).save_pretrained(tmp_path / "host")
    host = AutoModelForCausalLM.from_pretrained(tmp_path / "host", dtype=dtype)
    host.save_pretrained(tmp_path / "right")
    family = FamilialForCausalLM.from_backbone(tmp_path / "host", exits=[2, 4], dtype=dtype)
    export_exit(family, -1, tmp_path / "memory")
    family.save_pretrained(tmp_path / "family")
    export_exit(tmp_path / "family", -1, tmp_path / "files")
    for source in ("memory", "files"):
        assert_same_tensors(tensors_in(tmp_path / source), tensors_in(tmp_path / "right"))


def test_a_family_keeps_in_each_exit_what_the_host_keeps_in_its_norm(tmp_path):
    family = tiny_family("gpt_oss", [2, 4], num_exit_layers=1)
    family.save_pretrained(tmp_path / "family")
    loaded = FamilialForCausalLM.from_pretrained(tmp_path / "family", dtype=torch.float16)
    kept = {n for n, tensor in loaded.state_dict().items() if tensor.dtype == torch.float32}
    assert {"model.backbone.norm.weight", "model.exits.0.norm.weight"} <= kept
    assert "model.exits.0.layers.0.input_layernorm.weight" in kept
    assert "lm_head.weight" not in kept


@pytest.mark.parametrize("source", ["files", "memory"])
def test_values_too_large_for_the_dtype_are_refused(source, tmp_path):
    family = tiny_family("llama", [2, 4])
    with torch.no_grad():
        family.lm_head.weight[3, 4] = 1e6
    family.save_pretrained(tmp_path / "family")
    model = family if source == "memory" else tmp_path / "family"
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*too large"):
        export_exit(model, 0, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    export_exit(model, 0, tmp_path / "out", dtype="bfloat16")

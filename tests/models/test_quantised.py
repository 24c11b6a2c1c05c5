"""A quantised host as a family: saved and loaded as the host is, and no source of plain members."""

import json

import pytest
import torch
from backbones import tiny_model
from quantised import Int8Linear, quantised, replace
from reference import logits, stir, tiny_family, token_ids
from torch import nn
from transformers import AutoModelForCausalLM

from hf_familial import FamilialForCausalLM, push_exits_to_hub, push_family_to_hub
from hf_familial.errors import CheckpointError, CutError
from hf_familial.hub import export_exit, export_family


EXITS = [1, 2, 4]
SHAPES = [
    {},
    {"exit_head": "own", "num_exit_layers": 1},
]


@pytest.mark.parametrize("source", ["memory", "folder"])
@pytest.mark.parametrize("fields", SHAPES, ids=["shared", "own"])
@pytest.mark.parametrize("skipped", [None, ["lm_head", "model.layers.1.mlp.up_proj"]])
@pytest.mark.parametrize("by_segment", [None, True])
def test_a_family_of_a_quantised_host_is_saved_as_the_host_is(
    source, fields, skipped, by_segment, tmp_path
):
    host = quantised(tiny_model("llama"), skipped)
    right = logits(host, token_ids())
    host.save_pretrained(tmp_path / "host")
    backbone = host if source == "memory" else tmp_path / "host"
    family = stir(FamilialForCausalLM.from_backbone(backbone, exits=EXITS, **fields))
    assert torch.equal(logits(family, token_ids()), right)
    assert family.is_quantized
    assert family.hf_quantizer.is_serializable()
    family.save_pretrained(tmp_path / "family", by_segment=by_segment)
    names = sorted(path.name for path in (tmp_path / "family").glob("*.safetensors"))
    assert names == ["model.safetensors"]
    loaded = FamilialForCausalLM.from_pretrained(tmp_path / "family")
    assert loaded.is_quantized
    assert isinstance(loaded.model.backbone.layers[1].mlp.down_proj, Int8Linear)
    kept = type(loaded.model.backbone.layers[1].mlp.up_proj)
    assert kept is (Int8Linear if skipped is None else nn.Linear)
    for k in range(3):
        expected = logits(family, token_ids(), exit_idx=k)
        assert torch.equal(logits(loaded, token_ids(), exit_idx=k), expected)


@pytest.mark.parametrize("form", ["plain", "familial"])
def test_exports_of_a_quantised_family_are_refused_in_one_way(form, tmp_path):
    family = FamilialForCausalLM.from_backbone(quantised(tiny_model("llama")), exits=EXITS)
    family.save_pretrained(tmp_path / "family")
    path = tmp_path / "family" / "config.json"
    fields = json.loads(path.read_text())
    assert fields["quantization_config"]
    assert fields["text_config"]["quantization_config"]
    for source in (family, tmp_path / "family"):
        with pytest.raises(CheckpointError, match="is quantised, so its tensors cannot be copied"):
            export_exit(source, 0, tmp_path / "out", format=form)
        with pytest.raises(CheckpointError, match="is quantised"):
            export_family(source, tmp_path / "out", format=form)
        for push in (push_exits_to_hub, push_family_to_hub):
            # there is no server here to be asked
            with pytest.raises(CheckpointError, match="is quantised"):
                push(source, "me/family")
    # as a family says it that was made of a quantised decoder
    del fields["quantization_config"]
    path.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="is quantised"):
        export_exit(tmp_path / "family", 0, tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()


def test_a_family_that_is_dequantised_is_one_like_any_other(tmp_path):
    host = quantised(tiny_model("llama"))
    right = logits(host, token_ids())
    family = FamilialForCausalLM.from_backbone(host, exits=EXITS)
    family.dequantize()
    family.save_pretrained(tmp_path / "family")
    export_exit(tmp_path / "family", -1, tmp_path / "out")
    for cls, folder in ((FamilialForCausalLM, "family"), (AutoModelForCausalLM, "out")):
        loaded = cls.from_pretrained(tmp_path / folder)
        assert not hasattr(loaded, "hf_quantizer")
        assert torch.equal(logits(loaded, token_ids()), right)


def test_a_host_whose_quantiser_was_taken_off_is_one_like_any_other(tmp_path):
    host = tiny_model("llama")
    host.hf_quantizer, host.is_quantized, host.quantization_method = None, True, "gguf"
    family = FamilialForCausalLM.from_backbone(host, exits=EXITS)
    assert not getattr(family, "is_quantized", False)  # a trainer would refuse it
    report = export_exit(family, 0, tmp_path / "out")
    member = AutoModelForCausalLM.from_pretrained(report.path)
    assert torch.equal(logits(member, token_ids()), logits(family, token_ids(), exit_idx=0))


def test_a_quantiser_that_cannot_save_cannot_save_a_family(tmp_path, monkeypatch):
    family = FamilialForCausalLM.from_backbone(quantised(tiny_model("llama")), exits=EXITS)
    monkeypatch.setattr(type(family.hf_quantizer), "is_serializable", lambda self: False)
    with pytest.raises(ValueError, match="not serializable"):
        family.save_pretrained(tmp_path, by_segment=True)


def test_a_shallow_part_of_a_quantised_family_is_exact(tmp_path):
    family = FamilialForCausalLM.from_backbone(quantised(tiny_model("llama")), exits=EXITS)
    family.save_pretrained(tmp_path / "family")
    part = FamilialForCausalLM.from_pretrained(tmp_path / "family", max_exit=1)
    assert isinstance(part.model.backbone.layers[1].mlp.down_proj, Int8Linear)
    assert torch.equal(logits(part, token_ids()), logits(family, token_ids(), exit_idx=1))


def test_a_part_is_refused_where_a_quantisers_own_metadata_is_needed(tmp_path):
    from safetensors.torch import load_file, save_file

    family = FamilialForCausalLM.from_backbone(quantised(tiny_model("llama")), exits=EXITS)
    family.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "lm_head.weight": "{}"})
    with pytest.raises(CutError, match="without `max_exit`"):
        FamilialForCausalLM.from_pretrained(tmp_path, max_exit=0)


# quantised in place, by a program that transformers does not know


class Packed(torch.Tensor):
    """A weight of a class of its own: it can be multiplied with and moved, and nothing else."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is nn.functional.linear:
                plain = (a.as_subclass(torch.Tensor) if type(a) is cls else a for a in args)
                return func(*plain, **(kwargs or {}))
            if func in (torch.Tensor.to, torch.Tensor.float, torch.Tensor.__getitem__):
                raise NotImplementedError(func)
            result = func(*args, **(kwargs or {}))
            return result.as_subclass(cls) if func is torch.Tensor.detach else result


def packed_head(family):
    weight = family.lm_head.weight.detach().clone().as_subclass(Packed)
    family.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    assert type(family.lm_head.weight) is Packed
    return family


def test_the_loss_of_a_quantised_head_needs_no_logits_of_the_caller():
    family, ids = tiny_family("llama", EXITS), token_ids()
    right = family(ids, labels=ids)
    found = packed_head(family)(ids, labels=ids, skip_logits=True)
    assert found.logits is None
    assert torch.allclose(found.loss, right.loss, atol=1e-6)
    assert torch.allclose(found.exit_losses, right.exit_losses, atol=1e-6)


@pytest.mark.parametrize("how", ["tensors", "modules"])
def test_a_family_quantised_in_place_is_refused(how, tmp_path):
    family = tiny_family("llama", EXITS)
    if how == "tensors":
        packed_head(family)
    else:
        replace(family, [])
    with pytest.raises(ValueError, match="quantised"):
        export_exit(family, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# the programs themselves, where they are installed


def config_of(program):
    import transformers

    pytest.importorskip(program)
    if program == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(
            Int8WeightOnlyConfig(version=2), include_input_output_embeddings=True
        )
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.parametrize("program", ["torchao", "bitsandbytes"])
@pytest.mark.parametrize("source", ["memory", "folder"])
def test_foreign_quantisers(program, source, tmp_path):
    options = {"quantization_config": config_of(program), "device_map": "cpu"}
    tiny_model("llama").save_pretrained(tmp_path / "host")
    host = AutoModelForCausalLM.from_pretrained(tmp_path / "host", **options)
    ids, right = token_ids(), logits(host, token_ids())
    if source == "memory":
        family = FamilialForCausalLM.from_backbone(host, exits=EXITS)
    else:
        family = FamilialForCausalLM.from_backbone(tmp_path / "host", exits=EXITS, **options)
    assert torch.equal(logits(family, ids), right)
    whole = family(ids, labels=ids, output_exits=True)
    lean = family(ids, labels=ids, skip_logits=True)
    assert torch.allclose(lean.loss, whole.loss, atol=1e-5)
    family.save_pretrained(tmp_path / "family", by_segment=True)
    loaded = FamilialForCausalLM.from_pretrained(tmp_path / "family")
    assert torch.equal(logits(loaded, ids, exit_idx=0), logits(family, ids, exit_idx=0))
    for model in (family, tmp_path / "family"):
        with pytest.raises(CheckpointError, match="is quantised"):
            export_exit(model, 0, tmp_path / "out")

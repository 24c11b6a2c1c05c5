"""A relay runs on a family whose weights are offloaded, as `generate` does."""

import pytest
import torch
from reference import tiny_family

import hf_familial as hff
from hf_familial.handoff import DeviceSide, server_side


accelerate = pytest.importorskip("accelerate")

IDS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")
RELAYS = {
    "speculative": hff.SpeculativeRelay(draft_exit=0, draft_length=2),
    "default": None,
    "confidence": hff.ConfidenceRelay(0.05),
    "one exit": hff.FixedExit(0),
}


def to_memory(family, folder):
    accelerate.cpu_offload(family, execution_device=CPU)
    return family


def to_disk(family, folder):
    accelerate.disk_offload(family, folder / "offload", execution_device=CPU)
    return family


def by_map(first_on_disk):
    def load(family, folder):
        family.save_pretrained(folder / "family")
        places = {name: "cpu" for name, _ in family.named_modules() if name.count(".") == 1}
        del places["model.backbone"]
        for name, _ in family.model.backbone.named_children():
            if name != "layers":
                places[f"model.backbone.{name}"] = "cpu"
        for i in range(len(family.model.backbone.layers)):
            on_disk = i < 2 if first_on_disk else i >= 2
            places[f"model.backbone.layers.{i}"] = "disk" if on_disk else "cpu"
        places |= {"lm_head": "cpu", "exit_heads": "cpu"}
        places["model.exits"] = places["model.backbone.norm"] = "disk"
        if first_on_disk and not family.config.tie_word_embeddings:
            places["model.backbone.embed_tokens"] = places["lm_head"] = "disk"
        return hff.FamilialForCausalLM.from_pretrained(
            folder / "family", device_map=places, offload_folder=folder / "offload"
        ).eval()

    return load


def texts(model, relays=RELAYS):
    asked = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    found = {name: model.relay_generate(IDS, relay=r, **asked) for name, r in relays.items()}
    return found | {
        "fused": model.relay_generate(IDS, relay=hff.FixedExit(-1), fused_weights=True, **asked)
    }


@pytest.mark.parametrize("offload", [to_memory, to_disk, by_map(False), by_map(True)])
@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {}),
        ("qwen3", {"num_exit_layers": 1}),
        ("gemma3_text", {"exit_norm": "shared"}),
        ("mixtral", {"exit_head": "own"}),
        ("gpt2", {}),
    ],
)
def test_a_relay_writes_what_it_writes_in_memory(model_type, fields, offload, tmp_path):
    if offload not in (to_memory, to_disk) and model_type == "gpt2":
        pytest.skip("its layers have another name")
    family = tiny_family(model_type, [1, 2, 4], **fields)
    right = texts(family)
    offloaded = offload(family, tmp_path)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    found = texts(offloaded)
    assert all(torch.equal(found[name], right[name]) for name in right)
    assert any(
        parameter.is_meta for parameter in offloaded.parameters()
    )  # none was loaded for good


def test_a_hand_over_of_an_offloaded_family_is_refused_in_plain_words():
    family = to_memory(tiny_family("llama", [2, 4]), None)
    with pytest.raises(ValueError, match="it is offloaded"):
        server_side(family, 0)
    with pytest.raises(ValueError, match="it is offloaded"):
        DeviceSide(family, 2)

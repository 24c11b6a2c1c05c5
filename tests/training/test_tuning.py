"""Adapters of peft on families: they save, load, merge and export, and name the right base."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import tiny_model
from datasets import Dataset
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
from reference import stir, token_ids
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_familial import FamilialForCausalLM, FamilialTrainer, export_exit
from hf_familial.errors import CutError
from hf_familial.hub._source import origin_of
from hf_familial.hub.push import _base_of
from hf_familial.training.tuning import lora_targets


EXITS = [1, 3, 4]
IDS = token_ids()

Made = Callable[[], FamilialForCausalLM]


@pytest.fixture
def host(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "host")
    return tmp_path / "host"


@pytest.fixture(params=["saved", "never-saved"])
def made(request: pytest.FixtureRequest, host: Path) -> Made:
    """The same family each time, from its own folder or from its decoder's."""

    def anew() -> FamilialForCausalLM:
        return FamilialForCausalLM.from_backbone(
            host, exits=EXITS, num_exit_layers=1, exit_head="own"
        )

    if request.param == "never-saved":
        return anew
    folder = host.parent / "family"
    stir(anew()).save_pretrained(folder)
    return lambda: FamilialForCausalLM.from_pretrained(folder)


def trained(family: FamilialForCausalLM, **choices: Any) -> Any:
    """The family with updates that are not zero."""
    defaults: dict[str, Any] = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(family, LoraConfig(**(defaults | choices)))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def every_logits(model: Any) -> torch.Tensor:
    return torch.stack(model.eval()(IDS, output_exits=True).exit_logits)


def test_a_family_made_of_a_decoder_has_no_name_of_its_own(host: Path) -> None:
    """It is no checkpoint yet: the decoder's name is the decoder's."""
    family = FamilialForCausalLM.from_backbone(host, exits=EXITS)
    assert family.name_or_path == family.config.name_or_path == ""
    assert family.config.text_config.name_or_path == str(host)
    # what comes along with an export, and the base of a card, are still found
    assert origin_of(family) == host
    family.config.text_config.name_or_path = "some/decoder"
    assert _base_of(family) == "some/decoder"


CHOICES: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "all-linear": {"target_modules": "all-linear"},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "exits": {"modules_to_save": ["model.exits.0.norm", "model.exits.1.layers.0", "exit_heads.1"]},
}


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_adapters_of_a_family_round_trip_and_merge(
    tmp_path: Path, made: Made, choices: dict[str, Any]
) -> None:
    """What is saved gives the same logits of every exit when loaded, and when merged."""
    model = trained(made(), **choices)
    right, folder = every_logits(model), tmp_path / "adapter"
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(made(), folder)
    assert torch.equal(every_logits(loaded), right)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = FamilialForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(every_logits(again), right, rtol=1e-4, atol=1e-4)


def test_an_adapter_names_the_family_that_it_was_made_for(tmp_path: Path, made: Made) -> None:
    """A saved family is loaded with it; a family never saved is not taken for its decoder."""
    family = made()
    model = trained(family)
    model.save_pretrained(tmp_path / "adapter")
    name = PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path
    assert name == (family.name_or_path or None)
    if name is not None:
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert torch.equal(every_logits(loaded), every_logits(model))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert torch.equal(every_logits(loaded), every_logits(model))


def test_adapters_of_transformers_round_trip(tmp_path: Path, made: Made) -> None:
    """`add_adapter`, `save_pretrained` and `load_adapter` of the host."""
    family = made()
    family.add_adapter(LoraConfig(target_modules=["q_proj"]))
    for name, parameter in family.named_parameters():
        parameter.data += 0.1 if "lora_B" in name else 0
    family.save_pretrained(tmp_path / "adapter")
    loaded = made()
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(every_logits(loaded), every_logits(family))
    with pytest.raises(ValueError, match=r"added with .*default.*save_pretrained\(folder\)"):
        export_exit(family, 0, tmp_path / "member")
    assert not (tmp_path / "member").exists()


def test_a_training_of_adapters_saves_its_checkpoints(
    tmp_path: Path, made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    """Checkpoints are written and resumed; a base without a name is said before the training."""
    names = ["model.exits.0.norm", "exit_heads.0"]

    rows = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": IDS.tolist()})

    def trainer(steps: int) -> FamilialTrainer:
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=names)
        return FamilialTrainer(
            get_peft_model(made(), config),
            TrainingArguments(
                str(tmp_path / "run"),
                max_steps=steps,
                save_steps=1,
                learning_rate=0.05,
                disable_tqdm=True,
                report_to="none",
                use_cpu=True,
            ),
            train_dataset=rows,
        )

    with caplog.at_level(logging.WARNING):
        first = trainer(2)
    assert ("do not name the base" in caplog.text) == (not first.model.name_or_path)
    first.train()
    second = trainer(3)
    second.train(resume_from_checkpoint=True)
    loaded = PeftModel.from_pretrained(made(), tmp_path / "run" / "checkpoint-3")
    assert torch.equal(every_logits(loaded), every_logits(second.model))


@pytest.mark.parametrize("choices", [{}, {"use_dora": True}, CHOICES["exits"]], ids=repr)
def test_members_of_an_adapted_family_are_exported_merged(
    tmp_path: Path, made: Made, choices: dict[str, Any]
) -> None:
    """Updates are merged into a copy: the model that is trained stays as it was."""
    model = trained(made(), **choices)
    right = every_logits(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for exit_idx in range(len(EXITS)):
        out = tmp_path / str(exit_idx)
        export_exit(model, exit_idx, out)
        with torch.no_grad():
            found = AutoModelForCausalLM.from_pretrained(out).eval()(IDS).logits
        torch.testing.assert_close(found, right[exit_idx], rtol=1e-4, atol=1e-4)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_an_adapter_that_cannot_be_merged_is_not_exported(tmp_path: Path, made: Made) -> None:
    """Virtual tokens are no part of a member's weights."""
    model = get_peft_model(made(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PROMPT_TUNING cannot be merged"):
        export_exit(model, 0, tmp_path / "member")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi", "gemma2"])
def test_default_targets_are_those_of_the_decoder(model_type: str) -> None:
    """The modules that peft adapts in the decoder alone are adapted in the family's backbone."""
    host = get_peft_model(tiny_model(model_type), LoraConfig())
    family = FamilialForCausalLM.from_backbone(tiny_model(model_type), exits=[2, 4])
    model = get_peft_model(family, LoraConfig(target_modules=lora_targets(family)))
    prefix = host.get_base_model().base_model_prefix
    right = {name.replace(prefix, "model.backbone", 1) for name in host.targeted_module_names}
    assert set(model.targeted_module_names) == right
    assert lora_targets(family) == DEFAULTS[model_type]


def test_a_decoder_without_default_targets_names_its_modules() -> None:
    family = FamilialForCausalLM.from_backbone(tiny_model("nemotron"), exits=[2, 4])
    with pytest.raises(ValueError, match=r"`nemotron`. Choose .* down_proj, k_proj, o_proj"):
        lora_targets(family)


def test_an_adapter_beside_the_weights_is_not_left_out_in_silence(
    tmp_path: Path, made: Made
) -> None:
    """`from_pretrained` adds it to the whole family; a part, or a member, would lack it."""
    family = made()
    family.save_pretrained(tmp_path / "family")
    trained(family).save_pretrained(tmp_path / "family")
    with pytest.raises(CutError, match="contains an adapter, which would be ignored"):
        FamilialForCausalLM.from_pretrained(tmp_path / "family", max_exit=0)
    with pytest.raises(CutError, match="contains an adapter, which would be ignored"):
        export_exit(tmp_path / "family", 0, tmp_path / "member")
    assert not (tmp_path / "member").exists()

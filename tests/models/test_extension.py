"""The seam: code that came with a checkpoint, and what the installed package adds to it."""

import ast
import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from reference import tiny_family, token_ids
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import hf_familial as hff
from hf_familial import extension as packaged
from hf_familial.models import is_family, is_family_config
from hf_familial.models.familial import configuration_familial
from hf_familial.models.familial.configuration_familial import Accelerator, Extension, extension


ROOM = Path(configuration_familial.__file__).parent
FIELDS = {"model_type": "llama", "num_exit_layers": 1, "exit_head": "own"}


@pytest.fixture(scope="module")
def family():
    return tiny_family(FIELDS["model_type"], [1, 3, 4], num_exit_layers=1, exit_head="own")


@pytest.fixture(scope="module")
def copied(family, tmp_path_factory):
    """The same family of the classes that came with its checkpoint."""
    folder = tmp_path_factory.mktemp("family")
    family.save_pretrained(folder)
    cls = get_class_from_dynamic_module("modeling_familial.FamilialForCausalLM", str(folder))
    model = cls.from_pretrained(folder).eval()
    assert not isinstance(model, hff.FamilialForCausalLM)
    assert not isinstance(model.config, hff.FamilialConfig)
    return model


def greedy(model, relay):
    limits = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.relay_generate(token_ids(1, 8), relay=relay, **limits)


def test_a_family_is_recognised_by_what_it_is(family, copied):
    for model in (family, copied):
        assert is_family(model)
        assert is_family_config(model.config)
        assert not is_family(model.model)
        assert not is_family(model.config)
    assert not is_family(torch.nn.DataParallel(family))
    assert not is_family(family.model.backbone)
    assert not is_family_config(family.config.text_config)
    assert not is_family_config(None)


@pytest.mark.parametrize(
    "relay",
    [
        hff.SpeculativeRelay(draft_exit=0),
        hff.SpeculativeRelay(draft_exit=(0, 1), draft_length=2),
        hff.ConfidenceRelay(threshold={0: 0.01, 1: 0.02}),
        hff.HandoffRelay(after=3),
        hff.FixedExit(1),
    ],
    ids=lambda relay: type(relay).__name__,
)
def test_a_copy_takes_the_policies_of_the_package(relay, family, copied):
    assert torch.equal(greedy(copied, relay), greedy(family, relay))


@pytest.mark.parametrize(
    "relay", [object(), hff.SpeculativeRelay, "auto"], ids=["object", "class", "text"]
)
def test_what_is_no_policy_is_refused(relay, copied):
    with pytest.raises(ValueError, match="`relay` must be an instance of `SpeculativeRelay`"):
        greedy(copied, relay)


def test_the_package_evaluates_calibrates_describes_and_exports_a_copy(family, copied, tmp_path):
    rows = [{"input_ids": row} for row in token_ids(4, 16).tolist()]
    assert hff.evaluate_exits(copied, rows).to_dict() == hff.evaluate_exits(family, rows).to_dict()
    found, right = (hff.calibrate(model, rows, target=0.9) for model in (copied, family))
    assert found.relay == right.relay
    found, right = hff.describe(copied), hff.describe(family)
    assert found.exits == right.exits
    hff.export_exit(copied, 0, tmp_path / "member")
    hff.export_exit(family, 0, tmp_path / "right")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "member" / name).read_bytes() == (tmp_path / "right" / name).read_bytes()


def test_the_package_answers_the_words_it_knows(copied):
    seam = sys.modules[type(copied.config).__module__]
    assert type(seam.extension()) is packaged.PackageExtension
    assert isinstance(extension(), Extension)
    assert packaged.offer(configuration_familial.SEAM + 1) is None


def test_another_version_of_the_package_is_not_used(copied, monkeypatch, caplog):
    seam = sys.modules[type(copied.config).__module__]
    monkeypatch.setattr(seam, "SEAM", seam.SEAM + 1)
    monkeypatch.setattr(seam.logger, "propagate", True, raising=False)
    assert type(seam.extension()) is seam.Extension
    monkeypatch.setitem(sys.modules, "hf_familial.extension", None)  # from before the seam
    monkeypatch.setattr(seam, "SEAM", 1)
    assert type(seam.extension()) is seam.Extension


def test_an_accelerator_is_not_copied(tmp_path):
    family = tiny_family("llama", [1, 4])
    accelerator = family.accelerator
    assert accelerator is family.accelerator
    for twin in (
        copy.deepcopy(family),
        copy.copy(family),
        pickle.loads(pickle.dumps(family)),
    ):
        assert twin._accelerator is None
        assert twin.training == family.training
    assert family.accelerator is accelerator
    family.save_pretrained(tmp_path)
    with torch.device("meta"):
        assert hff.FamilialForCausalLM(family.config)._accelerator is None


def test_without_the_package_nothing_is_faster():
    plain, thing = Extension(), object()
    accelerator = plain.accelerator(None)
    assert type(accelerator) is Accelerator
    assert accelerator.prepare(None, None) is None
    assert accelerator.flops(None, 1, 1) == (None, None)
    for method in (accelerator.cache, accelerator.decoder):
        assert method(thing) is thing
    for call in (
        lambda: plain.warm_start(None, "gpt2", {}),
        lambda: plain.load_cut(None, "gpt2", 0),
        lambda: plain.save(None, None, "folder", by_segment=True),
    ):
        with pytest.raises(ImportError, match="needs the package `hf_familial`"):
            call()


def test_code_of_an_older_version_goes_and_other_files_stay(tmp_path):
    family = tiny_family("llama", [1, 4])
    family.save_pretrained(tmp_path)
    (tmp_path / "handler.py").write_text("mine = True")
    (tmp_path / "older.py").write_text("from .oldest import x")
    (tmp_path / "oldest.py").write_text("x = 1")
    entry = tmp_path / "modeling_familial.py"
    entry.write_text(entry.read_text() + "from .older import x\n")
    family.save_pretrained(tmp_path)
    found = {path.name for path in tmp_path.glob("*.py")}
    assert found == {path.name for path in ROOM.glob("*.py")} - {"__init__.py"} | {"handler.py"}


def test_one_string_names_the_package():
    named = []
    for path in ROOM.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {
            node.body[0].value
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and isinstance(node.body[0], ast.Expr)
        }
        named += [
            (path.name, node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and node not in documentation
            if isinstance(node.value, str) and "hf_familial" in node.value
        ]
    if ROOM.joinpath("__init__.py").exists():
        named = [found for found in named if found[0] != "__init__.py"]
    assert named == [("configuration_familial.py", "hf_familial")]

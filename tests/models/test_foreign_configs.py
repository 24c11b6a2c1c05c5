"""Configs that somebody else made, and hosts of other versions."""

import builtins
import importlib
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from transformers import LlamaConfig

from hf_familial import FamilialConfig
from hf_familial.models.familial import configuration_familial
from hf_familial.models.familial.configuration_familial import AutoMap, check_transformers


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"num_exit_layers": 1_000_000}, "num_exit_layers"),
        ({"num_exit_layers": 5}, "num_exit_layers"),
        ({"text_config": {"model_type": "qwen2", "num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"text_config": {"model_type": "gpt2", "n_layer": 10**9}}, "n_layer"),
        ({"text_config": LlamaConfig(num_hidden_layers=10**9), "exits": [10**9]}, "layers or less"),
        (
            {
                "text_config": {"model_type": "llama", "num_hidden_layers": 1000},
                "exits": list(range(1, 1001)),
                "num_exit_layers": 1000,
            },
            "layers or less",
        ),
    ],
)
def test_numbers_of_layers_that_nothing_can_build_are_refused_at_once(fields, name):
    backbone = {"text_config": {"model_type": "llama", "num_hidden_layers": 4}}
    start = time.process_time()
    with pytest.raises(ValueError, match=name):
        FamilialConfig.from_dict({"model_type": "familial"} | backbone | fields)
    assert time.process_time() - start < 5  # of minutes, or of no end


def test_as_many_private_layers_as_the_backbone_has_are_enough():
    config = FamilialConfig(text_config=LlamaConfig(num_hidden_layers=4), num_exit_layers=4)
    assert config.num_exit_layers == 4


def test_an_older_transformers_is_told_what_the_model_needs(monkeypatch):
    check_transformers()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.19.0")
    with pytest.raises(ImportError, match=r"transformers>=5\.23.*5\.19\.0(.|\n)*pip install"):
        check_transformers()
    named = AutoMap(configuration_familial.AUTO_MAP)
    assert named["AutoConfig"] == "configuration_familial.FamilialConfig"
    assert "AutoModelForCausalLM" in named
    for name in ("AutoModel", "AutoModelForCausalLM"):
        with pytest.raises(ImportError, match=r"transformers>=5\.23"):
            named[name]


def test_the_config_needs_no_name_that_older_versions_lack(monkeypatch):
    """As remote code, in a process whose transformers has no `SubConfigSpec`."""
    real = builtins.__import__

    def old(name, globals=None, locals=None, fromlist=(), level=0):  # noqa: A002
        caller = (globals or {}).get("__name__")
        if caller == "old.configuration_familial" and "SubConfigSpec" in (fromlist or ()):
            raise ImportError("cannot import name 'SubConfigSpec'")
        return real(name, globals, locals, fromlist, level)

    package = ModuleType("old")
    package.__path__ = [str(Path(configuration_familial.__file__).parent)]
    monkeypatch.setitem(sys.modules, "old", package)
    monkeypatch.setattr(builtins, "__import__", old)
    module = importlib.import_module("old.configuration_familial")
    assert module.SubConfigSpec is None
    config = module.FamilialConfig(text_config={"model_type": "qwen2", "num_hidden_layers": 8})
    assert config.exits == [2, 4, 6, 8]
    assert module.FamilialConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert module.FamilialConfig().text_config.model_type == "llama"
    assert FamilialConfig.from_dict(config.to_dict()).exits == config.exits

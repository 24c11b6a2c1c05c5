"""What `hf_familial` shows is what it promises."""

import importlib

import pytest

import hf_familial


PUBLIC = (
    "BackboneReport",
    "FamilialCausalLMOutput",
    "FamilialConfig",
    "FamilialForCausalLM",
    "FamilialModel",
    "FamilialModelOutput",
    "FamilialPreTrainedModel",
    "evenly_spaced_exits",
    "verify_backbone",
)


@pytest.mark.parametrize("module", ["hf_familial", "hf_familial.models.familial"])
def test_every_promised_name_is_there(module):
    loaded = importlib.import_module(module)
    assert len(set(loaded.__all__)) == len(loaded.__all__)
    for name in loaded.__all__:
        assert getattr(loaded, name) is not None, name


def test_a_star_import_gives_the_promised_names():
    namespace = {}
    exec("from hf_familial import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(hf_familial.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_stay_and_are_documented(name):
    assert name in hf_familial.__all__
    assert getattr(hf_familial, name).__doc__.strip()


def test_every_promised_name_is_listed():
    assert set(hf_familial.__all__) <= set(dir(hf_familial))


def test_no_such_name():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hf_familial.no_such_name
